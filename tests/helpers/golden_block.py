"""Recorded decodes of published block-diffusion programs (`data/block/FORMAT.md` describes every array)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / "data/block"
FAMILIES = {
    "sdar": "sdar",
    "jetengine": "sdar",
    "freedave": "sdar",
    "llada20": "llada2",
    "llada21": "llada2",
    "diffusers": "llada2",
    "dinfer": "llada2",
    "generate": "fastdllm2",
    "batch_sample": "fastdllm2",
}
"""The folder of every peer."""
MASKS = {"sdar": 300, "llada2": 270, "fastdllm2": 270}
PAD = 271
LENGTHS = ("gen_length", "max_gen_length", "max_tokens", "max_new_tokens")
STOPS = ("stopping_criteria_idx", "stop_words", "eos_id", "eos_token_id", "stop_token")


@dataclass(frozen=True)
class BlockRun:
    """One published decode of one or several prompts.

    Attributes:
        facts: the run's fields.
        prompts, out: int64 `[n]` and `[L]` of every row; `out` is empty where the call raised.
        step_of: int64 `[L]` of every row, the call that decided a position; empty where it was not recorded.
        calls: int64 `[n_forward, c]`.
        edits: int64 `[k, 5]`, tokens that changed after they were set: call, row, position, old, new.
        logprobs: float32 `[L]` of every row, empty where they were not recorded.
    """

    peer: str
    facts: dict[str, Any]
    prompts: list[Tensor]
    out: list[Tensor]
    step_of: list[Tensor]
    calls: Tensor
    edits: Tensor
    logprobs: list[Tensor]

    @property
    def id(self) -> str:
        return f"{self.peer}-{self.facts['id']}-{''.join(self.names)}"

    @property
    def names(self) -> list[str]:
        """Those of the prompts."""
        return self.facts.get("prompts") or [self.facts["prompt"]]

    @property
    def params(self) -> dict[str, Any]:
        """The keyword arguments; dInfer's are among the facts."""
        return self.facts.get("params", self.facts)

    @property
    def mask(self) -> int:
        return MASKS[FAMILIES[self.peer]]

    @property
    def block_length(self) -> int:
        return self.params.get("block_length") or self.params["block_size"]

    @property
    def new(self) -> int:
        """How many tokens were asked for."""
        return next(self.params[name] for name in LENGTHS if name in self.params)

    @property
    def edits_tokens(self) -> bool:
        """Whether a call may turn no mask into a token."""
        # Diffusers' pipeline takes 0 for none.
        return self.peer == "llada21" or bool(self.params.get("editing_threshold"))

    @property
    def stops(self) -> list[int]:
        """The ids that end it."""
        found = next((self.params[name] for name in STOPS if self.params.get(name) is not None), [])
        return [id for id in ([found] if isinstance(found, int) else found) if id >= 0]

    def canvas(self, row: int) -> int:
        """Columns that are decoded if nothing ends it, in whole blocks."""
        n, T = len(self.prompts[row]), self.block_length
        if FAMILIES[self.peer] == "fastdllm2":
            return (self.new // T + max(map(len, self.prompts)) // T) * T
        return -(-(n + self.new) // T) * T

    def commit_step(self, row: int) -> Tensor:
        """The last of the row's own deciding calls that turned a mask into a token; or edited it, of all calls."""
        step_of = self.step_of[row]
        if self.edits_tokens:
            step_of = step_of.clone()
            for call, at, position, _old, _new in self.edits.tolist():
                step_of[position] = call if at == row else step_of[position]
            return step_of
        calls = step_of[step_of >= 0]
        if self.calls.shape[1] >= 4 and self.peer != "jetengine":
            # Of a sequence that ended, calls may have decided nothing that is left of it.
            calls = torch.cat((calls, (self.calls[:, 3] == 0).nonzero().flatten()))
        return torch.where(step_of >= 0, torch.searchsorted(calls.unique(), step_of), -1)

    @property
    def alone(self) -> list[int]:
        """The rows that are what they are in a batch of one."""
        if len(self.prompts) == 1:
            return [0]
        # That of padded rows was not looked at, and only editing makes rows depend on each other there.
        unknown = [not self.edits_tokens] * len(self.prompts)
        return [row for row, same in enumerate(self.facts.get("rows_equal_batch1", unknown)) if same]

    def settings(self, row: int) -> dict[str, Any]:
        """`params` of one row, where a list has one for each."""
        whole = ("stop_words", "stopping_criteria_idx")
        return {k: v[row] if isinstance(v, list) and k not in whole else v for k, v in self.params.items()}


@functools.cache
def runs(peer: str) -> list[BlockRun]:
    """The decodes of one published program, those that raised as well."""
    folder = DATA / FAMILIES[peer] / "trajectories"
    described = json.loads((folder / f"{peer}.json").read_text())["runs"]
    with np.load(folder / f"{peer}.npz") as stored:
        arrays = {name: torch.from_numpy(array) for name, array in stored.items()}
    arrays = {name: array if array.is_floating_point() else array.long() for name, array in arrays.items()}
    return [run_of(peer, facts, arrays) for facts in described]


def run_of(peer: str, facts: dict[str, Any], arrays: dict[str, Tensor]) -> BlockRun:
    names = facts.get("prompts") or [facts["prompt"]]
    prompts = [row for name in names for row in arrays[f"prompt_{name}"]]

    def rows(name: str) -> list[Tensor]:
        if f"{facts['id']}_{name}" in arrays:
            found = list(arrays[f"{facts['id']}_{name}"])
        else:
            keys = (f"{facts['id']}_{name}{row}" for row in range(len(prompts)))
            found = [arrays[key] for key in keys if key in arrays]
        found = [row[: facts["lengths"][i]] if "lengths" in facts else row for i, row in enumerate(found)]
        return [row[k:] for row, k in zip(found, padding, strict=False)]

    # One is padded, by a whole block.
    padding = [int((prompt == PAD).sum()) for prompt in prompts]
    prompts = [prompt[k:] for prompt, k in zip(prompts, padding, strict=True)]

    none = torch.zeros(0, 5, dtype=torch.int64)
    return BlockRun(
        peer=peer,
        facts=facts,
        prompts=prompts,
        out=rows("out"),
        step_of=rows("step_of"),
        calls=arrays.get(f"{facts['id']}_calls", none),
        edits=arrays.get(f"{facts['id']}_edits", none),
        logprobs=rows("logprobs"),
    )
