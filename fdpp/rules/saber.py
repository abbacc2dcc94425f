"""Saber: more positions the surer the model has been, and those that fell back are taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fdpp.rules.budget import highest
from fdpp.rules.quota import quota
from fdpp.rules.rule import Needs, Proposed, Rule, Sight, whole
from fdpp.selection import Selection, rank


class Course(NamedTuple):
    """What `Saber` remembers.

    Attributes:
        masked: `[b, D, T]` bool, the state's masks.
        confidence: `[b, D, T]` float32, the highest probability of a token that may be proposed, at tokens too.
        change: `[b, D, T]` float32, how much it has changed since the state before; itself in a block's first forward.
        kept: `[b, D, T]` float32, what it was when the position last committed; -1 where it never did.
    """

    masked: Tensor
    confidence: Tensor
    change: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Saber(Rule):
    """All positions surer than those before them, or the n most confident, of which the worst are taken back.

    Saber (arXiv 2510.18165). With q the model's confidence at every position of the block, whatever token is there:

    - Commit: masked positions with q > tau (strict), at least the n most confident. tau is the mean, over all positions
      that ever committed, of q when they last did; 1 before there are any.
    - Take back: unless no mask is left, min(max(floor(n / 2), ceil(f / 8)), f - 1) positions, where f have committed in
      this step. They are those whose q rose least since the step before, or fell most, of all that are committed, the
      f included. Equal ones: the lower position first.

    A step gains at least one position, so a block of T ends within T forwards. Positions taken back in the step that
    commits them count as committed for tau. Given tokens, of a prompt or an infill, are neither taken back nor
    counted. With a temperature q is still that of the most likely token.

    Every block is decoded as the published program decodes its first one, which is all of the response as its authors
    decode code: before the first step q was 0, and tau is 1. With several blocks that program differs in three ways.
    Later steps also take back tokens of earlier blocks, tau counts these, and in a later block's first step the tokens
    that it has just committed are safe. Where fewer than n masks are left it commits tokens anew or masks of later
    blocks.

    `fdpp.select` with it is `Quota(n)`, since it sees no step before.
    """

    n: int = whole(2, 1, "tokens a forward at least, of which some are taken back")
    predicate: ClassVar = quota
    needs: ClassVar = Needs(logits=True)
    revokes: ClassVar = True
    name: ClassVar = "saber"
    title: ClassVar = "Saber"
    about: ClassVar = "those surer than the ones before; those that fell back are taken back"

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return len(residuals) <= self.n

    def observe(self, sight: Sight, before: tuple[Tensor, Course] | None) -> Course:
        masked, confidence = sight.states == sight.mask_id, highest(sight.logits, sight.mask_id)
        if before is None:
            return Course(masked, confidence, confidence, torch.full_like(confidence, -1.0))
        memory, changes, kept = before[1], [], []
        for depth in range(masked.shape[1]):
            now = masked[:, depth : depth + 1], confidence[:, depth : depth + 1]
            memory = Course(*now, now[1] - memory.confidence, kept_after(memory, self.n, now[0]))
            changes.append(memory.change)
            kept.append(memory.kept)
        return Course(masked, confidence, torch.cat(changes, 1), torch.cat(kept, 1))

    def again(self, logits: Tensor, memory: Course) -> Course:
        committed, taken = turn(memory, self.n)
        masked = memory.masked & ~committed | taken
        kept = kept_after(memory, self.n, masked)
        return Course(masked, memory.confidence, torch.zeros_like(memory.change), kept)

    def decide(self, proposed: Proposed) -> Selection:
        step, memory = proposed.step, proposed.memory
        if memory is None:
            return step
        # Positions that must come last have a confidence of 0 (`confidence_eos_eot_inf`).
        confidence = memory.confidence.masked_fill(proposed.candidate & (step.confidence <= 0.0), 0.0)
        committed, taken = turn(memory._replace(masked=proposed.candidate, confidence=confidence), self.n)
        return proposed.take_back(proposed.commit(committed & ~taken), taken)

    def shown(self, memory: Course) -> dict[str, Tensor]:
        return {"change": memory.change}

    def reference(self, proposed: Proposed) -> Selection:
        step, memory, n = proposed.step, proposed.memory, self.n
        if memory is None:
            return step
        committed, taken = torch.zeros_like(proposed.candidate), torch.zeros_like(proposed.candidate)
        for b, row in enumerate(step.confidence.tolist()):
            masked = proposed.candidate[b].nonzero().flatten().tolist()
            ever = [q for q in memory.kept[b].tolist() if q >= 0.0]
            tau = sum(ever) / len(ever) if ever else 1.0
            ranked = sorted(masked, key=lambda t: (-row[t], t))
            chosen = max([t for t in ranked if row[t] > tau], ranked[:n], key=len)
            committed[b, chosen] = True
            if len(chosen) < len(masked):
                held = [t for t in range(len(row)) if t in chosen or (t not in masked and memory.kept[b, t] >= 0.0)]
                held.sort(key=lambda t: (float(memory.change[b, t]), t))
                f = len(chosen)
                taken[b, held[: min(max(n // 2, -(-f // 8)), f - 1)]] = True
        return proposed.take_back(proposed.commit(committed & ~taken), taken)


def turn(memory: Course, n: int) -> tuple[Tensor, Tensor]:
    """The positions that a step commits, and those of them and of earlier ones that it takes back, bool `[..., T]`."""
    masked, ever = memory.masked, memory.kept >= 0.0
    counted = ever.sum(-1, keepdim=True)
    mean = memory.kept.double().masked_fill(~ever, 0.0).sum(-1, keepdim=True) / counted.clamp(min=1)
    tau = mean.masked_fill(counted == 0, 1.0)
    confidence = memory.confidence.masked_fill(~masked, -1.0)
    committed = masked & ((confidence > tau) | (rank(confidence, descending=True) < n))
    f = committed.sum(-1, keepdim=True)
    most = torch.minimum(((f + 7) // 8).clamp(min=n // 2), f - 1)
    held = committed | (~masked & ever)
    unfinished = (masked & ~committed).any(-1, keepdim=True)
    return committed, held & unfinished & (rank(memory.change.masked_fill(~held, torch.inf)) < most)


def kept_after(memory: Course, n: int, masked: Tensor) -> Tensor:
    """`kept` in the state after that of `memory`, whose masks are `masked`."""
    committed, taken = turn(memory, n)
    committed = (memory.masked & ~masked) | (committed & taken)
    return torch.where(committed, memory.confidence, memory.kept)
