"""The model's head as a decode uses it: whole, or this process's slice of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.settings import MAX_DRAFTS, DiffusionGenerationConfig
from fdpp.rules import Rule
from fdpp.selection import Selection
from fdpp.step import parallel, project
from fdpp.step.operators import prefix_step
from fdpp.step.parallel import VocabularySlice

FUSED_UP_TO: dict[str, int] = {
    # LLaDA's vocabulary in float32. bench/README.md, d_model 320: the fused head takes 1.8 times as long at 32 rows and
    # 2.3 times at 256. d_model 1024 on two busy cores: 1.0 times at 1 row, 0.8 to 1.1 from 8 to 64, which is noise, and
    # 1.4 to 1.5 from 128 to 1024.
    "cpu": 0,
}
"""Rows of a forward up to which `head="auto"` takes the fused head, by `device_kind`. A kind that is missing has not
been measured and takes the library's product at any number of rows, as every GPU does today."""

SMALLEST_VOCABULARY = 32
"""Ids from which on the fused head's scratch never takes more memory than the logits would."""


def device_kind(device: torch.device) -> str:
    """What figures are kept for: "cpu", or the name of a GPU as its driver tells it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def settled(
    model: DiffusionModel, config: DiffusionGenerationConfig, processor: Iterable[Any] | None, sequences: int
) -> DiffusionGenerationConfig:
    """`config` with "library" or "fused" in the place of `head="auto"`, for a decode of so many sequences."""
    if config.head != "auto":
        return config
    drafts = MAX_DRAFTS if config.drafts == "auto" else int(config.drafts)
    rows = sequences * config.per_block * drafts
    return replace(config, head="fused" if fused_wins(model, config, processor, rows) else "library")


def fused_wins(
    model: DiffusionModel, config: DiffusionGenerationConfig, processor: Iterable[Any] | None, rows: int
) -> bool:
    """Whether the fused head takes forwards of at most so many rows, and was measured to be faster."""
    if config.reads_logits is not None or processor is not None or slice_held(model) is not None:
        return False
    try:
        weight = model.head_weight()
    except ValueError:
        return False
    return weight.shape[0] >= SMALLEST_VOCABULARY and rows <= FUSED_UP_TO.get(device_kind(weight.device), 0)


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
            with a head that is sharded or more than a weight; a rule that feeds rows beside the sequence, with a model
        whose columns predict the next token: a row has no column before it.
    """
    held = slice_held(model)
    if rule.needs.rows and model.shift:
        raise ValueError(
            f"rule={type(rule).__name__}(...) feeds rows, and this model reads a row's token off the one before"
        )
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
