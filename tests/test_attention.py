"""Attention of a block over padded keys: against float64, however the keys are split, in branches, and in a decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import IMPLEMENTATIONS, INTERPRETED, generator, on_gpu, to_device
from small import left_pad, prompts, small_model
from torch import Tensor

from fdpp import Frechet, Wino
from fdpp.attention import beside, block_attention, cache, split_keys
from fdpp.kernels import attend, launch
from fdpp.kernels.launch import ATTEND_KEYS, ATTEND_SPLITS, attend_launch

# The interpreter computes with NumPy, which warns of the infinities and NaN that `tl.where` then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning")

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
NAN = float("nan")
Own = tuple[Tensor, Tensor]


def random_inputs(
    seed: int, B: int, H: int, kv_heads: int, n: int, S: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries whose attention is sharp enough for one key to matter."""
    g = generator(seed)
    q, k, v = (torch.randn(B, heads, T, d, generator=g) for heads, T in ((H, n), (kv_heads, S), (kv_heads, S)))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None = None,
    scale: float | None = None,
    stops: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Softmax attention in float64, written out, of the keys `seen` `[m, S]`; zeros where no key is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if left is not None:
        scores = scores.masked_fill(torch.arange(k.shape[2]) < left[:, None, None, None], -torch.inf)
    if stops is not None:
        scores = scores.masked_fill(torch.arange(k.shape[2]) >= stops[:, None], -torch.inf)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(nan=0.0) @ v


def library(q: Tensor, k: Tensor, v: Tensor, left: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's attention in the same dtype."""
    mask = None if left is None else (torch.arange(k.shape[2]) >= left[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def run(
    implementation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None = None,
    scale: float | None = None,
    own: Own | None = None,
    column: Tensor | int | None = None,
    stops: Tensor | None = None,
    holes: Tensor | None = None,
) -> Tensor:
    """An implementation's result, on the CPU."""
    device = "cuda" if implementation == "cuda" else "cpu"
    column = torch.tensor([column]) if isinstance(column, int) else column
    given = (q, k, v, left, *(own or (None, None)), column, stops, holes)
    q, k, v, left, own_k, own_v, column, stops, holes = (None if x is None else to_device(x, device) for x in given)
    split_keys.check(q, k, v, left, own and (own_k, own_v), column, stops, holes)
    take = split_keys.attention_cpu if implementation == "cpu" else split_keys.attention_gpu
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return take(q, k, v, left, scale, own_k, own_v, column, stops, holes).transpose(1, 2).cpu()


def assert_as_good(out: Tensor, *inputs: Any, of: Callable[..., Tensor] | None = None) -> None:
    """At most 1.5 times as far from float64 as PyTorch in the same dtype, plus 2e-6; `of` gives both ways' results."""
    want, theirs = (of(way, *inputs) if of else way(*inputs) for way in (truth, library))
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
@on_gpu(lambda S, padded: (S, padded) in ((1, False), (300, True), (129, False), (1056, True)))
def test_against_float64(
    implementation: str, B: int, H: int, kv_heads: int, n: int, S: int, d: int, padded: bool
) -> None:
    inputs = random_inputs(n, B, H, kv_heads, n, S, d)
    left = torch.randint(0, S, (B,), generator=generator(S)) if padded else None
    assert_as_good(run(implementation, *inputs, left), *inputs, left)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 matrices by their bit patterns")
    inputs = random_inputs(3, 2, 4, 2, 20, 500, 64, dtype)
    left = torch.tensor([0, 70])
    assert_as_good(run(implementation, *inputs, left), *inputs, left)


@each_implementation
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_padding_is_not_read(implementation: str, index: torch.dtype) -> None:
    """Keys that start within a split and a tile, at their borders, in the last split, and past all of them."""
    S = 512
    left = torch.tensor([0, 1, 31, 32, 127, 128, 300, 384, 511, 512], dtype=index)
    q, k, v = random_inputs(0, len(left), 2, 1, 3, S, 16)
    assert attend_launch(len(left), 6, S, True).splits == 4
    want = truth(q, k, v, left)
    padding = (torch.arange(S) < left[:, None])[:, None, :, None]
    if implementation != "cpu":
        k, v = k.masked_fill(padding, NAN), v.masked_fill(padding, NAN)
    out = run(implementation, q, k, v, left)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    assert not out[-1].any()


@each_implementation
def test_any_number_of_splits(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, several, and so many that the last ones are empty."""
    inputs, left, results = random_inputs(1, 2, 2, 2, 5, 700, 32), torch.tensor([0, 333]), []
    for programs, keys, splits in ((1, 128, 1), (8, 128, 2), (264, 128, 4), (264, 10, 64)):
        monkeypatch.setattr(launch, "ATTEND_PROGRAMS", programs)
        monkeypatch.setattr(launch, "ATTEND_KEYS", keys)
        assert attend_launch(4, 5, 700, True).splits == splits
        results.append(run(implementation, *inputs, left))
        assert_as_good(results[-1], *inputs, left)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("programs", [1, 264])
@on_gpu(lambda programs: programs == 264)
def test_queries_stop_at_columns_of_their_own(
    implementation: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, at and behind the borders of tiles and splits; what lies behind all of them is not read."""
    monkeypatch.setattr(launch, "ATTEND_PROGRAMS", programs)
    S, stops = 512, torch.tensor([1, 31, 32, 33, 127, 128, 129, 256, 300, 384, 400])
    q, k, v = random_inputs(3, 3, 4, 2, len(stops), S, 16)
    assert (attend_launch(6, 22, S, True).splits > 1) == (programs > 1)
    left = torch.tensor([0, 30, 200])
    if implementation != "cpu":
        k[:, :, 400:], v[:, :, 400:] = NAN, NAN
    for padding in (None, left):
        out = run(implementation, q, k, v, padding, stops=stops)
        want = truth(q, k[:, :, :400], v[:, :, :400], padding, stops=stops)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    assert not run(implementation, q, k, v, stops=torch.zeros_like(stops)).nan_to_num(nan=1.0).any() or (
        implementation == "cpu"  # PyTorch has no softmax of nothing
    )


@each_implementation
def test_branches_stop_at_columns_of_their_own(implementation: str) -> None:
    """Two blocks of a grid, of which the first sees the second in no branch."""
    n, S, column = 8, 300, 128
    q, k, v, own = random_branches(1, 2, 3, 4, 2, n, n, S, 16)
    stops, left = torch.tensor([132] * 4 + [136] * 4), torch.tensor([0, 50])
    out = run(implementation, q, k, v, left, own=own, column=column, stops=stops)
    for row in range(len(q)):
        keys, values = (x[row // 3 : row // 3 + 1].clone() for x in (k, v))
        keys[:, :, column : column + n], values[:, :, column : column + n] = (x[row] for x in own)
        want = truth(q[row : row + 1], keys, values, left[row // 3 : row // 3 + 1], stops=stops)
        torch.testing.assert_close(out[row : row + 1].double(), want, rtol=1e-5, atol=1e-6)


# Holes: each query may leave out one column


def with_holes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    own: Own | None,
    column: int,
    stops: Tensor | None,
    holes: Tensor,
) -> Tensor:
    """The truth of every row, over its sequence's keys with its own in their place."""
    found, columns = [], torch.arange(k.shape[2])
    for row in range(len(q)):
        b, keys, values = row // (len(q) // len(k)), *(x.clone() for x in (k, v))
        seen = columns >= (0 if left is None else left[b])
        if own is not None:
            block = slice(column, column + own[0].shape[2])
            keys[b, :, block], values[b, :, block], seen[block] = own[0][row], own[1][row], True
        seen = seen & (columns != holes[:, None])
        if stops is not None:
            seen &= columns < stops[:, None]
        found.append(truth(q[row : row + 1], keys[b : b + 1], values[b : b + 1], seen=seen))
    return torch.cat(found)


@each_implementation
@pytest.mark.parametrize("programs", [1, 264])
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("branches", [0, 1, 3])
@pytest.mark.parametrize("padded", [False, True])
@on_gpu(lambda padded, branches, stopped, programs: padded and stopped and programs == 264)
def test_holes(
    implementation: str, padded: bool, branches: int, stopped: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first column, the last, none, one that is hidden anyway; at the borders of tiles, splits and the block."""
    monkeypatch.setattr(launch, "ATTEND_PROGRAMS", programs)
    S, n, column = 300, 20, 147
    holes = torch.tensor([0, S - 1, -1, 31, 32, 127, 128, 159, 160, column - 1, column, column + n - 1, column + n])
    m = len(holes)
    q, k, v, own = random_branches(4, 2, max(branches, 1), 4, 2, m, n, S, 16)
    given = {"own": own, "column": column} if branches else {}
    assert (attend_launch(len(q) * 2, 2 * m, S, True).splits > 1) == (programs > 1)
    left = torch.tensor([0, 130]) if padded else None
    stops = torch.randint(140, S + 1, (m,), generator=generator(1)) if stopped else None
    # Every other entry of a longer tensor.
    out = run(implementation, q, k, v, left, stops=stops, holes=torch.stack((holes, holes + 1), 1)[:, 0], **given)
    want = with_holes(q, k, v, left, own if branches else None, column, stops, holes)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("programs", [1, 264])
@on_gpu(lambda programs: programs == 264)
def test_a_hole_may_be_all_that_is_left(implementation: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros for a query that then sees nothing, whether its key is cached or its own; the others are as ever."""
    monkeypatch.setattr(launch, "ATTEND_PROGRAMS", programs)
    S = 300
    holes, stops = torch.tensor([[S - 1, S], [-1, S], [0, 1], [5, S - 1]]).repeat(3, 1).T
    q, k, v, own = random_branches(5, 3, 1, 4, 2, len(holes), 1, S, 16)
    left = torch.tensor([0, S - 1, S])
    out = run(implementation, q, k, v, left, stops=stops, holes=holes)
    assert not out[0, :, 2::4].any() and not out[1, :, holes != -1].any() and not out[2].any()
    torch.testing.assert_close(out.double(), with_holes(q, k, v, left, None, 0, stops, holes), rtol=1e-5, atol=1e-6)
    assert out[0, :, 3::4].any() and out[1, :, holes == -1].any()
    holes = torch.tensor([5, 6, -1, S - 1]).repeat(3)
    given: dict[str, Any] = {"own": own, "column": 5, "stops": torch.full_like(holes, S), "holes": holes}
    out, only = run(implementation, q, k, v, torch.full((3,), S), **given), holes == 5
    assert not out[:, :, only].any() and out[:, :, ~only].equal(
        own[1].repeat_interleave(2, dim=1).expand(-1, -1, 9, -1)
    )


@each_implementation
@pytest.mark.parametrize("column", [0, 50, 124, 130, 248])
def test_holes_of_a_block_amid_padding(implementation: str, column: int) -> None:
    """Those in the block, beside it in padding, and behind the padding."""
    S, n = 256, 8
    left = torch.tensor([column, column + 1, column + n, column + n + 1, 200, 255, 256, 300])
    holes = torch.tensor([column, column + 3, column + n - 1, column - 1, column + n, 199, 200, 247, 248, 255, -1])
    q, k, v, own = random_branches(2, len(left), 1, 4, 2, len(holes), n, S, 16)
    stops = torch.full_like(holes, S)
    want = with_holes(q, k, v, left, own, column, stops, holes)
    out = run(implementation, q, k, v, left, own=own, column=column, stops=stops, holes=holes)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("column", [0, 50, 124, 130, 248])
def test_stops_of_a_block_amid_padding(implementation: str, column: int) -> None:
    """Before, in and behind the block, before and behind the padding."""
    S, n = 256, 8
    left = torch.tensor([column, column + 1, column + n, column + n + 1, 200, 255, 256, 300])
    stops = torch.tensor([0, column, column + 1, column + n - 1, column + n, column + n + 1, 192, 199, 200, 255, S])
    holes = torch.tensor([-1, column + 3]).repeat(6)[:11]
    q, k, v, own = random_branches(2, len(left), 1, 4, 2, len(stops), n, S, 16)
    want = with_holes(q, k, v, left, own, column, stops, holes)
    out = run(implementation, q, k, v, left, own=own, column=column, stops=stops, holes=holes)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@each_implementation
def test_mask_rows_beside_a_block(implementation: str) -> None:
    """Their keys behind the sequence's: each predicts a column of the block from all but that column."""
    L, T, first = 260, 6, 125
    q, k, v = random_inputs(6, 2, 4, 2, 2 * T, L + T, 16)
    left = torch.tensor([0, 37])
    stops, holes = torch.tensor([L] * T + [L + T] * T), torch.tensor([-1] * T + list(range(first, first + T)))
    out = run(implementation, q, k, v, left, stops=stops, holes=holes)
    want = [truth(q[:, :, :T], k[:, :, :L], v[:, :, :L], left)]
    for j in range(T):
        kept = torch.arange(L + T) != first + j
        want.append(truth(q[:, :, T + j : T + j + 1], k[:, :, kept], v[:, :, kept], left))
    torch.testing.assert_close(out.double(), torch.cat(want, dim=2), rtol=1e-5, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@on_gpu(lambda dtype: dtype == torch.bfloat16)
def test_holes_in_half_precision(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 matrices by their bit patterns")
    inputs, left = random_inputs(3, 2, 4, 2, 20, 500, 64, dtype), torch.tensor([0, 70])
    seen, holes = torch.ones(2, 1, 20, 500, dtype=torch.bool), torch.arange(60, 80)
    seen[1, :, :, :70], seen[:, :, range(20), holes] = False, False

    def way(how: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (
            truth(q, k, v, seen=seen)
            if how is truth
            else F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        )

    assert_as_good(run(implementation, *inputs, left, holes=holes), *inputs, of=way)


@each_implementation
def test_scale(implementation: str) -> None:
    inputs = random_inputs(1, 1, 2, 2, 5, 300, 32)
    assert_as_good(run(implementation, *inputs, None, 0.7), *inputs, None, 0.7)


@each_implementation
def test_scores_far_apart(implementation: str) -> None:
    """Weights that underflow, and scores beyond the exponential's range."""
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
    q, k, v = inputs
    assert run(implementation, q, *torch.zeros(2, *k.shape).half(), own=(k, v), column=0).equal(near)


@each_implementation
def test_rows_do_not_depend_on_each_other(implementation: str) -> None:
    q, k, v = random_inputs(2, 3, 2, 1, 20, 300, 16)
    left = torch.tensor([0, 40, 290])
    together = run(implementation, q, k, v, left)
    alone = run(implementation, q[1:2], k[1:2], v[1:2], left[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)


# Branches


def random_branches(
    seed: int,
    B: int,
    branches: int,
    H: int,
    kv_heads: int,
    m: int,
    n: int,
    S: int,
    d: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Own]:
    """`m` queries of every branch, a cache, and the keys and values of `n` columns for every branch."""
    q, own_k, own_v = random_inputs(seed, B * branches, H, kv_heads, m, n, d, dtype)
    _, k, v = random_inputs(seed + 1, B, H, kv_heads, m, S, d, dtype)
    return q, k, v, (own_k, own_v)


def by_row(
    way: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, left: Tensor | None, own: Own, column: int
) -> Tensor:
    """Every row over its own keys, and over its sequence's that are neither padding nor in the block's columns."""
    found = []
    for row in range(len(q)):
        b = row // (len(q) // len(k))
        start, n = 0 if left is None else int(left[b]), own[0].shape[2]
        seen = [c for c in range(start, k.shape[2]) if not column <= c < column + n]
        keys, values = (torch.cat((x[b, :, seen], new[row]), dim=1)[None] for x, new in zip((k, v), own, strict=True))
        found.append(way(q[row : row + 1], keys, values))
    return torch.cat(found)


@each_implementation
@pytest.mark.parametrize(
    ("shape", "column"),
    [
        ((1, 1, 1, 1, 1, 1, 1, 1), 0),
        ((2, 2, 2, 2, 5, 5, 31, 32), 0),
        ((1, 3, 4, 2, 6, 6, 40, 80), 34),
        # Over the border of two splits, 160 columns each, and of tiles.
        ((2, 3, 4, 2, 7, 20, 300, 20), 147),
        ((1, 2, 2, 1, 3, 1, 33, 16), 17),
        # More keys than a tile has; fewer than queries; nothing of the cache.
        ((1, 2, 4, 2, 4, 50, 129, 32), 30),
        ((1, 2, 2, 2, 40, 3, 65, 16), 15),
        ((2, 2, 2, 1, 5, 64, 64, 16), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
@on_gpu(lambda column, padded: (column, padded) in ((34, True), (147, True), (147, False), (15, False)))
def test_branches_against_float64(implementation: str, shape: tuple[int, ...], column: int, padded: bool) -> None:
    q, k, v, own = random_branches(column, *shape)
    left = torch.randint(0, column + 1, (len(k),), generator=generator(column)) if padded else None
    out = run(implementation, q, k, v, left, own=own, column=column)
    assert_as_good(out, q, k, v, left, own, column, of=by_row)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_branches_in_half_precision(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 matrices by their bit patterns")
    q, k, v, own = random_branches(3, 2, 2, 4, 2, 20, 20, 400, 64, dtype)
    left = torch.tensor([0, 70])
    out = run(implementation, q, k, v, left, own=own, column=190)
    assert_as_good(out, q, k, v, left, own, 190, of=by_row)


def test_branches_by_two_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As AMD's compiler gets it."""
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    q, k, v, own = random_branches(3, 2, 2, 4, 2, 5, 20, 300, 20)
    left = torch.tensor([0, 70])
    want = run("interpreter", q, k, v, left, own=own, column=147)
    asked = []
    monkeypatch.setattr(attend, "is_hip", lambda: asked.append(1) or True)
    assert run("interpreter", q, k, v, left, own=own, column=147).equal(want) and asked


@each_implementation
@pytest.mark.parametrize("column", [0, 1, 9, 16, 120, 128, 140, 248])
def test_what_a_branch_replaces_is_not_read(implementation: str, column: int) -> None:
    """Nor what is around the block's own keys, nor padding."""
    S, n = 256, 8
    q, k, v, own = random_branches(1, 2, 2, 2, 1, 3, n, S, 16)
    left = torch.tensor([0, column])
    assert attend_launch(4, 6, S, True).splits == 2
    want = by_row(truth, q, k, v, left, own, column)
    hidden = torch.zeros(2, 1, S, 1, dtype=torch.bool)
    hidden[:, :, column : column + n] = True
    if implementation != "cpu":
        hidden[1, :, :column] = True
    k, v = k.masked_fill(hidden, NAN), v.masked_fill(hidden, NAN)
    own = tuple(torch.full((4, 1, n + 40, 16), NAN)[:, :, 20 : 20 + n].copy_(x) for x in own)  # type: ignore[assignment]
    out = run(implementation, q, k, v, left, own=own, column=column)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("column", [0, 50, 124, 130, 248])
def test_a_block_amid_padding_is_seen(implementation: str, column: int) -> None:
    """Own keys are never padding; cached keys before `left` stay padding, on both sides of the block."""
    S, n = 256, 8
    left = torch.tensor([column, column + 1, column + n, column + n + 1, 200, 255, 256, 300])
    q, k, v, own = random_branches(2, len(left), 1, 2, 1, 3, n, S, 16)
    want = by_row(truth, q, k, v, left, own, column)
    if implementation != "cpu":
        padding = (torch.arange(S) < left[:, None])[:, None, :, None]
        k, v = k.masked_fill(padding, NAN), v.masked_fill(padding, NAN)
    out = run(implementation, q, k, v, left, own=own, column=column)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@each_implementation
def test_a_block_may_be_empty(implementation: str) -> None:
    q, k, v, own = random_branches(2, 2, 2, 2, 1, 3, 0, 40, 16)
    left = torch.tensor([0, 40])
    want = run(implementation, q, *(x.repeat_interleave(2, dim=0) for x in (k, v)), left.repeat_interleave(2))
    out = run(implementation, q, k, v, left, own=own, column=7)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    q, k, v, own = random_branches(2, 0, 2, 2, 1, 3, 4, 40, 16)
    assert run(implementation, q, k, v, own=own, column=7).shape == (0, 2, 3, 16)


@each_implementation
def test_the_column_is_the_first_of_a_tensor(implementation: str) -> None:
    q, k, v, own = random_branches(2, 1, 2, 2, 1, 3, 6, 40, 16)
    want = run(implementation, q, k, v, own=own, column=7)
    for column in (torch.arange(7, 13), torch.arange(20)[7:9], torch.tensor(7), torch.tensor([[7], [0]])):
        assert run(implementation, q, k, v, own=own, column=column).equal(want)


@each_implementation
@pytest.mark.parametrize("column", [-(10**6), -3, 37, 40, 10**6])
def test_no_column_leads_out_of_the_tensors(implementation: str, column: int) -> None:
    q, k, v, own = random_branches(2, 2, 1, 2, 1, 3, 6, 40, 16)
    left = torch.tensor([0, 37])
    if implementation == "cpu":
        with pytest.raises(IndexError):
            run(implementation, q, k, v, left, own=own, column=column)
        return

    def fenced(x: Tensor) -> Tensor:
        return torch.full((*x.shape[:2], x.shape[2] + 80, 16), NAN)[:, :, 40:-40].copy_(x)

    own = fenced(own[0]), fenced(own[1])
    assert run(implementation, q, fenced(k), fenced(v), left, own=own, column=column).isfinite().all()


@each_implementation
def test_branches_in_strides(implementation: str) -> None:
    """A cache's front columns, own keys and values beside queries in one matrix, channels that are not innermost."""
    q, k, v, own = random_branches(2, 2, 2, 4, 2, 5, 5, 60, 16)
    contiguous = run(implementation, q, k, v, own=own, column=40)
    spare = torch.full((3, 2, 90, 16), NAN)
    k, v = (spare.clone()[:2, :, :60].copy_(x) for x in (k, v))
    fused = torch.full((4, 5, 9, 16), NAN)
    q, *beside = (fused[:, :, i:j].transpose(1, 2).copy_(x) for i, j, x in ((0, 4, q), (4, 6, own[0]), (6, 8, own[1])))
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in own]
    for one in (beside, apart, [beside[0], own[1]]):
        assert not one[0].is_contiguous()
        out = run(implementation, q, k, v, own=tuple(one), column=40)
        torch.testing.assert_close(out, contiguous, rtol=1e-5, atol=1e-6)


@each_implementation
def test_branches_do_not_depend_on_each_other(implementation: str) -> None:
    """NaN in one branch stays in it; NaN in the cache reaches all branches of the sequence."""
    q, k, v, own = random_branches(2, 2, 3, 2, 1, 4, 6, 60, 16)
    left = torch.tensor([0, 40])
    want = run(implementation, q, k, v, left, own=own, column=44)
    alone = run(implementation, q[4:5], k[1:], v[1:], left[1:], own=(own[0][4:5], own[1][4:5]), column=44)
    torch.testing.assert_close(want[4:5], alone, rtol=1e-5, atol=1e-6)
    for spoiled in (q, *own):
        spoiled[4] = NAN
        out = run(implementation, q, k, v, left, own=own, column=44)
        assert out[4].isnan().all()
        torch.testing.assert_close(out[[0, 1, 2, 3, 5]], want[[0, 1, 2, 3, 5]], rtol=1e-5, atol=1e-6)
    v[0, 0, 55] = NAN
    assert run(implementation, q, k, v, left, own=own, column=44)[:3].isnan().all()


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
    assert 32 * attend_launch(32, 32, 1056, False).splits == 128
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
        ({"left": torch.zeros(3, dtype=torch.int64)}, r"left: expected \[2\].*got \[3\]"),
        ({"left": torch.zeros(2)}, "left: expected .*int32 or int64.*got .*float32"),
        ({"stops": torch.zeros(4, dtype=torch.int64)}, r"stops: expected \[3\] int64 on cpu, got \[4\]"),
        ({"holes": torch.zeros(2, 3, dtype=torch.int64)}, r"holes: expected \[3\] int64 on cpu, got \[2, 3\]"),
        ({"holes": torch.zeros(3, dtype=torch.int32)}, r"holes: expected \[3\] int64 on cpu, got \[3\] torch.int32"),
        ({"holes": torch.zeros(3, dtype=torch.int64, device="meta")}, "holes: expected .* on cpu, got .* on meta"),
    ],
)
def test_errors(changes: dict[str, Any], words: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 2, 9, 8), "v": torch.zeros(2, 2, 9, 8)}
    with pytest.raises(ValueError, match=words):
        block_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"own": None}, "own and column: expected both or neither, got column alone"),
        ({"column": None}, "own and column: expected both or neither, got own alone"),
        ({"own": (torch.zeros(6, 2, 5, 8),)}, "own: expected keys and values, got 1 tensors"),
        ({"own": (torch.zeros(2, 2, 5, 8),) * 2}, r"own\[0\]: expected \[6, 2, at most 9, 8\].*got \[2, 2, 5, 8\]"),
        ({"own": (torch.zeros(6, 4, 5, 8),) * 2}, r"own\[0\]: .*got \[6, 4, 5, 8\]"),
        ({"own": (torch.zeros(6, 2, 10, 8),) * 2}, r"own\[0\]: .*at most 9.*got \[6, 2, 10, 8\]"),
        ({"own": (torch.zeros(6, 2, 5),) * 2}, r"own\[0\]: .*got \[6, 2, 5\]"),
        ({"own": (torch.zeros(6, 2, 5, 8), torch.zeros(6, 2, 4, 8))}, r"own\[1\]: .*both alike.*got \[6, 2, 4, 8\]"),
        ({"own": (torch.zeros(6, 2, 5, 8), torch.zeros(6, 2, 5, 8).half())}, r"own\[1\]: .*float32.*got .*float16"),
        ({"column": torch.tensor([3], dtype=torch.int32)}, "column: expected int64.*got .*int32"),
        ({"column": torch.tensor([], dtype=torch.int64)}, r"column: expected .*at least one element.*got \[0\]"),
        ({"column": torch.zeros(1, dtype=torch.int64, device="meta")}, "column: expected .* on cpu, got .* on meta"),
        ({"k": torch.zeros(4, 2, 9, 8)}, r"k: expected \[a divisor of 6, .*got \[4, 2, 9, 8\]"),
        ({"k": torch.zeros(0, 2, 9, 8)}, r"k: expected \[a divisor of 6, .*got \[0, 2, 9, 8\]"),
        ({"left": torch.zeros(6, dtype=torch.int64)}, r"left: expected \[2\].*got \[6\]"),
    ],
)
def test_errors_of_branches(changes: dict[str, Any], words: str) -> None:
    arguments = {"q": torch.zeros(6, 4, 3, 8), "k": torch.zeros(2, 2, 9, 8), "v": torch.zeros(2, 2, 9, 8)}
    branches = {"own": (torch.zeros(6, 2, 5, 8),) * 2, "column": torch.tensor([4])}
    block_attention(**arguments, **branches)
    with pytest.raises(ValueError, match=words):
        block_attention(**{**arguments, **branches, **changes})


@pytest.mark.parametrize("implementation", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_call_takes_branches(implementation: str) -> None:
    q, k, v, own = random_branches(0, 2, 2, 4, 2, 3, 2, 9, 8)
    q, k, v, own_k, own_v = (x.to(implementation) for x in (q, k, v, *own))
    left, column = torch.tensor([0, 4], device=q.device), torch.tensor([5], device=q.device)
    out = block_attention(q, k, v, left, 0.3, own=(own_k, own_v), column=column)
    want = run(implementation, q, k, v, left, 0.3, own=(own_k, own_v), column=column)
    assert out.cpu().equal(want) and out.shape == q.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded: bool, device: str) -> None:
    left = torch.tensor([0, 4], device=device) if padded else None
    q, k, v = (x.to(device) for x in random_inputs(0, 2, 4, 2, 3, 9, 8))
    torch.library.opcheck(split_keys.attention_op, (q, k, v, left, 0.3))
    q, k, v, own = random_branches(0, 2, 3, 4, 2, 3, 2, 9, 8)
    q, k, v, own_k, own_v = (x.to(device) for x in (q, k, v, *own))
    column = torch.arange(5, 7, device=device)
    torch.library.opcheck(split_keys.attention_op, (q, k, v, left, 0.3, own_k, own_v, column))
    columns = torch.tensor([9, 9, 7], device=device), torch.tensor([-1, 0, 6], device=device)
    torch.library.opcheck(split_keys.attention_op, (q, k, v, left, 0.3, own_k, own_v, column, *columns))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic: bool) -> None:
    inputs, left = random_inputs(0, 2, 4, 2, 3, 9, 8), torch.tensor([0, 4])
    compiled = torch.compile(block_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert compiled(*inputs, left).equal(block_attention(*inputs, left))
    for branches, column in ((2, 5), (3, 4)):
        q, k, v, own = random_branches(0, 2, branches, 4, 2, 3, 2, 9, 8)
        given: dict[str, Any] = {"own": own, "column": torch.tensor([column])}
        assert compiled(q, k, v, left, **given).equal(block_attention(q, k, v, left, **given))
        given["holes"] = torch.tensor([-1, 0, column])
        assert compiled(q, k, v, left, **given).equal(block_attention(q, k, v, left, **given))


# In a decode


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Short blocks take the kernel in the interpreter, as on a GPU; lists sequences, branches and whether padded."""
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    seen: list[tuple[int, int, bool]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, left: Tensor | None, scale: float, *own: Tensor | None) -> Tensor:
        assert left is None or k.shape[0] == left.shape[0]
        seen.append((k.shape[0], q.shape[0] // k.shape[0], left is not None))
        return split_keys.attention_gpu(q, k, v, left, scale, *own)

    monkeypatch.setattr(split_keys, "attention_cpu", kernel)
    for module in (cache, beside):
        monkeypatch.setattr(module, "goes_to_kernel", lambda q: True)
    return seen


@pytest.mark.no_cover
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "dual"},
        {"cache": "prefix"},
        {"cache": "dual", "engine": "static"},
        {"cache": "dual", "cfg_scale": 1.0},
        {"cache": "dual", "drafts": 3, "branches": "batch"},
        {"cache": "prefix", "drafts": 3, "branches": "batch", "engine": "static"},
        {"cache": "dual", "drafts": 3, "branches": "tree"},
        {"cache": "prefix", "drafts": 3, "branches": "tree", "engine": "static"},
        {"cache": "dual", "drafts": 2, "branches": "tree", "cfg_scale": 1.0},
        {"cache": "none"},
        {"cache": "dual", "rule": Wino(0.2, 0.9, None)},
        {"cache": "prefix", "rule": Wino(0.2, 0.9, None), "engine": "static"},
    ],
    ids=str,
)
def test_a_decode_is_the_same(split: list[tuple[int, int, bool]], settings: dict[str, Any], padded: bool) -> None:
    """As with PyTorch's attention: every block over a cache, padded or not, with one state or several drafts."""
    model = small_model(n_kv_heads=2)
    rows = [prompts(1, 14)[0], prompts(1, 5 if padded else 14, seed=1)[0], prompts(1, 9 if padded else 14, seed=2)[0]]
    input_ids, attention_mask = left_pad(rows)
    settings = {"max_new_tokens": 12, "block_length": 6, "rule": Frechet(0.2), "stop_at_eos": False, **settings}
    with pytest.MonkeyPatch.context() as unsplit:
        for module in (cache, beside):
            unsplit.setattr(module, "goes_to_kernel", lambda q: False)
        want = model.generate(input_ids, attention_mask, **settings)
    assert not split
    out = model.generate(input_ids, attention_mask, **settings)
    assert out.sequences.equal(want.sequences) and out.nfe.equal(want.nfe)
    assert bool(split) == (settings["cache"] != "none")
    assert "drafts" not in settings or max(branches for _, branches, _ in split) == settings["drafts"]
    # Static steps have the padding of a length bucket.
    assert not split or any(paddedness for *_, paddedness in split) == (padded or "engine" in settings)


def test_what_goes_to_the_kernel() -> None:
    """Short blocks, on a GPU."""

    class OnGPU:
        is_cuda = True

        def __init__(self, dtype: torch.dtype, *shape: int) -> None:
            self.dtype, self.shape = dtype, shape

    def goes(q: Any) -> bool:
        return cache.splits_keys(q, torch.empty(1, 8, 1056, q.shape[3], device="meta"))

    assert goes(OnGPU(torch.bfloat16, 1, 8, 32, 128)) and goes(OnGPU(torch.float16, 1, 32, 64, 64))
    assert not goes(OnGPU(torch.bfloat16, 1, 32, 65, 128)), "260 queries for each head of keys"
    assert cache.goes_to_kernel(OnGPU(torch.bfloat16, 1, 32, 65, 128)), "branches, of any length"
    assert goes(OnGPU(torch.float32, 1, 8, 32, 128)) and not goes(OnGPU(torch.float64, 1, 8, 32, 128))
    assert not goes(OnGPU(torch.bfloat16, 1, 8, 32, 256))
    assert not goes(torch.empty(1, 8, 32, 128, dtype=torch.bfloat16, device="cpu"))
