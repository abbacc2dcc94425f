"""`select` on the CPU and its kernel against the float64 specification: ordinary inputs, then awkward ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import (
    IMPLEMENTATIONS,
    RULES,
    Problem,
    assert_as_specified,
    assert_equal,
    expected,
    generator,
    is_close_call,
    on_gpu,
    random_problem,
    run,
    run_in_block,
)
from torch import Tensor

from fdpp import EntropyBound, EntropySum, Factor, Frechet, Quota, Rule, Threshold, ThresholdQuota

# The interpreter computes with NumPy, which warns of the infinities and NaN that `tl.where` then leaves out.
pytestmark = [
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

# Blocks of 5 to 8 positions and odd vocabularies of 17 to 31 ids share a kernel, which a GPU compiles once.
V = 23
MASK = 7
INF, NAN = float("inf"), float("nan")


def profile(*residuals: float) -> Tensor:
    """Logits `[1, T, V]`: token `t % 5` is proposed at t with the given residual, exactly so if that is an integer."""
    logits = torch.full((1, len(residuals), V), -INF)
    for t, residual in enumerate(residuals):
        logits[0, t, t % 5] = 0.0
        rivals = int(residual) if residual == int(residual) else 1
        logits[0, t, 10 : 10 + rivals] = torch.tensor(residual / max(rivals, 1)).log()
    return logits


def masked(logits: Tensor, *rules: Rule, **changes: object) -> Problem:
    """Everything masked."""
    problem = Problem(logits, torch.full(logits.shape[:2], MASK), rules or (Frechet(0.25),), MASK)
    return dataclasses.replace(problem, **changes)


@on_gpu(lambda dtype: dtype == torch.float32)
@pytest.mark.parametrize("rule", [*RULES, ThresholdQuota(0.5, 2), EntropySum(0.8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rules_and_dtypes(implementation: str, rule: Rule, dtype: torch.dtype) -> None:
    T, size = (7, V) if implementation == "cuda" else (12, 50)
    problem = random_problem(0, 3, T, size, rule, dtype=dtype, active=dtype != torch.float32)
    assert_as_specified(run(implementation, problem), problem)


@on_gpu(lambda T, rule: (T, rule.order) in [(1, "entropy"), (31, "confidence"), (33, "entropy"), (129, "confidence")])
@pytest.mark.parametrize("rule", [Frechet(0.1), EntropyBound(2.0)], ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 31, 32, 33, 100, 129])
def test_block_lengths(implementation: str, T: int, rule: Rule) -> None:
    problem = random_problem(T, 2, T, 17, rule, masked=0.8)
    assert_as_specified(run(implementation, problem), problem)


@pytest.mark.parametrize("T", [1000, 1024])
def test_long_blocks(implementation: str, T: int) -> None:
    """Most positions committed already, as in the last steps: the interpreter is quick with them."""
    problem = random_problem(T, 1, T, 18, Threshold(0.3), masked=0.9 if implementation == "cpu" else 0.2)
    out = run(implementation, problem)
    assert out.committed.sum() > 33
    assert_as_specified(out, problem)


@on_gpu(lambda size: size in (1, 17, 2048, 2049, 5003))
@pytest.mark.parametrize("size", [1, 2, 16, 17, 1000, 2047, 2048, 2049, 5003])
def test_vocabularies(implementation: str, size: int) -> None:
    problem = random_problem(size, 2, 5, size, Threshold(0.9), masked=1.0, mask_id=size)
    problem.logits[0, 0, size - 1] = problem.logits[0, 1, 0] = 40.0
    out = run(implementation, problem)
    assert out.proposal[0, :2].tolist() == [size - 1, 0]
    assert_as_specified(out, problem)


@on_gpu(lambda rule, temperature: (rule.order == "entropy") == (temperature > 0.0))
@pytest.mark.parametrize("rule", [Frechet(0.25), EntropyBound(1.0)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_several_splits_of_several_tiles(implementation: str, rule: Rule, temperature: float) -> None:
    problem = random_problem(5, 1, 40, 9001, rule, masked=0.5, temperature=temperature)
    assert_as_specified(run(implementation, problem), problem)


@on_gpu(lambda dtype, temperature: (dtype == torch.float32) == (temperature > 0.0))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_full_vocabulary(implementation: str, dtype: torch.dtype, temperature: float) -> None:
    rule = Frechet(0.1) if temperature == 0.0 else EntropyBound(9.0)
    problem = random_problem(1, 1, 3, 126464, rule, dtype=dtype, masked=1.0, mask_id=126336, temperature=temperature)
    problem.logits[0, 0, problem.mask_id] = 13.0
    problem.logits[0, 1, 126463] = 30.0
    assert_as_specified(run(implementation, problem), problem)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    size=st.integers(2, 40),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    active=st.booleans(),
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
)
def test_random_problems(
    implementation: str, seed: int, B: int, T: int, size: int, rule: Rule, dtype: torch.dtype, share: float,
    active: bool, temperature: float,
) -> None:  # fmt: skip
    if implementation == "cuda":
        T, size, dtype, active = 5 + T % 4, 17 + 2 * (size % 8), torch.float32, temperature > 0.0
        rule = RULES[3 + seed % 3] if active else rule
    problem = random_problem(
        seed, B, T, size, rule, dtype=dtype, masked=share, active=active, mask_id=seed % size, temperature=temperature
    )
    truth = expected(problem)
    assume(not any(is_close_call(problem, truth, b) for b in range(B)))
    assert_as_specified(run(implementation, problem), problem, truth)


def test_each_sequence_has_its_own_numbers(implementation: str) -> None:
    rules = (Frechet(0.1), Frechet(0.7), Frechet(0.1, calibration=0.2), Frechet(0.0))
    problem = random_problem(9, 4, 8, V, *rules, masked=1.0)
    problem.logits[:] = problem.logits[:1].clone()
    out = run(implementation, problem)
    assert_as_specified(out, problem)
    assert len(set(out.remaining.tolist())) > 1


def test_ties_go_to_the_lower_position(implementation: str) -> None:
    logits = random_problem(3, 1, 1, V).logits.expand(1, 40, V).contiguous()
    for rule in (Quota(3), Quota(17), EntropyBound(0.0)):
        out = run(implementation, masked(logits, rule))
        count = rule.k if isinstance(rule, Quota) else 1
        assert out.committed[0].nonzero().flatten().tolist() == list(range(count))
        assert_as_specified(out, masked(logits, rule))


def test_ties_go_to_the_lower_id(implementation: str) -> None:
    """Within a tile, between tiles and between splits, whose borders are multiples of 2048."""
    size = 9001
    tied = [[3, 900], [0, 8999], [2047, 2048], [4095, 4096, 8192], [MASK, 8, 9], [8191, 8192], list(range(size))]
    logits = torch.zeros(1, len(tied), size)
    for t, ids in enumerate(tied):
        logits[0, t, ids] = 2.0
    problem = masked(logits, Quota(9))
    out = run(implementation, problem)
    assert out.proposal.tolist() == [[3, 0, 2047, 4095, 8, 8191, 0]]
    assert_as_specified(out, problem)


@pytest.mark.parametrize(
    ("rule", "residuals", "count"),
    [
        (Threshold(0.5), [1.0, 1.0], 2),
        (Threshold(0.25), [0.0, 3.0, 4.0], 2),
        (Threshold(1.0), [0.0, 0.0, 1e-7], 2),
        (Threshold(0.0), [0.0, 1.0, 12.0], 3),
        (Factor(1.5), [0.0, 1.0], 1),
        (Factor(1.5000001), [0.0, 1.0], 2),
        (Frechet(0.0), [1.0, 1.0], 1),
        (Frechet(0.0), [0.0, 1.0], 1),
        (Frechet(0.0), [0.0, 0.999999], 2),
        (Frechet(0.0), [0.0] * 8, 8),
        (Frechet(1.0), [0.0, 0.0], 1),
        (Frechet(0.999999999999), [0.0, 0.0], 2),
        (Frechet(3e38), [0.0, 0.0], 1),
        (Frechet(0.5, calibration=0.25), [0.0, 0.0], 1),
        (Frechet(0.25, calibration=0.25), [0.0, 0.0], 1),
        (Frechet(0.2499, calibration=0.25), [0.0, 0.0], 2),
        (EntropyBound(0.0), [0.0, 0.0, 1.0, 1.0], 3),
        (EntropyBound(0.7), [1.0, 1.0, 1.0], 2),
        (EntropySum(0.0), [0.0, 0.0], 1),
        (EntropySum(1e-300), [0.0, 0.0, 1.0], 2),
        (EntropySum(1.38), [1.0, 1.0, 1.0], 1),
        (EntropySum(1.39), [1.0, 1.0, 1.0], 2),
        (ThresholdQuota(0.5), [1.0, 1.0], 1),
        (ThresholdQuota(0.1), [1.0, 8.0, 9.0, 9.0], 2),
        (ThresholdQuota(0.25, 3), [0.0, 3.0, 3.0, 3.0], 3),
        (ThresholdQuota(1.0, 2), [0.0, 0.0, 0.0], 2),
        (ThresholdQuota(0.0, 9), [0.0, 1.0, 12.0], 3),
        (Quota(5), [1.0] * 6, 5),
        (Quota(10**9), [1.0] * 5, 5),
    ],
    ids=str,
)
def test_exact_boundaries(implementation: str, rule: Rule, residuals: list[float], count: int) -> None:
    """An accepted equality, a strict inequality, and just past each; d = 1/2 where the residual is 1."""
    out = run_in_block(implementation, masked(profile(*residuals), rule))
    assert int(out.committed.sum()) == count
    assert int(out.remaining) == len(residuals) - count


def test_one_minus_confidence_keeps_its_digits(implementation: str) -> None:
    """Confidences that float32 rounds to 1: only their residuals tell which are more certain, and how much."""
    problem = masked(profile(4e-9, 1e-9, 3e-9, 2e-9), Quota(2))
    out = run_in_block(implementation, problem)
    assert (out.confidence == 1.0).all()
    assert out.committed.tolist() == [[False, True, False, True]]
    for f, count in ((4.9e-9, 1), (6.1e-9, 2), (12.1e-9, 3), (20.1e-9, 4)):
        assert int(run_in_block(implementation, masked(problem.logits, Factor(f))).committed.sum()) == count
    margin = 1.0 - 5.5e-9
    assert int(run_in_block(implementation, masked(problem.logits, Frechet(margin))).committed.sum()) == 2


@triton.jit
def mean_cost_is(n, last, total, p0, p1):
    return (total > n * p0 - p1) & (total < n * p0 + p1)


@dataclasses.dataclass(frozen=True)
class MeanCostIs(Rule):
    """Shows what reaches a predicate: accepts a prefix whose mean cost is `mean` within 1e-12."""

    mean: float
    calibration: float = 0.0
    predicate = mean_cost_is

    def params(self) -> tuple[float, float]:
        return self.mean, 1e-12


@pytest.mark.parametrize("T", [31, 48])
def test_costs_are_summed_in_float64(implementation: str, T: int) -> None:
    """Two rivals of equal weight make every cost 2/3; calibration is added to it, up to a cost of 1."""
    logits = profile(*[2.0] * T)
    for rule in (MeanCostIs(2 / 3), MeanCostIs(2 / 3 + 0.1, 0.1), MeanCostIs(1.0, 0.5)):
        assert run(implementation, masked(logits, rule)).committed.all(), rule


UNUSABLE = {
    "nan": lambda row: row.index_fill(0, torch.tensor([4]), NAN),
    "all nan": lambda row: row * NAN,
    "nan at the mask id": lambda row: row.index_fill(0, torch.tensor([MASK]), NAN),
    "+inf": lambda row: row.index_fill(0, torch.tensor([4]), INF),
    "+inf at the mask id": lambda row: row.index_fill(0, torch.tensor([MASK]), INF),
    "nan and +inf": lambda row: row.index_fill(0, torch.tensor([2]), INF).index_fill(0, torch.tensor([4]), NAN),
    "all -inf": lambda row: row - INF,
    "all +inf": lambda row: row + INF,
    "only the mask id finite": lambda row: (row - INF).index_fill(0, torch.tensor([MASK]), 1.0),
}


@pytest.mark.parametrize("rule", [Quota(9), Frechet(0.0), EntropyBound(50.0)], ids=str)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_rows_come_last(implementation: str, kind: str, rule: Rule) -> None:
    logits = random_problem(2, 2, 4, V).logits + profile(1.0, 1.0, 1.0, 1.0).nan_to_num(neginf=0.0)
    logits[0, 0] = UNUSABLE[kind](logits[0, 0])
    logits[0, 2] = UNUSABLE[kind](logits[0, 2])
    for t in range(4):
        logits[1, t] = UNUSABLE[kind](logits[1, t])
    problem = masked(logits, rule)
    out = run_in_block(implementation, problem)
    assert out.nonfinite.tolist() == [2, 4]
    assert not out.committed[0, [0, 2]].any() and out.committed[0].any()
    assert out.committed[1].tolist() == [True, False, False, False]
    assert (out.confidence[1] == 0.0).all() and (out.confidence[0, [0, 2]] == 0.0).all()
    assert (out.proposal != MASK).all()
    assert_as_specified(out, problem)


@pytest.mark.parametrize("kind", ["nan", "+inf", "all -inf"])
def test_unusable_rows_of_several_splits(implementation: str, kind: str) -> None:
    logits = random_problem(2, 1, 7, 9001).logits
    logits[0, 1] = UNUSABLE[kind](logits[0, 1])
    logits[0, 2, 5000] = {"nan": NAN, "+inf": INF, "all -inf": -INF}[kind]
    problem = masked(logits, Quota(6))
    assert_as_specified(run(implementation, problem), problem)


@pytest.mark.parametrize("rule", [Frechet(0.0), EntropyBound(0.1)], ids=str)
def test_overflow_sized_logits(implementation: str, rule: Rule) -> None:
    logits = random_problem(4, 1, 6, V).logits
    logits[0, 0] *= 1e37
    logits[0, 1] = -3e38
    logits[0, 1, 5] = 3e38
    logits[0, 2] = 3e38
    logits[0, 3] = -3e38
    logits[0, 4, 3] = -3e38
    logits[0, 5, 1:] = -INF
    problem = masked(logits, rule)
    out = run(implementation, problem)
    assert out.nonfinite.tolist() == [0]
    assert_as_specified(out, problem)


def test_the_lowest_float_is_a_logit(implementation: str) -> None:
    """A lane of the kernel starts there, without a logit."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((1, 5, 9001), -INF)
    logits[0, 0] = lowest
    logits[0, 1, 4500] = lowest
    logits[0, 2, [100, 2148, 8300]] = lowest
    logits[0, 3, [5, 2053]] = torch.tensor([lowest, lowest / 2])
    problem = masked(logits, Quota(2))
    out = run(implementation, problem)
    assert out.proposal.tolist() == [[0, 4500, 100, 2053, 0]]
    assert out.nonfinite.tolist() == [1]
    assert_as_specified(out, problem)


def test_half_precision_extremes(implementation: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        logits = random_problem(4, 1, 6, V).logits.to(dtype)
        logits[0, 0, 3], logits[0, 1, 3] = torch.finfo(dtype).max, torch.finfo(dtype).min
        logits[0, 2] = torch.finfo(dtype).max
        problem = masked(logits, Frechet(0.0))
        assert_as_specified(run(implementation, problem), problem)


@pytest.mark.parametrize("rule", [Frechet(0.25), EntropyBound(0.5)], ids=str)
def test_nothing_masked(implementation: str, rule: Rule) -> None:
    problem = random_problem(1, 2, 5, V, rule, masked=0.0)
    problem.logits.fill_(NAN)
    out = run(implementation, problem)
    assert out.tokens.equal(problem.tokens) and out.proposal.equal(problem.tokens)
    assert not out.committed.any() and not out.confidence.any() and not out.remaining.any() and not out.nonfinite.any()


def test_nothing_active(implementation: str) -> None:
    problem = random_problem(1, 2, 5, V, Frechet(0.1), masked=1.0)
    out = run(implementation, dataclasses.replace(problem, active=torch.zeros(2, 5, dtype=torch.bool)))
    assert not out.committed.any() and out.proposal.equal(problem.tokens) and not out.remaining.any()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_empty(implementation: str, shape: tuple[int, int]) -> None:
    for rule in (Frechet(0.25), EntropyBound(0.5)):
        out = run(implementation, masked(torch.zeros(*shape, V), rule))
        assert [field.shape for field in out] == [shape] * 4 + [shape[:1]] * 2
        assert not out.remaining.any() and not out.nonfinite.any()


def test_at_least_one_position_commits(implementation: str) -> None:
    for rule in (Threshold(1.0), Factor(1e-30), Frechet(2.0), EntropyBound(0.0), Quota(1)):
        problem = random_problem(8, 3, 6, V, rule, masked=1.0)
        assert run(implementation, problem).committed.sum(1).tolist() == [1, 1, 1]


def test_mask_id_is_never_proposed(implementation: str) -> None:
    problem = random_problem(6, 2, 6, V, Threshold(0.05), masked=1.0, mask_id=MASK)
    problem.logits[..., MASK] = problem.logits.amax(-1) + 1.0
    out = run(implementation, problem)
    assert (out.proposal != MASK).all() and (out.confidence < 0.27).all()
    assert_as_specified(out, problem)


@pytest.mark.parametrize("lead", [1.0, 30.0, 200.0])
def test_entropy_counts_the_mask_id(implementation: str, lead: float) -> None:
    """A row whose mass lies on the mask id has an entropy like any other, however small the proposal's share."""
    problem = random_problem(6, 2, 6, V, EntropyBound(1.0), masked=1.0, mask_id=MASK)
    problem.logits[..., :3, MASK] = problem.logits[..., :3, :].amax(-1) + lead
    assert_as_specified(run(implementation, problem), problem)


@pytest.mark.parametrize("mask_id", [-1, -100, V, 126336])
def test_mask_id_outside_the_vocabulary(implementation: str, mask_id: int) -> None:
    problem = random_problem(6, 2, 6, V, Frechet(0.1), masked=0.7, mask_id=mask_id)
    assert_as_specified(run(implementation, problem), problem)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_masked_active_rows_are_read(implementation: str, temperature: float) -> None:
    problem = random_problem(6, 2, 8, V, Frechet(0.1), masked=0.6, active=True, temperature=temperature)
    clean = run(implementation, problem)
    poisoned = torch.where(problem.candidate[..., None], problem.logits, NAN)
    assert poisoned.isnan().any()
    out = run(implementation, dataclasses.replace(problem, logits=poisoned))
    assert not out.nonfinite.any()
    assert_equal(out, clean)


def strided(problem: Problem) -> dict[str, Tensor]:
    """The same logits in other layouts, NaN wherever no row lies."""
    B, T, size = problem.logits.shape
    wide = torch.full((2 * B + 1, T + 3, size + 5), NAN, dtype=problem.logits.dtype)
    sliced = wide[1::2, 2 : T + 2, 3 : size + 3].copy_(problem.logits)
    return {
        "sliced": sliced,
        "batch and positions transposed": problem.logits.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary not innermost": problem.logits.transpose(1, 2).contiguous().transpose(1, 2),
        "every other entry": torch.full((B, T, 2 * size), NAN, dtype=problem.logits.dtype)[..., ::2].copy_(
            problem.logits
        ),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides(implementation: str, dtype: torch.dtype) -> None:
    problem = random_problem(6, 2, 6, 31, Frechet(0.1), masked=0.7, dtype=dtype)
    contiguous = run(implementation, problem)
    for name, logits in strided(problem).items():
        assert logits.equal(problem.logits) and not logits.is_contiguous(), name
        assert_equal(run(implementation, dataclasses.replace(problem, logits=logits)), contiguous)


def test_expanded_rows(implementation: str) -> None:
    row = random_problem(6, 1, 1, 31).logits
    problem = masked(row.expand(2, 5, 31), Quota(2))
    assert problem.logits.stride() == (0, 0, 1)
    assert_equal(run(implementation, problem), run(implementation, masked(problem.logits.contiguous(), Quota(2))))


def test_strided_tokens_active_and_seeds(implementation: str) -> None:
    problem = random_problem(6, 8, 8, V, Frechet(0.1), active=True, temperature=1.0)
    assert problem.active is not None and problem.seeds is not None
    other = dataclasses.replace(
        problem,
        tokens=problem.tokens.T.contiguous().T,
        active=problem.active.T.contiguous().T,
        seeds=problem.seeds.repeat_interleave(2)[::2],
    )
    out = run(implementation, other)
    assert_equal(out, run(implementation, problem))
    assert all(field.is_contiguous() for field in out)


@on_gpu(lambda rule, temperature: (rule.order == "entropy") == (temperature > 0.0))
@pytest.mark.parametrize("rule", [Frechet(0.25), EntropyBound(0.5)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_inputs_stay_unmodified(implementation: str, rule: Rule, temperature: float) -> None:
    problem = random_problem(6, 2, 6, V, rule, masked=1.0, active=True, temperature=temperature)
    before = [None if x is None else x.clone() for x in (problem.logits, problem.tokens, problem.active, problem.seeds)]
    out = run(implementation, problem)
    for x, old in zip((problem.logits, problem.tokens, problem.active, problem.seeds), before, strict=True):
        assert x is old is None or x.equal(old)
    storages = {field.untyped_storage().data_ptr() for field in (*out, problem.tokens)}
    assert len(storages) == 7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sequence_does_not_depend_on_its_batch(implementation: str, temperature: float) -> None:
    problem = random_problem(6, 4, 8, V, Frechet(0.25), temperature=temperature)
    together = run(implementation, problem)
    # Another alignment of seeds would be another kernel.
    for b in (0, 2) if implementation == "cuda" else (0, 3):
        alone = dataclasses.replace(
            problem,
            logits=problem.logits[b : b + 1],
            tokens=problem.tokens[b : b + 1],
            seeds=None if problem.seeds is None else problem.seeds[b : b + 1],
        )
        assert_equal(run(implementation, alone), type(together)(*(field[b : b + 1] for field in together)))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_sampled(implementation: str, temperature: float) -> None:
    problem = random_problem(11, 3, 8, V, Frechet(0.2), masked=0.9, temperature=temperature)
    out = run(implementation, problem)
    assert_as_specified(out, problem)
    assert_equal(run(implementation, problem), out)


def test_sampling_far_from_the_top(implementation: str) -> None:
    """Proposals some 700 nats below the largest logit: their confidence and cost are 0 and 1, not NaN."""
    logits = torch.linspace(-700.0, 0.0, V).expand(1, 6, V).contiguous()
    for rule in (Frechet(0.0), EntropyBound(1.0)):
        problem = masked(logits, rule, temperature=1e4, seeds=torch.tensor([3]))
        out = run(implementation, problem)
        assert out.nonfinite.tolist() == [0]
        assert out.committed.any() and not out.confidence.isnan().any()
        assert out.proposal.equal(expected(problem).proposal)
        if isinstance(rule, EntropyBound):
            assert out.committed.all(), "all six entropies are those of one distribution, close to 0"


def test_sampling_frequencies(implementation: str) -> None:
    """4096 draws (512 in the interpreter) follow softmax(l / T); Pearson's statistic stays below its 99.9% quantile."""
    temperature, size = 1.5, 8
    logits = torch.full((V,), -INF)
    logits[:size] = torch.linspace(-2.0, 3.0, size)
    B, T = 64 if implementation == "interpreter" else 512, 8
    problem = Problem(
        logits.expand(B, T, V).contiguous(),
        torch.full((B, T), 99),
        (Frechet(0.1),),
        99,
        None,
        temperature,
        torch.arange(B),
    )
    drawn = run(implementation, problem).proposal.flatten().bincount(minlength=size).double()
    wanted = (logits[:size].double() / temperature).softmax(0) * B * T
    assert wanted.min() > 5
    assert float(((drawn - wanted) ** 2 / wanted).sum()) < 24.3


def test_sampled_confidence_is_the_untempered_softmax(implementation: str) -> None:
    problem = random_problem(1, 1, 6, V, Frechet(0.1), masked=1.0, temperature=3.0)
    out = run(implementation, problem)
    wanted = problem.logits.double().softmax(-1).gather(2, out.proposal[..., None])[..., 0]
    torch.testing.assert_close(out.confidence.double(), wanted, rtol=2e-6, atol=0.0)
    assert not out.proposal.equal(problem.logits[..., :-1].argmax(-1))


@pytest.mark.parametrize("apart", ["sequences", "positions"])
def test_offsets_beyond_int32(implementation: str, apart: str) -> None:
    """Rows 2^30 entries apart, so that the third one's offset is no int32, in memory that is never touched between."""
    device = "cuda" if implementation == "cuda" else "cpu"
    far_apart, shape = 2**30 + 16, (3, 3, 16) if apart == "sequences" else (1, 3, 16)
    storage = torch.empty(2 * far_apart + 3 * 16, dtype=torch.float16, device=device)
    logits = storage.as_strided(shape, (far_apart, 16 if apart == "sequences" else far_apart, 1))
    logits.copy_(torch.randn(shape, generator=generator(0)))
    far = masked(logits, Quota(1), mask_id=15, tokens=torch.full(shape[:2], 15))
    near = dataclasses.replace(far, logits=logits.cpu().contiguous())
    assert_equal(run(implementation, far), run(implementation, near))
