"""Self-conditioning of a canvas: tempered logits and soft embeddings, against float64 and against transformers' way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import nodes
import pytest
import roofline
import torch
from inputs import INTERPRETED, generator, on_gpu
from torch import Tensor

from fdpp.kernels import launch
from fdpp.kernels.launch import conditioning_bytes, conditioning_slab
from fdpp.step.canvas import conditioning
from fdpp.step.canvas.conditioning import (
    embed_gpu,
    embed_op,
    process_gpu,
    process_op,
    processed_logits,
    soft_embeddings,
)
from fdpp.step.canvas.reference import processed

# The interpreter computes with NumPy, which warns of the infinities and NaN that are tried.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

DEVICES = [
    "cpu",
    pytest.param("interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
NAN, INF = float("nan"), float("inf")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CAP, SCALE = 30.0, 53.0


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs and tiles of small vocabularies, the last of them in part."""
    monkeypatch.setattr(conditioning, "SLAB", 96)
    monkeypatch.setattr(launch, "CONDITIONING_IN_L2", 0)
    monkeypatch.setattr(launch, "CONDITIONING_IDS", 128)
    monkeypatch.setattr(conditioning, "CONDITIONING_BLOCK_V", 64)


def numbers_of(*temperatures: float) -> Tensor:
    return torch.tensor([[0.1, t] for t in temperatures], dtype=torch.float64)


def called(device: str, name: str, *arguments: Any) -> Tensor:
    """`processed_logits` or `soft_embeddings` by an implementation, its result on the CPU."""
    if device == "interpreter":
        gpu = {"processed_logits": process_gpu, "soft_embeddings": embed_gpu}[name]
        given = signature(getattr(conditioning, name)).bind(*arguments)
        given.apply_defaults()
        return gpu(*given.args)
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    return getattr(conditioning, name)(*moved).cpu()


def canvas(seed: int, B: int, T: int, V: int, kind: str = "mixed", dtype: torch.dtype = F32) -> Tensor:
    """Logits of flat rows, of rows with one id far above the others, or of both by turns."""
    g = generator(seed)
    logits = torch.randn(B, T, V, generator=g) * (0.3 if kind == "flat" else 4.0)
    raised = torch.randint(0, V, (B, T, 1), generator=g)
    lift = torch.full((B, T, 1), {"flat": 0.0, "peaked": 25.0, "mixed": 25.0}[kind])
    if kind == "mixed":
        lift[:, ::2] = 0.0
    return logits.scatter_add_(2, raised, lift).to(dtype)


def lse_of(logits: Tensor, numbers: Tensor, cap: float = CAP) -> Tensor:
    temperatures = numbers[:, 1].expand(logits.shape[0])
    return processed(logits, temperatures, cap).logsumexp(-1).float()


def exact(logits: Tensor, numbers: Tensor, weight: Tensor, cap: float = CAP, scale: float = SCALE) -> Tensor:
    temperatures = numbers[:, 1].expand(logits.shape[0])
    return scale * processed(logits, temperatures, cap).softmax(-1) @ weight.double()


def theirs(logits: Tensor, numbers: Tensor, weight: Tensor, cap: float = CAP, scale: float = SCALE) -> Tensor:
    """Transformers' way: processed logits rounded to the weight's dtype, so their softmax, and the product."""
    x = logits.float()
    x = x / cap
    x = torch.tanh(x) * cap / numbers[:, 1].float()[:, None, None]
    p = x.to(weight.dtype).softmax(dim=-1, dtype=F32).to(weight.dtype)
    return torch.matmul(p, weight) * torch.tensor(scale).to(weight.dtype)


def needs_rounding(device: str, dtype: torch.dtype) -> None:
    if device == "interpreter" and dtype == BF16:
        pytest.skip("the interpreter cuts bfloat16 off instead of rounding to it")


# Processed logits


@on_each_device
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("given", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("cap", [0.0, CAP], ids=["plain", "capped"])
@on_gpu(lambda dtype, given, cap: (dtype, given) == (BF16, BF16) or (dtype, given, cap) == (F32, F32, CAP))
def test_logits_are_tempered(device: str, dtype: torch.dtype, given: torch.dtype, cap: float) -> None:
    needs_rounding(device, dtype)
    logits, numbers = canvas(1, 2, 3, 200, dtype=given), numbers_of(0.4, 0.8)
    out = called(device, "processed_logits", logits, numbers, cap, dtype)
    truth = processed(logits, numbers[:, 1], cap)
    assert out.dtype == dtype and out.shape == truth.shape and out.is_contiguous()
    rounding = torch.finfo(dtype).eps / 2
    assert ((out.double() - truth).abs() <= (rounding + 1e-6) * truth.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_on_a_cpu_they_are_transformers(dtype: torch.dtype) -> None:
    logits, numbers = canvas(2, 2, 5, 333, dtype=dtype), numbers_of(0.4, float(torch.tensor(0.7)))
    x = logits.to(F32) / CAP
    x = torch.tanh(x) * CAP
    scores = torch.cat([row / t for row, t in zip(x.split(1), numbers[:, 1].float(), strict=True)])
    assert processed_logits(logits, numbers, CAP).equal(scores.to(BF16))


@on_each_device
@pytest.mark.parametrize("cap", [0.0, CAP], ids=["plain", "capped"])
@on_gpu(lambda cap: cap == CAP)
def test_extremes_are_tempered(device: str, cap: float) -> None:
    row = torch.tensor([NAN, INF, -INF, 3e38, -3e38, 0.0, -0.0, 1e-30, -1e-3, 0.24, 0.26, 8.0])
    out = called(device, "processed_logits", row.expand(1, 1, -1), numbers_of(0.5), cap, F32)[0, 0]
    truth = processed(row.expand(1, 1, -1), torch.tensor([0.5]), cap)[0, 0]
    assert out.isnan().tolist() == truth.isnan().tolist()
    torch.testing.assert_close(out[1:].double().clamp(-3e38, 3e38), truth[1:].clamp(-3e38, 3e38), rtol=1e-6, atol=0)


# Soft embeddings


@on_each_device
@pytest.mark.parametrize("kind", ["flat", "peaked", "mixed"])
@pytest.mark.parametrize("weights", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 1000, 40), (1, 1, 129, 1), (3, 2, 96, 7), (1, 2, 1, 5)], ids=str)
@on_gpu(lambda weights, shape: shape[0] == 2 and weights != F16)
def test_no_further_from_float64_than_transformers(
    device: str, kind: str, weights: torch.dtype, shape: tuple[int, ...]
) -> None:
    """In its largest and in its mean error, but for the rounding of the lse, which is up to 100 here."""
    needs_rounding(device, weights)
    B, T, V, D = shape
    numbers = numbers_of(*(0.45 + 0.1 * b for b in range(B)))
    logits = canvas(3, B, T, V, kind, BF16)
    weight = torch.randn(V, D, generator=generator(4)).to(weights)
    truth = exact(logits, numbers, weight)
    out = called(device, "soft_embeddings", logits, lse_of(logits, numbers), numbers, weight, CAP, SCALE)
    assert out.dtype == weights and out.shape == (B, T, D) and out.is_contiguous()
    ours, other = ((x.double() - truth).abs() for x in (out, theirs(logits, numbers, weight)))
    slack = 8e-6 * truth.abs().amax()
    assert ours.amax() <= other.amax() + slack and ours.mean() <= other.mean() + slack
    if weights == BF16 and T * D > 100 and kind == "mixed":
        assert ours.mean() < other.mean() / 1.5, "logits are not rounded here"


def test_bound_at_a_wide_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would matter that sums are in float32: 64 slabs of 1024 ids."""
    monkeypatch.setattr(conditioning, "SLAB", 1024)
    numbers, weight = numbers_of(0.6), torch.randn(65536, 48, generator=generator(1)).to(BF16)
    for kind in ("flat", "mixed"):
        logits = canvas(2, 1, 16, 65536, kind, BF16)
        truth = exact(logits, numbers, weight)
        out = soft_embeddings(logits, lse_of(logits, numbers), numbers, weight, CAP, SCALE)
        ours, other = ((x.double() - truth).abs() for x in (out, theirs(logits, numbers, weight)))
        assert ours.amax() < other.amax() and ours.mean() < other.mean() / 1.5, kind


@on_each_device
@on_gpu(lambda: True)
def test_parts_of_a_vocabulary_add_up(device: str) -> None:
    numbers, weight = numbers_of(0.7), torch.randn(300, 9, generator=generator(5))
    logits = canvas(6, 1, 4, 300)
    lse = lse_of(logits, numbers)
    parts = [
        called(device, "soft_embeddings", logits[..., part], lse, numbers, weight[part], CAP, SCALE)
        for part in (slice(0, 70), slice(70, 71), slice(71, 300))
    ]
    torch.testing.assert_close(sum(parts).double(), exact(logits, numbers, weight), rtol=1e-5, atol=1e-4)


@on_each_device
@pytest.mark.parametrize("weights", [F32, BF16], ids=str)
@on_gpu(lambda weights: weights == F32)
def test_one_certain_id_gives_its_embedding(device: str, weights: torch.dtype) -> None:
    """Exactly: its probability is 1, all others are 0."""
    weight = torch.randn(200, 6, generator=generator(7)).to(weights)
    logits = torch.full((1, 3, 200), -200.0)
    logits[0, torch.arange(3), torch.tensor([0, 96, 199])] = 0.0
    out = called(device, "soft_embeddings", logits, torch.zeros(1, 3), numbers_of(1.0), weight)
    assert out[0].equal(weight[[0, 96, 199]])


@on_each_device
@on_gpu(lambda: True)
def test_unusable_positions_get_nan_and_no_other_does(device: str) -> None:
    """Whatever their lse: as a softmax has it, or of what is left of the row."""
    logits, numbers = canvas(8, 1, 7, 300), numbers_of(0.5)
    logits[0, 1, 17], logits[0, 2, 200], logits[0, 3] = NAN, INF, -INF
    logits[0, 5, 3] = -INF
    lse = lse_of(logits, numbers, 0.0)
    weight = torch.randn(300, 5, generator=generator(9))
    for clean in (False, True):
        given = lse.clone()
        if clean:
            given[0, 1] = 3.0
        out = called(device, "soft_embeddings", logits, given, numbers, weight)
        assert out.isnan().all(2)[0].tolist() == [False, True, True, True, False, False, False]
        kept = torch.tensor([0, 4, 5, 6])
        torch.testing.assert_close(
            out[0, kept].double(), exact(logits, numbers, weight, 0.0, 1.0)[0, kept], rtol=1e-5, atol=1e-5
        )


# Both


def both(
    device: str, logits: Tensor, lse: Tensor, numbers: Tensor, weight: Tensor, *more: Any
) -> tuple[Tensor, Tensor]:
    finished, x, soft = more or (None, None, None)
    return (
        called(device, "processed_logits", logits, numbers, CAP, F32, finished, x),
        called(device, "soft_embeddings", logits, lse, numbers, weight, CAP, SCALE, finished, soft),
    )


@on_each_device
@pytest.mark.parametrize("kept", [False, True], ids=["nothing before", "before"])
@on_gpu(lambda kept: True)
def test_finished_sequences_are_not_read(device: str, kept: bool) -> None:
    """They hold NaN here; what they were comes out bit for bit, and 0 where nothing was. Others are as alone."""
    finished = torch.tensor([True, False, True, False])
    logits, numbers = canvas(10, 4, 3, 300), numbers_of(0.4, 0.5, 0.6, 0.7)
    weight = torch.randn(300, 6, generator=generator(11))
    lse = lse_of(logits, numbers)
    logits[finished], lse[finished], numbers[finished] = NAN, NAN, NAN
    before = [torch.randn(4, 3, n, generator=generator(n)) for n in (300, 6)] if kept else [None, None]
    given = [None if x is None else x.clone() for x in before]
    outs = both(device, logits, lse, numbers, weight, finished, *before)
    live = ~finished
    for out, old, was in zip(outs, before, given, strict=True):
        if old is None:
            assert not out[finished].any()
        else:
            assert out[finished].equal(old[finished]) and old.equal(was)
    alone = both(device, logits[live], lse[live], numbers[live], weight)
    assert outs[0][live].equal(alone[0])
    torch.testing.assert_close(outs[1][live], alone[1], rtol=1e-6, atol=1e-5)


@on_each_device
def test_all_have_finished(device: str) -> None:
    logits, finished = torch.full((2, 3, 50), NAN), torch.tensor([True, True])
    before = torch.ones(2, 3, 50), torch.ones(2, 3, 4)
    outs = both(device, logits, logits[..., 0], numbers_of(0.4), torch.ones(50, 4), finished, *before)
    assert outs[0].equal(before[0]) and outs[1].equal(before[1])


@on_each_device
@on_gpu(lambda: False)
def test_any_strides(device: str) -> None:
    """Rows apart, ids apart, one row of numbers for all, a transposed weight, flags apart."""
    logits, numbers = canvas(12, 4, 6, 300), numbers_of(0.6)
    weight, finished = torch.randn(300, 6, generator=generator(13)), torch.tensor([False, True, False, False])
    lse, before = lse_of(logits, numbers), (torch.ones(4, 6, 300), torch.ones(4, 6, 6))
    expected = both(device, logits, lse, numbers, weight, finished, *before)
    wide = torch.full((4, 6, 320), NAN)
    wide[..., 3:303] = logits
    rows = torch.full((6, 4, 300), NAN).copy_(logits.transpose(0, 1)).transpose(0, 1)
    ids = torch.full((300, 4, 6), NAN).copy_(logits.permute(2, 0, 1)).permute(1, 2, 0)
    flags = torch.ones(4, 2, dtype=torch.bool)
    flags[:, 0] = finished
    apart = torch.empty(2, 4, dtype=torch.float64).copy_(numbers.expand(4, 2).T).T
    turned = tuple(torch.empty(x.shape[::-1]).copy_(x.permute(2, 1, 0)).permute(2, 1, 0) for x in before)
    for given, several in ((wide[..., 3:303], numbers.expand(4, 2)), (rows, apart), (ids, numbers.repeat(4, 1))):
        outs = both(device, given, lse.T.contiguous().T, several, weight.T.contiguous().T, flags[:, 0], *turned)
        for out, same in zip(outs, expected, strict=True):
            assert out.is_contiguous()
            torch.testing.assert_close(out, same, rtol=1e-6, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_no_positions(device: str, shape: tuple[int, int]) -> None:
    outs = both(device, torch.zeros(*shape, 50), torch.zeros(shape), numbers_of(0.4), torch.zeros(50, 4))
    assert [tuple(out.shape) for out in outs] == [(*shape, 50), (*shape, 4)]


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("logits: expected \\[B, T, V\\]", {"logits": torch.zeros(3, 50)}),
    ("logits: expected \\[B, T, V\\]", {"logits": torch.zeros(2, 3, 50, dtype=torch.float64)}),
    ("logits: expected \\[B, T, V\\]", {"logits": torch.zeros(2, 3, 0)}),
    ("logits: expected a CPU or CUDA tensor", {"logits": torch.zeros(2, 3, 50, device="meta")}),
    ("numbers: expected \\[2, 2\\] torch.float64", {"numbers": torch.zeros(3, 2, dtype=torch.float64)}),
    ("numbers: expected \\[1, 2\\] torch.float64", {"numbers": torch.zeros(1, 2)}),
    ("softcap: expected a finite number of at least 0, got -1.0", {"softcap": -1.0}),
    ("softcap: expected a finite number of at least 0, got nan", {"softcap": NAN}),
    ("finished: expected \\[2\\] torch.bool", {"finished": torch.zeros(2)}),
    ("before: expected", {"before": torch.zeros(2, 3, 49)}),
    ("before: expected", {"before": torch.zeros(2, 3, 50, dtype=F16)}),
    ("dtype: expected bfloat16", {"dtype": torch.float64}),
    ("lse: expected \\[2, 3\\] torch.float32", {"lse": torch.zeros(2, 3, dtype=torch.float64)}),
    ("weight: expected \\[50, D\\]", {"weight": torch.zeros(49, 4)}),
    ("weight: expected \\[50, D\\]", {"weight": torch.zeros(50, 4, dtype=torch.float64)}),
]


@pytest.mark.parametrize(("message", "wrong"), WRONG, ids=[f"{i}-{next(iter(w))}" for i, (_, w) in enumerate(WRONG)])
def test_errors_name_what_was_expected(message: str, wrong: dict[str, Any]) -> None:
    given = {"logits": torch.zeros(2, 3, 50), "numbers": numbers_of(0.5)}
    x, soft = {"dtype": F32}, {"lse": torch.zeros(2, 3), "weight": torch.zeros(50, 4)}
    name = next(iter(wrong))
    calls = {processed_logits: x, soft_embeddings: soft}
    for call, more in calls.items():
        if name in given or name in ("softcap", "finished", "before") or name in more:
            with pytest.raises(ValueError, match=message):
                call(**(given | more | wrong))


# As operators


def arguments(device: str, logits: Tensor, finished: bool = True) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of both operators."""
    B, T, V = logits.shape
    flags = torch.arange(B) % 2 == 1 if finished else None
    before = (torch.ones(B, T, V), torch.ones(B, T, 4)) if finished else (None, None)
    numbers, weight = numbers_of(0.6), torch.randn(V, 4, generator=generator(1))
    lse = lse_of(logits, numbers)
    found = (
        (logits, numbers, CAP, F32, flags, before[0]),
        (logits, lse, numbers, weight, CAP, SCALE, flags, before[1]),
    )
    return tuple(tuple(a.to(device) if isinstance(a, Tensor) else a for a in args) for args in found)  # type: ignore[return-value]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("finished", [False, True], ids=["none", "finished"])
def test_opcheck(device: str, finished: bool) -> None:
    logits = canvas(1, 2, 3, 130)
    for given in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1), torch.zeros(2, 0, 130)):
        for operator, args in zip((process_op, embed_op), arguments(device, given, finished), strict=True):
            torch.library.opcheck(operator, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_a_graph_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    for call, index in ((processed_logits, 0), (soft_embeddings, 1)):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for T in (3, 4):
            args = arguments("cpu", canvas(T, 2, T, 130))[index]
            args[0].requires_grad_()
            out = compiled(*args)
            assert out.equal(call(*args)) and not out.requires_grad


@pytest.mark.gpu
def test_captured() -> None:
    """A capture holds no synchronisation; its replay sees what the inputs hold then."""
    first, second = (arguments("cuda", canvas(seed, 2, 3, 130)) for seed in (1, 2))
    for call, args, other in zip((processed_logits, soft_embeddings), first, second, strict=True):
        expected = call(*other).clone()
        call(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(*args)
        for held, new in zip(args, other, strict=True):
            if isinstance(held, Tensor):
                held.copy_(new)
        graph.replay()
        assert out.equal(expected)


# What a GPU launches and holds, counted


@pytest.fixture
def true_slabs(small_slabs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


def counted(B: int, finished: bool, dtype: torch.dtype = BF16) -> tuple[list[nodes.Launch], int]:
    """Launches of soft embeddings at DiffusionGemma's shape, and the most bytes that they hold."""
    T, V, D = 256, 262144, 2816
    with nodes.recorded() as record:

        def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=nodes.GPU)

        flags = empty(B, dtype=torch.bool) if finished else None
        before = empty(B, T, D, dtype=dtype) if finished else None
        given = empty(B, T, V, dtype=BF16), empty(B, T), empty(1, 2, dtype=torch.float64), empty(V, D, dtype=dtype)
        record.launches.clear()
        with nodes.Held() as held:
            soft_embeddings(*given, CAP, SCALE, flags, before)
        return list(record.launches), held.most


@pytest.mark.usefixtures("true_slabs")
def test_one_launch_and_one_product_for_a_slab() -> None:
    launches, _ = counted(1, True)
    names = [x.name for x in launches]
    assert names == ["zeros", *["weights_kernel", "mm", "add_"] * 8, "mul_", "_to_copy", "where"]
    logits, weight = 256 * 262144 * 2, 262144 * 2816 * 2
    read = sum(x.bytes for x in launches if x.name == "weights_kernel")
    assert 2 * logits <= read <= 2.01 * logits, "logits once, and as much written"
    assert sum(x.bytes for x in launches if x.name == "mm") - weight - logits <= 8 * 4 * 256 * 2816


@pytest.mark.usefixtures("true_slabs")
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("B", [1, 4, 32])
def test_memory_of_a_step_is_what_is_said(B: int, dtype: torch.dtype) -> None:
    for finished in (False, True):
        _, most = counted(B, finished, dtype)
        said = conditioning_bytes(B * 256, 262144, 2816, dtype.itemsize)
        assert 0.8 * said <= most <= said
    if dtype == BF16:
        assert said <= (B <= 4 and 48 << 20) or said <= 320 << 20


@pytest.mark.parametrize("rows", [0, 1, 3, 256, 300, 8192, 10**6])
@pytest.mark.usefixtures("true_slabs")
def test_slabs(rows: int) -> None:
    for V in (1, 1000, 8192, 262144):
        ids = conditioning_slab(rows, V)
        assert ids == V or (8192 <= ids < V and ids & (ids - 1) == 0)
        assert ids in (V, 8192) or rows * ids * 2 <= 16 << 20


# Ahead of time


@pytest.fixture(scope="module")
def builds() -> dict[str, dict[str, Any]]:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "helpers" / "aot_conditioning.py"],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {report["name"]: report for report in json.loads(done.stdout)}


def test_compiled_for_every_target(builds: dict[str, dict[str, Any]]) -> None:
    """Without spills, in so few registers that a multiprocessor fills up, sixteen bytes a load and a store."""
    assert {(b["target"], b["kernel"]) for b in builds.values()} == {
        (target, kernel)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for kernel in ("process_kernel", "weights_kernel")
    }
    for name, build in builds.items():
        assert build["stack"] == build["local"] == 0, name
        assert build["registers"] <= 64, name
        assert build["widest"] == 16 and build["shared"] == 0, name
        assert not [at for at in build["memory"] if "bar" in at], name


def test_as_many_instructions_as_predictions_count(builds: dict[str, dict[str, Any]]) -> None:
    """A thread has 16 logits, a warp of a loop of 8 has 256."""
    for kernel in ("process_kernel", "weights_kernel"):
        build = builds[f"{kernel}-sm_90-32-bfloat16-bfloat16-capped-finished"]
        assert 0.9 < build["instructions"] / (2 * roofline.CANVAS_SLOTS[kernel]) < 1.1


def test_a_finished_sequence_is_known_before_logits_are_asked_for(builds: dict[str, dict[str, Any]]) -> None:
    for name, build in builds.items():
        loads = [at for at in build["memory"] if at.startswith(("ld.", "global_load", "buffer_load"))]
        assert ("ld.global.b8" in loads[0] or "ubyte" in loads[0]) == ("finished" in name), name
