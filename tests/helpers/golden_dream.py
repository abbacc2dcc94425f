"""Recorded outputs of published Dream programs (`data/dream/FORMAT.md` describes every array)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_dream import PlainDream
from torch import Tensor

from fdpp import DreamModelLM

DATA = Path(__file__).parents[1] / "data/dream"
MASK, PAD = 500, 501
PEERS = ("dream", "dream_v0", "fastdllm", "fastdllmpp", "dawn", "freedave")


@dataclass(frozen=True)
class DreamRun:
    """One published decode; `out`, `step_of` and `draws` are None where there are none (an `error`, no draws)."""

    peer: str
    run: dict[str, Any]
    prompt: Tensor
    calls: Tensor
    out: Tensor | None
    step_of: Tensor | None
    draws: Tensor | None

    @property
    def id(self) -> str:
        alg = self.run["params"].get("alg", self.run["func"])
        return f"{self.peer}-{self.run['id']}-{alg}-{self.run['prompt']}"

    @property
    def new(self) -> int:
        params = self.run["params"]
        return params.get("max_new_tokens") or params["max_gen_length"]

    @property
    def attention_mask(self) -> Tensor | None:
        return (self.prompt != PAD).long() if "attention_mask" in self.run else None


@functools.cache
def model(name: str) -> DreamModelLM:
    return DreamModelLM.from_pretrained(DATA / name).eval()


@functools.cache
def plain(name: str) -> PlainDream:
    return PlainDream(DATA / name)


@functools.cache
def forward_arrays() -> dict[str, Tensor]:
    with np.load(DATA / "trajectories/forward.npz") as stored:
        return {name: torch.from_numpy(array) for name, array in stored.items()}


@functools.cache
def forward_facts() -> dict[str, Any]:
    return json.loads((DATA / "trajectories/forward.json").read_text())


def schedule_tables() -> list[dict[str, Any]]:
    """`masks`, `steps`, `eps` and the published `counts` of every step."""
    return json.loads((DATA / "trajectories/schedule.json").read_text())["tables"]


@functools.cache
def runs(peer: str) -> list[DreamRun]:
    """The decodes of one published project, those that raised as well."""
    described = json.loads((DATA / f"trajectories/{peer}.json").read_text())["runs"]
    with np.load(DATA / f"trajectories/{peer}.npz") as stored:
        arrays = {name: torch.from_numpy(array) for name, array in stored.items()}
    arrays = {name: array if array.is_floating_point() else array.long() for name, array in arrays.items()}
    return [
        DreamRun(
            peer=peer,
            run=run,
            prompt=arrays[f"prompt_{run['prompt']}"],
            calls=arrays[f"{run['id']}_calls"],
            out=arrays.get(f"{run['id']}_out"),
            step_of=arrays.get(f"{run['id']}_step_of"),
            draws=arrays.get(f"{run['id']}_rand"),
        )
        for run in described
    ]
