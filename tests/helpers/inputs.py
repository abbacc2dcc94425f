"""Inputs of a denoising step, its implementations, and the comparison of each with the float64 specification."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import triton
from torch import Tensor

from fdpp import Budget, EntropyBound, Factor, Frechet, Quota, Rule, Selection, Threshold
from fdpp.selection import check
from fdpp.step import cpu, gpu, reference
from fdpp.step.terms import Terms, pack

TRITON = triton.__version__.rpartition(".")[0]
"""The bounds on registers and spills depend on it."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = [
    "cpu",
    pytest.param("interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""The vectorised PyTorch code, the kernel in Triton's interpreter, and the compiled kernel."""


def on_gpu(where: Callable[..., bool]) -> pytest.MarkDecorator:
    """A GPU runs only the cases whose parameters `where` accepts; the other implementations run all.

    Every combination of constants, types and alignment is another kernel, which takes a second to compile. Cases that
    differ only in data take the kernels that are there already (see `specialisations.py`).
    """
    return pytest.mark.cases(where=where)


@dataclass(frozen=True)
class Lead(Threshold):
    """All positions whose best token leads the next one by at least `tau`."""

    order: ClassVar = "margin"


RULES = (
    Quota(3),
    Threshold(0.5),
    Factor(1.2),
    Frechet(0.25),
    Frechet(0.0, calibration=0.05),
    EntropyBound(0.5),
    Budget(0.6, 0.3),
    Lead(0.3),
)
CLOSE = 1e-6
"""Relative distance of two residuals below which float32 may order or judge them otherwise than float64."""


@dataclass(frozen=True)
class Problem:
    """Arguments of a step: logits `[B, T, V]`, tokens `[B, T]`, one rule or one per sequence (of one class)."""

    logits: Tensor
    tokens: Tensor
    rules: Sequence[Rule]
    mask_id: int
    active: Tensor | None = None
    temperature: float = 0.0
    seeds: Tensor | None = None

    @property
    def candidate(self) -> Tensor:
        masked = self.tokens == self.mask_id
        return masked if self.active is None else masked & self.active

    def rule(self, b: int) -> Rule:
        return self.rules[b % len(self.rules)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_problem(
    seed: int,
    B: int,
    T: int,
    V: int,
    *rules: Rule,
    dtype: torch.dtype = torch.float32,
    masked: float = 0.7,
    mask_id: int | None = None,
    active: bool = False,
    temperature: float = 0.0,
) -> Problem:
    """Logits whose confidences spread over (0, 1): one raised entry a row, by 0 to 12 more than the others' total."""
    g = generator(seed)
    mask_id = V - 1 if mask_id is None else mask_id
    logits = torch.randn(B, T, V, generator=g)
    raised = torch.randint(0, V, (B, T, 1), generator=g)
    logits.scatter_(2, raised, torch.rand(B, T, 1, generator=g) * 12 + torch.tensor(float(V)).log() - 2)
    tokens = torch.randint(0, V, (B, T), generator=g)
    tokens[tokens == mask_id] = (mask_id + 1) % max(V, 2)
    tokens[torch.rand(B, T, generator=g) < masked] = mask_id
    return Problem(
        logits.to(dtype),
        tokens,
        rules,
        mask_id,
        torch.rand(B, T, generator=g) < 0.7 if active else None,
        temperature,
        torch.randint(-(2**62), 2**62, (B,), generator=g) if temperature > 0 else None,
    )


def run(implementation: str, problem: Problem) -> Selection:
    """The step that an implementation takes on `problem`; the outputs lie on the CPU."""
    device = "cuda" if implementation == "cuda" else "cpu"
    select = cpu.select if implementation == "cpu" else gpu.select
    params = torch.cat([pack(rule, device) for rule in problem.rules])
    logits, tokens, active, seeds = (
        None if tensor is None else to_device(tensor, device)
        for tensor in (problem.logits, problem.tokens, problem.active, problem.seeds)
    )
    check(logits, tokens, active, seeds)
    terms = Terms(params, problem.rules[0].key(), problem.mask_id, problem.temperature, seeds)
    outputs = select(logits, tokens, active, terms)
    return Selection(*(output.cpu() for output in outputs))


def run_in_block(implementation: str, problem: Problem, T: int = 8) -> Selection:
    """`run`; on a GPU in a block that is padded to `T` positions, committed and with NaN as logits: so blocks of any
    length take one kernel."""
    (B, n), V = problem.tokens.shape, problem.logits.shape[2]
    if implementation != "cuda":
        return run(implementation, problem)
    logits = torch.cat((problem.logits, problem.logits.new_full((B, T - n, V), float("nan"))), dim=1)
    tokens = torch.cat((problem.tokens, problem.tokens.new_full((B, T - n), problem.mask_id + 1)), dim=1)
    out = run(implementation, replace(problem, logits=logits, tokens=tokens))
    assert out.tokens[:, n:].equal(tokens[:, n:]) and not out.committed[:, n:].any()
    return Selection(*(field[:, :n] if field.dim() == 2 else field for field in out))


def to_device(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides and the same memory between the elements; no copy if it is on `device` already."""
    if tensor.device.type == device:
        return tensor
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def expected(problem: Problem) -> Selection:
    """The specification, sequence by sequence."""
    rows = [
        reference.select(
            problem.logits[b : b + 1],
            problem.tokens[b : b + 1],
            problem.rule(b),
            problem.mask_id,
            None if problem.active is None else problem.active[b : b + 1],
            problem.temperature,
            None if problem.seeds is None else problem.seeds[b : b + 1],
        )
        for b in range(problem.logits.shape[0])
    ]
    return Selection(*map(torch.cat, zip(*rows, strict=True)))


def is_close_call(problem: Problem, truth: Selection, b: int) -> bool:
    """Whether float32 may rightly commit other positions of sequence `b` than `truth` does.

    Every rule's predicate can only turn false as a cost grows. So a count that is the same with all residuals lowered
    and with all raised is the same with any rounding between. Besides, the cut must not fall between two residuals that
    are nearly, but not bit for bit, equal.
    """
    rule, logits = problem.rule(b), problem.logits[b]
    profile = []
    for t in problem.candidate[b].nonzero().flatten().tolist():
        row, proposal = logits[t].double(), int(truth.proposal[b, t])
        if row.isnan().any() or (row == torch.inf).any() or row[proposal] == -torch.inf:
            continue
        profile.append(reference.costs(row, proposal, problem.mask_id, rule.order, t))
    profile.sort()
    if not profile:
        return False

    def count(scale: float) -> int:
        return max(reference.accepted(rule, [p[2] * scale for p in profile], [p[3] * scale for p in profile]), 1)

    n = count(1.0)
    if n != count(1.0 - CLOSE) or n != count(1.0 + CLOSE):
        return True
    if n == len(profile) or profile[n][0] > profile[n - 1][0] * (1.0 + CLOSE):
        return False
    return not logits[profile[n][1]].equal(logits[profile[n - 1][1]])


def softmax_error(problem: Problem, truth: Selection) -> Tensor:
    """Error of the proposals' softmax `[B, T]` as PyTorch computes it in the logits' own dtype."""
    own = problem.logits.softmax(-1).gather(2, truth.proposal.clamp(0, problem.logits.shape[2] - 1)[..., None])[..., 0]
    return torch.where(problem.candidate, (own.double() - truth.confidence).abs(), 0.0).nan_to_num(nan=0.0)


def assert_as_specified(out: Selection, problem: Problem, truth: Selection | None = None) -> None:
    """Same proposals, commits and counts as the specification; confidences off by no more than same-dtype softmax."""
    truth = expected(problem) if truth is None else truth
    close = [b for b in range(problem.logits.shape[0]) if is_close_call(problem, truth, b)]
    assert not close, f"sequences {close}: decided by rounding, choose another input"
    assert out.proposal.equal(truth.proposal)
    assert out.committed.equal(truth.committed)
    assert out.tokens.equal(truth.tokens)
    assert out.remaining.equal(truth.remaining)
    assert out.nonfinite.equal(truth.nonfinite)
    assert [field.dtype for field in out[:4]] == [torch.int64, torch.int64, torch.float32, torch.bool]
    assert out.remaining.dtype == out.nonfinite.dtype == torch.int32
    error = (out.confidence.double() - truth.confidence).abs()
    assert (error <= softmax_error(problem, truth) + 1e-6).all()


def assert_equal(first: Selection, second: Selection) -> None:
    """Every field bit for bit."""
    for name, a, b in zip(Selection._fields, first, second, strict=True):
        assert a.equal(b.to(a.device)), name
