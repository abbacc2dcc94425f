"""Rules of other projects, each in a module of its own, against decodes of the published programs."""

from __future__ import annotations

import json
from typing import Any

import golden
import numpy as np
import pytest
import torch
from rules_of_others.credit import Credit
from rules_of_others.hierarchy import Hierarchy

import fdpp
from fdpp import Wino

FOLDER = golden.DATA / "rules_of_others"
RUNS = {peer: json.loads((FOLDER / f"{peer}.json").read_text())["runs"] for peer in ("hierarchy", "credit", "wino")}


def rule_of(peer: str, params: dict[str, Any]) -> fdpp.Rule:
    if peer == "wino":
        return Wino(params["threshold"], params["threshold_back"])
    if peer == "credit":
        return Credit(params["threshold"], params["credit_alpha"], params["boost_gamma"], params["decay_beta"])
    # Without a low threshold a run's best always commits; without a high one only the best do.
    high = 1.0 if params["threshold"] is None else params["threshold"]
    return Hierarchy(params["low_threshold"] or 0.0, high)


@pytest.mark.parametrize(
    ("peer", "run"), [pytest.param(peer, run, id=f"{peer}-{run['run']}") for peer in RUNS for run in RUNS[peer]]
)
def test_the_published_decode(peer: str, run: dict[str, Any]) -> None:
    """Final tokens, number of forwards, and the forward that last committed each position."""
    with np.load(FOLDER / f"{peer}.npz") as stored:
        prompt, tokens, step_of = (
            torch.from_numpy(stored[name]).long()
            for name in (f"prompt_{run['prompt']}", f"{run['run']}_out", f"{run['run']}_step_of")
        )
    params = run["params"]
    out: Any = golden.model("model_tiny").generate(
        prompt,
        rule=rule_of(peer, params),
        max_new_tokens=params["gen_length"],
        block_length=params["block_length"],
        cache="none",
        stop_at_eos=False,
    )
    assert out.sequences.equal(tokens) and int(out.nfe) == run["n_forward"]
    assert out.commit_step.equal(step_of[:, prompt.shape[1] :])


def test_tokens_were_taken_back() -> None:
    assert sum(run["revoked"] > 0 for run in RUNS["wino"]) > 10
