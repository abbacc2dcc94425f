"""Rules of published block-diffusion programs with what they do beside the rules of `fdpp`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import fdpp
from fdpp.rules import Proposed, Sight
from fdpp.selection import Selection


class Calls(NamedTuple):
    """`clean` as in `fdpp.Editing`; `masked` `[b, D]` int64, the block's forwards that found a mask."""

    clean: Tensor
    masked: Tensor


@dataclass(frozen=True)
class PipelineEditing(fdpp.Editing):
    """Diffusers' token editing: a block ends with its forward `steps` that finds a mask, and is not looked at again."""

    steps: int = 32

    def observe(self, sight: Sight, before: tuple[Tensor, Calls] | None) -> Calls:
        found = (sight.states == sight.mask_id).any(2).long()
        return Calls(*super().observe(sight, before), found if before is None else before[1].masked + found)

    def decide(self, proposed: Proposed) -> Selection:
        step = super().decide(proposed)
        assert proposed.memory is not None
        last = proposed.candidate.any(1) & (proposed.memory.masked == self.steps)
        left = (step.tokens == proposed.mask_id).sum(1, dtype=torch.int32)
        return step._replace(remaining=torch.where(last, left, step.remaining))
