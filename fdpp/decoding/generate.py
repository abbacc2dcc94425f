"""`generate`: the interface of transformers' text-diffusion models to the block loop."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.static import steps_for

TOKEN_IDS = ("mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id")
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
"""Arguments of `from_pretrained` that say where a file is."""


def without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under `torch.no_grad` and outside of inference mode: what it keeps for later are ordinary tensors."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


class DiffusionGenerationMixin:
    """Gives `generate` to a model with `model(input_ids, attention_mask, position_ids, cache, start)` and `project`."""

    generation_config_class = DiffusionGenerationConfig
    config: Any

    @without_gradients
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: DiffusionGenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        custom_generate: Callable[..., Any] | None = None,
        **overrides: Any,
    ) -> Any:
        """Decode a response block by block.

        Args:
            input_ids: `[B, P]` int64 prompts, padded on the left; P may be 0.
            attention_mask: `[B, P]`, 1 at prompt tokens and 0 at padding; None: no padding.
            generation_config: settings, in the place of the model's own `generation_config`; any of its fields can also
                be given by name and then wins.
            streamer: receives `put(prompt)`, `put_draft(block)` after every forward if it has that method, `put(block)`
                for every finished block and `end()`, as `transformers.TextDiffusionStreamer` does. A draft is the
                block's tokens so far `[B, T]`, masks included; a streamer that asks for logits instead is refused.
            stopping_criteria: called after every block as `criterion(sequences so far, None, new_token_length=T)`, with
                all B sequences, ended ones too, and T the block's length, as in transformers' text diffusion; True ends
                a sequence.
            logits_processor: changes the logits of every forward's block, as in transformers' text diffusion: called
                with `input_ids` `[N, S]`, the tokens before the block, and `scores` `[N, T, V]`, the block's logits;
                N counts the sequences whose block is not done, and drafts. A `LogitsProcessor` with a third parameter,
                `cur_step`, gets the masks left, `[N, 1, 1]`.
            custom_generate: decodes in the place of the block loop and returns what it likes. Called, as transformers
                calls it, with the model and `input_ids`, then by name `attention_mask` `[B, P]` int64,
                `generation_config` (settings with all token ids), `logits_processor` and `stopping_criteria` (lists,
                perhaps empty), `streamer` if there is one, and settings of its own that it names.

        Returns:
            `DiffusionGenerationOutput` (sequences, nfe, tokens per forward), or the sequences alone with
            `return_dict_in_generate=False`. Prompt tokens are never changed, whatever ids they hold.

        Raises:
            ValueError: a setting, shape or dtype that does not fit; a prompt that with its response is longer than the
                model's window.
            TypeError: an unknown setting, or one of another type.
            FloatingPointError: the model produced NaN, +inf or only -inf at a masked position.
        """
        own = taken_by(custom_generate, overrides)
        config = self.settled(generation_config, {name: overrides[name] for name in overrides.keys() - own.keys()})
        attention_mask = check_prompt(input_ids, attention_mask)
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(1).amax())
        window = self.config.max_sequence_length
        if longest + config.max_new_tokens > window:
            raise ValueError(
                f"prompt of {longest} tokens and {config.max_new_tokens} new ones exceed the model's window of {window}"
            )
        if getattr(streamer, "_takes_logits", False):
            raise ValueError(f"streamer: expected one of tokens, got {type(streamer).__name__}, which takes logits")
        processors = LogitsProcessorList(logits_processor or [])
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if custom_generate is not None:
            return custom_generate(
                self,
                input_ids,
                attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask.long(),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=criteria,
                **({} if streamer is None else {"streamer": streamer}),
                **own,
            )
        model = cast(DiffusionModel, self)
        with steps_for(model, config, input_ids.device, processors or None) as static:
            loop = BlockLoop(model, input_ids, attention_mask, config, processors or None, static)
            decode(loop, streamer, criteria, input_ids)
        return loop.output() if config.return_dict_in_generate else loop.sequences

    @without_gradients
    def warmup(
        self,
        prompt_length: int,
        batch_size: int = 1,
        generation_config: DiffusionGenerationConfig | None = None,
        **overrides: Any,
    ) -> None:
        """Capture ahead of time what `generate` with the same settings would capture on first use.

        It serves batches of up to `batch_size` prompts, padded or not. Prompts of another length in the same length
        bucket find all steps but one, the full forward of equally long prompts: it feeds as many columns as they have.
        Where the static engine is not used (on a CPU, unless asked for) there is nothing to do.

        Args:
            prompt_length: tokens of the longest prompt.
            batch_size: most prompts of a batch.
            generation_config: as in `generate`, and so are all other settings.
        """
        config = self.settled(generation_config, overrides)
        weight = next(iter(self.parameters()))  # type: ignore[attr-defined]
        ids = torch.full((batch_size, prompt_length), config.pad_token_id or 0, device=weight.device)
        masks: list[Tensor | None] = [None]
        if batch_size > 1 and prompt_length:
            ragged = torch.ones_like(ids, dtype=torch.bool)
            ragged[0, 0] = False
            masks.append(ragged)
        model = cast(DiffusionModel, self)
        with steps_for(model, config, ids.device) as static:
            if static is not None:
                for mask in masks:
                    BlockLoop(model, ids, mask, config, None, static).warm_up()

    def settled(
        self, generation_config: DiffusionGenerationConfig | None, overrides: dict[str, Any]
    ) -> DiffusionGenerationConfig:
        """All settings of a decode: `overrides` win over `generation_config`, which wins over the model's."""
        unknown = set(overrides) - set(DiffusionGenerationConfig.__dataclass_fields__)
        if unknown:
            known = ", ".join(DiffusionGenerationConfig.__dataclass_fields__)
            raise TypeError(f"generate: unknown settings {sorted(unknown)}; known are {known}")
        own = check_kind(getattr(self, "generation_config", DiffusionGenerationConfig()))
        settings = replace(own if generation_config is None else check_kind(generation_config), **overrides)
        missing = {name: getattr(own, name) for name in TOKEN_IDS if getattr(settings, name) is None}
        return with_token_ids(replace(settings, **missing), self.config)

    def adjust_generation_fn(
        self,
        generation_config: DiffusionGenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        **loading: Any,
    ) -> None:
        """Called by `from_pretrained`: takes the `generation_config` given to it, else the checkpoint's file."""
        if generation_config is None and pretrained_model_name_or_path is not None:
            hub = {name: loading[name] for name in HUB_OPTIONS if name in loading}
            with suppress(OSError):
                generation_config = DiffusionGenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if generation_config is not None:
            self.generation_config = check_kind(generation_config)


def decode(loop: BlockLoop, streamer: BaseStreamer | None, criteria: StoppingCriteriaList, prompt: Tensor) -> None:
    """Run `loop` to its end, block by block, as `generate` says."""
    put_draft = getattr(streamer, "put_draft", None)
    if streamer is not None:
        streamer.put(prompt.cpu())
    for block in range(len(loop.config.blocks())):
        for _ in loop.steps(block, watch=put_draft is not None):
            if put_draft is not None:
                put_draft(loop.block_tokens(block).cpu())
        if criteria:
            loop.stop(criteria, block)
        if streamer is not None:
            streamer.put(loop.block_tokens(block).cpu())
        if loop.finished():
            break
    if streamer is not None:
        streamer.end()


def check_kind(config: Any) -> DiffusionGenerationConfig:
    if not isinstance(config, DiffusionGenerationConfig):
        raise TypeError(f"generation_config: expected a DiffusionGenerationConfig, got {type(config).__name__}")
    return config


def taken_by(custom_generate: Callable[..., Any] | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Those of `overrides` that are no settings of a decode and that `custom_generate` takes, by name or by `**`."""
    if custom_generate is None:
        return {}
    if not callable(custom_generate):
        raise TypeError(
            f"custom_generate: expected a callable, code of repositories is not run; got {custom_generate!r}"
        )
    parameters = inspect.signature(custom_generate).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    foreign = overrides.keys() - DiffusionGenerationConfig.__dataclass_fields__.keys()
    return {name: overrides[name] for name in foreign if takes_all or name in parameters}


def with_token_ids(config: DiffusionGenerationConfig, model_config: Any) -> DiffusionGenerationConfig:
    """`config` with its missing token ids from the model's, all checked against its vocabulary.

    The padding id falls back to the first EOS id. EoT is looked up for `confidence_eos_eot_inf` alone.
    """
    mask, eos, pad, eot = (
        getattr(model_config, name, None) if getattr(config, name) is None else getattr(config, name)
        for name in TOKEN_IDS
    )
    eot = eot if config.confidence_eos_eot_inf else None
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = eos[0] if pad is None and eos else pad
    if not eos and (config.logits_eos_inf or (config.confidence_eos_eot_inf and eot is None)):
        raise ValueError("eos_token_id: logits_eos_inf and confidence_eos_eot_inf expect one, got None")
    named = [("mask_token_id", mask), ("pad_token_id", pad), *(("eos_token_id", e) for e in eos)]
    for name, value in [*named, ("eot_token_id", eot)] if eot is not None else named:
        if not isinstance(value, int) or not 0 <= value < model_config.vocab_size:
            raise ValueError(f"{name}: expected an id below the vocabulary's {model_config.vocab_size}, got {value!r}")
    if mask in (pad, *eos, eot):
        raise ValueError(f"mask_token_id: expected another id than those of EOS and padding, got {mask}")
    return replace(config, mask_token_id=mask, eos_token_id=eos, pad_token_id=pad, eot_token_id=eot)


def check_prompt(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The attention mask as bool `[B, P]`, None without padding; `ValueError` on a prompt that does not fit."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.shape[0] == 0:
        raise ValueError(
            f"input_ids: expected [B, P] int64 with B of at least 1, got {list(input_ids.shape)} {input_ids.dtype}"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape or attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask: expected {list(input_ids.shape)} on {input_ids.device}, "
            f"got {list(attention_mask.shape)} on {attention_mask.device}"
        )
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("attention_mask: expected padding on the left alone, got a 0 to the right of a 1")
    return None if bool(mask.all()) else mask
