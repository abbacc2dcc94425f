"""The block cache: what a forward replaces, what it sees, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from small import MASK, left_pad, prompts, small_model
from torch import Tensor

from fdpp import LLaDAModelLM
from fdpp.attention.cache import BlockCache, tree_mask

ATOL = 2e-4
"""For logits of about 5: float32 sums in another order."""


def keys_and_values(B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random `[B, 2, T, 4]` of two heads."""
    k, v = torch.randn(2, B, 2, T, 4, generator=torch.Generator().manual_seed(seed))
    return k, v


def filled(B: int = 3, L: int = 10, layers: int = 2) -> BlockCache:
    cache = BlockCache()
    for layer in range(layers):
        cache.write(layer, *keys_and_values(B, L, seed=layer), 0)
    return cache


def forward(
    model: LLaDAModelLM, x: Tensor, cache: BlockCache | None, start: int, stop: int, mask: Tensor | None = None
) -> Tensor:
    """Logits of the columns `start..stop` of `x`, from a forward over them alone."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
    with torch.no_grad():
        hidden = model.model(x[:, start:stop], attention_mask=mask, position_ids=positions, cache=cache, start=start)
        return model.project(hidden)


# The container


def test_the_first_forward_is_stored_as_it_is() -> None:
    cache, (k, v) = BlockCache(), keys_and_values(3, 10)
    seen_k, seen_v = cache.write(0, k, v, 0)
    assert torch.equal(seen_k, k) and torch.equal(seen_v, v)
    assert torch.equal(cache.keys[0], k) and torch.equal(cache.values[0], v)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (4, 7), (9, 10), (0, 1), (6, 10)])
def test_writes_are_in_place(start: int, stop: int) -> None:
    cache = filled()
    before_k, before_v, address = cache.keys[1].clone(), cache.values[1].clone(), cache.keys[1].data_ptr()
    other = cache.keys[0].clone()
    k, v = keys_and_values(3, stop - start, seed=7)
    seen_k, seen_v = cache.write(1, k, v, start)
    before_k[:, :, start:stop], before_v[:, :, start:stop] = k, v
    assert torch.equal(cache.keys[1], before_k) and torch.equal(cache.values[1], before_v)
    assert torch.equal(seen_k, before_k) and torch.equal(seen_v, before_v)
    assert cache.keys[1].data_ptr() == address
    assert torch.equal(cache.keys[0], other)


def test_a_block_before_any_full_forward() -> None:
    with pytest.raises(ValueError, match=r"full forward first.*from 4"):
        BlockCache().write(0, *keys_and_values(3, 2), 4)


@pytest.mark.parametrize(("start", "T"), [(9, 2), (10, 1), (0, 11)])
def test_columns_beyond_the_end(start: int, T: int) -> None:
    cache = filled()
    before = cache.keys[0].clone()
    with pytest.raises(ValueError, match=rf"10 columns.*{start} to {start + T}"):
        cache.write(0, *keys_and_values(3, T), start)
    assert torch.equal(cache.keys[0], before)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("sequences", [[0, 2], [1], [0, 1, 2], [2, 0], [1, 2]])
def test_sequences_in_front_keep_their_keys_and_so_do_the_others(sequences: list[int], passes: int) -> None:
    cache, before = BlockCache(passes=passes), filled(3 * passes)
    for layer in range(2):
        cache.write(layer, *keys_and_values(3 * passes, 10, seed=layer), 0)

    def rows(order: list[int]) -> list[int]:
        return [sequence * passes + i for sequence in order for i in range(passes)]

    order = cache.seat(sequences)
    assert sorted(order) == sorted(sequences) and cache.size == len(sequences)
    for layer, (k, v) in enumerate(cache.allocated):
        assert torch.equal(cache.keys[layer], before.keys[layer][rows(order)])
        assert torch.equal(k, before.keys[layer][rows(cache.order)])
        assert torch.equal(v, before.values[layer][rows(cache.order)])
    k, v = keys_and_values(len(sequences) * passes, 3, seed=9)
    assert torch.equal(cache.write(0, k, v, 5)[0][:, :, 5:8], k)


def test_only_sequences_that_stand_too_far_back_are_moved() -> None:
    cache = filled(5)
    assert cache.seat([4, 0, 2]) == [0, 4, 2] and cache.order == [0, 4, 2, 3, 1]
    assert cache.seat([0, 1, 2, 3, 4]) == [0, 4, 2, 3, 1]
    assert cache.seat([3]) == [3]


def test_nothing_is_written_for_fillers() -> None:
    cache, before = filled(), filled()
    cache.pad(0, fillers=torch.tensor([False, True, False]))
    for start in (5, torch.tensor([5, 6, 7])):
        k, v = keys_and_values(3, 3, seed=9)
        seen_k, seen_v = cache.write(1, k, v, start)
        assert torch.equal(seen_k[[0, 2], :, 5:8], k[[0, 2]]) and torch.equal(seen_k[1], before.keys[1][1])
        assert torch.equal(seen_v[[0, 2], :, 5:8], v[[0, 2]]) and torch.equal(seen_v[1], before.values[1][1])


def test_padding_that_the_host_knows_is_neither_fed_nor_seen() -> None:
    cache, (k, v) = BlockCache(spare=4), keys_and_values(2, 10)
    cache.pad(3)
    for _ in range(2):  # empty and allocated
        seen_k, seen_v = cache.write(0, k[:, :, 3:], v[:, :, 3:], 3)
        assert torch.equal(seen_k, k[:, :, 3:]) and torch.equal(seen_v, v[:, :, 3:])
    assert cache.length == 10 and not cache.keys[0][:, :, :3].any()
    cache.pad(2)
    assert torch.equal(cache.write(0, k[:, :, 2:], v[:, :, 2:], 2)[0], k[:, :, 2:])
    with pytest.raises(ValueError, match=r"full forward first.*from 4"):
        BlockCache().write(0, *keys_and_values(1, 3), 4)


def test_what_was_never_written_holds_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask takes a column's weight away, but 0 times NaN is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # which fills what is empty with NaN
    try:
        assert torch.empty(1).isnan()
        cache = BlockCache(spare=4)
        cache.pad(3)
        cache.write(0, *keys_and_values(2, 7), 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for pair in cache.allocated for tensor in pair)


# Forwards with it


@pytest.fixture(scope="module", params=[4, 2, 1], ids="{}-kv-heads".format)
def llada(request: pytest.FixtureRequest) -> LLaDAModelLM:
    return small_model(n_kv_heads=request.param)


def columns(L: int) -> list[tuple[int, int]]:
    """Everything, everything from a block on, blocks at both ends and within, one column."""
    return [(0, L), (6, L), (6, 11), (0, 5), (L - 1, L)]


@pytest.mark.parametrize("padded", [False, True])
def test_a_cached_forward_of_unchanged_tokens_is_the_full_one(llada: LLaDAModelLM, padded: bool) -> None:
    x, mask = left_pad([prompts(1, 14)[0], prompts(1, 9, seed=1)[0]])
    mask = mask.bool() if padded else None
    full, cache = forward(llada, x, None, 0, 14, mask), BlockCache()
    real = torch.ones(2, 14, dtype=torch.bool) if mask is None else mask
    for start, stop in [(0, 14), *columns(14)]:
        logits = forward(llada, x, cache, start, stop, mask)
        torch.testing.assert_close(
            logits[real[:, start:stop]], full[:, start:stop][real[:, start:stop]], rtol=0, atol=ATOL
        )


def test_a_dual_forward_sees_the_old_rest_and_the_new_block(llada: LLaDAModelLM) -> None:
    """Block-wise attention written out: keys and values of `old` outside the block, of `new` inside."""
    old, new, start, stop = prompts(2, 14), prompts(2, 14, seed=1), 5, 9
    cache = BlockCache()
    forward(llada, old, cache, 0, 14)
    stored = [k.clone() for k in cache.keys]
    logits = forward(llada, new, cache, start, stop)

    assert (logits - forward(llada, new, None, 0, 14)[:, start:stop]).abs().max() > 0.1
    mixed = old.clone()
    mixed[:, start:stop] = new[:, start:stop]
    # Layer 0's keys depend on their own token alone, so a forward over the mixed tokens gives the expected ones.
    whole = BlockCache()
    forward(llada, mixed, whole, 0, 14)
    torch.testing.assert_close(cache.keys[0], whole.keys[0])
    torch.testing.assert_close(cache.values[0], whole.values[0])
    outside = torch.ones(14, dtype=torch.bool)
    outside[start:stop] = False
    for layer, before in enumerate(stored):
        assert torch.equal(cache.keys[layer][:, :, outside], before[:, :, outside])
        assert (cache.keys[layer][:, :, start:stop] - before[:, :, start:stop]).abs().max() > 0.1


def test_only_the_last_contents_of_a_block_count(llada: LLaDAModelLM) -> None:
    """A block's forward does not depend on what the cache held there before."""
    x, cache, other = prompts(2, 14), BlockCache(), BlockCache()
    for filled_cache in (cache, other):
        forward(llada, x, filled_cache, 0, 14)
    detour = x.clone()
    detour[:, 5:9] = MASK
    forward(llada, detour, other, 5, 9)
    assert torch.equal(forward(llada, x, cache, 5, 9), forward(llada, x, other, 5, 9))


def test_a_second_full_forward_forgets_the_first(llada: LLaDAModelLM) -> None:
    x, cache = prompts(2, 14), BlockCache()
    forward(llada, prompts(2, 14, seed=5), cache, 0, 14)
    full = forward(llada, x, cache, 0, 14)
    torch.testing.assert_close(full, forward(llada, x, None, 0, 14), rtol=0, atol=ATOL)
    torch.testing.assert_close(forward(llada, x, cache, 3, 8), full[:, 3:8], rtol=0, atol=ATOL)


def test_kept_rows_go_on_as_if_alone(llada: LLaDAModelLM) -> None:
    x, cache = prompts(4, 14), BlockCache()
    forward(llada, x, cache, 0, 14)
    rows = torch.tensor(cache.seat([3, 1]))
    changed = x[rows].clone()
    changed[:, 6] = MASK
    logits = forward(llada, changed, cache, 5, 9)
    for i, row in enumerate(rows.tolist()):
        alone = BlockCache()
        forward(llada, x[row : row + 1], alone, 0, 14)
        torch.testing.assert_close(
            logits[i : i + 1], forward(llada, changed[i : i + 1], alone, 5, 9), rtol=0, atol=ATOL
        )


# Several branches in one forward


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(5, 14), (6, 11), (13, 14)])
@pytest.mark.parametrize("branches", [2, 3])
def test_branches_in_batch_layout_are_forwards_of_their_own(
    llada: LLaDAModelLM, branches: int, start: int, stop: int, padded: bool
) -> None:
    x, mask = left_pad([prompts(1, 14)[0], prompts(1, 9, seed=1)[0]])
    mask = mask.bool() if padded else torch.ones(2, 14, dtype=torch.bool)
    contents = torch.stack([prompts(2, 14, seed=10 + j) for j in range(branches)], 1)
    cache, alone = BlockCache(), BlockCache()
    forward(llada, x, cache, 0, 14, mask)
    forward(llada, x, alone, 0, 14, mask)
    stored = [tensor.clone() for tensor in cache.keys + cache.values]
    cache.branches = branches
    all_masks = mask.repeat_interleave(branches, 0)
    logits = forward(llada, contents.flatten(0, 1), cache, start, stop, all_masks).unflatten(0, (2, branches))
    assert all(torch.equal(a, b) for a, b in zip(cache.keys + cache.values, stored, strict=True))
    for j in range(branches):
        expected = forward(llada, contents[:, j], alone, start, stop, mask)
        torch.testing.assert_close(logits[:, j], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("start", "stop"), [(0, 14), (5, 14), (6, 11), (13, 14)])
@pytest.mark.parametrize("branches", [2, 3])
def test_branches_in_tree_layout_are_forwards_of_their_own(
    llada: LLaDAModelLM, branches: int, start: int, stop: int
) -> None:
    x, n = prompts(2, 14), stop - start
    contents = torch.stack([prompts(2, 14, seed=10 + j) for j in range(branches)], 1)
    cache, alone = BlockCache("tree", spare=(branches - 1) * n), BlockCache()
    assert torch.equal(forward(llada, x, cache, 0, 14), forward(llada, x, alone, 0, 14))
    cache.branches = branches
    mask = tree_mask(14, slice(start, stop), n, branches, x.device)
    positions = torch.arange(start, stop).repeat(branches)[None]
    with torch.no_grad():
        fed = contents[:, :, start:stop].flatten(1)
        hidden = llada.model(fed, attention_mask=mask, position_ids=positions, cache=cache, start=start)
        logits = llada.project(hidden).unflatten(1, (branches, n))
    for j in reversed(range(branches)):
        expected = forward(llada, contents[:, j], alone, start, stop)
        torch.testing.assert_close(logits[:, j], expected, rtol=0, atol=ATOL)
    # The first branch stands in the sequence's own columns.
    for k, expected_k in zip(cache.keys, alone.keys, strict=True):
        torch.testing.assert_close(k[:, :, :14], expected_k, rtol=0, atol=ATOL)
    with pytest.raises(ValueError, match=f"{(branches - 1) * n} spare.*in {branches + 1} branches"):
        cache.branches = branches + 1
        cache.write(0, *torch.zeros(2, 2, 1, n * (branches + 1), 8), start)
