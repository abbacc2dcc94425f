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
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fdpp.decoding.adapters import check_adapters
from fdpp.decoding.arguments import (
    SETTINGS,
    check_ids,
    check_mask,
    inferred_padding,
    prompt_of,
    settings_of,
    warn_once,
)
from fdpp.decoding.block_causal import loop_of
from fdpp.decoding.embedded import check_embeds, check_settings, copied
from fdpp.decoding.filters import check_filtered_ids
from fdpp.decoding.head import slice_held
from fdpp.decoding.infill import blanks, groups, output_of
from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.refresh import ALL
from fdpp.decoding.settings import BLOCK_LENGTH, DiffusionGenerationConfig
from fdpp.decoding.static import steps_for
from fdpp.decoding.stops import StopStrings, end_at_strings, stops_of
from fdpp.selection import is_int

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
    shift = 0
    block_causal = False
    anchored = False
    default_sub_block_length: int | None = None

    @property
    def default_block_length(self) -> int:
        """The length of blocks that the model was trained with; that of most where it can be any."""
        return getattr(self.config, "block_length", None) or BLOCK_LENGTH

    @without_gradients
    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: DiffusionGenerationConfig | GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        custom_generate: Callable[..., Any] | None = None,
        num_return_sequences: int | None = None,
        tokenizer: Any = None,
        inputs_embeds: Tensor | None = None,
        **overrides: Any,
    ) -> Any:
        """Decode a response block by block.

        Args:
            input_ids: `[B, P]` int64 prompts, padded on the left; P may be 0. Also lists of ids, or what a tokenizer
                returns. Masks in a prompt stay, with a warning: `infill` fills them.
            attention_mask: `[B, P]`, 1 at prompt tokens and 0 at padding; None: as transformers infers it, see
                `fdpp.decoding.arguments.inferred_padding`.
            generation_config: settings, in the place of the model's own `generation_config`; any of its fields can also
                be given by name and then wins. The settings of a `GenerationConfig` count as given by name.
            streamer: receives `put(prompt)`, `put_draft(block)` after every forward if it has that method, `put(block)`
                for every finished block and `end()`, as `transformers.TextDiffusionStreamer` does. A draft is the
                block's tokens so far `[B, T]`, masks included; a streamer that asks for logits instead is refused.
                Responses of a block-causal model begin amid blocks, in a batch at different places: a draft goes as far
                as any has come, and what all have come to is finished.
            stopping_criteria: called after every block as `criterion(sequences so far, None, new_token_length=T)`, with
                all B sequences, ended ones too, and T the block's length, as in transformers' text diffusion; True ends
                a sequence. `StopStringCriteria`, which look at the last token, are asked for each token of the block.
                Where responses begin amid blocks: once for each length that they have come to, each about those of it.
            logits_processor: changes the logits of every forward's block. A `LogitsProcessor` with a third parameter,
                `cur_step`, as in transformers' text diffusion, is called with `input_ids` `[N, S]`, the columns before
                the block, `scores` `[N, T, V]`, the block's logits, and the masks left `[N, 1, 1]`; N counts the
                sequences whose block is not done, and drafts. Any other, as in transformers' autoregressive decodes, is
                called with a row for each of these N * T positions: `input_ids` `[n, S]`, the tokens before the block
                and those before the position in the block that are committed, and `scores` `[n, V]`. Rows of one length
                S are one call, without padding. Order is kept.
            custom_generate: decodes in the place of the block loop and returns what it likes. Called, as transformers
                calls it, with the model and `input_ids`, then by name `attention_mask` `[B, P]` int64,
                `generation_config` (settings with all token ids), `logits_processor` and `stopping_criteria` (lists,
                perhaps empty), `streamer` if there is one, and settings of its own that it names. `stop_strings` are
                one of the criteria.
            num_return_sequences: responses to every prompt, next to each other; more than one takes sampling.
            tokenizer: the model's, for `stop_strings`.
            inputs_embeds: `[B, P, d_model]`, prompts as embeddings, such as a vision model's own code makes of text and
                pictures. Without `input_ids` the prompts have no ids: the returned sequences are the responses alone,
                a streamer is given a prompt of no columns, and processors and criteria find masks in its place. With
                `input_ids` `[B, P]` these are what is returned and what penalties count.
            overrides: settings by name. `do_sample`, `max_length` and values that change nothing are read as in
                transformers, see `fdpp.decoding.arguments.settings_of`.

        Returns:
            `DiffusionGenerationOutput` (sequences, nfe, tokens per forward), or the sequences alone with
            `return_dict_in_generate=False`. Prompt tokens are never changed, whatever ids they hold.

        Raises:
            ValueError: a setting, shape, dtype or id that does not fit; `stop_strings` without a tokenizer; a prompt
                that with its response is longer than the model's window.
            TypeError: an unknown setting, one of another type, or text in the place of ids.
            FloatingPointError: the model produced NaN, +inf or only -inf at a masked position.
        """
        own = taken_by(custom_generate, overrides)
        overrides = {name: overrides[name] for name in overrides.keys() - own.keys()}
        model = cast(DiffusionModel, self)
        embeds = None if inputs_embeds is None else check_embeds(inputs_embeds, model)
        unnamed = embeds is not None and input_ids is None and "inputs" not in overrides
        if unnamed and embeds is not None:
            input_ids = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask, config = self.asked(input_ids, attention_mask, generation_config, overrides, num_return_sequences)
        if embeds is not None:
            check_settings(config)
            embeds = copied(embeds, ids, num_return_sequences or 1)
        if unnamed:
            ids = torch.full_like(ids, cast(int, config.mask_token_id))
        masks = not unnamed and bool(blanks(ids, mask, cast(int, config.mask_token_id)).any())
        if config.max_new_tokens == 0 and custom_generate is None:
            if not masks:
                raise ValueError("max_new_tokens=0 fills the masks of a prompt, got one without: expected at least 1")
            return self.fill(ids, mask, config, streamer, stopping_criteria, logits_processor, tokenizer)
        if masks and custom_generate is None:
            warn_once(f"generate: the prompt holds masks, which {stay(model)}; `infill` or max_new_tokens=0 fills them")
        self.check_window(ids, mask, config.max_new_tokens)
        processors, criteria = lists(streamer, logits_processor, stopping_criteria)
        stops = stops_of(config, tokenizer, ids, mask)
        if custom_generate is not None:
            criteria.extend([] if stops is None else [stops])
            return custom_generate(
                self,
                ids,
                attention_mask=torch.ones_like(ids) if mask is None else mask.long(),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=criteria,
                **({} if streamer is None else {"streamer": streamer}),
                **({} if embeds is None else {"inputs_embeds": embeds}),
                **own,
            )
        with steps_for(model, config, ids.device, processors or None) as static:
            loop = loop_of(model)(model, ids, mask, config, processors or None, static, embeds=embeds)
            stops = stops_of(config, tokenizer, *loop.prompts)
            decode(loop, streamer, criteria, ids[:, :0] if unnamed else ids, stops)
        sequences = loop.sequences[:, ids.shape[1] :] if unnamed else loop.sequences
        if not config.return_dict_in_generate:
            return sequences
        out = loop.output()
        out.sequences = sequences
        return out

    @without_gradients
    def infill(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        generation_config: DiffusionGenerationConfig | GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        num_return_sequences: int | None = None,
        tokenizer: Any = None,
        **overrides: Any,
    ) -> Any:
        """Fill the masks of a text, block by block.

        The response starts at a sequence's first mask: blocks are counted from there, and given tokens count as
        committed. None of them is ever changed. Blocks without masks cost nothing. An EOS or a stop string ends a
        sequence as in `generate` if no given token follows it. Sequences whose first masks stand in different columns
        are decoded one after another, each as it would be alone.

        Args:
            input_ids, attention_mask: `[B, P]` as in `generate`; masks are the model's `mask_token_id`.
            streamer: as in `generate`, given what is before the first mask as the prompt; the first masks of all
                sequences must then stand in the same column.
            stopping_criteria: as in `generate`, asked with sequences that are decoded together; True leaves padding
                in the place of later masks.
            generation_config, logits_processor, num_return_sequences, tokenizer, overrides: as in `generate`, but for
                `max_new_tokens`.

        Returns:
            As `generate`, the sequences `[B, P]` and what is said of every position over all P of them.

        Raises:
            As `generate`.
        """
        if overrides.get("max_new_tokens"):
            raise ValueError(f"infill: expected no max_new_tokens, the text has its length, got {overrides}")
        overrides = {**overrides, "max_new_tokens": 0}
        ids, mask, config = self.asked(input_ids, attention_mask, generation_config, overrides, num_return_sequences)
        return self.fill(ids, mask, config, streamer, stopping_criteria, logits_processor, tokenizer)

    def fill(
        self,
        ids: Tensor,
        mask: Tensor | None,
        config: DiffusionGenerationConfig,
        streamer: BaseStreamer | None,
        stopping_criteria: StoppingCriteriaList | None,
        logits_processor: LogitsProcessorList | None,
        tokenizer: Any,
    ) -> Any:
        """`infill` with its arguments checked."""
        self.check_window(ids, mask, 0)
        processors, criteria = lists(streamer, logits_processor, stopping_criteria)
        parts = list(groups(blanks(ids, mask, cast(int, config.mask_token_id))))
        if streamer is not None and (len(parts) != 1 or parts[0][1].shape[0] < ids.shape[0]):
            at = ", ".join(f"{start} of sequences {rows.tolist()}" for start, rows in parts) or "none"
            raise ValueError(f"streamer: expected first masks in one column of all sequences, got columns {at}")
        model, loops = cast(DiffusionModel, self), []
        if model.block_causal and parts:
            # The grid of a row does not begin at its first mask, so rows need not have it in one column.
            parts = [(parts[0][0], torch.cat([rows for _, rows in parts]).sort().values)]
        for start, rows in parts:
            some = replace(config, max_new_tokens=ids.shape[1] - start)
            with steps_for(model, some, ids.device, processors or None) as static:
                prompt, given = ids[rows, :start], ids[rows, start:]
                behind = ids.shape[1] if model.block_causal else start
                padding = None if mask is None else check_mask(ids[rows, :behind], mask[rows, :behind])
                loop = loop_of(model)(model, prompt, padding, some, processors or None, static, given, rows)
                decode(loop, streamer, criteria, prompt, stops_of(some, tokenizer, *loop.prompts))
            loops.append((rows, loop))
        out = output_of(ids, loops)
        return out if config.return_dict_in_generate else out.sequences

    def asked(
        self,
        input_ids: Any,
        attention_mask: Any,
        generation_config: Any,
        overrides: dict[str, Any],
        copies: int | None = None,
    ) -> tuple[Tensor, Tensor | None, DiffusionGenerationConfig]:
        """The prompts `[B, P]`, each so many times, their attention mask (None: no padding), and all settings."""
        self.before_decode()
        overrides = dict(overrides)
        inputs = overrides.pop("inputs", None)
        overrides.pop("token_type_ids", None)  # some tokenizers return them, all zero
        device = next(iter(self.parameters())).device  # type: ignore[attr-defined]
        ids, mask = prompt_of(inputs if input_ids is None else input_ids, attention_mask, device)
        config = self.settled(generation_config, overrides, ids.shape[1])
        check_ids(ids, self.config.vocab_size)
        mask = inferred_padding(ids, config) if mask is None else check_mask(ids, mask)
        if config.draws and config.seed is None:
            config = replace(config, seed=drawn_seed(cast(DiffusionModel, self), ids.device))
        times = check_copies(copies, config)
        return ids.repeat_interleave(times, 0), None if mask is None else mask.repeat_interleave(times, 0), config

    def check_window(self, ids: Tensor, mask: Tensor | None, new: int) -> None:
        longest = ids.shape[1] if mask is None else int(mask.sum(1).amax())
        window = self.config.max_position_embeddings
        if longest + new > window:
            raise ValueError(f"prompt of {longest} tokens and {new} new ones exceed the model's window of {window}")

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
        self.before_decode()
        config = self.settled(generation_config, overrides, prompt_length)
        weight = next(iter(self.parameters()))  # type: ignore[attr-defined]
        ids = torch.full((batch_size, prompt_length), config.pad_token_id or 0, dtype=torch.int64, device=weight.device)
        masks: list[Tensor | None] = [None]
        if batch_size > 1 and prompt_length:
            ragged = torch.ones_like(ids, dtype=torch.bool)
            ragged[0, 0] = False
            masks.append(ragged)
        model = cast(DiffusionModel, self)
        with steps_for(model, config, ids.device) as static:
            if static is not None:
                for mask in masks:
                    loop_of(model)(model, ids, mask, config, None, static).warm_up()

    def before_decode(self) -> None:
        """Look at the model before it decodes. `ValueError`: it holds an adapter that a decode cannot apply."""
        check_adapters(self)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Named by peft, which wants to see it in a model of task type CAUSAL_LM. No block decode calls it."""
        raise NotImplementedError("prepare_inputs_for_generation: a block decode prepares no inputs token by token")

    def settled(
        self,
        generation_config: DiffusionGenerationConfig | GenerationConfig | None,
        overrides: dict[str, Any],
        prompt_length: int | None = None,
    ) -> DiffusionGenerationConfig:
        """All settings of a decode: `overrides` win over `generation_config`, which wins over the model's."""
        own = check_kind(getattr(self, "generation_config", DiffusionGenerationConfig()))
        if isinstance(generation_config, GenerationConfig):
            overrides, generation_config = generation_config.to_diff_dict() | overrides, None
        base = own if generation_config is None else check_kind(generation_config)
        settings = replace(base, **settings_of(overrides, base, prompt_length))
        missing = {name: getattr(own, name) for name in TOKEN_IDS if getattr(settings, name) is None}
        settings = with_token_ids(with_blocks(replace(settings, **missing), cast(DiffusionModel, self)), self.config)
        check_filtered_ids(settings, self.config.vocab_size)
        return settings

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


def decode(
    loop: BlockLoop,
    streamer: BaseStreamer | None,
    criteria: StoppingCriteriaList,
    prompt: Tensor,
    stops: StopStrings | None = None,
) -> None:
    """Run `loop` to its end, block by block, as `generate` says."""
    put_draft = getattr(streamer, "put_draft", None)
    if streamer is not None:
        streamer.put(prompt.cpu())
    for block in range(len(loop.blocks)):
        live = loop.live
        for _ in loop.steps(block, watch=put_draft is not None):
            if put_draft is not None:
                put_draft(loop.block_tokens(block, draft=True).cpu())
        if stops is not None:
            end_at_strings(loop, stops, block, live)
        if criteria:
            loop.stop(criteria, block)
        if streamer is not None and (tokens := loop.block_tokens(block)).shape[1]:
            streamer.put(tokens.cpu())
        if loop.finished():
            break
    if streamer is not None:
        streamer.end()


def stay(model: DiffusionModel) -> str:
    """What becomes of masks in a prompt."""
    if model.block_causal:
        return "stay as they are before the block in which the response begins, and are filled in it"
    return "stay as they are"


def with_blocks(config: DiffusionGenerationConfig, model: DiffusionModel) -> DiffusionGenerationConfig:
    """`config` with the model's own block lengths where it has none.

    Raises:
        ValueError: settings that make no sense with, or without, a block-causal model.
    """
    if config.block_length is None:
        config = replace(config, block_length=model.default_block_length)
    if not model.block_causal:
        if config.sub_block_length is not None:
            raise ValueError(f"sub_block_length={config.sub_block_length}: expected a block-causal model")
        return config
    if config.refresh != ALL:
        raise ValueError(f"refresh='{config.refresh}': nothing of a block-causal model has to be fed again")
    if config.sub_block_length is None:
        return replace(config, sub_block_length=model.default_sub_block_length)
    return config


def lists(
    streamer: Any, logits_processor: Any, stopping_criteria: Any
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    """Processors and criteria as transformers' lists; `ValueError` on a streamer that wants logits."""
    if getattr(streamer, "_takes_logits", False):
        raise ValueError(f"streamer: expected one of tokens, got {type(streamer).__name__}, which takes logits")
    return LogitsProcessorList(logits_processor or []), StoppingCriteriaList(stopping_criteria or [])


def check_copies(num_return_sequences: int | None, config: DiffusionGenerationConfig) -> int:
    """How often to decode every prompt; `ValueError` if that does not fit."""
    copies = 1 if num_return_sequences is None else num_return_sequences
    if not is_int(copies) or copies < 1:
        raise ValueError(f"num_return_sequences: expected an int of at least 1, got {num_return_sequences!r}")
    if copies > 1 and not config.draws:
        raise ValueError(f"num_return_sequences={copies} would be the same {copies} times: expected a temperature")
    return copies


def drawn_seed(model: DiffusionModel, device: torch.device) -> int:
    """A seed from PyTorch's CPU generator; under tensor parallelism that of the first process."""
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")
    held = slice_held(model)
    return int(seed if held is None else held.agreed(seed.to(device)))


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
    foreign = overrides.keys() - set(SETTINGS)
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
