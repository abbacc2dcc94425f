"""The model's head as a decode uses it: whole, or this process's slice of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fdpp.decoding.model import DiffusionModel
from fdpp.rules import Rule
from fdpp.selection import Selection
from fdpp.step import parallel, project
from fdpp.step.operators import prefix_step
from fdpp.step.parallel import VocabularySlice


def slice_held(model: DiffusionModel) -> VocabularySlice | None:
    """The slice of the vocabulary that this process has logits of, None if that is all of it."""
    held: VocabularySlice | None = getattr(model, "vocabulary_slice", lambda: None)()
    return held


def head_of(
    model: DiffusionModel, rule: Rule, fused: bool = False
) -> tuple[Callable[[Tensor], Tensor], Callable[..., Selection]]:
    """What turns hidden states into logits, and what takes a step on these, called as `prefix_step`.

    Where the model's head is sharded, these are a slice's logits and the step of `fdpp.step.parallel`; for a rule that
    reads logits they are gathered. A `fused` step takes the hidden states themselves, in the logits' place.

    Raises:
        ValueError: a rule that reads attention on a sharded model, no process of which sees that of all heads; `fused`
            with a head that is sharded or more than a weight.
    """
    held = slice_held(model)
    if fused:
        if held is not None:
            raise ValueError("head='fused' takes a whole head, got one that tensor parallelism shares out")
        return as_it_is, partial(step_of_hidden, model.head_weight())
    if held is None:
        return model.project, prefix_step
    if rule.needs.attention:
        kind = type(rule).__name__
        raise ValueError(f"rule={kind}(...) needs the attention of all heads, which tensor parallelism shares out")
    if rule.needs.logits or rule.needs.rows:
        return model.project, prefix_step
    return model.project_slice, partial(parallel.prefix_step, first_id=held.first, group=held.group)


def as_it_is(hidden: Tensor) -> Tensor:
    return hidden


def step_of_hidden(weight: Tensor, hidden: Tensor, *arguments: Any) -> Selection:
    """`prefix_step` of `hidden @ weight.T`."""
    return project.prefix_step(hidden, weight, *arguments)
