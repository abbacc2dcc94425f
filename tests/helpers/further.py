"""Recorded decodes of rules that look further, on `model_tiny` (`data/FORMAT.md`, section 5)."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import torch
from golden import DATA, model
from torch import Tensor

import fdpp

FOLDER = DATA / "further"


def runs(peer: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{peer}.json").read_text())["runs"]


@functools.cache
def arrays(peer: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{peer}.npz") as stored:
        return {name: torch.from_numpy(array).long() for name, array in stored.items()}


def assert_as_recorded(peer: str, run: dict[str, Any], rule: fdpp.Rule, **settings: Any) -> None:
    """A decode with `rule` has the run's tokens, its number of forwards, and the forward that committed each."""
    prompt, tokens, step_of = recorded(peer, run)
    params = run["params"]
    out: Any = model(run["model"]).generate(
        prompt,
        rule=rule,
        max_new_tokens=params["gen_length"],
        block_length=params["block_length"],
        cache="none",
        stop_at_eos=False,
        **settings,
    )
    assert out.sequences.equal(tokens) and int(out.nfe) == run["n_forward"]
    assert out.commit_step.equal(step_of)


def recorded(peer: str, run: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """A run's prompt `[1, P]`, tokens `[1, P + L]`, and the forwards that last committed the response's `[1, L]`."""
    prompt, tokens, step_of = (arrays(peer)[n] for n in (f"prompt_{run['prompt']}", *of_run(run, "out", "step_of")))
    return prompt, tokens, step_of[:, prompt.shape[1] :]


def of_run(run: dict[str, Any], *names: str) -> list[str]:
    return [f"{run['run']}_{name}" for name in names]
