"""Complete published decodes, reproduced by `generate`: every token, the forward that decided it, and the NFE.

FORMAT.md, section 4, describes the runs. Runs that rounding can change (`stable` false) are not compared. Where the
published code breaks its own rule, the fault is imitated here, so that the rest of the decode can be compared.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from golden import Trajectory, model, seen_by_rows, trajectories
from published_loops import LeftToRight, PublishedFactor, Recorder
from torch import Tensor

import fdpp

MASK = 500


@dataclass(frozen=True)
class Decode:
    """A decode of ours; `step_of` and `forwards` count the forwards of the batch, the rest those of each row."""

    sequences: Tensor
    step_of: Tensor
    commit_step: Tensor
    nfe: Tensor
    forwards: int


@functools.cache
def decode(
    model_name: str,
    prompt: tuple[tuple[int, ...], ...],
    block_length: int,
    cache: str,
    rule: fdpp.Rule,
    steps: int | None,
    drafts: int,
    branches: str,
) -> Decode:
    recorder = Recorder()
    out = model(model_name).generate(
        torch.tensor(prompt),
        max_new_tokens=64,
        block_length=block_length,
        rule=rule,
        steps=steps,
        cache=cache,
        stop_at_eos=False,
        streamer=recorder,
        drafts=drafts,
        branches=branches,
    )
    return Decode(out.sequences, recorder.step_of, out.commit_step, out.nfe, recorder.forwards)


def rule_of(run: dict[str, Any]) -> fdpp.Rule:
    params = run["params"]
    if params.get("alg_temp") == -1:
        return LeftToRight(2.0 if params["confidence_threshold"] is None else params["confidence_threshold"])
    if params.get("local_leap"):
        return fdpp.LocalLeap(params["threshold"], params["relaxed_threshold"], params["radius"])
    tau = params.get("threshold", params.get("confidence_threshold"))
    if tau is not None:
        return fdpp.Threshold(tau)
    if params.get("factor") is not None:
        return PublishedFactor(params["factor"])
    if params.get("frechet_margin") is not None:
        return fdpp.Frechet(params["frechet_margin"])
    return fdpp.Quota()


def cache_of(run: dict[str, Any]) -> str:
    if "dual_cache" in run["params"]:
        return "dual" if run["params"]["dual_cache"] else "prefix"
    return {"generate": "none", "generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual"}[run["func"]]


def ours(
    trajectory: Trajectory, rule: fdpp.Rule | None = None, prompt: Tensor | None = None, drafts: int = 1
) -> Decode:
    """Our decode of the run: `steps` only where they are a schedule, and optionally with another rule or prompt."""
    run, params = trajectory.run, trajectory.run["params"]
    rule = rule or rule_of(run)
    prompt = trajectory.prompt if prompt is None else prompt
    return decode(
        run["model"],
        tuple(map(tuple, prompt.tolist())),
        params["block_length"],
        cache_of(run),
        rule,
        params.get("steps") if rule == fdpp.Quota() else None,
        drafts,
        # FreeDave's `debug` is its batch layout, one state at a time.
        "tree" if drafts > 1 and params["draft_mode"] == "tree_attention" else "batch",
    )


def kind(trajectory: Trajectory) -> str:
    """What is asked of a run; guidance and FreeDave's drafts across a block's end (`eager`) are not offered."""
    run, params = trajectory.run, trajectory.run["params"]
    if run["mode"] == "quota+cfg" or params.get("eager_acceptance_mode"):
        return "not offered"
    if run["mode"] == "dawn":
        return "in test_golden_dawn.py"
    if run["mode"] == "freedave":
        return "drafted" if run["stable"] else "drafted, unstable"
    if run["masks_left"]:
        return "masks left"
    return "reproduced" if run["stable"] else "unstable"


PEERS = ("fastdllmpp", "fastdllm", "llada", "dawn", "freedave")
RUNS = {peer: trajectories(peer) for peer in PEERS}


def of_kind(wanted: str) -> list[Any]:
    return [pytest.param(t, id=t.id) for peer in PEERS for t in RUNS[peer] if kind(t) == wanted]


def test_every_run_is_accounted_for() -> None:
    counts = {peer: Counter(map(kind, RUNS[peer])) for peer in PEERS}
    assert counts == {
        "fastdllmpp": {"reproduced": 224, "unstable": 8, "masks left": 2},
        "fastdllm": {"reproduced": 35, "unstable": 1},
        "llada": {"reproduced": 36, "not offered": 24},
        "dawn": {"reproduced": 40, "in test_golden_dawn.py": 64},
        "freedave": {"reproduced": 46, "unstable": 2, "drafted": 276, "drafted, unstable": 12, "not offered": 192},
    }


@pytest.mark.parametrize("trajectory", of_kind("reproduced"))
def test_reproduced(trajectory: Trajectory) -> None:
    out, run = ours(trajectory), trajectory.run
    assert out.sequences.equal(trajectory.out)
    step_of = trajectory.step_of[:, -64:]
    assert out.step_of.equal(step_of)
    assert out.forwards == run["n_forward"] == (run["nfe"] or run["n_forward"])
    commit_step, nfe = seen_by_rows(step_of, run["params"]["block_length"])
    assert out.commit_step.equal(commit_step)
    assert out.nfe.equal(nfe)


@pytest.mark.parametrize("trajectory", of_kind("drafted"))
def test_drafts_cost_the_published_forwards(trajectory: Trajectory) -> None:
    """FreeDave's decode in as many forwards. With a threshold it drafts other states, and is not always lossless."""
    run, params, undrafted = trajectory.run, trajectory.run["params"], ours(trajectory)
    out = ours(trajectory, drafts=params["draft_steps"])
    assert out.sequences.equal(undrafted.sequences)
    assert out.commit_step.equal(undrafted.commit_step)
    if run["equals_baseline"]:
        assert out.sequences.equal(trajectory.out)
    if params["confidence_threshold"] is None:
        assert run["equals_baseline"] and int(out.nfe[0]) == run["nfe"]
    assert out.nfe[0] < undrafted.nfe[0]


@pytest.mark.parametrize("trajectory", of_kind("unstable") + of_kind("drafted, unstable"))
def test_unstable_runs_end_all_the_same(trajectory: Trajectory) -> None:
    out = ours(trajectory, drafts=trajectory.run["params"].get("draft_steps", 1))
    assert not (out.sequences == MASK).any()
    assert out.sequences[:, :-64].equal(trajectory.prompt)


@pytest.mark.parametrize("trajectory", of_kind("masks left"))
def test_too_few_steps_leave_no_mask(trajectory: Trajectory) -> None:
    """Published dual-cache decodes stop after `steps`; ours go on, and decode as if there had been enough."""
    assert trajectory.run["note"] == "few_steps" and (trajectory.out == MASK).any()
    params = trajectory.run["params"] | {"steps": 64}
    same = ("func", "model", "prompt")
    enough = next(
        t
        for t in RUNS[trajectory.peer]
        if t.run["params"] == params and all(t.run[key] == trajectory.run[key] for key in same)
    )
    out = ours(trajectory)
    assert not (out.sequences == MASK).any()
    assert out.sequences.equal(enough.out)


@pytest.mark.parametrize(
    "trajectory", [pytest.param(t, id=t.id) for t in RUNS["fastdllmpp"] if t.run["prompt"].endswith("ab")]
)
def test_rows_do_not_depend_on_the_batch(trajectory: Trajectory) -> None:
    together = ours(trajectory)
    for row in range(2):
        alone = ours(trajectory, prompt=trajectory.prompt[row : row + 1])
        assert alone.sequences[0].equal(together.sequences[row])
        assert alone.nfe[0] == together.nfe[row]


def test_our_factor_is_the_strict_one() -> None:
    """The published fault decides in every published factor decode, so with the rule of the paper none is the same."""
    runs = [t for t in RUNS["fastdllmpp"] if "factor" in t.run["params"] and kind(t) == "reproduced"]
    strict = [ours(t, rule=fdpp.Factor(t.run["params"]["factor"])) for t in runs]
    assert len(runs) == 51
    for trajectory, out in zip(runs, strict, strict=True):
        assert not (out.sequences == MASK).any()
        assert not out.step_of.equal(trajectory.step_of[:, -64:])
    assert sum(out.forwards > t.run["nfe"] for t, out in zip(runs, strict, strict=True)) == 44


def test_the_caches_decode_differently() -> None:
    """So the runs above tell them apart."""
    runs = [t for t in RUNS["fastdllmpp"] if t.run["mode"] == "thr0.9" and t.run["prompt"] == "p20a"]
    assert {cache_of(t.run) for t in runs} == {"none", "prefix", "dual"}
    for block_length in (16, 32):
        outs = [ours(t).step_of for t in runs if t.run["params"]["block_length"] == block_length]
        assert len(outs) == len({tuple(out.flatten().tolist()) for out in outs}) == 3
