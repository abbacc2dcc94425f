"""Tokens that are taken back (WINO, arXiv 2507.18578): every one has a row beside the sequence that does not see it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fdpp.rules.rule import Memory, Needs, Proposed, Rows, Sight
from fdpp.selection import Selection, rank


class Verdicts(NamedTuple):
    """What a rule that verifies remembers of a state.

    Attributes:
        verdict: `[b, D, T]` float64, the probability of each position's token, given all that the block sees but it.
            NaN at masks.
        states: `[b, D, T]` int64, the tokens.
        before: `[b, D, T]` int64, those before the last step of the block; of its first forward `states`.
        inner: what another rule remembers, see `fdpp.Revocable`; None: nothing.
    """

    verdict: Tensor
    states: Tensor
    before: Tensor
    inner: Memory | None = None


class Verified:
    """Base beside `Rule` of rules that take back what they committed.

    Beside the sequence a mask is fed for each position of the block, which sees what the block sees but that position's
    token, and the other masks. The probability that its logits, unfiltered, give to the token is its *verdict*. It
    exists from the forward after its commit on: no step takes back what it commits.

    `taking_back` makes a step that takes back tokens whose verdict is too low:

    - none where the step commits fewer than two positions;
    - fewer than the block's step before committed, so that a block of T positions ends within T forwards, and none in
      its first step;
    - the lowest verdicts first, of equals the lower position.

    Tokens of a prompt or an infill are never taken back, nor those of earlier blocks.
    """

    needs: ClassVar[Needs] = Needs(logits=True, rows=True)
    revokes: ClassVar[bool] = True

    def rows(self, block: Tensor) -> Rows:
        return Rows(columns=block, holes=block)

    def observe(self, sight: Sight, before: tuple[Tensor, Any] | None) -> Any:
        assert sight.rows is not None
        logits = sight.rows.to(torch.promote_types(sight.rows.dtype, torch.float32))
        of_token = logits.gather(-1, sight.states[..., None])[..., 0]
        last = sight.states[:, :1] if before is None else before[1].states
        earlier = torch.cat((last, sight.states[:, :-1]), dim=1)
        verdict = (of_token - logits.logsumexp(-1)).exp().double()
        return Verdicts(verdict.masked_fill(sight.states == sight.mask_id, torch.nan), sight.states, earlier)

    def again(self, logits: Tensor, memory: Any) -> Any:
        return memory._replace(before=memory.states)

    def shown(self, memory: Any) -> dict[str, Tensor]:
        return {"verdict": memory.verdict}


def taking_back(proposed: Proposed, step: Selection, below: float, at_most: int | None = None) -> Selection:
    """`step`, and tokens with a verdict below `below` (strict) become masks again, at most so many."""
    tokens, candidate, memory = proposed.tokens, proposed.candidate, proposed.memory
    assert isinstance(memory, Verdicts)
    held = ~candidate & (tokens != proposed.mask_id)
    if proposed.given is not None:
        held = held & ~proposed.given
    # A draft's guess has the verdicts of the state before it: a token that is new in it has none.
    doubted = held & (tokens == memory.states) & (memory.verdict < below)
    bound = committed_by_last(proposed) - 1
    bound = bound if at_most is None else bound.clamp(max=at_most)
    order = rank(memory.verdict.masked_fill(~doubted, torch.inf))
    several = step.committed.sum(1, keepdim=True) > 1
    return proposed.take_back(step, doubted & (order < bound[:, None]) & several)


def committed_by_last(proposed: Proposed) -> Tensor:
    """How many positions the block's step before committed, int64 `[N]`; 0 in its first."""
    assert isinstance(proposed.memory, Verdicts)
    return ((proposed.memory.before == proposed.mask_id) & (proposed.tokens != proposed.mask_id)).sum(1)


def taking_back_in_reference(
    proposed: Proposed, step: Selection, below: float, at_most: int | None = None
) -> Selection:
    """The specification of `taking_back`."""
    memory, taken = proposed.memory, torch.zeros_like(proposed.candidate)
    assert isinstance(memory, Verdicts)
    for b, bound in enumerate(committed_by_last(proposed).tolist()):
        if int(step.committed[b].sum()) < 2:
            continue
        verdict, doubted = memory.verdict[b].tolist(), []
        for t, token in enumerate(proposed.tokens[b].tolist()):
            given = proposed.given is not None and bool(proposed.given[b, t])
            known = token == int(memory.states[b, t]) and token != proposed.mask_id
            if known and not given and not proposed.candidate[b, t] and verdict[t] < below:
                doubted.append(t)
        doubted.sort(key=lambda t: (verdict[t], t))
        most = bound - 1 if at_most is None else min(bound - 1, at_most)
        taken[b, doubted[: max(most, 0)]] = True
    return proposed.take_back(step, taken)
