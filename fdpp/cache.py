"""Keys and values of a block-wise decode, and how queries meet them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.attention import block_attention

SHORT = 256
"""Queries per head of keys up to which attention waits for memory: they do 256 FLOP a byte of bfloat16 keys, which is
what an H200 has for each byte it reads (990 TFLOP/s at 4.3 TB/s are 230). Derived, not measured."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of `q` `[b, H, n, hd]` over `k`, `v` `[b, kv_heads, S, hd]`; `mask`: what may be seen."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def splits_keys(q: Tensor, k: Tensor) -> bool:
    """Whether queries of padded sequences go to `block_attention`: a short block of half precision on a GPU."""
    queries = q.shape[1] // k.shape[1] * q.shape[2]
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] <= 128 and queries <= SHORT


class BlockCache:
    """Keys (after the rotary embedding) and values `[b, kv_heads, L, head_size]` of every layer, in place.

    One rule serves Fast-dLLM's caches (arXiv 2505.22618, section 3.1): a forward over columns `start..start+n` replaces
    the keys and values there and attends over all L. A full forward feeds `0..L`; the prefix cache then feeds from the
    block's start to the end, so only what lies before the block is reused; the dual cache feeds the block alone.

    A forward may evaluate several branches, alternative contents of the same columns, that share everything else and
    none of which is written over the others:

    - `"batch"`: the branches of sequence i are rows `i * branches ..` of the queries. Their scores against the shared
      keys and against their own are taken apart and normalised together, so no key is copied.
    - `"tree"`: the branches follow each other in one row, `n` columns each; the first stands in the cache's columns
      and the others in spare ones behind it, and a mask keeps them apart (`tree_mask`).

    The first full forward allocates; from then on everything is written in place. A block starts with `hold(b)`, and
    rows that leave it make room in front.

    Attributes:
        keys, values: one tensor per layer, of the sequences held now; with spare columns behind the L of the sequence.
        allocated: the tensors that `keys` and `values` are the front rows of.
        branches: how many branches the next forward holds, 1 unless set.
        layout: "batch" or "tree".
        passes: rows of each sequence, side by side, with keys and values of their own: 2 with guidance.
        padding: `[rows]` int64, the columns of padding on the left of every row; None where nobody said (`pad`).
    """

    def __init__(self, layout: str = "batch", spare: int = 0, passes: int = 1) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.allocated: list[tuple[Tensor, Tensor]] = []
        self.branches, self.layout, self.spare, self.passes = 1, layout, spare, passes
        self.padding: Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] - self.spare

    @property
    def size(self) -> int:
        """How many sequences are held."""
        return self.keys[0].shape[0] // self.passes

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int | Tensor) -> Tensor:
        """Attention of fed positions `q` `[rows, H, m, hd]`, some or all of those with keys and values `k` and `v`.

        `start` is the column of the first, or an int64 tensor of their columns `[n]`.
        """
        if self.branches > 1 and self.layout == "batch":
            return self.attend_shared(layer, q, k, v, mask, start)
        keys, values = self.write(layer, k, v, start)
        if self.padding is not None and self.branches == 1 and splits_keys(q, keys):
            return block_attention(q, keys, values, self.padding.to(q.device))
        return attend(q, keys, values, mask)

    def write(self, layer: int, k: Tensor, v: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` `[b, kv_heads, n * branches, hd]` from column `start` on; returns what may be seen.

        The first forward of a decode sets L, so it must be a full one; every later full forward writes in place.
        """
        if layer == len(self.keys):
            if not isinstance(start, int) or start or self.branches > 1:
                raise ValueError(f"an empty cache needs a full forward first, got columns from {start}")
            b, kv_heads, L, hd = k.shape
            kept_k, kept_v = (new.new_empty(b, kv_heads, L + self.spare, hd) for new in (k, v))
            kept_k[:, :, :L], kept_v[:, :, :L] = k, v
            self.allocated.append((kept_k, kept_v))
            self.keys.append(kept_k)
            self.values.append(kept_v)
            return k, v
        n = k.shape[2] // self.branches
        columns, seen = columns_from(start, n), self.length + (self.branches - 1) * n
        if (isinstance(columns, slice) and columns.stop > self.length) or seen > self.keys[layer].shape[2]:
            raise ValueError(
                f"the cache holds {self.length} columns and {self.spare} spare ones, "
                f"got columns {start} to {start + n} in {self.branches} branches"
            )
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            stored[:, :, columns] = new[:, :, :n]
            if self.branches > 1:
                stored[:, :, self.length : seen] = new[:, :, n:]
        return self.keys[layer][:, :, :seen], self.values[layer][:, :, :seen]

    def attend_shared(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int | Tensor
    ) -> Tensor:
        """Attention of branches in batch layout: `q`, `k`, `v` have `b * branches` rows, the cache b."""
        keys, values = self.keys[layer], self.values[layer]
        b, kv_heads, L, hd = keys.shape
        rows, heads, wanted, _ = q.shape
        n, queries = k.shape[2], heads // kv_heads * wanted
        grouped = (q * hd**-0.5).reshape(b, self.branches, kv_heads, queries, hd).transpose(1, 2)
        own_k = k.view(b, self.branches, kv_heads, n, hd).transpose(1, 2)
        own_v = v.view(b, self.branches, kv_heads, n, hd).transpose(1, 2)

        shared = (grouped.flatten(2, 3) @ keys.transpose(2, 3)).view(b, kv_heads, self.branches, queries, L)
        hidden = marked(torch.zeros(1, 1, 1, 1, L, dtype=torch.bool, device=q.device), columns_from(start, n))
        if mask is not None:
            hidden = hidden | ~mask.view(b, self.branches, 1, 1, L).transpose(1, 2)
        scores = torch.cat((shared.masked_fill(hidden, -torch.inf), grouped @ own_k.transpose(3, 4)), dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        out = (weights[..., :L].flatten(2, 3) @ values).view(b, kv_heads, self.branches, queries, hd)
        out = out + weights[..., L:] @ own_v
        return out.transpose(1, 2).reshape(rows, heads, wanted, hd)

    def pad(self, mask: Tensor | None) -> None:
        """The masks of the next forward are this one, `[b, L]` bool, False at padding, which is on the left alone."""
        self.padding = None if mask is None else (~mask).sum(1).repeat_interleave(self.passes)

    def hold(self, b: int) -> None:
        """Hold `b` sequences, at most as many as the first forward had; their contents are what stands in front."""
        self.keys = [k[: b * self.passes] for k, _ in self.allocated]
        self.values = [v[: b * self.passes] for _, v in self.allocated]

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences `rows` (int64 indices `[b]`), which move to the front."""
        places = rows
        if self.passes > 1:
            places = (rows[:, None] * self.passes + torch.arange(self.passes, device=rows.device)).flatten()
        for stored in (*self.keys, *self.values):
            stored[: places.shape[0]] = stored.index_select(0, places.to(stored.device))
        self.hold(rows.shape[0])

    def front(self, b: int) -> BlockCache:
        """Another cache that holds `b` sequences in the same memory."""
        other = BlockCache(self.layout, self.spare, self.passes)
        other.allocated = self.allocated
        other.hold(b)
        return other


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


def tree_mask(length: int, fed: slice | Tensor, n: int, branches: int, device: torch.device) -> Tensor:
    """What branches in tree layout may see: bool `[branches * n, length + (branches - 1) * n]`, n the columns of `fed`.

    Branch 0 stands in the columns `fed` and sees all `length` columns; branch j sees its own n columns instead of them.
    """
    sees = torch.zeros(branches, length + (branches - 1) * n, dtype=torch.bool, device=device)
    sees[:, :length] = True
    marked(sees[1:], fed, False)
    for branch in range(1, branches):
        first = length + (branch - 1) * n
        sees[branch, first : first + n] = True
    return sees.repeat_interleave(n, dim=0)
