"""A small random DiffusionGemma, and transformers' own decode of it with the draws of fdpp's stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSampler

from fdpp.step.draw import draw
from fdpp.step.noise import renoise

V, CANVAS = 120, 16


def tiny_gemma(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Two layers of 32 channels, four experts and 120 ids; `seed` makes the weights, and sharp logits."""
    text = DiffusionGemmaTextConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        max_position_embeddings=256,
    )
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        position_embedding_size=16,
    )
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
        image_token_id=V - 2,
        boi_token_id=V - 3,
        eoi_token_id=V - 1,
    )
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.mul_(40.0)
    return model.to(dtype)


class Replay:
    """fdpp's draws for transformers' own step: seeds from torch's generator, once a step."""

    def multinomial(self, probs: Tensor, num_samples: int) -> Tensor:
        T = CANVAS
        self.seeds = torch.randint(2**63 - 1, (probs.shape[0] // T,)).repeat_interleave(T)
        self.positions = torch.arange(T).repeat(probs.shape[0] // T)
        assert num_samples == 1
        return draw(probs.double().log(), self.seeds, self.positions, 1.0)[1][:, None]

    def renoise(self, sampler: Any, accepted_canvas: Tensor, cur_step: int) -> Tensor:
        fresh = renoise(self.seeds, self.positions, sampler.vocab_size).view_as(accepted_canvas)
        return torch.where(sampler.accepted_token_mask, accepted_canvas, fresh)


@contextmanager
def replayed() -> Iterator[None]:
    """transformers' step draws what fdpp's draws after the same `torch.manual_seed`."""
    replay = Replay()

    def renoise_canvas(self: Any, accepted_canvas: Tensor, cur_step: int) -> Tensor:
        return replay.renoise(self, accepted_canvas, cur_step)

    multinomial = patch.object(torch, "multinomial", replay.multinomial)
    with multinomial, patch.object(EntropyBoundSampler, "renoise_canvas", renoise_canvas):
        yield


def decoded(model: Any, ids: Tensor, seed: int = 0, **settings: Any) -> tuple[list[list[int]], list[float]]:
    """Sequences, and tokens per forward, of one `generate`."""
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 2 * CANVAS, "max_denoising_steps": 12, "pad_token_id": 0, **settings}
    out = model.generate(ids, **settings)
    return out.sequences.tolist(), out.tokens_per_forward.tolist()


def prompt(batch: int, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, V - 3, (batch, length), generator=torch.Generator().manual_seed(seed))
