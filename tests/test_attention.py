"""Attention of a block over padded keys: against float64, however the keys are split, and in a decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import IMPLEMENTATIONS, INTERPRETED, generator, to_device
from small import left_pad, prompts, small_model
from torch import Tensor

from fdpp import Frechet, attention, cache
from fdpp.attention import block_attention
from fdpp.kernels import launch
from fdpp.kernels.launch import ATTEND_KEYS, ATTEND_SPLITS, attend_launch

# The interpreter computes with NumPy, which warns of the infinities and NaN that `tl.where` then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning")

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
NAN = float("nan")


def random_inputs(
    seed: int, B: int, H: int, kv_heads: int, n: int, S: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries whose attention is sharp enough for one key to matter."""
    g = generator(seed)
    q, k, v = (torch.randn(B, heads, T, d, generator=g) for heads, T in ((H, n), (kv_heads, S), (kv_heads, S)))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def truth(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention in float64, written out; zeros where no key is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if first is not None:
        scores = scores.masked_fill(torch.arange(k.shape[2]) < first[:, None, None, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(nan=0.0) @ v


def library(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's attention in the same dtype."""
    mask = None if first is None else (torch.arange(k.shape[2]) >= first[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def run(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What an implementation makes of it, on the CPU."""
    device = "cuda" if implementation == "cuda" else "cpu"
    q, k, v, first = (None if x is None else to_device(x, device) for x in (q, k, v, first))  # type: ignore[assignment]
    attention.check(q, k, v, first)
    take = attention.attention_cpu if implementation == "cpu" else attention.attention_gpu
    return take(q, k, v, first, q.shape[3] ** -0.5 if scale is None else scale).transpose(1, 2).cpu()


def assert_as_good(out: Tensor, *inputs: Any) -> None:
    """As far from float64 as PyTorch in the same dtype, give or take a rounding."""
    want, theirs = truth(*inputs), library(*inputs)
    assert out.shape == want.shape and out.dtype == inputs[0].dtype
    assert (out - want).abs().amax() <= (theirs - want).abs().amax() * 1.5 + 2e-6


@each_implementation
@pytest.mark.parametrize(
    ("B", "H", "kv_heads", "n", "S", "d"),
    [
        (1, 1, 1, 1, 1, 1),
        (2, 4, 4, 5, 31, 32),
        (1, 2, 2, 16, 32, 80),
        (2, 4, 2, 7, 300, 128),
        (1, 6, 2, 33, 129, 20),
        (3, 4, 1, 32, 65, 16),
        (1, 8, 1, 9, 1056, 32),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_against_float64(
    implementation: str, B: int, H: int, kv_heads: int, n: int, S: int, d: int, padded: bool
) -> None:
    inputs = random_inputs(n, B, H, kv_heads, n, S, d)
    first = torch.randint(0, S, (B,), generator=generator(S)) if padded else None
    assert_as_good(run(implementation, *inputs, first), *inputs, first)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 matrices by their bit patterns")
    inputs = random_inputs(3, 2, 4, 2, 20, 500, 64, dtype)
    first = torch.tensor([0, 70])
    assert_as_good(run(implementation, *inputs, first), *inputs, first)


@each_implementation
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_padding_is_not_read(implementation: str, index: torch.dtype) -> None:
    """Keys that start within a split and a tile, at their borders, in the last split, and behind all of them."""
    S = 512
    first = torch.tensor([0, 1, 31, 32, 127, 128, 300, 384, 511, 512], dtype=index)
    q, k, v = random_inputs(0, len(first), 2, 1, 3, S, 16)
    assert attend_launch(len(first), 6, S, True).splits == 4
    want = truth(q, k, v, first)
    padding = (torch.arange(S) < first[:, None])[:, None, :, None]
    if implementation != "cpu":
        k, v = k.masked_fill(padding, NAN), v.masked_fill(padding, NAN)
    out = run(implementation, q, k, v, first)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    assert not out[-1].any()


@each_implementation
def test_any_number_of_splits(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, several, and so many that the last ones are empty."""
    inputs, first, results = random_inputs(1, 2, 2, 2, 5, 700, 32), torch.tensor([0, 333]), []
    for programs, keys, splits in ((1, 128, 1), (8, 128, 2), (264, 128, 4), (264, 10, 64)):
        monkeypatch.setattr(launch, "ATTEND_PROGRAMS", programs)
        monkeypatch.setattr(launch, "ATTEND_KEYS", keys)
        assert attend_launch(4, 5, 700, True).splits == splits
        results.append(run(implementation, *inputs, first))
        assert_as_good(results[-1], *inputs, first)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@each_implementation
def test_scale(implementation: str) -> None:
    inputs = random_inputs(1, 1, 2, 2, 5, 300, 32)
    assert_as_good(run(implementation, *inputs, None, 0.7), *inputs, None, 0.7)


@each_implementation
def test_scores_far_apart(implementation: str) -> None:
    """Weights that underflow, and scores beyond what the exponential takes."""
    q, k, v = random_inputs(1, 1, 2, 2, 5, 600, 32)
    inputs = (q * 100, k, v)
    out = run(implementation, *inputs)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), truth(*inputs), rtol=1e-4, atol=1e-4)


@each_implementation
@pytest.mark.parametrize("splits", [1, 4])
def test_nan_is_not_hidden(implementation: str, splits: int) -> None:
    S = 128 * splits
    q, k, v = random_inputs(1, 1, 2, 2, 3, S, 16)
    assert attend_launch(2, 3, S, True).splits == splits
    q[0, 1, 2] = NAN
    out = run(implementation, q, k, v)
    assert out[0, 1, 2].isnan().all() and not out[0, 0].isnan().any() and not out[0, 1, :2].isnan().any()
    q, k, v = random_inputs(1, 1, 2, 2, 3, S, 16)
    v[0, 1, 100] = NAN
    out = run(implementation, q, k, v)
    assert out[0, 1].isnan().all() and not out[0, 0].isnan().any()


@each_implementation
@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (1, 0, 3, 5), (1, 2, 0, 5)])
def test_empty(implementation: str, shape: tuple[int, ...]) -> None:
    B, H, n, S = shape
    kv_heads = max(H, 1)
    q, k, v = torch.zeros(B, H, n, 8), torch.zeros(B, kv_heads, S, 8), torch.zeros(B, kv_heads, S, 8)
    assert run(implementation, q, k, v).shape == (B, H, n, 8)


@each_implementation
def test_strides(implementation: str) -> None:
    """A cache's front columns, queries beside keys and values in one matrix, channels that are not innermost."""
    q, k, v = random_inputs(2, 2, 4, 2, 5, 200, 16)
    contiguous = run(implementation, q, k, v)
    spare = torch.full((3, 2, 230, 16), NAN)
    kept_k, kept_v = (spare.clone()[:2, :, :200].copy_(x) for x in (k, v))
    beside = torch.full((2, 5, 11, 16), NAN)[:, :, 3:7].transpose(1, 2).copy_(q)
    apart = q.transpose(2, 3).contiguous().transpose(2, 3)
    for one in (beside, apart):
        assert not one.is_contiguous()
        torch.testing.assert_close(run(implementation, one, kept_k, kept_v), contiguous, rtol=1e-5, atol=1e-6)
    other = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (k, v))
    torch.testing.assert_close(run(implementation, q, *other), contiguous, rtol=1e-5, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("apart", ["sequences", "heads", "columns"])
def test_offsets_beyond_int32(implementation: str, apart: str) -> None:
    """Keys, values or queries 2^30 entries apart, so that the third one's offset is no int32."""
    if implementation == "cpu":
        pytest.skip("PyTorch's kernels copy such tensors")
    device, far_apart, d = "cuda" if implementation == "cuda" else "cpu", 2**30 + 16, 16
    shape = {"sequences": (3, 1, 1), "heads": (1, 3, 1), "columns": (1, 1, 3)}[apart]
    inputs = [torch.randn(*shape, d, generator=generator(i)).half() for i in range(3)]
    near = run(implementation, *inputs)
    storage = torch.empty(2 * far_apart + 3 * d, dtype=torch.float16, device=device)
    for i in range(3):
        # Side by side, in the gaps between the rows of one storage.
        far = storage[i * d :].as_strided((*shape, d), (far_apart, far_apart, far_apart, 1))
        far.copy_(inputs[i])
        inputs[i] = far
    assert run(implementation, *inputs).equal(near)


@each_implementation
def test_rows_do_not_depend_on_each_other(implementation: str) -> None:
    q, k, v = random_inputs(2, 3, 2, 1, 20, 300, 16)
    first = torch.tensor([0, 40, 290])
    together = run(implementation, q, k, v, first)
    alone = run(implementation, q[1:2], k[1:2], v[1:2], first[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    heads=st.integers(1, 3000), rows=st.integers(1, 4000), S=st.integers(1, 100_000), exact=st.booleans()
)  # fmt: skip
def test_launch_configurations_cover_the_keys(heads: int, rows: int, S: int, exact: bool) -> None:
    config = attend_launch(heads, rows, S, exact)
    assert config.splits.bit_count() == config.block_m.bit_count() == 1
    assert config.splits * config.split_len >= S and config.split_len % config.block_s == 0
    assert config.splits == 1 or config.splits <= min(S // ATTEND_KEYS, ATTEND_SPLITS)


def test_launch_configurations_fill_the_device() -> None:
    """A block of LLaDA over 1056 columns; a big batch needs no splits."""
    assert 32 * attend_launch(32, 32, 1056, False).splits == 256
    assert attend_launch(32 * 16, 32, 1056, False).splits == 1


# The public call


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(2, 4, 8)}, r"q: expected \[B, H, n, d\].*got \[2, 4, 8\]"),
        ({"q": torch.zeros(2, 4, 3, 8).double()}, "q: .*float64"),
        ({"k": torch.zeros(2, 3, 9, 8)}, r"k: expected \[2, a divisor of 4, S, 8\].*got \[2, 3, 9, 8\]"),
        ({"k": torch.zeros(2, 2, 9, 8).half()}, "k: expected .*float32.*got .*float16"),
        ({"v": torch.zeros(2, 2, 7, 8)}, r"v: expected .*both alike.*got \[2, 2, 7, 8\]"),
        ({"first": torch.zeros(3, dtype=torch.int64)}, r"first: expected \[2\].*got \[3\]"),
        ({"first": torch.zeros(2)}, "first: expected .*int32 or int64.*got .*float32"),
    ],
)
def test_errors(changes: dict[str, Any], words: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 2, 9, 8), "v": torch.zeros(2, 2, 9, 8)}
    with pytest.raises(ValueError, match=words):
        block_attention(**{**arguments, **changes})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded: bool, device: str) -> None:
    first = torch.tensor([0, 4], device=device) if padded else None
    q, k, v = (x.to(device) for x in random_inputs(0, 2, 4, 2, 3, 9, 8))
    torch.library.opcheck(attention.attention_op, (q, k, v, first, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic: bool) -> None:
    inputs, first = random_inputs(0, 2, 4, 2, 3, 9, 8), torch.tensor([0, 4])
    compiled = torch.compile(block_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert compiled(*inputs, first).equal(block_attention(*inputs, first))


# In a decode


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Padded sequences take the kernel in the interpreter, as short blocks do on a GPU; lists the queries' shapes."""
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    seen: list[tuple[int, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        assert first is not None and k.shape[0] == first.shape[0]
        seen.append(tuple(q.shape))
        return attention.attention_gpu(q, k, v, first, scale)

    monkeypatch.setattr(attention, "attention_cpu", kernel)
    monkeypatch.setattr(cache, "splits_keys", lambda q, k: q.shape[1] // k.shape[1] * q.shape[2] <= cache.SHORT)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "dual"},
        {"cache": "prefix"},
        {"cache": "dual", "engine": "static"},
        {"cache": "dual", "cfg_scale": 1.0},
        {"cache": "dual", "drafts": 3, "branches": "batch"},
        {"cache": "dual", "drafts": 3, "branches": "tree"},
        {"cache": "none"},
    ],
    ids=str,
)
def test_a_padded_decode_is_the_same(split: list[tuple[int, ...]], settings: dict[str, Any]) -> None:
    """As with PyTorch's masked attention, whether its forwards are short, of one branch and cached or not."""
    model = small_model(n_kv_heads=2)
    input_ids, attention_mask = left_pad([prompts(1, 14)[0], prompts(1, 5, seed=1)[0], prompts(1, 9, seed=2)[0]])
    settings = {"max_new_tokens": 12, "block_length": 6, "rule": Frechet(0.2), "stop_at_eos": False, **settings}
    with pytest.MonkeyPatch.context() as unsplit:
        unsplit.setattr(cache, "splits_keys", lambda q, k: False)
        want = model.generate(input_ids, attention_mask, **settings)
    assert not split
    out = model.generate(input_ids, attention_mask, **settings)
    assert out.sequences.equal(want.sequences) and out.nfe.equal(want.nfe)
    assert bool(split) == (settings["cache"] != "none")


def test_without_padding_nothing_changes(split: list[tuple[int, ...]]) -> None:
    small_model().generate(prompts(2, 9), max_new_tokens=6, block_length=6, rule=Frechet(0.2), engine="eager")
    assert not split


def test_what_goes_to_the_kernel() -> None:
    """Short blocks of half precision, on a GPU."""

    class OnGPU:
        is_cuda = True

        def __init__(self, dtype: torch.dtype, *shape: int) -> None:
            self.dtype, self.shape = dtype, shape

    def goes(q: Any) -> bool:
        return cache.splits_keys(q, torch.empty(1, 8, 1056, q.shape[3], device="meta"))

    assert goes(OnGPU(torch.bfloat16, 1, 8, 32, 128)) and goes(OnGPU(torch.float16, 1, 32, 64, 64))
    assert not goes(OnGPU(torch.bfloat16, 1, 32, 65, 128)), "260 queries for each head of keys"
    assert not goes(OnGPU(torch.float32, 1, 8, 32, 128)) and not goes(OnGPU(torch.float64, 1, 8, 32, 128))
    assert not goes(OnGPU(torch.bfloat16, 1, 8, 32, 256))
    assert not goes(torch.empty(1, 8, 32, 128, dtype=torch.bfloat16, device="cpu"))
