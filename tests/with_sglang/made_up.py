"""Stand-ins for what SGLang's loops are called with: batches of blocks, and a model of made-up logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, MASK, BLOCK = 97, 96, 8


class MadeUpModel:
    """In place of `ModelRunner`: logits made up from a request's block alone, as if its context were part of it."""

    def __init__(self, spoil: Callable[[list[int], Tensor], None] | None = None) -> None:
        self.spoil, self.forwards = spoil, 0

    def logits(self, block: list[int]) -> Tensor:
        """`[BLOCK, VOCABULARY]`: rows from nearly uniform to nearly certain."""
        generator = torch.Generator().manual_seed(hash(tuple(block)) % 2**32)
        scale = torch.rand(BLOCK, 1, generator=generator) * 8
        logits = torch.randn(BLOCK, VOCABULARY, generator=generator) * scale
        if self.spoil:
            self.spoil(block, logits)
        return logits.to(DEVICE)

    def forward(self, forward_batch: Any, pp_proxy_tensors: None) -> Any:
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput
        from sglang.srt.model_executor.model_runner import ModelRunnerOutput

        self.forwards += 1
        blocks = forward_batch.input_ids.view(-1, BLOCK).tolist()
        full_logits = torch.cat([self.logits(block) for block in blocks])
        output = LogitsProcessorOutput(next_token_logits=None, full_logits=full_logits)
        return ModelRunnerOutput(logits_output=output, can_run_graph=False)


def batch_of(blocks: list[list[int]], prompt_lens: list[int] | None = None) -> Any:
    """SGLang's `ForwardBatch` of these blocks; with `prompt_lens`, committed tokens are marked as SGLang marks them."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    tokens = torch.tensor(blocks, device=DEVICE)
    B = tokens.shape[0]
    rows = torch.arange(B, device=DEVICE)
    batch = ForwardBatch(
        forward_mode=ForwardMode.DLLM_EXTEND,
        batch_size=B,
        input_ids=tokens.view(-1),
        req_pool_indices=rows,
        seq_lens=torch.full_like(rows, BLOCK),
        out_cache_loc=torch.arange(B * BLOCK, device=DEVICE),
        seq_lens_sum=B * BLOCK,
        rids=[f"request-{i}" for i in range(B)],
    )
    if prompt_lens is not None:
        batch.dllm_prompt_mask = torch.arange(BLOCK, device=DEVICE) < torch.tensor(prompt_lens, device=DEVICE)[:, None]
    return batch


def block(prompt_len: int, seed: int = 0) -> list[int]:
    """A block of `prompt_len` committed tokens and masks."""
    return [(7 * i + 13 * seed) % MASK for i in range(prompt_len)] + [MASK] * (BLOCK - prompt_len)
