"""`diffusion_generate`, Dream's own method: its arguments, its records, its history."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from golden_dream import MASK, DreamRun, model, runs
from small import EOS, prompts, small_dream
from small import MASK as SMALL_MASK
from torch import Tensor

import fdpp

RANKED = [
    run
    for run in runs("dream")
    if run.run["stable"] and run.out is not None and run.run["prompt"] != "m" and run.run["params"].get("top_p") is None
    if run.run["params"].get("alg", "origin") != "origin" and "top_k" in run.run["params"]
]
SIZES: dict[str, Any] = {"max_new_tokens": 16, "steps": 8}


@pytest.mark.parametrize("run", RANKED[::4], ids=lambda run: run.id)
def test_published_calls_run_as_they_are(run: DreamRun) -> None:
    """With the very arguments of the recorded call."""
    assert run.out is not None and run.step_of is not None
    arguments = {**run.run["params"], "return_dict_in_generate": True, "output_history": True}
    out = model(run.run["model"]).diffusion_generate(run.prompt, attention_mask=run.attention_mask, **arguments)
    assert torch.equal(out.sequences, run.out)
    deciding = sorted(set(run.step_of[run.step_of >= 0].tolist()))
    assert int(out.nfe.max()) == len(deciding) == len(out.history) <= run.run["n_forward"]
    for state, call in zip(out.history, deciding, strict=True):
        assert torch.equal(state, run.out.masked_fill(run.step_of > call, MASK))


def test_enough_runs_are_compared() -> None:
    assert len(RANKED) >= 20 and {run.run["params"]["alg"] for run in RANKED[::4]} == {
        "maskgit_plus",
        "topk_margin",
        "entropy",
    }


@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("alg_temp", [None, 0.0, 0.3])
def test_it_is_generate_by_other_names(alg: str, alg_temp: float | None) -> None:
    dream, ids = small_dream(), prompts(2, 5)
    given = dream.diffusion_generate(ids, alg=alg, alg_temp=alg_temp, eps=0.01, seed=3, **SIZES)
    rule = fdpp.rules.dream.rule_of(alg, 0.01, alg_temp)
    expected = dream.generate(ids, rule=rule, block_length=16, cache="none", stop_at_eos=False, seed=3, **SIZES)
    assert torch.equal(given, expected.sequences) and not (given == SMALL_MASK).any()
    assert int(expected.nfe.max()) <= 8


def test_defaults_are_the_published_ones() -> None:
    signature = inspect.signature(fdpp.DreamModelLM.diffusion_generate).parameters
    defaults = {name: signature[name].default for name in ("steps", "eps", "alg", "alg_temp", "output_history")}
    assert defaults == {"steps": 512, "eps": 1e-3, "alg": "origin", "alg_temp": None, "output_history": False}
    dream, ids = small_dream(), prompts(1, 4)
    torch.manual_seed(0)
    first = dream.diffusion_generate(input_ids=ids, max_new_tokens=6)
    torch.manual_seed(0)
    assert isinstance(first, Tensor) and torch.equal(dream.diffusion_generate(ids, max_new_tokens=6), first)


def test_settings_of_generate_take_the_place_of_the_schedule() -> None:
    dream, ids = small_dream(), prompts(2, 5)
    settings: dict[str, Any] = {"cache": "dual", "block_length": 4, "rule": fdpp.Threshold(0.5), "max_new_tokens": 16}
    out = dream.diffusion_generate(ids, return_dict_in_generate=True, stop_at_eos=True, **settings)
    expected = dream.generate(ids, stop_at_eos=True, **settings)
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.nfe, expected.nfe)
    assert out.history is None


def test_the_history_of_a_decode_that_ends_early() -> None:
    """What stands behind an EOS was committed by no step, and is there at the end."""
    dream, ids = small_dream(), prompts(3, 5)
    plain = dream.project
    lift = torch.zeros(64)
    lift[EOS] = 5.0
    dream.project = lambda hidden: plain(hidden) + lift
    arguments: dict[str, Any] = {"alg": "entropy", "stop_at_eos": True, "output_history": True, **SIZES}
    out = dream.diffusion_generate(ids, return_dict_in_generate=True, **arguments)
    assert (out.commit_step < 0).any()
    assert torch.equal(out.history[-1], out.sequences)
    assert all(torch.equal(state[:, :5], ids) for state in out.history)


def test_what_does_not_fit_is_named() -> None:
    dream, ids = small_dream(), prompts(1, 4)
    with pytest.raises(
        ValueError, match="alg: expected one of origin, maskgit_plus, topk_margin, entropy, got 'klass'"
    ):
        dream.diffusion_generate(ids, alg="klass", **SIZES)
    with pytest.raises(ValueError, match="generation_tokens_hook_func is not implemented, expected streamer="):
        dream.diffusion_generate(ids, generation_tokens_hook_func=print, **SIZES)
    with pytest.raises(TypeError, match="known are"):
        dream.diffusion_generate(ids, algorithm="entropy", **SIZES)
