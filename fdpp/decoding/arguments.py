"""What people pass to `generate`, as the prompts and the settings of a decode."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fdpp.decoding.saved import METADATA
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.rules import Rule
from fdpp.selection import is_int

logger = logging.getLogger(__name__)

SETTINGS = tuple(field.name for field in fields(DiffusionGenerationConfig))

NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "use_cache": True,
    "early_stopping": False,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "synced_gpus": False,
    "disable_compile": False,
}
"""Arguments of transformers' `generate` that a diffusion decode lacks, with the value that changes nothing."""

ELSEWHERE = {
    "gen_length": "max_new_tokens={}",
    "max_tokens": "max_new_tokens={}",
    "max_gen_toks": "max_new_tokens={}",
    "block_size": "block_length={}",
    "diffusion_steps": "rule=Quota(), steps={}",
    "num_steps": "rule=Quota(), steps={}",
    "threshold": "rule=Threshold({})",
    "factor": "rule=Factor({})",
    "frechet_margin": "rule=Frechet({})",
    "use_cache": 'cache="none"',
    "dual_cache": 'cache="dual"',
    "mask_id": "mask_token_id={}",
    "guidance_scale": "cfg_scale, which is guidance_scale - 1",
    "stop": "stop_strings={}",
    "step_callback": "streamer=, whose put_draft gets the block after every forward",
    "prompt": "input_ids=",
    "bd_size": "block_length={}",
    "small_block_size": "sub_block_length={}",
    "use_block_cache": 'cache="dual", or "prefix" without it',
    "denoising_steps": "steps=, which counts the whole response, with a rule whose k is None",
    "remasking_strategy": "rule=Quota(), Leftmost(None), ThresholdQuota() or EntropySum()",
    "confidence_threshold": "rule=ThresholdQuota({})",
    "dynamic_threshold": "rule=ThresholdLeftmost({})",
    "eb_threshold": "rule=EntropySum({})",
    "editing_threshold": "rule=Editing(edit={})",
    "max_post_steps": "rule=Editing(post={})",
    "num_to_transfer": "rule=Editing(k={})",
    "threshold_back": "rule=Wino(back={})",
    "low_threshold": "rule=Hierarchy(low={})",
    "credit_alpha": "rule=Credit(alpha={})",
    "boost_gamma": "rule=Credit(gamma={})",
    "decay_beta": "rule=Credit(beta={})",
    "answer_start_pos": "rule=Prophet(answer=...), which is counted from the response's first position",
    "early_exit_thresholds": "rule=Prophet(early=..., mid=..., late=...)",
    "eos_early_stop": "stop_at_eos={}",
    "cache_implementation": 'cache="dual", "prefix" or "none"',
}
"""What has another name here: arguments of other projects' `generate` and of transformers'."""


@cache
def warn_once(message: str) -> None:
    logger.warning(message)


def settings_of(
    given: dict[str, Any], own: DiffusionGenerationConfig, prompt_length: int | None = None
) -> dict[str, Any]:
    """The settings of a decode that `given` names, as transformers' `generate` would read them.

    Settings stay what they are. `do_sample` and `max_length` become a temperature and a number of new tokens, given the
    settings `own` that they change and the columns of the prompt. What changes nothing is left out: None, and the
    values in `NEUTRAL`.

    Raises:
        TypeError: a name that has no meaning here; the error says what has another name.
        ValueError: settings that contradict each other, or a length that the prompt fills up.
    """
    changes = {name: given[name] for name in SETTINGS if name in given}
    others = {name: value for name, value in given.items() if name not in SETTINGS and value is not None}
    max_length, do_sample = others.pop("max_length", None), others.pop("do_sample", None)
    for name, value in others.items():
        if not ((name in METADATA and name != "use_cache") or (name in NEUTRAL and value == NEUTRAL[name])):
            raise TypeError(f"generate: {meaning(name, value)}")
    if max_length is not None and changes.get("max_new_tokens") is None:
        changes["max_new_tokens"] = new_tokens(max_length, prompt_length)
    if do_sample is not None:
        changes["temperature"] = temperature_of(do_sample, changes.get("temperature"), own.temperature)
    return changes


def meaning(name: str, value: Any) -> str:
    """What to say of an argument that is not taken."""
    shown = f"{name}={reprlib.repr(value)}"
    owners = [kind for kind in Rule.named().values() if name in kind.numbers]
    if name in ELSEWHERE:
        return f"{shown} has another name here, {ELSEWHERE[name].format(reprlib.repr(value))}"
    if owners:
        rules = " or ".join(f"rule={kind.__name__}({shown})" for kind in owners)
        return f"{shown} is a rule's, {rules}"
    from transformers import GenerationConfig

    if name in vars(GenerationConfig()):
        neutral = f"; expected {NEUTRAL[name]!r}, which changes nothing" if name in NEUTRAL else ""
        return f"{shown} is of autoregressive generation and has no meaning in a diffusion decode{neutral}"
    return f"unknown setting {shown}; known are {', '.join(SETTINGS)}"


def new_tokens(max_length: Any, prompt_length: int | None) -> int:
    """The length of a response that, with a prompt of so many columns, has `max_length`."""
    if prompt_length is None:
        raise ValueError(f"max_length={max_length!r} counts the prompt: expected max_new_tokens here")
    if not is_int(max_length) or max_length <= prompt_length:
        raise ValueError(f"max_length: expected an int above the prompt's {prompt_length} columns, got {max_length!r}")
    return max_length - prompt_length


def temperature_of(do_sample: Any, given: float | None, own: float) -> float:
    """The temperature under transformers' `do_sample`: its default is 1, and without sampling there is none."""
    if not isinstance(do_sample, bool):
        raise ValueError(f"do_sample: expected a bool, got {do_sample!r}")
    if do_sample:
        if given is not None and not given:
            raise ValueError("do_sample=True and temperature=0 contradict each other: expected a temperature above 0")
        return given or own or 1.0
    if given:
        raise ValueError(f"do_sample=False and temperature={given!r} contradict each other: expected one of them")
    return 0.0


def prompt_of(input_ids: Any, attention_mask: Any, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts `[B, P]` int64, and the attention mask that came with them, None if none did.

    Args:
        input_ids: such a tensor; the ids of one prompt or of several of one length as lists; what a tokenizer returns
            (a mapping with `input_ids` and perhaps `attention_mask`); None: one empty prompt.
        attention_mask: a tensor or lists.
        device: where lists go.

    Raises:
        TypeError: text, or anything else that holds no ids.
        ValueError: a shape or dtype that does not fit.
    """
    if isinstance(input_ids, Mapping):
        if "input_ids" not in input_ids:
            raise TypeError(f"input_ids: expected them in the mapping, got its keys {sorted(map(str, input_ids))}")
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    ids = tensor_of(input_ids, "input_ids", device)
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[0] == 0:
        raise ValueError(f"input_ids: expected [B, P] int64 with B of at least 1, got {list(ids.shape)} {ids.dtype}")
    return ids, None if attention_mask is None else tensor_of(attention_mask, "attention_mask", device)


def tensor_of(given: Any, name: str, device: torch.device) -> Tensor:
    """A tensor as it is; a list of ints as `[1, P]` int64, lists of ints of one length as `[B, P]`."""
    if isinstance(given, Tensor):
        return given
    if given is None:
        return torch.empty(1, 0, dtype=torch.int64, device=device)
    if isinstance(given, str) or (isinstance(given, (list, tuple)) and any(isinstance(one, str) for one in given)):
        raise TypeError(f"{name}: expected the ids of a tokenizer, tokenizer(text, return_tensors='pt'), got text")
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected a tensor [B, P] or lists of ids, got {type(given).__name__}")
    rows = [list(row) for row in given] if given and isinstance(given[0], (list, tuple)) else [list(given)]
    if any(not is_int(one) for row in rows for one in row):
        raise TypeError(f"{name}: expected ints, got {given!r}")
    if len({len(row) for row in rows}) > 1:
        lengths = [len(row) for row in rows]
        raise ValueError(f"{name}: expected rows of one length, padded on the left, got lengths {lengths}")
    return torch.tensor(rows, dtype=torch.int64, device=device)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise `ValueError` on an id that the vocabulary lacks."""
    if not ids.numel():
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids: expected ids from 0 to {vocab_size - 1}, the model's vocabulary, got {wrong}")


def check_mask(ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    """The attention mask as bool `[B, P]`, None without padding."""
    if attention_mask.shape != ids.shape or attention_mask.device != ids.device:
        raise ValueError(
            f"attention_mask: expected {list(ids.shape)} on {ids.device}, "
            f"got {list(attention_mask.shape)} on {attention_mask.device}"
        )
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("attention_mask: expected padding on the left alone, got a 0 to the right of a 1")
    return None if bool(mask.all()) else mask


def inferred_padding(ids: Tensor, config: DiffusionGenerationConfig) -> Tensor | None:
    """The attention mask of prompts that came without one: as in transformers, padding ids at a row's start are padding
    unless they are also an end of text. Then they count as prompt, with a warning.
    """
    pad = config.pad_token_id
    if pad is None:
        return None
    padded = ids.eq(pad)
    outer = padded[:, :1] | padded[:, -1:]
    if not bool(outer.any()):
        return None
    if pad in config.eos_ids:
        warn_once(
            f"generate: no attention_mask, and rows of input_ids start or end with {pad}, the padding id and an end of "
            "text: decoded as a part of the prompt. Pass the tokenizer's attention_mask if it is padding"
        )
        return None
    if bool((padded[:, -1] & ~padded.all(1)).any()):
        raise ValueError(f"input_ids: expected padding on the left alone, got rows that end with the padding id {pad}")
    return (~padded).cumsum(1) > 0
