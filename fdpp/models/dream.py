"""Dream (Ye et al., Dream 7B: Diffusion Large Language Models, arXiv 2508.15487): Dream-v0-Base-7B, -Instruct-7B,
Dream-Coder and others of this architecture.

A Qwen2.5 transformer with bidirectional attention: RMSNorm, SwiGLU, rotary positions, grouped key heads, biases on
queries, keys and values. It was trained on from an autoregressive model, and so the row of a position predicts the next
position's token. The parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdpp.decoding.output import DiffusionGenerationOutput
from fdpp.models.dream_config import DreamConfig
from fdpp.models.qwen import QwenBlock, QwenLM, QwenTransformer
from fdpp.rules.dream import rule_of
from fdpp.selection import MAX_POSITIONS


class DreamBlock(QwenBlock):
    biased = True


class DreamTransformer(QwenTransformer):
    """The transformer up to its final norm."""

    config_class = DreamConfig
    block_class = DreamBlock
    _no_split_modules = ("DreamBlock",)


@dataclass
class DreamModelOutput(DiffusionGenerationOutput):
    """What `diffusion_generate` returns with `return_dict_in_generate=True`.

    Attributes:
        history: `[B, P + max_new_tokens]` int64 after every step, masks included; None without `output_history`.
    """

    history: tuple[Tensor, ...] | None = None


class DreamModelLM(QwenLM):
    """Dream with its language-model head and `generate`."""

    config_class = DreamConfig
    transformer_class = DreamTransformer
    published = "DreamModel"
    shift = 1
    _no_split_modules = ("DreamBlock",)
    model: DreamTransformer

    def diffusion_generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        steps: int = 512,
        eps: float = 1e-3,
        alg: str = "origin",
        alg_temp: float | None = None,
        output_history: bool = False,
        return_dict_in_generate: bool = False,
        generation_tokens_hook_func: Any = None,
        generation_logits_hook_func: Any = None,
        **settings: Any,
    ) -> Any:
        """Decode as Dream's own method of this name does: without a cache, the response one block (of 1,024 at most).

        It is `generate` with the rule that `alg`, `eps` and `alg_temp` name, see `fdpp.rules.dream`. Steps that decide
        nothing are left out, so there are at most `steps` forwards, for the same tokens. What differs from the
        published method: rows of a batch do not compete, a mask is never proposed, no mask is left in the response,
        masks of the prompt stay, `top_k` is what is passed and not 50, and confidences are those without temperature.

        Args:
            inputs: `[B, P]` int64 prompts, or `input_ids=`.
            generation_config: as in `generate`.
            steps: of the response.
            eps: where the schedule's times end.
            alg: "origin", "maskgit_plus", "topk_margin" or "entropy".
            alg_temp: of the draw among positions; None or 0: the most certain ones.
            output_history: also return the sequences after every step.
            return_dict_in_generate: a `DreamModelOutput` in the place of the sequences alone.
            generation_tokens_hook_func, generation_logits_hook_func: None; `generate` has `streamer=` and
                `logits_processor=` for what they do.
            settings: as in `generate`: `attention_mask`, `max_new_tokens`, `temperature`, `top_p`, `top_k`, or
                `cache`, `block_length` and `rule`, in the place of the schedule. `stop_at_eos` is off unless given.

        Raises:
            As `generate`; `ValueError` on another `alg`, or a hook.
        """
        hooks = {
            "generation_tokens_hook_func": (generation_tokens_hook_func, "streamer"),
            "generation_logits_hook_func": (generation_logits_hook_func, "logits_processor"),
        }
        for name, (hook, instead) in hooks.items():
            if hook is not None:
                raise ValueError(f"diffusion_generate: {name} is not implemented, expected {instead}= in its place")
        schedule = {} if "rule" in settings else {"rule": rule_of(alg, eps, alg_temp), "steps": steps}
        settings = {"cache": "none", "block_length": MAX_POSITIONS, "stop_at_eos": False, **schedule, **settings}
        ids = settings.pop("input_ids", inputs)
        settings["return_dict_in_generate"] = True
        out = self.generate(ids, generation_config=generation_config, **settings)
        if not return_dict_in_generate:
            return out.sequences
        if not output_history:
            return DreamModelOutput(**out)
        mask_id = settings.get("mask_token_id")
        if mask_id is None:
            mask_id = self.settled(generation_config, {}).mask_token_id
        return DreamModelOutput(**out, history=history_of(out, mask_id))


def history_of(out: DiffusionGenerationOutput, mask_id: int | None) -> tuple[Tensor, ...]:
    """The sequences `[B, L]` after every step of their own, masks included."""
    assert out.sequences is not None and out.commit_step is not None and mask_id is not None
    new = out.commit_step.shape[1]
    prompts, response = out.sequences.split((out.sequences.shape[1] - new, new), dim=1)
    last = int(out.commit_step.amax()) if out.commit_step.numel() else -1
    # What no step committed is padding behind an EOS.
    committed = torch.where(out.commit_step < 0, last, out.commit_step)
    states = [response.masked_fill(committed > step, mask_id) for step in range(last + 1)]
    return tuple(torch.cat((prompts, state), dim=1) for state in states)
