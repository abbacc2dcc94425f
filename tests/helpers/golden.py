"""Recorded inputs and outputs of the published implementations (`data/FORMAT.md` describes every array)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdpp.models.llada import LLaDAModelLM

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class SelectorCase:
    """One input of the published selectors and what each call made of it; shapes as in FORMAT.md, section 1."""

    id: str
    mask_id: int
    runs: list[dict[str, Any]]
    logits: Tensor
    x: Tensor
    mask: Tensor
    argmax: Tensor
    conf64: Tensor
    x0: Tensor
    transfer_index: Tensor
    x_after: Tensor | None


@dataclass(frozen=True)
class Trajectory:
    """One complete published decode."""

    peer: str
    run: dict[str, Any]
    prompt: Tensor
    out: Tensor
    step_of: Tensor
    calls: Tensor

    @property
    def id(self) -> str:
        return f"{self.peer}-{self.run['run']}-{self.run['mode']}"


def selector_index() -> list[dict[str, Any]]:
    """Id, group, tags and shape of every selector case."""
    return json.loads((DATA / "selectors/index.json").read_text())["cases"]


def stored_logits(arrays: Any, name: str) -> Tensor:
    if f"{name}_f32" in arrays:
        return torch.from_numpy(arrays[f"{name}_f32"])
    return torch.from_numpy(arrays[f"{name}_bf16"].view(np.int16)).view(torch.bfloat16)


@functools.lru_cache(maxsize=4)
def selector_case(case_id: str) -> SelectorCase:
    with np.load(DATA / f"selectors/{case_id}.npz") as stored:
        arrays = dict(stored)
    meta = json.loads(bytes(arrays["meta"]))
    logits = stored_logits(arrays, "logits")
    if "cfg" in meta["tags"]:
        unconditional = stored_logits(arrays, "logits_uncond")
        scale = meta["runs"][0]["params"]["cfg_scale"]
        logits = unconditional + (scale + 1) * (logits - unconditional)
    return SelectorCase(
        id=case_id,
        mask_id=meta["mask_id"],
        runs=meta["runs"],
        logits=logits,
        x=torch.from_numpy(arrays["x"]).long(),
        mask=torch.from_numpy(arrays["mask"]),
        argmax=torch.from_numpy(arrays["argmax"]).long(),
        conf64=torch.from_numpy(arrays["conf64"]),
        x0=torch.from_numpy(arrays["x0"]).long(),
        transfer_index=torch.from_numpy(arrays["transfer_index"]),
        x_after=torch.from_numpy(arrays["x_after"]).long() if "x_after" in arrays else None,
    )


@functools.cache
def model(name: str) -> LLaDAModelLM:
    return LLaDAModelLM.from_pretrained(DATA / name).eval()


@functools.cache
def forward_arrays() -> dict[str, Tensor]:
    with np.load(DATA / "trajectories/forward.npz") as stored:
        return {name: torch.from_numpy(array) for name, array in stored.items()}


@functools.cache
def trajectories(peer: str) -> list[Trajectory]:
    """The decodes of one published project that returned."""
    runs = json.loads((DATA / f"trajectories/{peer}.json").read_text())["runs"]
    with np.load(DATA / f"trajectories/{peer}.npz") as stored:
        arrays = {name: torch.from_numpy(array).long() for name, array in stored.items()}
    return [
        Trajectory(
            peer=peer,
            run=run,
            prompt=arrays[f"prompt_{run['prompt']}"],
            out=arrays[f"{run['run']}_out"],
            step_of=arrays[f"{run['run']}_{'step_map' if peer == 'freedave' else 'step_of'}"],
            calls=arrays[f"{run['run']}_calls"],
        )
        for run in runs
        if "error" not in run
    ]


def seen_by_rows(step_of: Tensor, block_length: int) -> tuple[Tensor, Tensor]:
    """The decode counted per row: the row's own step that decided each position, `[B, R]`, and its forwards `[B]`.

    `step_of` counts the batch's forwards. There the rows begin a block together, when the slowest has finished the one
    before. A row takes no part in forwards after its own block is complete.
    """
    own = torch.zeros(step_of.shape[0], 1, dtype=torch.int64)
    begin, steps = 0, []
    for block in step_of.split(block_length, dim=1):
        steps.append(own + block - begin)
        own = own + block.amax(1, keepdim=True) - begin + 1
        begin = int(block.amax()) + 1
    return torch.cat(steps, dim=1), own[:, 0]
