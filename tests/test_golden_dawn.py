"""Published DAWN decodes: each of their steps taken by ours, and whole decodes by `generate`.

The published code breaks its own rule in two ways (FORMAT.md, section 1). It overwrites position 0, prompt or not, when
a conflict has removed a candidate or a row has nothing masked; `prompt_change_events` lists each. And it skips clause 3
for both rows of a batch if one has no candidate for it. So each step is taken from the recorded tokens, position 0
included, and a decode is compared as far as the published one follows its rule.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from golden import Trajectory, model, seen_by_rows, trajectories
from torch import Tensor

from fdpp.attention import Probe
from fdpp.moved import dawn as dawn_step
from fdpp.rules import dawn
from fdpp.rules.dawn import Dawn

MASK = 500
RUNS = [t for t in trajectories("dawn") if t.run["mode"] == "dawn" and t.run["stable"]]
EACH = pytest.mark.parametrize("index", range(len(RUNS)), ids=[t.id for t in RUNS])


def rule_of(run: dict[str, Any], **changes: float) -> Dawn:
    taus = {name: run["params"][name] for name in ("tau_sink", "tau_edge", "tau_induce", "tau_low")}
    return Dawn(**{**taus, **changes}, layers=model(run["model"]).config.n_layers - run["attn_from_layer"])


def states(trajectory: Trajectory) -> Tensor:
    """Tokens before every forward: `[n_forward, B, L]`."""
    prompt, P = trajectory.prompt.clone(), trajectory.prompt.shape[1]
    events, found = trajectory.run.get("prompt_change_events", []), []
    for call in range(trajectory.run["n_forward"]):
        response = trajectory.out[:, P:].masked_fill(trajectory.step_of[:, P:] >= call, MASK)
        found.append(torch.cat((prompt, response), dim=1))
        for _, row, position, _, new in filter(lambda event: event[0] == call, events):
            prompt[row, position] = new
    assert torch.equal(prompt, trajectory.out[:, :P])
    return torch.stack(found)


@functools.cache
def coupled(index: int) -> list[tuple[int, int]]:
    """The calls and rows of a run at which our step differs from the published one, each shown to be a fault of it."""
    trajectory = RUNS[index]
    run, P, T = trajectory.run, trajectory.prompt.shape[1], trajectory.run["params"]["block_length"]
    rule, without_set = rule_of(run), rule_of(run, tau_low=1.0)
    llada, found = model(run["model"]), []
    for call, x in enumerate(states(trajectory)):
        probe = Probe(rule.probed(llada.config.n_layers))
        with torch.no_grad():
            logits = llada.project(llada.model(x, cache=probe))
        first = P + int((x[:, P:] == MASK).any(0).nonzero()[0]) // T * T
        block = slice(first, first + T)
        step = functools.partial(
            dawn_step.select,
            logits[:, block],
            x[:, block],
            mask_id=MASK,
            edges=dawn.dependency_edges(probe.queries, probe.own, rule=rule, start=0, first=first, T=T),
            committed_confidence=dawn_step.softmax_maximum(logits, MASK).masked_fill(x == MASK, 0.0),
            first=first,
        )
        out, published = step(rule=rule), trajectory.step_of[:, block] == call
        assert torch.equal(out.proposal[published], trajectory.out[:, block][published])
        bare = step(rule=without_set).committed
        for row in (out.committed != published).any(1).nonzero().flatten().tolist():
            other = 1 - row
            assert x.shape[0] == 2 and torch.equal(out.committed[other], bare[other]), "only beside an exhausted row"
            assert torch.equal(published[row], bare[row]), "and then without clause 3"
            found.append((call, row))
    return found


def follows(index: int) -> list[int]:
    """Per row, the calls for which the published code follows its rule and sees the prompt unchanged."""
    run, ends = RUNS[index].run, [RUNS[index].run["n_forward"]] * RUNS[index].prompt.shape[0]
    broken = coupled(index) + [(event[0] + 1, event[1]) for event in run.get("prompt_change_events", [])]
    for call, row in broken:
        ends[row] = min(ends[row], call)
    return ends


@EACH
def test_every_step(index: int) -> None:
    """A row alone in its batch takes the published step every time."""
    assert not coupled(index) or RUNS[index].prompt.shape[0] == 2


@EACH
def test_generate(index: int) -> None:
    """Token for token and forward for forward, as far as the published code follows its rule."""
    trajectory = RUNS[index]
    run, P = trajectory.run, trajectory.prompt.shape[1]
    out = model(run["model"]).generate(
        trajectory.prompt,
        max_new_tokens=64,
        block_length=run["params"]["block_length"],
        rule=rule_of(run),
        cache="none",
        stop_at_eos=False,
    )
    step_of = trajectory.step_of[:, P:]
    commit_step, nfe = seen_by_rows(step_of, run["params"]["block_length"])
    assert torch.equal(out.sequences[:, :P], trajectory.prompt) and not (out.sequences == MASK).any()
    for row, end in enumerate(follows(index)):
        same = step_of[row] < end
        assert torch.equal(out.sequences[row, P:][same], trajectory.out[row, P:][same])
        assert torch.equal(out.commit_step[row][same], commit_step[row][same])
        if same.all():
            assert out.nfe[row] == nfe[row]


def test_how_much_is_compared() -> None:
    assert len(RUNS) == 63 and sum(len(coupled(index)) for index in range(63)) == 30
    assert sum(trajectory.run["n_forward"] * trajectory.prompt.shape[0] for trajectory in RUNS) == 799
    compared = Counter(
        "whole" if int(trajectory.step_of[row].max()) < end else "up to a fault"
        for index, trajectory in enumerate(RUNS)
        for row, end in enumerate(follows(index))
    )
    assert compared == {"whole": 43, "up to a fault": 35}
