"""A stand-in for what fdpp's plugin imports of SGLang, where that is not installed.

It has the names, arguments and returned values of SGLang's `DllmAlgorithm`, whose loops here are written anew and
short. The released package itself is tested against by `make sglang-check`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class DllmConfig(NamedTuple):
    algorithm: str
    algorithm_config: dict[str, Any]
    block_size: int
    mask_id: int
    first_done_first_out_mode: bool = False


class DllmAlgorithm:
    """A block is denoised in place, in `forward_batch.input_ids` `[B * block_size]`."""

    def __init__(self, config: DllmConfig) -> None:
        self.block_size, self.mask_id = config.block_size, config.mask_id
        self.fdfo = config.first_done_first_out_mode

    def init_step_state(self, forward_batch: Any) -> list[Any]:
        return [None] * forward_batch.batch_size

    def max_steps(self, block_size: int) -> int:
        return block_size + 1

    def step(self, forward_batch: Any, full_logits: Tensor, states: list[Any]) -> list[bool]:
        raise NotImplementedError

    def run(self, model_runner: Any, forward_batch: Any, algo_states: list[Any] | None = None) -> Any:
        """Whole blocks, or with first-done-first-out one forward of blocks of any age, whose states are handed on."""
        fresh = self.init_step_state(forward_batch)
        states = [new if old is None else old for new, old in zip(fresh, algo_states or fresh, strict=True)]
        blocks = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size)
        starts = (blocks != self.mask_id).sum(1).tolist()
        for _ in range(1 if self.fdfo else self.max_steps(self.block_size)):
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
            done = self.step(forward_batch, out.logits_output.full_logits, states)
            if all(done):
                break
        else:
            assert self.fdfo, "the block was not done after max_steps"
        if not self.fdfo:
            return out.logits_output, [row[n:] for row, n in zip(blocks, starts, strict=True)], None, None, False
        lengths = [self.block_size if finished else 0 for finished in done]
        handed_on = [None if finished else state for finished, state in zip(done, states, strict=True)]
        return out.logits_output, blocks.tolist(), lengths, handed_on, False


def modules() -> dict[str, ModuleType]:
    """By name, for `sys.modules`."""
    off = SimpleNamespace(get=lambda: False)
    held: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.dllm": {},
        "sglang.srt.dllm.algorithm": {"algo_name_to_cls": {}},
        "sglang.srt.dllm.algorithm.base": {"DllmAlgorithm": DllmAlgorithm},
        "sglang.srt.dllm.config": {"DllmConfig": DllmConfig},
        "sglang.srt.environ": {
            "envs": SimpleNamespace(SGLANG_ENABLE_NAN_LOGITS_CHECK=off, SGLANG_ENABLE_ASYNC_ASSERT=off)
        },
    }
    made = {}
    for name, content in held.items():
        made[name] = ModuleType(name)
        made[name].__path__ = []
        vars(made[name]).update(content)
    return made


def batch_of(blocks: list[list[int]], prompt_lens: list[int]) -> Any:
    """A `ForwardBatch` of blocks that begin with so many tokens of a prompt."""
    tokens = torch.tensor(blocks)
    prompt = torch.arange(tokens.shape[1]) < torch.tensor(prompt_lens)[:, None]
    rids = [f"request-{i}" for i in range(len(blocks))]
    return SimpleNamespace(batch_size=len(blocks), input_ids=tokens.view(-1), dllm_prompt_mask=prompt, rids=rids)


class Runner:
    """In the place of `ModelRunner`: `logits` of a context and a block, for the blocks of a batch with `contexts`.

    `seen` are the blocks of the last forward.
    """

    def __init__(self, logits: Callable[[list[int], list[int]], Tensor]) -> None:
        self.logits, self.contexts, self.seen = logits, list[list[int]](), list[list[int]]()

    def forward(self, forward_batch: Any, pp_proxy_tensors: None) -> Any:
        self.seen = forward_batch.input_ids.view(forward_batch.batch_size, -1).tolist()
        rows = [self.logits(context, block) for context, block in zip(self.contexts, self.seen, strict=True)]
        return SimpleNamespace(logits_output=SimpleNamespace(full_logits=torch.cat(rows)))
