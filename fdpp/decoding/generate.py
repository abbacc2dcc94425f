"""`generate`: the shape of transformers' text-diffusion models around the block loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fdpp.decoding.config import DiffusionGenerationConfig
from fdpp.decoding.loop import BlockLoop


class DiffusionGenerationMixin:
    """Gives `generate` to a model with `model(input_ids, attention_mask, position_ids, cache, start)` and `project`."""

    config: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: DiffusionGenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **overrides: Any,
    ) -> Any:
        """Decode a response block by block.

        Args:
            input_ids: `[B, P]` int64 prompts, padded on the left; P may be 0.
            attention_mask: `[B, P]`, 1 at prompt tokens and 0 at padding; None: no padding.
            generation_config: settings; any of its fields can also be given by name and then wins.
            streamer: receives `put(prompt)`, `put_draft(block)` after every step where it has it, `put(block)` for
                every finished block and `end()`, as `transformers.TextDiffusionStreamer` does.
            stopping_criteria: called after every block with the sequences so far; True ends a sequence.

        Returns:
            `DiffusionGenerationOutput` (sequences, nfe, tokens per forward), or the sequences alone with
            `return_dict_in_generate=False`. Prompt tokens are never changed, whatever ids they hold.

        Raises:
            ValueError: a setting, shape or dtype that does not fit; a prompt that with its response is longer than the
                model's window.
            FloatingPointError: the model produced NaN, +inf or only -inf at a masked position.
        """
        unknown = set(overrides) - set(DiffusionGenerationConfig.__dataclass_fields__)
        if unknown:
            known = ", ".join(DiffusionGenerationConfig.__dataclass_fields__)
            raise TypeError(f"generate: unknown settings {sorted(unknown)}; known are {known}")
        base = DiffusionGenerationConfig() if generation_config is None else generation_config
        if not isinstance(base, DiffusionGenerationConfig):
            raise TypeError(f"generation_config: expected a DiffusionGenerationConfig, got {type(base).__name__}")
        config = with_token_ids(replace(base, **overrides), self.config)
        attention_mask = check_prompt(input_ids, attention_mask)
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(1).amax())
        window = self.config.max_sequence_length
        if longest + config.max_new_tokens > window:
            raise ValueError(
                f"prompt of {longest} tokens and {config.max_new_tokens} new ones exceed the model's window of {window}"
            )
        loop = BlockLoop(self, input_ids, attention_mask, config)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for block in range(len(config.blocks())):
            put_draft = getattr(streamer, "put_draft", None)
            for _ in loop.steps(block, watch=put_draft is not None):
                if put_draft is not None:
                    put_draft(loop.block_tokens(block).cpu())
            if stopping_criteria is not None:
                loop.stop(StoppingCriteriaList(stopping_criteria), block)
            if streamer is not None:
                streamer.put(loop.block_tokens(block).cpu())
            if loop.finished():
                break
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return loop.sequences
        return loop.output()


def with_token_ids(config: DiffusionGenerationConfig, model_config: Any) -> DiffusionGenerationConfig:
    """`config` with its missing token ids from the model's, all checked against its vocabulary.

    The padding id falls back to the first EOS id.
    """
    mask, eos, pad = (
        getattr(model_config, name, None) if getattr(config, name) is None else getattr(config, name)
        for name in ("mask_token_id", "eos_token_id", "pad_token_id")
    )
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = eos[0] if pad is None and eos else pad
    for name, value in (("mask_token_id", mask), ("pad_token_id", pad), *(("eos_token_id", e) for e in eos)):
        if not isinstance(value, int) or not 0 <= value < model_config.vocab_size:
            raise ValueError(f"{name}: expected an id below the vocabulary's {model_config.vocab_size}, got {value!r}")
    if mask in (pad, *eos):
        raise ValueError(f"mask_token_id: expected another id than those of EOS and padding, got {mask}")
    return replace(config, mask_token_id=mask, eos_token_id=eos, pad_token_id=pad)


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
