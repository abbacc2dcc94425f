"""The denoising step as a module: swap it into a decoding loop, compile it, capture it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdpp.rules import Rule
from fdpp.selection import Selection, check_temperature
from fdpp.step.operators import decided, prefix_step
from fdpp.step.terms import Terms, check_rule, pack


class DenoisingStep(nn.Module):
    """`fdpp.select` with its rule, mask id and temperature held: `step(logits, tokens) -> Selection`.

    The rule's numbers are a buffer that moves with the module, so a call makes no tensor but its outputs. They are kept
    as the bits of float64 in int64, which a cast of the module to half precision leaves alone.
    `torch.compile(step, fullgraph=True)` has no graph break, and on a GPU a CUDA graph may capture it.

    Args:
        rule: a `fdpp.Rule`.
        mask_id: the id that marks a masked position.
        temperature: 0 for greedy proposals, above 0 to sample (every call then needs `seeds`).
    """

    bits: Tensor

    def __init__(self, rule: Rule, mask_id: int, temperature: float = 0.0) -> None:
        super().__init__()
        check_rule(rule)
        check_temperature(temperature)
        self.rule, self.mask_id, self.temperature = rule, mask_id, temperature
        self.register_buffer("bits", pack(rule).view(torch.int64), persistent=False)

    def forward(
        self, logits: Tensor, tokens: Tensor, active: Tensor | None = None, seeds: Tensor | None = None
    ) -> Selection:
        """See `fdpp.select`; `seeds` `[B]` int64 are the sequences' noise streams."""
        terms = Terms(self.bits.view(torch.float64), self.rule.tested(), self.mask_id, self.temperature, seeds)
        return decided(prefix_step(logits, tokens, active, terms), tokens, active, self.rule, self.mask_id)

    def extra_repr(self) -> str:
        return f"rule={self.rule}, mask_id={self.mask_id}, temperature={self.temperature}"
