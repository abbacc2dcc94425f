"""A block's small operators as kernels: against float64, and in forwards and decodes on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import INTERPRETED, generator, on_gpu
from layer_twins import TWINS
from small import left_pad, prompts, small_model, small_sdar
from torch import Tensor

from fdpp import Frechet, Wino
from fdpp.attention import BlockCache
from fdpp.attention.rotary import Place, rotary_angles, rotate, rotate_in_place
from fdpp.kernels.launch import norm_warps
from fdpp.kernels.layers import HeadNorms
from fdpp.models import block as blocks
from fdpp.models import layers
from fdpp.models.launches import in_rows, rms_norm_gpu, swiglu_gpu

# The interpreter computes with NumPy, which warns of the infinities and NaN that are tried.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

DEVICES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
NAN = float("nan")


@pytest.fixture(autouse=True)
def rounds(request: pytest.FixtureRequest) -> None:
    """The interpreter cuts bfloat16 off instead of rounding to it."""
    given = getattr(request.node, "callspec", None)
    if given and given.params.get("device") == "cpu" and given.params.get("dtype") == torch.bfloat16:
        pytest.skip("the interpreter does not round to bfloat16")


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def assert_as_good(out: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """At most as far from float64 as PyTorch in the same dtype, plus 1e-6 of the largest value."""
    out, theirs = out.cpu(), theirs.cpu()
    assert out.dtype == theirs.dtype and out.shape == theirs.shape
    scale = truth.abs().amax() + 1
    assert (out - truth).abs().amax() <= (theirs - truth).abs().amax() + 1e-6 * scale


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 4096), (2, 5, 320), (3, 1, 33), (1, 4, 1), (2, 3, 5000)], ids=str)
@on_gpu(lambda dtype, shape: (dtype, shape[2]) in ((torch.bfloat16, 4096), (torch.float32, 33)))
def test_norm(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = random(1, *shape, dtype=dtype), random(2, shape[-1], dtype=dtype)
    out = rms_norm_gpu(x.to(device), weight.to(device), 1e-5)
    assert_as_good(out, layers.rms_norm(x, weight, 1e-5), exact_norm(x, weight, 1e-5))


@on_each_device
@in_each_dtype
@on_gpu(lambda dtype: dtype == torch.bfloat16)
def test_norm_of_a_sum(device: str, dtype: torch.dtype) -> None:
    """The sum is rounded to the dtype first, and stays in the first addend."""
    x, added, weight = (random(seed, 2, 3, 300, dtype=dtype) for seed in (1, 2, 3))
    given, weight = x.clone().to(device), weight[0, 0]
    out = rms_norm_gpu(given, weight.to(device), 1e-5, added.to(device))
    total = x + added
    assert given.cpu().equal(total)
    assert_as_good(out, layers.rms_norm(total, weight, 1e-5), exact_norm(total, weight, 1e-5))


@on_each_device
def test_norm_of_rows_apart_leaves_them(device: str) -> None:
    x, weight = random(1, 2, 9, 40).to(device), torch.ones(40, device=device)
    before = x.clone()
    part = x[:, 2:5]
    torch.testing.assert_close(rms_norm_gpu(part, weight, 1e-5), layers.rms_norm(part.clone(), weight, 1e-5))
    assert x.equal(before)


@on_each_device
def test_norm_of_nothing_and_of_extremes(device: str) -> None:
    weight = torch.ones(8, device=device)
    assert rms_norm_gpu(torch.zeros(0, 3, 8, device=device), weight, 1e-5).shape == (0, 3, 8)
    rows = torch.zeros(1, 3, 8)
    rows[0, 1, 2], rows[0, 2, 3] = NAN, float("inf")
    out = rms_norm_gpu(rows.to(device), weight, 1e-5).cpu()
    assert not out[0, 0].any() and out[0, 1].isnan().all() and out[0, 2, 3].isnan()


def test_warps_of_the_norm() -> None:
    assert [norm_warps(2**i) for i in (5, 9, 10, 12, 13, 15)] == [1, 1, 2, 8, 16, 16]


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 12288), (2, 3, 40), (1, 2, 1), (2, 2, 1030)], ids=str)
@on_gpu(lambda dtype, shape: (dtype, shape[2]) in ((torch.bfloat16, 12288), (torch.float32, 40)))
def test_swiglu(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = random(1, *shape, dtype=dtype) * 3, random(2, *shape, dtype=dtype)
    exact = gate.double() * gate.double().sigmoid() * up.double()
    theirs = layers.swiglu(gate.clone(), up)
    assert_as_good(swiglu_gpu(gate.to(device), up.to(device)), theirs, exact)
    joined = torch.cat((gate, up), dim=-1).to(device)
    out = swiglu_gpu(*joined.chunk(2, dim=-1))
    assert out.is_contiguous()
    assert_as_good(out, theirs, exact)


@on_each_device
def test_swiglu_of_extremes(device: str) -> None:
    gate = torch.tensor([[-float("inf"), -200.0, -0.0, 200.0, NAN]], device=device)
    out = swiglu_gpu(gate, torch.ones_like(gate))[0].cpu()
    assert out[:4].tolist()[1:] == [0.0, 0.0, 200.0] and out[0].isnan() and out[4].isnan()
    assert swiglu_gpu(torch.zeros(0, 2, 4, device=device), torch.zeros(0, 2, 4, device=device)).shape == (0, 2, 4)


def test_rows_at_one_distance() -> None:
    x = torch.zeros(3, 4, 10)
    assert in_rows(x) and in_rows(x[..., :5]) and in_rows(x[:1, 1:]) and in_rows(x[0])
    assert not in_rows(x[:, :3]) and not in_rows(x[:, :1]) and not in_rows(x[..., ::2])
    assert not in_rows(x.transpose(1, 2)) and not in_rows(x.transpose(0, 1))


def exact_rotation(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    half = angles[0].shape[-1] // 2
    cos, sin = (angle.double()[..., half:] for angle in angles)
    first, second, passed = x.double().tensor_split((half, 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), dim=-1)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize(
    ("b", "n", "heads", "kv_heads", "hd"),
    [(1, 4, 32, 32, 128), (2, 3, 4, 2, 80), (3, 1, 1, 1, 2), (1, 7, 28, 4, 64), (2, 2, 3, 1, 40)],
)
@pytest.mark.parametrize("kind", ["alone", "start", "columns", "fillers"])
@on_gpu(
    lambda dtype, hd, kind: (dtype, hd) == (torch.bfloat16, 128) or (dtype, hd, kind) == (torch.float32, 80, "start")
)
def test_rotation(
    device: str, dtype: torch.dtype, b: int, n: int, heads: int, kv_heads: int, hd: int, kind: str
) -> None:
    """Queries and keys in place, keys and values in the cache's columns, and nothing else is touched."""
    given = random(n, b, n, heads + 2 * kv_heads, hd, dtype=dtype)
    at = torch.randint(0, 4000, (b, n), generator=generator(b))
    angles = rotary_angles(at, hd, 500000.0)
    q, k, v = given.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    # Every other row and column of what is allocated, as a cache in use has them.
    stored = [random(seed, 2 * b, kv_heads, 2 * n + 3, hd, dtype=dtype).to(device)[::2] for seed in (8, 9)]
    before = [x.clone() for x in stored]
    columns, fillers = torch.arange(n) + 2, None
    if kind == "columns":
        columns = torch.randperm(2 * n + 3, generator=generator(1))[:n]
    if kind == "fillers":
        fillers = torch.arange(b) % 2 == 1
    start = 2 if kind == "start" else columns.to(device)
    place = None if kind == "alone" else Place(*stored, start, None if fillers is None else fillers.to(device))
    turned = given.to(device, copy=True)
    rotate_in_place(turned, heads, kv_heads, (angles[0].to(device), angles[1].to(device)), place)
    new_q, new_k, new_v = turned.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    assert_as_good(new_q, rotate(q, angles), exact_rotation(q, angles))
    assert_as_good(new_k, rotate(k, angles), exact_rotation(k, angles))
    assert new_v.cpu().equal(v)
    for new, now, old in zip((new_k, new_v), stored, before, strict=True):
        want = old.clone()
        if place is not None:
            want[:, :, columns.to(device)] = new
        if fillers is not None:
            want = torch.where(fillers.to(device)[:, None, None, None], old, want)
        assert now.equal(want)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "hd", "rotary_dim", "normed"),
    [(32, 8, 128, 128, True), (16, 4, 128, 64, True), (4, 2, 80, 80, True), (3, 1, 20, 6, True), (2, 2, 40, 30, False)],
)
@on_gpu(lambda dtype, hd: dtype == torch.bfloat16 and hd == 128)
def test_rotation_of_normalised_heads_and_of_some_channels(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, hd: int, rotary_dim: int, normed: bool
) -> None:
    """Rounded where PyTorch's operators round; the channels beyond the rotary ones are normalised and stored, too."""
    given = random(hd, 2, 3, heads + 2 * kv_heads, hd, dtype=dtype)
    angles = rotary_angles(torch.tensor([[5, 900, 4000]]), rotary_dim, 1e6)
    norms = HeadNorms(1 + random(1, hd, dtype=dtype), 1 - random(2, hd, dtype=dtype), 1e-6) if normed else None
    q, k, v = given.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    stored = [torch.zeros(2, kv_heads, 5, hd, dtype=dtype, device=device) for _ in range(2)]
    turned = given.to(device, copy=True)
    on_device = None if norms is None else HeadNorms(norms.q.to(device), norms.k.to(device), norms.eps)
    place = Place(stored[0], stored[1], 1, None)
    rotate_in_place(turned, heads, kv_heads, (angles[0].to(device), angles[1].to(device)), place, on_device)
    new_q, new_k, new_v = turned.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    for x, new, weight in ((q, new_q, norms and norms.q), (k, new_k, norms and norms.k)):
        theirs = x if weight is None else layers.rms_norm(x, weight, 1e-6)
        exact = x.double() if weight is None else exact_norm(x, weight, 1e-6)
        assert_as_good(new, rotate(theirs, angles), exact_rotation(exact, angles))
    assert new_v.cpu().equal(v)
    for new, now in zip((new_k, new_v), stored, strict=True):
        assert now[:, :, 1:4].equal(new) and not now[:, :, ::4].any()


@on_each_device
def test_rotation_by_the_angles_of_one_row(device: str) -> None:
    given = random(1, 3, 5, 6, 16).to(device)
    angles = rotary_angles(torch.arange(5, device=device)[None], 16, 10000.0)
    want = given.clone()
    rotate_in_place(want, 2, 2, (angles[0].repeat(3, 1, 1, 1), angles[1].repeat(3, 1, 1, 1)), None)
    rotate_in_place(given, 2, 2, angles, None)
    assert given.equal(want)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.sampled_from((2, 6, 32, 66)))
def test_rotation_keeps_lengths(b: int, n: int, groups: int, kv_heads: int, hd: int) -> None:
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    heads = groups * kv_heads
    x = random(b, b, n, heads + 2 * kv_heads, hd)
    turned = x.clone()
    rotate_in_place(turned, heads, kv_heads, rotary_angles(torch.arange(n)[None] * 7, hd, 10000.0), None)
    half = hd // 2
    lengths = [y[..., :half].pow(2) + y[..., half:].pow(2) for y in (x, turned)]
    torch.testing.assert_close(*lengths)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks do what they do on a GPU, with PyTorch's operators in the kernels' place; lists their launches."""
    return on_kernels(monkeypatch, **TWINS)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks take the kernels in the interpreter, as on a GPU; lists their launches."""
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    ways = {name: getattr(layers, name) for name in ("rms_norm_gpu", "swiglu_gpu", "rotate_in_place")}
    return on_kernels(monkeypatch, **ways)


def on_kernels(monkeypatch: pytest.MonkeyPatch, **ways: Callable[..., Any]) -> list[str]:
    """Let blocks launch `ways`, and list which."""
    launched: list[str] = []

    def noted(name: str, way: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            launched.append(name)
            return way(*arguments, **keywords)

        return call

    for module in (layers, blocks):
        monkeypatch.setattr(module, "on_kernels", lambda x: not torch.is_grad_enabled())
    for name, way in ways.items():
        monkeypatch.setattr(layers, name, noted(name, way))
    return launched


@contextmanager
def plain() -> Iterator[None]:
    """Within it blocks launch nothing of ours."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (layers, blocks):
            patched.setattr(module, "on_kernels", lambda x: False)
        yield


@pytest.mark.parametrize("made", [partial(small_model, n_kv_heads=2), small_sdar], ids=["LLaDA", "SDAR"])
@torch.no_grad()
def test_a_forward_is_the_same(made: Callable[[], Any], kernels: list[str]) -> None:
    model = made()
    ids = prompts(2, 9)
    states: list[Tensor] = []
    out = model.model(ids, hidden_states=states)
    layer = ["rms_norm_gpu", "rotate_in_place", "rms_norm_gpu", "swiglu_gpu"]
    assert kernels == layer * model.config.num_hidden_layers + ["rms_norm_gpu"]
    with plain():
        wanted: list[Tensor] = []
        want = model.model(ids, hidden_states=wanted)
    for state, expected in zip((out, *states), (want, *wanted), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_hook_may_keep_what_a_block_gets(twins: list[str]) -> None:
    model = small_model()
    ids, kept = prompts(1, 6), []
    want = model.model(ids)
    parts = model.model.transformer
    hooks = [parts["wte"].register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))]
    for block in parts["blocks"]:
        hooks.append(block.register_forward_hook(lambda module, args, out: kept.append((args[0], kept[-1][0].clone()))))
        hooks.append(block.register_forward_pre_hook(lambda module, args: kept.append((args[0], args[0].clone()))))
    assert model.model(ids).equal(want) and len(kept) == 1 + 2 * len(parts["blocks"])
    for held, then in kept:
        assert held.equal(then)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_a_layer_that_cannot_add_up(kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a quantised weight: the sum is taken with the norm."""
    model, ids = small_model(), prompts(2, 6)
    want = model.model(ids)
    monkeypatch.setattr(layers, "is_whole", lambda weight: False)
    torch.testing.assert_close(model.model(ids), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "none"},
        {"cache": "dual"},
        {"cache": "prefix", "engine": "static"},
        {"cache": "dual", "engine": "static"},
        {"cache": "dual", "cfg_scale": 1.0},
        {"cache": "dual", "drafts": 3, "branches": "batch"},
        {"cache": "prefix", "drafts": 3, "branches": "tree"},
        {"cache": "dual", "drafts": 2, "branches": "tree", "engine": "static"},
        {"cache": "dual", "rule": Wino(0.2, 0.9, None)},
        {"cache": "prefix", "rule": Wino(0.2, 0.9, None), "engine": "static"},
    ],
    ids=str,
)
def test_a_decode_is_the_same(twins: list[str], settings: dict[str, Any]) -> None:
    """Prompts of several lengths; static steps are padded to a bucket, and five sequences have a filler."""
    model = small_model(n_kv_heads=2)
    input_ids, attention_mask = left_pad([prompts(1, length, seed=length)[0] for length in (9, 4, 7, 9, 2)])
    settings = {"max_new_tokens": 12, "block_length": 6, "rule": Frechet(0.2), "stop_at_eos": False, **settings}
    out = model.generate(input_ids, attention_mask, **settings)
    assert {"rms_norm_gpu", "swiglu_gpu", "rotate_in_place"} <= set(twins)
    with plain():
        model.forget_captures()
        want = model.generate(input_ids, attention_mask, **settings)
    assert out.sequences.equal(want.sequences) and out.nfe.equal(want.nfe)
    torch.testing.assert_close(out.confidence, want.confidence, rtol=1e-4, atol=1e-5)


def test_a_decode_by_the_kernels_is_the_same(kernels: list[str]) -> None:
    model, ids = small_model(n_layers=1, n_kv_heads=2), prompts(1, 3)
    settings: dict[str, Any] = {"max_new_tokens": 4, "block_length": 2, "rule": Frechet(0.2), "stop_at_eos": False}
    out = model.generate(ids, cache="dual", **settings)
    assert len(kernels) == 5 * int(out.nfe), "two norms, rotation and SwiGLU of the layer, and the last norm"
    with plain():
        assert model.generate(ids, cache="dual", **settings).sequences.equal(out.sequences)


def test_a_place_is_part_of_the_cache() -> None:
    cache, fillers = BlockCache(), torch.tensor([False, True])
    k = torch.ones(2, 1, 5, 4)
    cache.pad(0, fillers)
    place = cache.place(0, 0, k)
    assert place is not None and place.keys.data_ptr() == cache.keys[0].data_ptr() and place.fillers.equal(fillers)
    with pytest.raises(ValueError, match="the cache holds 5 columns"):
        cache.place(0, 3, k)
    with pytest.raises(ValueError, match="full forward first"):
        BlockCache().place(0, torch.arange(5), k)
    cache.branches = 2
    assert cache.place(0, 0, k) is None
