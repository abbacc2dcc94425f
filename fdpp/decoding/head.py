"""The model's head as a decode uses it: whole, or this process's slice of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fdpp import parallel
from fdpp.dawn import Dawn
from fdpp.klass import Klass
from fdpp.ops import select_packed
from fdpp.project import project_select_packed
from fdpp.reference import Selection
from fdpp.rules import Rule


def slice_held(model: Any) -> parallel.VocabularySlice | None:
    """The slice of the vocabulary that this process has logits of, None if that is all of it."""
    held: parallel.VocabularySlice | None = getattr(model, "vocabulary_slice", lambda: None)()
    return held


def head_of(model: Any, rule: Rule, fused: bool = False) -> tuple[Callable[[Tensor], Tensor], Callable[..., Selection]]:
    """What turns hidden states into logits, and what takes a step on these, called as `fdpp.ops.select_packed`.

    Where the model's head is sharded, these are a slice's logits and the step of `fdpp.parallel`. KLASS compares whole
    distributions, so its logits are gathered. A `fused` step takes the hidden states themselves, which stand in the
    logits' place.

    Raises:
        ValueError: `Dawn` on a sharded model, no process of which sees the attention of all heads; `fused` with a head
            that is sharded or more than a weight.
    """
    held = slice_held(model)
    if fused:
        if held is not None:
            raise ValueError("head='fused' takes a whole head, got one that tensor parallelism shares out")
        return keep, partial(step_of_hidden, model.head_weight())
    if held is None:
        return model.project, select_packed
    if isinstance(rule, Dawn):
        raise ValueError("rule=Dawn(...) needs the attention of all heads, which tensor parallelism shares out")
    if isinstance(rule, Klass):
        return model.project, select_packed
    return model.project_slice, partial(parallel.select_packed, first_id=held.first, group=held.group)


def keep(hidden: Tensor) -> Tensor:
    return hidden


def step_of_hidden(weight: Tensor, hidden: Tensor, *arguments: Any) -> Selection:
    """`select_packed` of `hidden @ weight.T`."""
    return project_select_packed(hidden, weight, *arguments)
