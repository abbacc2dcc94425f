"""What a forward says of the states it evaluates, and the step that a rule takes on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fdpp import dawn, klass
from fdpp.dawn import Dawn
from fdpp.decoding.shaping import drawn, ranked_last
from fdpp.klass import Klass
from fdpp.ops import recommit, select_packed, select_rows
from fdpp.reference import Selection
from fdpp.rules import Rule


class Evidence(NamedTuple):
    """For D states of b sequences, T positions each:

    Attributes:
        logits: `[b, D, T, V]`; on a CPU also those of the masked positions alone, `[m, V]` in their order; with a fused
            head the hidden states that they would be made of, `[b, D, T, d_model]`.
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
        step: Callable[..., Selection] = select_packed,
        mask_id: int,
        first: int,
        temperature: float,
        seeds: Tensor | None,
        last: tuple[int, ...] = (),
        random: bool = False,
    ) -> Selection:
        """One step on each of the `states` `[b, D, T]`; fields of shape `[b, D, ...]`.

        `params` `[b * D, 3]` are the rule's numbers, `first` is the block's first column, `seeds` are `[b * D]`.
        `step` is what takes a step on these logits, where the rule has none of its own. Positions that propose one of
        the ids `last` rank last; with `random` a `Quota` commits as many positions as it says, but any.
        """
        tokens = states.flatten(0, 1)
        flat = self if self.logits.dim() == 2 else self.each(lambda part: part.flatten(0, 1))
        if last:
            proposal = select_packed(flat.logits, tokens, None, params, rule, mask_id, temperature, seeds).proposal
            flat = flat._replace(logits=ranked_last(flat.logits, proposal, last, mask_id))
        if flat.logits.dim() == 2:
            selection = select_rows(flat.logits, tokens, params, rule, mask_id, temperature, seeds)
        elif isinstance(rule, Dawn):
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
            selection = step(flat.logits, tokens, None, params, rule, mask_id, temperature, seeds)
        if random:
            assert seeds is not None
            selection = recommit(selection, tokens, drawn(tokens, params[:, 0], seeds, mask_id), mask_id)
        return Selection(*(field.unflatten(0, states.shape[:2]) for field in selection))
