"""The operator as PyTorch sees it, what `select` refuses, and that the front door leads to the same place."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from inputs import RULES, Problem, assert_as_specified, assert_equal, on_gpu, random_problem, run
from torch import Tensor

import fdpp
from fdpp import EntropyBound, Frechet, Quota, Rule, Selection, Threshold
from fdpp.step import operators
from fdpp.step.terms import pack

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def operator_arguments(problem: Problem, device: str) -> tuple[Any, ...]:
    tensors = (problem.logits, problem.tokens, problem.active)
    params = torch.cat([pack(rule, device) for rule in problem.rules])
    seeds = None if problem.seeds is None else problem.seeds.to(device)
    return (
        *(None if tensor is None else tensor.to(device) for tensor in tensors),
        params,
        problem.rules[0].key(),
        problem.mask_id,
        problem.temperature,
        seeds,
    )


@on_gpu(lambda active, temperature: active == (temperature > 0.0))
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rule", "dtype", "active", "temperature"),
    [
        (Frechet(0.25), torch.float32, False, 0.0),
        (Threshold(0.9), torch.bfloat16, True, 0.0),
        (Quota(2), torch.float16, False, 0.7),
        (EntropyBound(0.5), torch.bfloat16, True, 0.7),
    ],
    ids=str,
)
def test_opcheck(device: str, rule: Rule, dtype: torch.dtype, active: bool, temperature: float) -> None:
    problem = random_problem(0, 2, 5, 21, rule, dtype=dtype, active=active, temperature=temperature)
    torch.library.opcheck(operators.select_op, operator_arguments(problem, device))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_awkward_arguments(device: str) -> None:
    """Other strides, one row of numbers per sequence, no positions at all."""
    problem = random_problem(0, 8, 8, 21, *(Frechet(0.1 * i) for i in range(8)), active=True)
    assert problem.active is not None
    transposed = dataclasses.replace(
        problem,
        logits=problem.logits.transpose(0, 1),
        tokens=problem.tokens.T,
        active=problem.active.T,
    )
    empty = Problem(torch.zeros(2, 0, 7), torch.zeros(2, 0, dtype=torch.int64), (Frechet(0.1),), 6)
    for awkward in (transposed, empty):
        torch.library.opcheck(operators.select_op, operator_arguments(awkward, device))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_select_is_the_implementation(rule: Rule) -> None:
    problem = random_problem(3, 2, 8, 30, rule, active=True)
    out = fdpp.select(problem.logits, problem.tokens, rule=rule, mask_id=problem.mask_id, active=problem.active)
    assert isinstance(out, Selection)
    assert_equal(out, run("cpu", problem))
    assert_equal(Selection(*operators.select_op(*operator_arguments(problem, "cpu"))), out)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_recorded_gradients_end_at_the_choice(rule: Rule, compiled: bool) -> None:
    """A model that is called without no_grad gives such logits."""
    torch._dynamo.reset()
    problem = random_problem(3, 2, 8, 30, rule)
    scale = torch.ones((), requires_grad=True)

    def choose() -> Selection:
        return fdpp.select(problem.logits * scale, problem.tokens, rule=rule, mask_id=problem.mask_id)

    out = torch.compile(choose, fullgraph=True, backend="aot_eager")() if compiled else choose()
    assert_equal(out, run("cpu", problem))
    assert not out.confidence.requires_grad


def test_a_seed_is_one_stream_per_sequence() -> None:
    problem = random_problem(3, 3, 8, 30, Frechet(0.25), temperature=1.0)

    def sample(seed: int | Tensor) -> Selection:
        return fdpp.select(
            problem.logits, problem.tokens, rule=problem.rules[0], mask_id=problem.mask_id, temperature=1.0, seed=seed
        )

    out = sample(41)
    assert_equal(out, sample(41))
    assert_equal(out, sample(torch.tensor([41, 42, 43])))
    assert_equal(out, run("cpu", dataclasses.replace(problem, seeds=torch.tensor([41, 42, 43]))))
    assert not out.proposal.equal(sample(7).proposal)
    assert_equal(sample(-1), sample(torch.tensor([-1, 0, 1])))


def test_seed_zero_samples() -> None:
    problem = random_problem(3, 1, 8, 30, Frechet(0.25), temperature=5.0)
    out = fdpp.select(
        problem.logits, problem.tokens, rule=problem.rules[0], mask_id=problem.mask_id, temperature=5.0, seed=0
    )
    assert_as_specified(out, dataclasses.replace(problem, seeds=torch.tensor([0])))


def test_a_greedy_step_ignores_the_seed() -> None:
    problem = random_problem(3, 2, 8, 30, Frechet(0.25))
    arguments = {"rule": problem.rules[0], "mask_id": problem.mask_id}
    assert_equal(
        fdpp.select(problem.logits, problem.tokens, **arguments, seed=5),
        fdpp.select(problem.logits, problem.tokens, **arguments),
    )


LOGITS, TOKENS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3, 5)}, "logits: expected [B, T, V] in bfloat16, float16 or float32, got [3, 5]"),
        ({"logits": LOGITS.double()}, "in bfloat16, float16 or float32, got [2, 3, 5] in torch.float64"),
        ({"logits": LOGITS.long()}, "torch.int64"),
        ({"logits": torch.zeros(1, 1025, 5)}, "at most 1024 positions and a vocabulary, got T=1025, V=5"),
        ({"logits": torch.zeros(2, 3, 0)}, "got T=3, V=0"),
        ({"tokens": TOKENS[:, :2]}, "tokens: expected [2, 3] torch.int64 on cpu, got [2, 2] torch.int64 on cpu"),
        ({"tokens": TOKENS[0]}, "tokens: expected [2, 3] torch.int64 on cpu, got [3]"),
        ({"tokens": TOKENS.int()}, "tokens: expected [2, 3] torch.int64 on cpu, got [2, 3] torch.int32 on cpu"),
        ({"tokens": TOKENS.to("meta")}, "tokens: expected [2, 3] torch.int64 on cpu, got [2, 3] torch.int64 on meta"),
        ({"active": TOKENS}, "active: expected [2, 3] torch.bool on cpu, got [2, 3] torch.int64 on cpu"),
        ({"active": TOKENS[:1] == 0}, "active: expected [2, 3] torch.bool on cpu, got [1, 3] torch.bool on cpu"),
        ({"temperature": 1.0, "seed": TOKENS[0]}, "seeds: expected [2] torch.int64 on cpu, got [3] torch.int64 on cpu"),
        ({"temperature": 1.0, "seed": torch.zeros(2)}, "seeds: expected [2] torch.int64 on cpu, got [2] torch.float32"),
        ({"temperature": 1.0}, "temperature=1.0 samples: expected a seed"),
        ({"temperature": -0.5, "seed": 1}, "temperature: expected a finite number of at least 0, got -0.5"),
        ({"temperature": float("nan"), "seed": 1}, "temperature: expected a finite number of at least 0, got nan"),
        ({"temperature": float("inf"), "seed": 1}, "temperature: expected a finite number of at least 0, got inf"),
        ({"temperature": "hot", "seed": 1}, "temperature: expected a finite number of at least 0, got 'hot'"),
        ({"rule": 0.9}, "rule: expected a fdpp.Rule such as fdpp.Frechet(0.25), got 0.9"),
        ({"rule": Frechet}, "rule: expected a fdpp.Rule"),
        ({"logits": LOGITS.to("meta"), "tokens": TOKENS.to("meta")}, "logits: expected a CPU or CUDA tensor, got meta"),
    ],
)  # fmt: skip
def test_errors_name_what_was_expected_and_what_came(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": LOGITS, "tokens": TOKENS, "rule": Frechet(0.25), "mask_id": 4} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        fdpp.select(arguments.pop("logits"), arguments.pop("tokens"), **arguments)


def test_packed_numbers() -> None:
    """Float64 and a tensor: 0.1 is no float32."""
    assert pack(Frechet(0.1, 0.3)).tolist() == [[0.1, 0.0, 0.3]]
    assert pack(Quota(3)).tolist() == [[3.0, 0.0, 0.0]]
    assert pack(Threshold(0.9)).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_select_under_compile(temperature: float) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits: Tensor, tokens: Tensor, seed: Tensor | None) -> Selection:
        return fdpp.select(logits * 2.0, tokens, rule=Frechet(0.25), mask_id=29, temperature=temperature, seed=seed)

    problem = random_problem(3, 2, 8, 30, Frechet(0.25), temperature=temperature)
    eager = run("cpu", dataclasses.replace(problem, logits=problem.logits * 2.0))
    assert_equal(compiled(problem.logits, problem.tokens, problem.seeds), eager)


def test_errors_under_compile() -> None:
    """A wrong shape is found while tracing, with the same message."""
    compiled = torch.compile(
        lambda logits, tokens: fdpp.select(logits, tokens, rule=Quota(1), mask_id=4), backend="aot_eager"
    )
    with pytest.raises(ValueError, match=re.escape("tokens: expected [2, 3] torch.int64 on cpu, got [2, 2]")):
        compiled(LOGITS, TOKENS[:, :2])
