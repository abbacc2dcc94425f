"""What a forward says of the states it evaluates."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fdpp.rules import Rule
from fdpp.rules.rule import Memory


class Evidence(NamedTuple):
    """For D states of b sequences, T positions each:

    Attributes:
        logits: `[b, D, T, V]`; on a CPU also those of the masked positions alone, `[m, V]` in their order; with a fused
            head the hidden states in their place, `[b, D, T, d_model]`.
        memory: what the rule remembers of each state, tensors `[b, D, ...]`; None where it remembers nothing.
    """

    logits: Tensor
    memory: Memory | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Evidence:
        """With `change` applied to every tensor."""
        memory = None if self.memory is None else self.memory._make(map(change, self.memory))
        return Evidence(change(self.logits), memory)

    def tensors(self) -> list[Tensor]:
        return [self.logits, *(self.memory or ())]

    def unchanged(self, rule: Rule) -> Evidence:
        """For the state after this one, if its predictions were the same."""
        return self if self.memory is None else self._replace(memory=rule.again(self.logits, self.memory))
