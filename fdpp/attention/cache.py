"""The key/value cache of a block-wise decode, and attention over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.attention.rotary import Place
from fdpp.attention.split_keys import block_attention, new_tickets, visible, with_own
from fdpp.selection import DTYPES

SHORT = 256
"""Queries per key head up to which memory bounds attention: 256 queries do 256 FLOP per byte of bfloat16 keys, and an
H200 does 230 in the time it reads a byte (990 TFLOP/s at 4.3 TB/s). Derived, not measured."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sees: Tensor | None = None) -> Tensor:
    """Softmax attention of `q` `[b, H, n, hd]` over `k`, `v` `[b, kv_heads, S, hd]`; `mask` is True at keys to see.

    `sees` `[n, S]` is True at those that a query may see in any row; None: all.

    On a CPU, rows that differ only in their left padding each attend over their own columns. A mask gives sums of other
    groups, and so another rounding than the row has alone.
    """
    left = left_padding(mask, q.shape[0]) if mask is not None and q.device.type == "cpu" else None
    gqa = q.shape[1] != k.shape[1]
    if left is None:
        mask = sees if mask is None else mask if sees is None else mask & sees
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    out = []
    for first, queries, keys, values in zip(left, q.split(1), k.split(1), v.split(1), strict=True):
        keys, values = keys[:, :, first:], values[:, :, first:]
        # Queries of all columns include those of the padding, and how many there are decides how each is summed.
        parts = (queries,)
        if first and q.shape[2] == k.shape[2]:
            parts = queries.tensor_split((first,), dim=2)
        own = None if sees is None else sees[:, first:]
        attended = [F.scaled_dot_product_attention(part, keys, values, own, enable_gqa=gqa) for part in parts]
        out.append(torch.cat(attended, dim=2))
    return torch.cat(out)


def left_padding(mask: Tensor, rows: int) -> list[int] | None:
    """How many columns the bool `mask` `[rows, 1, 1, S]` hides on each row's left; None if it is another mask."""
    compiling = torch.compiler.is_compiling()  # a number per row would be a graph break
    if compiling or not rows or mask.dtype != torch.bool or mask.shape != (rows, 1, 1, mask.shape[-1]):
        return None
    sees, S = mask[:, 0, 0], mask.shape[-1]
    left = S - sees.sum(1)
    is_left = sees.equal(visible(left, S)) and int(left.max()) < S
    return left.tolist() if is_left else None


def goes_to_kernel(q: Tensor) -> bool:
    """Whether `block_attention` has a kernel for queries like `q` `[b, H, n, hd]`."""
    return q.is_cuda and q.dtype in DTYPES and q.shape[3] <= 128


def splits_keys(q: Tensor, k: Tensor) -> bool:
    """Whether `q` `[b, H, n, hd]` over cached keys `k` goes to `block_attention`: a short block on a GPU."""
    return goes_to_kernel(q) and q.shape[1] // k.shape[1] * q.shape[2] <= SHORT


class BlockCache:
    """Keys (after the rotary embedding) and values `[b, kv_heads, L, head_size]` of every layer, in place.

    A forward over columns `start..start+n` replaces the keys and values there and attends over all L. The caches of
    Fast-dLLM (arXiv 2505.22618, section 3.1) differ only in what they feed after a full forward (`0..L`):

    - prefix cache: from the block's start to the end, so only columns before the block are reused;
    - dual cache: the block alone.

    A forward may evaluate several branches: alternative contents of the same columns, which share all other columns.
    None overwrites another. The layout is

    - `"batch"`: the branches of sequence i are rows `i * branches ..` of the queries. On a CPU each gets a copy of the
      sequence's keys and values, with its own in the place of those fed.
    - `"tree"`: the branches follow each other in one row, `n` columns each. The first is written to the cache's columns
      and the others to spare ones after L; a mask keeps them apart (`tree_mask`).

    On a GPU a short block goes to `block_attention` instead, in either layout, padded or not, as do branches of any
    length. That copies no key.

    With a `grid` columns see no block behind their own. Stored keys of finished blocks are then exact, a forward feeds
    what is not stored yet, in order, and attends over no column behind those.

    The first forward allocates, later ones write in place. Every forward, the first included, attends over what is
    stored. A block starts with `seat`.

    Attributes:
        keys, values: one tensor per layer, the rows in use; `spare` columns follow the L of the sequence.
        allocated: per layer the tensors of which `keys` and `values` are the first rows.
        tickets: of `block_attention`, on a GPU: launches over one cache follow each other.
        order: numbers of the sequences, in the order of their rows.
        branches: branches of the next forward, 1 unless set.
        layout: "batch" or "tree".
        passes: successive rows of each sequence, each with its own keys and values: 2 with guidance.
        padding: columns on the left that hold no token and are not attended to. An int is the same for all rows, and
            the columns are cut off; else int64 `[rows]` (see `pad`).
        fillers: bool `[rows]`, rows whose keys and values are not written; None: all are.
        grid: the length of blocks, counted from column 0, that see no later one; None: every column sees all.
        sequences, columns: how many sequences of which length L to make room for. None: as the first forward, which
            then is a full one of all sequences.
    """

    def __init__(
        self,
        layout: str = "batch",
        spare: int = 0,
        passes: int = 1,
        grid: int | None = None,
        sequences: int | None = None,
        columns: int | None = None,
    ) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.allocated: list[tuple[Tensor, Tensor]] = []
        self.tickets: Tensor | None = None
        self.order: list[int] = []
        self.branches, self.layout, self.spare, self.passes = 1, layout, spare, passes
        self.grid, self.sequences, self.columns = grid, sequences, columns
        self.padding: Tensor | int = 0
        self.fillers: Tensor | None = None
        self.made: dict[tuple[Any, ...], Any] = {}

    @property
    def length(self) -> int:
        if not self.keys:
            assert self.columns is not None
            return self.columns
        return self.keys[0].shape[2] - self.spare

    @property
    def size(self) -> int:
        """Number of sequences in use."""
        return self.keys[0].shape[0] // self.passes

    def pad(self, padding: Tensor | int = 0, fillers: Tensor | None = None) -> None:
        """Set the left padding of the next forward's sequences, and which of them are fillers.

        Args:
            padding: columns on the left without a token: an int if the host knows it and all have as many (those
                columns must not be fed), else int64 `[b]`.
            fillers: bool `[b]`, sequences that only fill the batch: nothing is written for them.
        """
        self.padding = padding if isinstance(padding, int) else padding.repeat_interleave(self.passes)
        self.fillers = None if fillers is None else fillers.repeat_interleave(self.passes)
        self.made = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        start: int | Tensor,
        stored: bool = False,
        wanted: slice | Tensor | None = None,
    ) -> Tensor:
        """Attention of queries `q` `[rows, H, m, hd]`, at some or all of the fed positions that `k` and `v` belong to.

        `start` is the first fed column, or an int64 tensor `[n]` of all of them. `mask` is True at keys to see; None:
        at all but padding, other branches and, with a `grid`, later blocks. Where `k` and `v` are `stored` already, it
        was at their `place`. `wanted` says of which positions the queries are; None: of all.
        """
        n = k.shape[2] // self.branches
        if self.branches > 1:
            if mask is None and goes_to_kernel(q):
                return self.attend_own(layer, q, k, v, start, wanted)
            if self.layout == "batch":
                return self.attend_copies(layer, q, k, v, mask, start, wanted)
        keys, values = self.held(layer, n, start) if stored else self.write(layer, k, v, start)
        if mask is None and self.branches == 1 and (splits_keys(q, keys) or (self.grid and goes_to_kernel(q))):
            stops = self.stops(start, n, q.device, wanted)
            return block_attention(q, keys, values, self.left(q.device), stops=stops, tickets=self.tickets)
        return attend(q, keys, values, self.mask(start, n, q.device, wanted) if mask is None else mask)

    def place(self, layer: int, start: int | Tensor, k: Tensor) -> Place | None:
        """Where a kernel may store keys `k` `[b, kv_heads, n, hd]` and as many values before `attend`, with `start`.

        None where there are branches: `attend` knows which of them are stored.
        """
        if self.branches > 1:
            return None
        self.make_room(layer, k, start)
        return Place(self.keys[layer], self.values[layer], start, self.fillers)

    def write(self, layer: int, k: Tensor, v: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` `[b, kv_heads, n * branches, hd]` at `start`; returns what to attend over."""
        self.make_room(layer, k, start)
        n = k.shape[2] // self.branches
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            self.put(stored, columns_from(start, n), new[:, :, :n])
            if self.branches > 1:
                self.put(stored, slice(self.length, self.seen(n)), new[:, :, n:])
        return self.held(layer, n, start)

    def seen(self, n: int) -> int:
        """How many columns a forward over `n` attends to, padding and other branches included."""
        return self.length + (self.branches - 1) * n

    def behind(self, n: int, start: int | Tensor) -> int:
        """The column behind those that a forward over `n` columns at `start` attends over, other branches left out."""
        if self.grid is None or not isinstance(start, int):
            return self.length
        return min(end_of_block(start + n, self.grid), self.length)

    def held(self, layer: int, n: int, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a forward over `n` columns at `start` attends over."""
        stop = self.behind(n, start) if self.branches == 1 else self.seen(n)
        columns = slice(self.padding if isinstance(self.padding, int) else 0, stop)
        return self.keys[layer][:, :, columns], self.values[layer][:, :, columns]

    def make_room(self, layer: int, k: Tensor, start: int | Tensor) -> None:
        """Check that keys and values like `k` fit in at `start`, and allocate where the layer has none.

        The first forward of a decode sets L, so it must be a full one where `columns` do not.
        """
        cut = self.padding if isinstance(self.padding, int) else 0
        n = k.shape[2] // self.branches
        if layer == len(self.keys):
            if layer == len(self.allocated):
                columns = self.columns
                if columns is None:
                    if not isinstance(start, int) or start != cut or self.branches > 1:
                        raise ValueError(f"an empty cache needs a full forward first, got columns from {start}")
                    columns = start + n
                self.allocate(k, columns)
            rows = k.shape[0]
            self.keys.append(self.allocated[layer][0][:rows])
            self.values.append(self.allocated[layer][1][:rows])
        beyond = isinstance(start, int) and start + n > self.length
        if beyond or self.seen(n) > self.keys[layer].shape[2]:
            raise ValueError(
                f"the cache holds {self.length} columns and {self.spare} spare ones, "
                f"got columns {start} to {start + n} in {self.branches} branches"
            )

    def allocate(self, like: Tensor, length: int) -> None:
        """Allocate one more layer. Zeros: a masked column has weight 0, and 0 times a NaN is NaN."""
        rows, kv_heads, _, hd = like.shape
        rows = rows if self.sequences is None else self.sequences * self.passes
        k, v = (like.new_zeros(rows, kv_heads, length + self.spare, hd) for _ in range(2))
        self.allocated.append((k, v))
        if self.tickets is None and like.is_cuda:
            self.tickets = new_tickets(like.device)

    def put(self, stored: Tensor, columns: slice | Tensor, new: Tensor) -> None:
        if self.fillers is not None:
            new = torch.where(self.fillers.to(new.device)[:, None, None, None], stored[:, :, columns], new)
        stored[:, :, columns] = new

    def left(self, device: torch.device) -> Tensor | None:
        """Left padding of every row, int64 `[rows]`; None where it is cut off."""
        return None if isinstance(self.padding, int) else self.padding.to(device)

    def mask(
        self, start: int | Tensor, n: int, device: torch.device, wanted: slice | Tensor | None = None
    ) -> Tensor | None:
        """The mask of a forward over `n` columns at `start`, made once for all layers; None: everything is seen."""
        branches = self.branches if self.layout == "tree" else 1
        key = (branches, device, n, start if isinstance(start, int) else None)
        if key not in self.made:
            fed, cut = columns_from(start, n), self.padding if isinstance(self.padding, int) else 0
            length = self.length if branches > 1 else self.behind(n, start)
            mask = seen(self.left(device), length, fed, n, branches, device, self.grid)
            self.made[key] = mask if mask is None or not cut else mask[..., cut:]
        mask = self.made[key]
        return mask if wanted is None or mask is None or mask.shape[2] == 1 else mask[:, :, wanted]

    def stops(self, start: int | Tensor, n: int, device: torch.device, wanted: slice | Tensor | None) -> Tensor | None:
        """For `block_attention` the column behind those that each query sees, int64 `[m]`; None: it sees all."""
        if self.grid is None or one_block(columns_from(start, n), self.grid):
            return None
        key = ("stops", device, n, start if isinstance(start, int) else None)
        if key not in self.made:
            cut = self.padding if isinstance(self.padding, int) else 0
            self.made[key] = (indices(columns_from(start, n), device) // self.grid + 1) * self.grid - cut
        return self.made[key] if wanted is None else self.made[key][wanted]

    def attend_own(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: int | Tensor,
        wanted: slice | Tensor | None = None,
    ) -> Tensor:
        """Attention of branches by a kernel that takes their own keys and values in place of the cache's."""
        tree, D = self.layout == "tree", self.branches
        n = k.shape[2] // (D if tree else 1)
        stop, stops = self.behind(n, start), self.stops(start, n, q.device, wanted)
        keys, values = (stored[:, :, :stop] for stored in (self.keys[layer], self.values[layer]))
        if tree:
            q, k, v = (x.unflatten(2, (D, -1)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        key = ("column", q.device)
        if key not in self.made:
            if isinstance(start, int):
                start = torch.full((1,), start, dtype=torch.int64, device=q.device)
            self.made[key] = start.to(q.device)
        left = self.left(q.device)
        own = {"own": (k, v), "column": self.made[key]}
        out = block_attention(q, keys, values, left, stops=stops, tickets=self.tickets, **own)
        return out.unflatten(0, (-1, D)).transpose(1, 2).flatten(2, 3) if tree else out

    def attend_copies(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        start: int | Tensor,
        wanted: slice | Tensor | None = None,
    ) -> Tensor:
        """Attention of branches in batch layout, each over a copy of its sequence's keys and values."""
        columns, stop = columns_from(start, k.shape[2]), self.behind(k.shape[2], start)
        keys, values = (
            with_own(stored[:, :, :stop], columns, new)
            for stored, new in ((self.keys[layer], k), (self.values[layer], v))
        )
        if mask is None and (hidden := self.mask(start, k.shape[2], q.device, wanted)) is not None:
            mask = hidden if hidden.shape[0] == 1 else hidden.repeat_interleave(self.branches, dim=0)
        return attend(q, keys, values, mask)

    def resize(self, b: int) -> None:
        """Use the rows of the first `b` sequences of `order`; none is moved or cleared."""
        self.keys = [k[: b * self.passes] for k, _ in self.allocated]
        self.values = [v[: b * self.passes] for _, v in self.allocated]

    def seat(self, sequences: Sequence[int]) -> list[int]:
        """Move `sequences` (numbers in `order`) to the first rows and use those; returns them in row order.

        A sequence from further back swaps its keys and values with one that is not among them. In an empty cache they
        take rows in the given order.
        """
        if not self.order:
            rows = self.allocated[0][0].shape[0] // self.passes if self.allocated else self.sequences
            self.order = list(range(rows or 0)) or list(sequences)
        wanted, b = set(sequences), len(sequences)
        out = [place for place in range(b) if self.order[place] not in wanted]
        back = [place for place in range(b, len(self.order)) if self.order[place] in wanted]
        for i, j in zip(out, back, strict=True):
            self.order[i], self.order[j] = self.order[j], self.order[i]
        if out and self.allocated:
            to, of = (
                [place * self.passes + i for place in places for i in range(self.passes)]
                for places in (out + back, back + out)
            )
            for stored in (tensor for pair in self.allocated for tensor in pair):
                stored[to] = stored[of]
        self.resize(b)
        return self.order[:b]

    def front(self, b: int) -> BlockCache:
        """Another cache in the same memory, of the first `b` sequences."""
        other = BlockCache(self.layout, self.spare, self.passes, self.grid, self.sequences, self.columns)
        other.allocated, other.tickets = self.allocated, self.tickets
        other.resize(b)
        return other


def indices(columns: slice | Tensor, device: torch.device) -> Tensor:
    """`columns` as int64 numbers `[n]`."""
    return torch.arange(columns.start, columns.stop, device=device) if isinstance(columns, slice) else columns


def end_of_block(stop: int, grid: int) -> int:
    """The column behind the block of the `grid` that columns before `stop` end in."""
    return math.ceil(stop / grid) * grid


def one_block(columns: slice | Tensor, grid: int) -> bool:
    """Whether `columns` are known to lie in one block of the `grid`."""
    return isinstance(columns, slice) and columns.start // grid == (columns.stop - 1) // grid


def block_causal_mask(length: int, grid: int, device: torch.device) -> Tensor:
    """Bool `[length, length]`: which columns each column sees where none sees a block behind its own."""
    return no_later_block(slice(0, length), length, grid, device)


def no_later_block(columns: slice | Tensor, length: int, grid: int, device: torch.device) -> Tensor:
    """Bool `[n, length]`: which of `length` columns each of the n `columns` sees where none sees a later block."""
    return torch.arange(length, device=device) // grid <= (indices(columns, device) // grid)[:, None]


def columns_from(start: int | Tensor, n: int) -> slice | Tensor:
    """The columns of `n` fed positions: those from `start` on, or `start` itself."""
    return slice(start, start + n) if isinstance(start, int) else start


def marked(mask: Tensor, columns: slice | Tensor, value: bool = True) -> Tensor:
    """`mask` `[..., L]` with `value` at `columns`, in place.

    Not by `mask[..., columns] = value`: with a tensor of columns PyTorch copies the value to the device and waits for
    it, which a capture refuses.
    """
    if isinstance(columns, slice):
        mask[..., columns] = value
        return mask
    return mask.index_fill_(-1, columns, value)


def seen(
    padding: Tensor | None,
    length: int,
    fed: slice | Tensor,
    n: int,
    branches: int,
    device: torch.device,
    grid: int | None = None,
) -> Tensor | None:
    """The mask for `attend` of queries in the n columns `fed` over `length` columns; None: everything is seen.

    `padding` `[b]` is the number of columns on the left without a token; None: no padding. Several `branches` are in
    tree layout (`tree_mask`). With a `grid` a column sees no later block of it; where `fed` are one block, `length`
    columns end with it.
    """
    real = None if padding is None else visible(padding, length)
    causal = None if grid is None or one_block(fed, grid) else no_later_block(fed, length, grid, device)
    if branches > 1:
        if grid is not None and causal is None:
            causal = no_later_block(fed, length, grid, device)
        return tree_mask(length, fed, n, branches, device, real, causal)
    if real is None or causal is None:
        mask = causal if real is None else real[:, None]
        return None if mask is None else mask.view(-1, 1, *mask.shape[-2:])
    # Padding sees padding: a query that sees nothing has no softmax.
    return (causal & (real[:, None] | ~real[:, fed][:, :, None]))[:, None]


def tree_mask(
    length: int,
    fed: slice | Tensor,
    n: int,
    branches: int,
    device: torch.device,
    real: Tensor | None = None,
    causal: Tensor | None = None,
) -> Tensor:
    """The mask of branches in tree layout: bool `[b, 1, branches * n, length + (branches - 1) * n]`.

    Branch 0 is in the n columns `fed` and sees all `length` columns. Branch j sees its own n columns in place of those
    `fed`. `real` `[b, length]` is True at columns with a token; None: all have one, and b = 1. `causal` `[n, length]`
    says which columns those `fed` see; None: all.
    """
    sees = torch.zeros(branches, length + (branches - 1) * n, dtype=torch.bool, device=device)
    sees[:, :length] = True
    marked(sees[1:], fed, False)
    for branch in range(1, branches):
        first = length + (branch - 1) * n
        sees[branch, first : first + n] = True
    sees = sees.repeat_interleave(n, dim=0)[None]
    if causal is not None:
        sees = sees & torch.cat((causal, causal[:, fed].repeat(1, branches - 1)), dim=1).repeat(branches, 1)
    if real is not None:
        sees = sees & torch.cat((real, real[:, fed].repeat(1, branches - 1)), dim=1)[:, None]
    return sees[:, None]
