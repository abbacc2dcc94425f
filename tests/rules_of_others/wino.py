"""WINO (arXiv 2507.18578): wide in, narrow out, verified by rows beside the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import fdpp
from fdpp.rules import MostConfident, Needs, Proposed, Rows, Sight, number
from fdpp.selection import Selection

FIRST = 30
"""Commits assumed of the step before a block's first, as published."""


class Verified(NamedTuple):
    """What the rule remembers.

    Attributes:
        verdict: `[b, D, T]`, the probability of a position's token, given all columns but its own.
        states: `[b, D, T]` int64, the tokens.
        commits: `[b, D]` int64, how many positions the step before committed.
    """

    verdict: Tensor
    states: Tensor
    commits: Tensor


@dataclass(frozen=True)
class Wino(MostConfident, fdpp.Rule):
    """Commit all with c > threshold, at most `cap` of them, and take back tokens whose verdict is below `back`.

    cap = min(max(floor(0.7 masks), 5), 20). A step that commits only one takes none back. A step takes back fewer than
    the step before it committed. So a block of T positions ends within T forwards.
    """

    threshold: float = number(0.6, "[0, 1]", "confidence, 0 to 1; less is faster", option="tau", line=True)
    back: float = number(0.9, "[0, 1]", "verdict below which a token is taken back", line=True)
    needs: ClassVar = Needs(logits=True, rows=True)
    revokes: ClassVar = True
    name: ClassVar = "wino"
    title: ClassVar = "WINO"
    about: ClassVar = "many, of which some are taken back"

    def rows(self, block: Tensor, length: int) -> Rows:
        every = torch.arange(length + block.shape[0], device=block.device)
        return Rows(columns=block, sees=every != block[:, None])

    def observe(self, sight: Sight, before: tuple[Tensor, Verified] | None) -> Verified:
        assert sight.rows is not None
        verdict = sight.rows.double().softmax(-1).gather(-1, sight.states[..., None])[..., 0]
        if before is None:
            commits = torch.full_like(sight.states[:, :, 0], FIRST)
        else:
            commits = ((before[1].states == sight.mask_id) & (sight.states != sight.mask_id)).sum(2)
        return Verified(verdict, sight.states, commits)

    def decide(self, proposed: Proposed) -> Selection:
        step, candidate, memory = proposed.step, proposed.candidate, proposed.memory
        if memory is None:
            return step
        masks = candidate.sum(1, keepdim=True)
        cap = (masks * 7 // 10).clamp(5, 20)
        c = step.confidence.masked_fill(~candidate, -1.0)
        rank = c.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        sure = candidate & (c > self.threshold)
        committed = candidate & torch.where(sure.any(1, keepdim=True), sure & (rank < cap), rank == 0)
        bound = memory.commits[:, None] - 1
        verdict = torch.where(~candidate & (memory.verdict < self.back), memory.verdict, 2.0)
        order = verdict.argsort(dim=1, stable=True).argsort(dim=1)
        taken = (verdict < 2.0) & (order < bound) & (committed.sum(1, keepdim=True) > 1)
        return taken_back(proposed, committed, taken)

    def reference(self, proposed: Proposed) -> Selection:
        step, candidate, memory = proposed.step, proposed.candidate, proposed.memory
        if memory is None:
            return step
        committed, taken = torch.zeros_like(candidate), torch.zeros_like(candidate)
        for b, row in enumerate(step.confidence.tolist()):
            masked = candidate[b].nonzero().flatten().tolist()
            ranked = sorted(masked, key=lambda t: (-row[t], t))
            sure = [t for t in ranked if row[t] > self.threshold]
            chosen = (sure or ranked[:1])[: min(max(int(0.7 * len(masked) + 1e-9), 5), 20)]
            committed[b, chosen] = True
            if len(chosen) > 1:
                verdict = memory.verdict[b].tolist()
                doubted = [t for t in range(len(row)) if t not in masked and verdict[t] < self.back]
                doubted.sort(key=lambda t: (verdict[t], t))
                taken[b, doubted[: int(memory.commits[b]) - 1]] = True
        return taken_back(proposed, committed, taken)


def taken_back(proposed: Proposed, committed: Tensor, taken: Tensor) -> Selection:
    """The step with `committed` written and `taken` masked again, both bool `[N, T]`."""
    step, mask_id = proposed.step, proposed.mask_id
    after = torch.where(committed, step.proposal, proposed.tokens).masked_fill(taken, mask_id)
    return step._replace(tokens=after, committed=committed, remaining=(after == mask_id).sum(1, dtype=torch.int32))
