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
        return Evidence(change(self.logits), changed(self.memory, change))

    def tensors(self) -> list[Tensor]:
        return [self.logits, *tensors_of(self.memory)]

    def unchanged(self, rule: Rule) -> Evidence:
        """For the state after this one, if its predictions were the same."""
        return self if self.memory is None else self._replace(memory=rule.again(self.logits, self.memory))


def changed(memory: Memory | None, change: Callable[[Tensor], Tensor]) -> Memory | None:
    """`memory` with `change` applied to every tensor, those of memories within it too."""
    if memory is None or isinstance(memory, Tensor):
        return None if memory is None else change(memory)
    return memory._make(changed(part, change) for part in memory)


def tensors_of(memory: Memory | None) -> list[Tensor]:
    if memory is None or isinstance(memory, Tensor):
        return [] if memory is None else [memory]
    return [tensor for part in memory for tensor in tensors_of(part)]
