"""`DenoisingStep`: the same step as a module, compiled, cast, moved, in a loop."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from typing import Any

import pytest
import torch
from inputs import RULES, Problem, assert_equal, random_problem, run
from torch import Tensor, nn

from fdpp import DenoisingStep, EntropyBound, Frechet, Quota, Rule, Selection, Threshold

BACKEND = "inductor" if shutil.which("gcc") or shutil.which("cc") else "aot_eager"


def step_for(problem: Problem) -> DenoisingStep:
    return DenoisingStep(problem.rules[0], problem.mask_id, problem.temperature)


def call(step: Any, problem: Problem) -> Selection:
    return step(problem.logits, problem.tokens, problem.active, problem.seeds)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_is_select(rule: Rule, temperature: float) -> None:
    problem = random_problem(2, 2, 8, 30, rule, active=True, temperature=temperature)
    assert_equal(call(step_for(problem), problem), run("cpu", problem))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool, temperature: float) -> None:
    """Static: a new graph for each shape. Dynamic: one graph for all of them."""
    torch._dynamo.reset()
    problems = [
        random_problem(seed, B, T, V, Frechet(0.25), active=True, temperature=temperature)
        for seed, (B, T, V) in enumerate([(2, 8, 30), (3, 12, 40), (4, 5, 50)])
    ]
    problems = [dataclasses.replace(problem, mask_id=29) for problem in problems[: 3 if dynamic else 1]]
    compiled = torch.compile(step_for(problems[0]), fullgraph=True, dynamic=dynamic, backend=BACKEND)
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for problem in problems:
            assert_equal(call(compiled, problem), call(step_for(problem), problem))


def test_compiles_inside_a_model() -> None:
    """Logits from a matrix product before it, its tokens used after it."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 20, bias=False)
            self.step = DenoisingStep(Threshold(0.06), 19)

        def forward(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            out = self.step(self.head(hidden), tokens)
            return out.tokens + 1, out.remaining.sum()

    torch.manual_seed(0)
    model, hidden, tokens = Tiny(), torch.randn(2, 6, 8), torch.full((2, 6), 19)
    before = tokens.clone()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=BACKEND)(hidden, tokens)
        for a, b in zip(compiled, model(hidden, tokens), strict=True):
            assert a.equal(b)
    assert tokens.equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cast_leaves_the_rule_alone(dtype: torch.dtype) -> None:
    """Casting a model that holds the step may not round its margin: 0.51 would become 0.5097656 in float16."""
    logits = torch.full((1, 2, 3), -float("inf"))
    logits[0, 0, 0] = logits[0, 1, 1] = 0.0
    logits[0, 1, 0] = torch.tensor(0.245098 / 0.754902).log()
    problem = Problem(logits, torch.full((1, 2), 2), (Frechet(0.51),), 2)
    assert call(DenoisingStep(Frechet(0.50975), 2), problem).committed.all()
    assert not call(nn.Sequential(DenoisingStep(Frechet(0.51), 2)).to(dtype)[0], problem).committed.all()


def test_state_dict_is_empty_and_copies_work() -> None:
    step = DenoisingStep(EntropyBound(0.3), 5, 0.5)
    assert not step.state_dict()
    assert not list(step.parameters())
    assert copy.deepcopy(step).rule == step.rule
    assert repr(step) == "DenoisingStep(rule=EntropyBound(gamma=0.3, tempered=False), mask_id=5, temperature=0.5)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.9, 5), "rule: expected a fdpp.Rule such as fdpp.Frechet(0.25), got 0.9"),
        ((Frechet(), 5, -1.0), "temperature: expected a finite number of at least 0, got -1.0"),
        ((Frechet(), 5, float("nan")), "temperature: expected a finite number of at least 0, got nan"),
        ((Quota(), 5), "k is None"),
    ],
)
def test_construction_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DenoisingStep(*arguments)


def test_sampling_needs_seeds() -> None:
    problem = random_problem(2, 2, 8, 30, Frechet(0.1), temperature=0.7)
    with pytest.raises(ValueError, match=re.escape("temperature=0.7 samples: expected seeds, an int64 tensor [B]")):
        call(step_for(problem), dataclasses.replace(problem, seeds=None))


@pytest.mark.parametrize("rule", [Frechet(0.25), Threshold(1.0), EntropyBound(0.0), Quota(3)], ids=str)
@pytest.mark.parametrize("share_unusable", [0.0, 0.5, 1.0])
def test_a_loop_of_steps_ends(rule: Rule, share_unusable: float) -> None:
    """Every step commits something while anything is masked, usable or not; nothing committed changes again."""
    problem = random_problem(2, 2, 8, 30, rule, masked=1.0)
    unusable = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) < share_unusable
    logits = problem.logits.masked_fill(unusable[..., None], float("nan"))
    step, tokens = step_for(problem), problem.tokens
    remaining = torch.tensor([8, 8])
    while remaining.any():
        out = step(logits, tokens)
        assert ((out.remaining < remaining) | (remaining == 0)).all()
        assert out.tokens[~out.committed].equal(tokens[~out.committed])
        assert (out.tokens[out.committed] != problem.mask_id).all()
        tokens, remaining = out.tokens, out.remaining
    assert (tokens != problem.mask_id).all()
