"""Token editing: a block is looked at again until no token in it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fdpp.rules.leftmost import at_once_in
from fdpp.rules.rule import Needs, Proposed, Rule, Sight, number, whole
from fdpp.rules.threshold_quota import ThresholdQuota
from fdpp.selection import Selection, rank


class Looks(NamedTuple):
    """What `Editing` remembers.

    Attributes:
        clean: `[b, D]` int64, forwards in a row, this one included, that found no mask in the block.
    """

    clean: Tensor


@dataclass(frozen=True)
class Editing(ThresholdQuota, Rule):
    """`ThresholdQuota(tau, k)`, and in the same step decided tokens change: LLaDA2.1's token editing.

    A decided position whose most likely token is another one, with c > edit (strict), takes it; not one that was given.
    A block is finished after the first forward that found no mask and changed nothing, or after `post` forwards that
    found no mask, with `post=0` as soon as no mask is left. So most blocks cost a forward more than with
    `ThresholdQuota`. Earlier blocks are never changed. `edit=1` changes nothing.

    The numbers are those of LLaDA2.1's own `generate`. Diffusers' pipeline for it has tau 0.7 and edit 0.5, and its
    `post` is one more than its `max_post_steps` says.

    A mask id inside the prompt is decided like any other position and may change then. The published loop takes it for
    prompt once it is decided.

    `fdpp.select` with it is `ThresholdQuota(tau, k)`, since it sees no decided positions.
    """

    tau: float = number(0.95, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    edit: float = number(0.9, "[0, 1]", "confidence of a token that takes the place of another, 0 to 1", line=True)
    post: int = whole(16, 0, "most forwards of a block that has no mask left")
    needs: ClassVar = Needs(logits=True, block=True)
    revokes: ClassVar = True
    name: ClassVar = "editing"
    title: ClassVar = "editing"
    about: ClassVar = "all confident ones; decided ones may change"

    def observe(self, sight: Sight, before: tuple[Tensor, Looks] | None) -> Looks:
        # A block without a mask gets none again, so the states without one are the last ones.
        clean = (sight.states != sight.mask_id).all(2).long()
        earlier = 0 if before is None else before[1].clean
        return Looks(clean * (clean.cumsum(1) + earlier))

    def decide(self, proposed: Proposed) -> Selection:
        step, tokens, candidate, memory = proposed.step, proposed.tokens, proposed.candidate, proposed.memory
        if memory is None or proposed.given is None:
            return step
        c, k = step.confidence.masked_fill(~candidate, -1.0), self.at_once_of(proposed)
        chosen = candidate & ((c > self.tau) | (rank(c, descending=True) < k))
        edited = ~candidate & ~proposed.given & (step.proposal != tokens) & (step.confidence > self.edit)
        # A draft's guess has the memory of the state before; what it changes does not depend on that.
        settled = (memory.clean > 0) & ~edited.any(1)
        return written(proposed, chosen, edited, settled | (memory.clean >= self.post))

    def reference(self, proposed: Proposed) -> Selection:
        step, tokens, memory = proposed.step, proposed.tokens, proposed.memory
        if memory is None or proposed.given is None:
            return step
        chosen, edited = torch.zeros_like(proposed.candidate), torch.zeros_like(proposed.candidate)
        over = []
        for b, row in enumerate(step.confidence.tolist()):
            masked = proposed.candidate[b].nonzero().flatten().tolist()
            above, k = [t for t in masked if row[t] > self.tau], at_once_in(proposed, b, self)
            chosen[b, above if len(above) >= k else sorted(masked, key=lambda t: (-row[t], t))[:k]] = True
            for t, confidence in enumerate(row):
                free = t not in masked and not proposed.given[b, t]
                edited[b, t] = free and bool(step.proposal[b, t] != tokens[b, t]) and confidence > self.edit
            clean = int(memory.clean[b])
            over.append((clean > 0 and not edited[b].any()) or clean >= self.post)
        return written(proposed, chosen, edited, torch.tensor(over, dtype=torch.bool, device=tokens.device))


def written(proposed: Proposed, chosen: Tensor, edited: Tensor, over: Tensor) -> Selection:
    """The step that commits the masks `chosen` and changes the tokens `edited`, both `[N, T]`.

    A block with no mask left goes on unless it is `over` `[N]`.
    """
    step, candidate, committed = proposed.step, proposed.candidate, chosen | edited
    left = (candidate & ~chosen).sum(1, dtype=torch.int32)
    return Selection(
        tokens=torch.where(committed, step.proposal, proposed.tokens),
        proposal=torch.where(candidate | committed, step.proposal, proposed.tokens),
        confidence=step.confidence.masked_fill(~(candidate | committed), 0.0),
        committed=committed,
        remaining=torch.where(over, left, left.clamp(min=1)),
        nonfinite=step.nonfinite,
    )
