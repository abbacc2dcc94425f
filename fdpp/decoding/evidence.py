"""What a forward says of the states it evaluates, and the step that a rule takes on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fdpp import dawn, klass
from fdpp.dawn import Dawn
from fdpp.klass import Klass
from fdpp.ops import select_packed
from fdpp.reference import Selection
from fdpp.rules import Rule


class Evidence(NamedTuple):
    """For D states of b sequences, T positions each:

    Attributes:
        logits: `[b, D, T, V]`.
        edges, anchors: for `Dawn`: the dependency graph's edges, int32 `[b, D, T, words]`, and the model's confidence
            at committed columns, float32 `[b, D, L]`; columns that were not fed keep that of the block's full forward.
        stable: for `Klass`: steps in a row over which a prediction held still, int64 `[b, D, T]`.
    """

    logits: Tensor
    edges: Tensor | None = None
    anchors: Tensor | None = None
    stable: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Evidence:
        """With `change` applied to every field that is there."""
        parts = (None if part is None else change(part) for part in self[1:])
        return Evidence(change(self.logits), *parts)

    def unchanged(self) -> Evidence:
        """For the state after this one, if its predictions were the same."""
        return self if self.stable is None else self._replace(stable=self.stable + 1)

    def select(
        self,
        rule: Rule,
        states: Tensor,
        params: Tensor,
        *,
        mask_id: int,
        first: int,
        temperature: float,
        seeds: Tensor | None,
    ) -> Selection:
        """One step on each of the `states` `[b, D, T]`; fields of shape `[b, D, ...]`.

        `params` `[b * D, 3]` are the rule's numbers, `first` is the block's first column, `seeds` are `[b * D]`.
        """
        flat = self.each(lambda part: part.flatten(0, 1))
        tokens = states.flatten(0, 1)
        if isinstance(rule, Dawn):
            assert flat.edges is not None and flat.anchors is not None
            selection = dawn.select(
                flat.logits,
                tokens,
                rule=rule,
                mask_id=mask_id,
                edges=flat.edges,
                committed_confidence=flat.anchors,
                first=first,
                params=params,
                temperature=temperature,
                seeds=seeds,
            )
        elif isinstance(rule, Klass):
            assert flat.stable is not None
            selection = klass.select(
                flat.logits,
                tokens,
                rule=rule,
                mask_id=mask_id,
                stable=flat.stable,
                params=params,
                temperature=temperature,
                seeds=seeds,
            )
        else:
            selection = select_packed(flat.logits, tokens, None, params, rule, mask_id, temperature, seeds)
        return Selection(*(field.unflatten(0, states.shape[:2]) for field in selection))
