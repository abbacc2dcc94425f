"""A step of a canvas on the CPU and its kernel against the float64 specification, and the operator around them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import unwritten
from canvases import Canvases, assert_as_specified, assert_equal, canvases, run
from captures import Operators
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import IMPLEMENTATIONS, generator, on_gpu
from torch import Tensor

import fdpp
from fdpp import CanvasStep
from fdpp.kernels.launch import canvas_launch
from fdpp.step.canvas import cpu, gpu, operator
from fdpp.step.canvas.operator import denoise_op

# The interpreter computes with NumPy, which warns of the infinities and NaN that `tl.where` then leaves out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)
everywhere = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
V = 72
"""A multiple of 8 and not of 64, as most cases have it, so that they share kernels."""


def rows(*distributions: list[float]) -> Tensor:
    """Logits `[1, T, V]`: those of the first ids; all others are banned."""
    logits = torch.full((1, len(distributions), V), -INF)
    for t, row in enumerate(distributions):
        logits[0, t, : len(row)] = torch.tensor(row)
    return logits


def problem_of(logits: Tensor, **settings: Any) -> Canvases:
    canvas = torch.arange(logits.shape[0] * logits.shape[1]).view(logits.shape[:2])
    return Canvases(logits, canvas, **{"temperature": (1.0,), **settings})


@on_gpu(lambda T, V, softcap: (T, V) in [(2, 5), (33, 1000)] and (V == 5) == (softcap > 0.0))
@everywhere
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("V", [1, 5, 63, 64, 65, 1000])
def test_sizes(implementation: str, V: int, T: int, softcap: float) -> None:
    if implementation == "interpreter" and T == 33 and (V not in (65, 1000) or not softcap):
        pytest.skip("the interpreter takes a tenth of a second a position")
    problem = canvases(V + T, 2, T, V, bound=(0.3,), softcap=softcap)
    assert_as_specified(run(implementation, problem), problem)


@on_gpu(lambda dtype, softcap: softcap > 0.0 or dtype == torch.float32)
@everywhere
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(implementation: str, dtype: torch.dtype, softcap: float) -> None:
    problem = canvases(3, 2, 9, V, dtype, bound=(1.0, 4.0), temperature=(0.4, 0.8), softcap=softcap)
    assert_as_specified(run(implementation, problem), problem)


@on_gpu(lambda T: T == 256)
@everywhere
@pytest.mark.parametrize("T", [100, 1024])
def test_long_canvases(implementation: str, T: int) -> None:
    if implementation == "interpreter" and T > 100:
        pytest.skip("the interpreter takes a minute and a half")
    problem = canvases(T, 1, T, 65, bound=(20.0,))
    out = run(implementation, problem)
    assert 8 < int(out.accepted.sum()) < T
    assert_as_specified(out, problem)


@on_gpu(lambda splits, dtype: (splits == 1) == (dtype == torch.float32))
@everywhere
@pytest.mark.parametrize(("splits", "tiles"), [(1, 8), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_splits_of_many_tiles(
    implementation: str, splits: int, tiles: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21 tiles, whose noise is made 8 or 2 at a time; the last tile is cut off."""

    def launch(*sizes: int) -> Any:
        length = -(-21 // splits) * 1024
        return dataclasses.replace(canvas_launch(*sizes), splits=splits, split_len=length, tiles=tiles)

    monkeypatch.setattr(gpu, "canvas_launch", launch)
    problem = canvases(splits, 1, 3, 20_777, dtype, bound=(2.0,), temperature=(1.0,))
    problem.logits[0, 0, 20_776] = problem.logits[0, 1, 0] = 60.0
    out = run(implementation, problem)
    assert out.argmax[0, :2].tolist() == out.sample[0, :2].tolist() == [20_776, 0]
    assert_as_specified(out, problem)


@on_gpu(lambda dtype: dtype == torch.bfloat16)
@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_full_vocabulary(implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "interpreter":
        if dtype == torch.float32:
            pytest.skip("the interpreter takes half a minute a case")
        one = dataclasses.replace(canvas_launch(1, 256, 262144), block_t=2, splits=2, split_len=131072)
        monkeypatch.setattr(gpu, "canvas_launch", lambda *sizes: one)
    problem = canvases(1, 1, 2, 262144, dtype, bound=(9.0,), temperature=(0.6,), softcap=30.0)
    out = run(implementation, problem)
    assert out.accepted.any()
    assert_as_specified(out, problem)


@everywhere
def test_each_canvas_has_its_own_numbers_and_streams(implementation: str) -> None:
    problem = canvases(5, 4, 9, V, bound=(0.0, 0.0, 0.5, 500.0), temperature=(0.5, 0.5, 0.8, 0.5))
    problem.logits[:] = problem.logits[:1].clone()
    out = run(implementation, problem)
    assert_as_specified(out, problem)
    counts = out.accepted.sum(1).tolist()
    assert counts[:2] == [1, 1] and 1 < counts[2] < counts[3] == 9
    assert not out.canvas[0].equal(out.canvas[1]) and not out.entropy[1].equal(out.entropy[2])


@on_gpu(lambda layout: layout != "transposed")
@everywhere
@pytest.mark.parametrize("layout", ["spread", "transposed", "last"])
def test_strides(implementation: str, layout: str) -> None:
    plain = canvases(7, 2, 9, V, bound=(2.0,), finished=(False, False))
    if layout == "spread":
        logits = torch.full((2, 18, 2 * V), NAN)[:, ::2, :V].copy_(plain.logits)
    elif layout == "transposed":
        logits = plain.logits.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        logits = plain.logits.transpose(1, 2).contiguous().transpose(1, 2)
    canvas = torch.zeros(2, 13, dtype=torch.int64)[:, 3:12].copy_(plain.canvas)
    awkward = dataclasses.replace(plain, logits=logits, canvas=canvas)
    assert not awkward.logits.is_contiguous() and not awkward.canvas.is_contiguous()
    out = run(implementation, awkward)
    assert_equal(out, run(implementation, plain))
    assert all(field.is_contiguous() for field in out)


@everywhere
def test_ties_go_to_the_lower_position_and_the_lower_id(implementation: str) -> None:
    flat, even = [0.0] * 8, [1.0, 1.0]
    problem = problem_of(rows(flat, even, flat, even, even), bound=(1.0,))
    out = run(implementation, problem)
    assert out.accepted.tolist() == [[False, True, False, True, False]]
    assert out.argmax.tolist() == [[0] * 5]
    assert_as_specified(out, problem)


@everywhere
def test_equal_logits_everywhere(implementation: str) -> None:
    problem = problem_of(torch.full((2, 9, V), 3.25), temperature=(0.5,))
    out = run(implementation, problem)
    assert not out.argmax.any() and out.accepted.sum(1).tolist() == [1, 1] and out.accepted[:, 0].all()
    torch.testing.assert_close(out.entropy, torch.full((2, 9), V).float().log(), rtol=3e-7, atol=0.0)
    torch.testing.assert_close(out.lse, out.entropy + 6.5, rtol=3e-7, atol=0.0)
    assert len(set(out.sample.flatten().tolist())) > 9


@everywhere
def test_a_sum_that_equals_the_bound_is_within_it(implementation: str) -> None:
    """Entropies of two equal logits: all alike, so that sums of float32 are exact."""
    even = [1.0, 1.0]
    logits = rows(*[even] * 9)
    unit = float(run(implementation, problem_of(logits)).entropy[0, 0])
    assert unit == pytest.approx(0.6931472, rel=1e-7)
    below = torch.tensor(2 * unit, dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64))
    for bound, count in ((2 * unit, 3), (float(below), 2), (0.0, 1), (8 * unit, 9), (1e300, 9)):
        out = run(implementation, problem_of(logits, bound=(bound,)))
        assert out.accepted[0].tolist() == [t < count for t in range(9)]


@everywhere
def test_what_is_certain_costs_nothing(implementation: str) -> None:
    """With a bound of 0: all positions without entropy, and one more."""
    problem = problem_of(rows([0.0, 1.0], [5.0], [0.0] * 3, [-2.0], [-INF, 1.0]), bound=(0.0,))
    out = run(implementation, problem)
    assert out.accepted.tolist() == [[True, True, False, True, True]]
    assert out.sample[0, [1, 3, 4]].tolist() == [0, 0, 1] and out.entropy[0, 1] == 0.0
    assert_as_specified(out, problem)


@everywhere
def test_small_entropies_keep_their_digits(implementation: str) -> None:
    """1 - p of a float32 p would have none."""
    gaps = torch.tensor([12.0, 20.0, 30.0, 44.0])
    entropy = run(implementation, problem_of(rows(*([0.0, -gap, -gap - 1.0] for gap in gaps.tolist())))).entropy
    others = torch.stack((gaps, gaps + 1.0)).double()
    rest = (-others).exp()
    exact = rest.sum(0).log1p() + (rest * others).sum(0) / (1.0 + rest.sum(0))
    torch.testing.assert_close(entropy[0].double(), exact, rtol=3e-6, atol=2e-16)
    assert 0.0 < float(entropy[0, 3]) < 1e-15


AWKWARD: dict[str, list[float]] = {
    "nan": [1.0, NAN, 3.0],
    "all nan": [NAN] * V,
    "infinite": [1.0, INF, 3.0],
    "infinite and nan": [INF, NAN],
    "banned": [-INF] * V,
    "opposite": [-INF, INF],
}


@everywhere
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_unusable_rows_are_never_accepted(implementation: str, kind: str, softcap: float) -> None:
    logits = rows(AWKWARD[kind], [0.0, 1.0], AWKWARD[kind])
    if softcap:
        logits[0, 1, 2:] = -1e4
        problem = problem_of(logits, bound=(1e9,), softcap=softcap)
        # A soft cap makes all but NaN finite.
        usable = "nan" not in kind
        assert run(implementation, problem).accepted.tolist() == [[usable, True, usable]]
    else:
        problem = problem_of(logits, bound=(1e9,))
        out = run(implementation, problem)
        assert out.accepted.tolist() == [[False, True, False]]
        assert out.entropy[0, ::2].tolist() == [INF, INF] and out.mean_entropy.tolist() == [INF]
        assert out.sample[0, ::2].equal(out.canvas[0, ::2])
    assert_as_specified(run(implementation, problem), problem)


@everywhere
def test_nothing_usable_accepts_nothing(implementation: str) -> None:
    problem = problem_of(rows([NAN], [INF, 1.0], [-INF]), bound=(1.0,))
    out = run(implementation, problem)
    assert not out.accepted.any() and out.canvas.equal(out.sample)
    assert_as_specified(out, problem)


@everywhere
def test_banned_ids_are_never_drawn(implementation: str) -> None:
    logits = torch.zeros(1, 33, 1000)
    logits[0, :, ::2] = -INF
    logits[0, :, 128:640] = -INF
    problem = problem_of(logits, bound=(1e9,))
    out = run(implementation, problem)
    assert (out.sample % 2 == 1).all() and not ((out.sample >= 128) & (out.sample < 640)).any()
    assert_as_specified(out, problem)


@everywhere
def test_outputs_far_beyond_the_soft_cap(implementation: str) -> None:
    """tanh is then 1: what is not alike was there before."""
    logits = rows(*([0.0] * V for _ in range(5)))
    logits[0, 0, 5], logits[0, 1, 7:9], logits[0, 2], logits[0, 3], logits[0, 4, 3] = 1e4, 9e3, -1e4, 1e4, -1e4
    problem = problem_of(logits, softcap=30.0, bound=(5.0,), temperature=(0.4,))
    out = run(implementation, problem)
    assert out.argmax.tolist() == [[5, 7, 0, 0, 0]]
    torch.testing.assert_close(out.entropy[0, 2:4], torch.full((2,), V).float().log(), rtol=1e-6, atol=0.0)
    assert_as_specified(out, problem)


@everywhere
def test_large_outputs_without_a_soft_cap(implementation: str) -> None:
    problem = canvases(11, 1, 9, V, bound=(0.5,), temperature=(0.9,))
    problem = dataclasses.replace(problem, logits=problem.logits * 700.0)
    out = run(implementation, problem)
    assert out.sample.equal(out.argmax)
    assert_as_specified(out, problem)


@everywhere
def test_without_temperature_the_sample_is_the_argmax(implementation: str) -> None:
    problem = canvases(12, 2, 9, V, temperature=(1e-6,))
    out = run(implementation, problem)
    assert out.sample.equal(out.argmax) and out.argmax.equal(problem.logits.argmax(2))
    assert out.accepted.all() and out.canvas.equal(out.sample)


@everywhere
@pytest.mark.parametrize("finished", [(True, True, True), (True, False, True), (False, False, False)], ids=str)
def test_finished_canvases_are_kept(implementation: str, finished: tuple[bool, ...]) -> None:
    problem = canvases(13, 3, 9, V, bound=(1.0,), finished=finished)
    for b, done in enumerate(finished):
        if done:
            problem.logits[b] = NAN
    out = run(implementation, problem)
    done = torch.tensor(finished)
    assert out.canvas[done].equal(problem.canvas[done]) and out.sample[done].equal(problem.canvas[done])
    assert out.argmax[done].equal(problem.argmax[done])
    assert not torch.cat([out.entropy[done], out.lse[done], out.accepted[done], out.mean_entropy[done, None]], 1).any()
    assert_as_specified(out, problem)


def test_logits_of_finished_canvases_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    rows_of = cpu.rows_of
    monkeypatch.setattr(cpu, "rows_of", lambda logits, b, t: read.append(b) or rows_of(logits, b, t))
    run("cpu", canvases(13, 3, 9, V, finished=(True, False, True)))
    assert torch.cat(read).tolist() == [1] * 9


@everywhere
def test_a_canvas_alone_takes_the_same_step(implementation: str) -> None:
    batch = canvases(14, 3, 9, V, bound=(1.0,), finished=(False, True, False))
    out = run(implementation, batch)
    for b in range(3):
        alone = dataclasses.replace(
            batch,
            logits=batch.logits[b : b + 1],
            canvas=batch.canvas[b : b + 1],
            seed=batch.seed + b,
            finished=batch.finished[b : b + 1],  # type: ignore[index]
        )
        assert_equal(run(implementation, alone), CanvasStep(*(field[b : b + 1] for field in out)))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    size=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([0.0, 5.0, 30.0]),
    bound=st.sampled_from([0.0, 0.1, 2.0, 1e3]),
    temperature=st.sampled_from([0.05, 0.4, 1.0, 3.0]),
    finished=st.booleans(),
    banned=st.booleans(),
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_random_canvases(
    implementation: str, seed: int, B: int, T: int, size: int, dtype: torch.dtype, softcap: float, bound: float,
    temperature: float, finished: bool, banned: bool,
) -> None:  # fmt: skip
    done = tuple((seed >> b) % 2 == 1 for b in range(B)) if finished else None
    problem = canvases(
        seed, B, T, size, dtype, softcap=softcap, bound=(bound,), temperature=(temperature,), finished=done
    )
    if banned and not softcap:
        problem.logits[torch.rand(problem.logits.shape, generator=generator(seed)) < 0.5] = -INF
    out = run(implementation, problem)
    assert_as_specified(out, problem)
    assert ((out.canvas >= 0) & (out.canvas < size) | (out.canvas == problem.canvas)).all()
    assert out.canvas[out.accepted].equal(out.sample[out.accepted])


# Distributions


def chi_square(counts: Tensor, p: Tensor) -> float:
    return float(((counts - counts.sum() * p) ** 2 / (counts.sum() * p)).sum())


@pytest.mark.parametrize("V", [5, 130])
def test_samples_follow_the_softmax(V: int) -> None:
    """512,000 draws; the limit is passed by one in a million."""
    logits = torch.randn(1, 1, V, generator=generator(V)) * 1.5
    n, problem = torch.zeros(V), problem_of(logits.expand(64, 1000, V), temperature=(0.8,))
    for seed in range(8):
        n += run("cpu", dataclasses.replace(problem, seed=1000 * seed)).sample.flatten().bincount(minlength=V)
    p = (logits[0, 0].double() / 0.8).softmax(0)
    assert chi_square(n.double(), p) < {5: 33.4, 130: 220.0}[V]


def test_what_is_made_anew_is_uniform() -> None:
    V = 50
    problem = problem_of(torch.zeros(256, 1024, V), bound=(0.0,))
    out = run("cpu", problem)
    assert out.accepted.sum() == 256
    fresh = out.canvas[~out.accepted]
    n = fresh.bincount(minlength=V).double()
    assert chi_square(n, torch.full((V,), 1 / V, dtype=torch.float64)) < 108.0
    # And says nothing of the sample, which another use of the counter draws.
    same = int((out.canvas == out.sample)[~out.accepted].sum())
    assert abs(same - len(fresh) / V) < 5 * (len(fresh) / V) ** 0.5


@pytest.mark.parametrize("seed", range(5))
def test_transformers_accepts_the_same(seed: int) -> None:
    module = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    problem = canvases(seed, 3, 64, 300, bound=(2.0,), temperature=(0.6,))
    sampler = module.EntropyBoundSampler(module.EntropyBoundSamplerConfig(2.0), 64, 300, 48)
    x = problem.logits / 0.6
    sampler.accept_canvas(problem.canvas, problem.canvas, x, 48)
    out = run("cpu", problem)
    assert 3 < int(out.accepted.sum()) < 192
    assert out.accepted.equal(sampler.accepted_token_mask)
    assert out.argmax.equal(x.argmax(2))


# The operator

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("finished", [None, (True, False)], ids=str)
def test_opcheck(device: str, finished: tuple[bool, ...] | None) -> None:
    problem = canvases(0, 2, 9, V, bound=(0.3,), softcap=30.0, finished=finished)
    torch.library.opcheck(denoise_op, problem.arguments(device))
    own = dataclasses.replace(
        problem, bound=(0.3, 0.4), temperature=(0.7, 0.8), logits=problem.logits.mT.contiguous().mT
    )
    torch.library.opcheck(denoise_op, own.arguments(device))


def public(problem: Canvases, **changes: Any) -> CanvasStep:
    arguments: dict[str, Any] = {"bound": problem.bound[0], "temperature": problem.temperature[0], "seed": problem.seed}
    arguments |= {"argmax": problem.argmax, "softcap": problem.softcap or None} | changes
    return fdpp.denoise_canvas(arguments.pop("logits", problem.logits), problem.canvas, **arguments)


def test_the_front_door() -> None:
    problem = canvases(1, 3, 9, V, bound=(0.3,), softcap=30.0)
    out = run("cpu", problem)
    assert_equal(public(problem), out)
    assert_equal(CanvasStep(*denoise_op(*problem.arguments())), out)
    assert_equal(operator.step(*problem.arguments()), out)  # type: ignore[arg-type]
    assert_equal(public(problem, seed=problem.seeds), out)
    double = torch.float64
    for bound, temperature in (
        (torch.tensor(0.3, dtype=double), 0.7),
        (0.3, torch.tensor([0.7] * 3, dtype=double)),
        (torch.tensor([0.3] * 3, dtype=double), torch.tensor(0.7, dtype=double)),
    ):
        assert_equal(public(problem, bound=bound, temperature=temperature), out)
    done = public(problem, finished=torch.ones(3, dtype=torch.bool), argmax=None)
    assert done.argmax.equal(problem.canvas)
    assert not any(field is tensor for field in done for tensor in (problem.canvas, problem.argmax))


def test_float32_numbers_are_taken_as_they_are() -> None:
    problem = canvases(1, 3, 9, V)
    exact = torch.tensor([0.25, 0.5, 1.0])
    out = public(problem, bound=exact, temperature=exact)
    assert_equal(out, run("cpu", dataclasses.replace(problem, bound=(0.25, 0.5, 1.0), temperature=(0.25, 0.5, 1.0))))


@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_gradients_end_at_the_choice(compiled: bool) -> None:
    torch._dynamo.reset()
    problem = canvases(1, 2, 9, V)
    scale = torch.ones((), requires_grad=True)

    def choose() -> CanvasStep:
        return public(problem, logits=problem.logits * scale)

    out = torch.compile(choose, fullgraph=True, backend="aot_eager")() if compiled else choose()
    assert_equal(out, run("cpu", problem))
    assert not out.entropy.requires_grad


def test_a_loop_under_compile() -> None:
    """A canvas and numbers that are tensors, step by step in one graph."""
    torch._dynamo.reset()
    problem = canvases(1, 2, 9, V, bound=(0.3,), softcap=30.0)
    logits, canvas, argmax, _, numbers, seeds, softcap = problem.arguments()

    def steps() -> tuple[Tensor, Tensor]:
        now, best = canvas, argmax
        done = torch.zeros(2, dtype=torch.bool)
        for i in range(3):
            out = operator.step(logits * (1.0 + now.float().mean()), now, best, done, numbers, seeds + i, softcap)
            done = done | out.argmax.eq(best).all(1)
            now, best = out.canvas, out.argmax
        return now, best

    together, alone = torch.compile(steps, fullgraph=True, backend="aot_eager")(), steps()
    assert together[0].equal(alone[0]) and together[1].equal(alone[1])


def test_a_launch_asks_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph may hold it: nothing but memory is asked for, of the same shapes in every call."""

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: None

    monkeypatch.setattr(gpu, "canvas_kernel", Launch())
    problem = canvases(1, 2, 9, V, finished=(True, False))
    logs, arguments = [], problem.arguments()
    for _ in range(2):
        with unwritten.left_alone(), Operators() as mode:
            gpu.denoise_canvas(*arguments)  # type: ignore[arg-type]
        logs.append(mode.log)
    assert logs[0] == logs[1]
    # Zeros are the tickets, which a GPU has made before.
    assert {entry[0].__name__.split(".")[0] for entry in logs[0]} <= {"empty", "new_empty", "zeros"}


LOGITS, CANVAS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3, 5)}, "logits: expected [B, T, V] in bfloat16, float16 or float32, got [3, 5]"),
        ({"logits": torch.zeros(())}, "logits: expected [B, T, V] in bfloat16, float16 or float32, got []"),
        ({"logits": LOGITS.double()}, "in bfloat16, float16 or float32, got [2, 3, 5] in torch.float64"),
        ({"logits": torch.zeros(1, 1025, 5)}, "1 to 1024 positions and a vocabulary, got T=1025, V=5"),
        ({"logits": torch.zeros(1, 0, 5)}, "1 to 1024 positions and a vocabulary, got T=0, V=5"),
        ({"logits": torch.zeros(2, 3, 0)}, "got T=3, V=0"),
        ({"logits": LOGITS.to("meta")}, "logits: expected a CPU or CUDA tensor, got meta"),
        ({"canvas": CANVAS[:, :2]}, "canvas: expected [2, 3] torch.int64 on cpu, got [2, 2] torch.int64 on cpu"),
        ({"canvas": CANVAS.int()}, "canvas: expected [2, 3] torch.int64 on cpu, got [2, 3] torch.int32 on cpu"),
        ({"argmax": CANVAS[0]}, "argmax: expected [2, 3] torch.int64 on cpu, got [3] torch.int64 on cpu"),
        ({"finished": CANVAS[:, 0]}, "finished: expected [2] torch.bool on cpu, got [2] torch.int64 on cpu"),
        ({"seed": CANVAS[0]}, "seed: expected [2] torch.int64 on cpu, got [3] torch.int64 on cpu"),
        ({"seed": 0.5}, "seed: expected an int or an int64 tensor [2], got 0.5"),
        ({"bound": -0.1}, "bound: expected a finite number at least 0, got -0.1"),
        ({"bound": NAN}, "bound: expected a finite number at least 0, got nan"),
        ({"bound": torch.zeros(3)}, "bound: expected a number or float [2], got [3] torch.float32"),
        ({"bound": CANVAS[:, 0]}, "bound: expected a number or float [2], got [2] torch.int64"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": INF}, "temperature: expected a finite number above 0, got inf"),
        ({"temperature": "hot"}, "temperature: expected a finite number above 0, got 'hot'"),
        ({"temperature": torch.ones(2, device="meta")}, "temperature: expected a tensor on cpu, got one on meta"),
        ({"softcap": 0.0}, "softcap: expected a finite number above 0 or None, got 0.0"),
        ({"softcap": INF}, "softcap: expected a finite number above 0 or None, got inf"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_errors_name_what_was_expected_and_what_came(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": LOGITS, "canvas": CANVAS, "bound": 0.1, "temperature": 0.5, "seed": 1}
    arguments |= changes
    with pytest.raises(ValueError, match=re.escape(message)):
        fdpp.denoise_canvas(arguments.pop("logits"), arguments.pop("canvas"), **arguments)
