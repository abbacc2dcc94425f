"""`EntropyBound(tempered=True)`: with a temperature T all of a step is that of l / T at temperature 1."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from inputs import (
    IMPLEMENTATIONS,
    Problem,
    assert_as_specified,
    assert_equal,
    expected,
    generator,
    on_gpu,
    random_problem,
)
from small import prompts, small_model

import fdpp
from fdpp import EntropyBound, Revocable, Selection
from fdpp.step import cpu, gpu, parallel, project
from fdpp.step.terms import Terms, pack

# The interpreter computes with NumPy, which warns of the infinities and NaN that `tl.where` then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

PLAIN, TEMPERED = EntropyBound(1.0), EntropyBound(1.0, tempered=True)


def terms_of(problem: Problem, device: str = "cpu") -> Terms:
    seeds = None if problem.seeds is None else problem.seeds.to(device)
    return Terms(
        torch.cat([pack(rule, device) for rule in problem.rules]),
        problem.rules[0].tested(),
        problem.mask_id,
        problem.temperature,
        seeds,
    )


def run(implementation: str, problem: Problem) -> Selection:
    device = "cuda" if implementation == "cuda" else "cpu"
    select = cpu.select if implementation == "cpu" else gpu.select
    out = select(problem.logits.to(device), problem.tokens.to(device), None, terms_of(problem, device))
    return Selection(*(field.cpu() for field in out))


def of_divided(problem: Problem) -> Problem:
    """The step of an ordinary rule on l / T at temperature 1."""
    assert problem.temperature
    return replace(problem, logits=problem.logits / problem.temperature, rules=(PLAIN,), temperature=1.0)


@on_gpu(lambda temperature: temperature == 0.5)
@pytest.mark.parametrize("temperature", [0.25, 0.5, 3.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_is_that_of_divided_logits(implementation: str, temperature: float) -> None:
    problem = random_problem(5, 3, 7, 200, TEMPERED, masked=0.9, mask_id=70, temperature=temperature)
    problem.logits[0, 0, 70], problem.logits[0, 1, 5], problem.logits[1, :, 100:] = 9.0, torch.nan, -torch.inf
    out = run(implementation, problem)
    assert_as_specified(out, problem, expected(of_divided(problem)))
    assert_as_specified(out, problem)
    plain = run(implementation, replace(problem, rules=(PLAIN,)))
    assert not plain.committed.equal(out.committed) and not plain.confidence.equal(out.confidence)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_without_a_temperature_nothing_changes(implementation: str) -> None:
    problem = random_problem(5, 3, 7, 200, TEMPERED)
    assert_equal(run(implementation, problem), run(implementation, replace(problem, rules=(PLAIN,))))


def head(temperature: float) -> tuple[torch.Tensor, torch.Tensor, Problem]:
    weight = torch.randn(150, 16, generator=generator(1))
    hidden = torch.randn(2, 6, 16, generator=generator(0)) * 2
    tokens, seeds = torch.full((2, 6), 149), torch.tensor([4, 9])
    return hidden, weight, Problem(hidden @ weight.T, tokens, (TEMPERED,), 149, None, temperature, seeds)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_fused_head(implementation: str) -> None:
    hidden, weight, problem = head(0.4)
    device = "cuda" if implementation == "cuda" else "cpu"
    take = project.project_cpu if implementation == "cpu" else project.project_gpu
    tensors = (x.to(device) for x in (hidden, weight, problem.tokens))
    out = Selection(*(field.cpu() for field in take(*tensors, None, terms_of(problem, device))))
    truth = expected(of_divided(problem))
    assert out.proposal.equal(truth.proposal) and out.committed.equal(truth.committed)
    # A GPU multiplies float32 as three products of TF32.
    torch.testing.assert_close(out.confidence.double(), truth.confidence, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cuts", [(), (64,), (30, 100), (64, 64, 199)], ids=str)
def test_slices_of_a_vocabulary(cuts: tuple[int, ...]) -> None:
    problem = random_problem(5, 1, 7, 200, TEMPERED, masked=1.0, mask_id=70, temperature=0.5)
    terms, positions, b = terms_of(problem), torch.arange(7), torch.zeros(7, dtype=torch.int64)
    edges = [pair for pair in itertools.pairwise((0, *cuts, 200)) if pair[0] < pair[1]]
    slices = [problem.logits[..., first:stop] for first, stop in edges]
    starts = [first for first, _ in edges]
    lent = [parallel.lend(part, terms, b, positions, first) for part, first in zip(slices, starts, strict=True)]
    parts = [
        parallel.summarize(
            part[0].clone(), terms, b, positions, first, parallel.borrowed(torch.stack(lent), first + part.shape[2])
        )
        for part, first in zip(slices, starts, strict=True)
    ]
    merged = parallel.merge(torch.stack(parts), True, "entropy")
    whole = cpu.summarize(problem.logits[0].clone(), terms, b, positions)
    assert merged[0].equal(whole[0])
    torch.testing.assert_close(merged[1:], whole[1:], rtol=1e-5, atol=1e-6)


def test_the_public_calls_and_the_module() -> None:
    problem = head(0.4)[2]
    how: dict[str, Any] = {"mask_id": 149, "temperature": 0.4, "seed": problem.seeds}
    wanted = fdpp.select(problem.logits / 0.4, problem.tokens, rule=PLAIN, **{**how, "temperature": 1.0})
    step = fdpp.DenoisingStep(TEMPERED, 149, 0.4)
    for out in (
        fdpp.select(problem.logits, problem.tokens, rule=TEMPERED, **how),
        fdpp.select(problem.logits, problem.tokens, rule=Revocable(TEMPERED, 0.0), **how),
        step(problem.logits, problem.tokens, seeds=problem.seeds),
        torch.compile(step, backend="aot_eager", fullgraph=True)(problem.logits, problem.tokens, seeds=problem.seeds),
    ):
        assert out.tokens.equal(wanted.tokens)
        torch.testing.assert_close(out.confidence, wanted.confidence, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head", ["library", "fused"])
def test_a_decode_is_that_of_a_model_with_divided_logits(head: str) -> None:
    """The model's head is divided by T in place of its logits, and T is a power of two."""
    settings: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8, "cache": "dual", "seed": 5, "head": head}
    divided, whole = small_model(), small_model()
    with torch.no_grad():
        divided.head.mul_(4.0)
    wanted = divided.generate(prompts(2, 7), rule=EntropyBound(0.6), temperature=1.0, **settings)
    out = whole.generate(prompts(2, 7), rule=EntropyBound(0.6, tempered=True), temperature=0.25, **settings)
    plain = whole.generate(prompts(2, 7), rule=EntropyBound(0.6), temperature=0.25, **settings)
    assert out.sequences.equal(wanted.sequences) and out.commit_step.equal(wanted.commit_step)
    assert not plain.commit_step.equal(out.commit_step)


def test_it_is_saved_and_checked() -> None:
    assert TEMPERED.saved() == {"name": "EntropyBound", "gamma": 1.0, "tempered": True}
    assert fdpp.Rule.of(TEMPERED.saved()) == TEMPERED != PLAIN and fdpp.Rule.of("entropy") == EntropyBound()
    with pytest.raises(ValueError, match="expected tempered as a bool, got 1"):
        EntropyBound(1.0, tempered=1)  # type: ignore[arg-type]
