"""Rows beside a sequence: mask tokens that see it, and that it does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.attention.cache import (
    BlockCache,
    attend,
    columns_from,
    goes_to_kernel,
    indices,
    splits_keys,
)
from fdpp.attention.rotary import Place
from fdpp.attention.split_keys import block_attention, visible, with_own


class Beside(BlockCache):
    """Stands in for the `cache` of one forward that feeds n columns of every sequence and, behind them, E rows.

    The columns attend as they would without rows. A row sees what the block sees, but for its hole, and all rows: with
    a cache, what is stored, and what is fed in its place. The rows' own keys and values stand behind all columns that
    are seen, where the next forward finds nothing of them.

    The cache has E spare columns, knows how many `columns` it is for, and has its branches in batch layout.
    """

    def __init__(
        self,
        holes: Tensor,
        cache: BlockCache | None,
        first: int = 0,
        mask: Tensor | None = None,
        left: Tensor | None = None,
    ) -> None:
        """
        Args:
            holes: int64 `[E]`, the column that each row does not see, -1: none.
            cache: None: everything is fed, and nothing is stored.
            first, mask, left: without a cache the first column that is fed, the mask `[b, 1, 1 or n, n]` of the columns
                (None: they see each other), and how many columns from the first hold no token, int64 `[b]` (None: 0).
        """
        super().__init__()
        self.cache, self.fed_mask, self.fed_left = cache, mask, left
        self.cut = first
        if cache is not None:
            self.cut = cache.padding if isinstance(cache.padding, int) else 0
        self.holes = torch.where(holes < 0, holes, holes - self.cut)

    def place(self, layer: int, start: int | Tensor, k: Tensor) -> Place | None:
        return None if self.cache is None else self.cache.place(layer, self.columns_of(self.cache, start, k), k)

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
        """Attention of queries `q` `[b, H, n + E, hd]`, those of the rows last; there is no `mask` and no `wanted`."""
        E, cache = self.holes.shape[0], self.cache
        n, mask, left, row_stop = q.shape[2] - E, self.fed_mask, self.fed_left, None
        if cache is not None:
            k, v = self.kept(cache, layer, k, v, start, stored)
            left, row_stop = repeated(cache.left(q.device), cache.branches, q), self.row_stop(cache, start)
            if splits_keys(q, k) or (cache.grid is not None and goes_to_kernel(q)):
                stops, holes = self.for_all(cache, start, n, k.shape[2], row_stop)
                return block_attention(q, k, v, left, stops=stops, holes=holes, tickets=cache.tickets)
            mask = repeated(cache.mask(start, n, q.device), cache.branches, q)
        S = k.shape[2] - E
        out = attend(q[:, :, :n], k[:, :, :S], v[:, :, :S], mask), self.attend_rows(q[:, :, n:], k, v, left, row_stop)
        # A GPU's attention has positions before heads in memory, and so has what comes next.
        return torch.cat([each.transpose(1, 2) for each in out], dim=1).transpose(1, 2)

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, left: Tensor | None, stop: Tensor | None) -> Tensor:
        """Attention of the rows' queries `q` `[b, H, E, hd]` over all keys before `stop` but holes and padding."""
        if goes_to_kernel(q):
            stops = None if stop is None else stop.expand(q.shape[2])
            tickets = None if self.cache is None else self.cache.tickets
            return block_attention(q, k, v, left, stops=stops, holes=self.holes, tickets=tickets)
        S = k.shape[2]
        columns = torch.arange(S, device=q.device)
        sees = columns != self.holes[:, None]
        if stop is not None:
            sees = sees & (columns < stop)
        return attend(q, k, v, None if left is None else visible(left, S)[:, None, None], sees)

    def kept(
        self, cache: BlockCache, layer: int, k: Tensor, v: Tensor, start: int | Tensor, stored: bool
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that are seen, those of the rows last unless `row_stop` says where; `k`, `v` as fed."""
        columns = self.columns_of(cache, start, k)
        seen = slice(self.cut, cache.behind(k.shape[2] - self.holes.shape[0], start) + self.holes.shape[0])
        if cache.branches > 1:
            whole = (with_own(held[layer], columns, new) for held, new in ((cache.keys, k), (cache.values, v)))
        else:
            if not stored:
                cache.write(layer, k, v, columns)
            whole = (held[layer] for held in (cache.keys, cache.values))
        keys, values = (held[:, :, seen] for held in whole)
        return keys, values

    def columns_of(self, cache: BlockCache, start: int | Tensor, k: Tensor) -> Tensor:
        """Where the cache stores what is fed, `k` `[b, kv_heads, n + E, hd]`: int64 `[n + E]`."""
        if ("columns",) not in self.made:
            E = self.holes.shape[0]
            fed = indices(columns_from(start, k.shape[2] - E), k.device)
            behind: int | Tensor = cache.behind(fed.shape[0], start)
            if (stop := self.block_stop(cache, start)) is not None:
                behind = stop
            self.made["columns",] = torch.cat((fed, torch.arange(E, device=k.device) + behind))
        return self.made["columns",]

    def block_stop(self, cache: BlockCache, start: int | Tensor) -> Tensor | None:
        """The column behind the block of the grid that is fed, `[1]`; None where it is the last that is kept."""
        if cache.grid is None or not isinstance(start, Tensor):
            return None
        return (start[-1:] // cache.grid + 1) * cache.grid

    def row_stop(self, cache: BlockCache, start: int | Tensor) -> Tensor | None:
        """The key behind those that a row may see, `[1]`; None: there is none behind."""
        stop = self.block_stop(cache, start)
        return None if stop is None else stop + self.holes.shape[0] - self.cut

    def for_all(
        self, cache: BlockCache, start: int | Tensor, n: int, S: int, row_stop: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """For all queries together, of S keys: the key behind those that each sees, and its hole, int64 `[n + E]`."""
        if ("all",) not in self.made:
            E, device = self.holes.shape[0], self.holes.device
            stops = cache.stops(start, n, device, None)
            stops = torch.full((n,), S - E, dtype=torch.int64, device=device) if stops is None else stops
            last = torch.full((E,), S, dtype=torch.int64, device=device) if row_stop is None else row_stop.expand(E)
            none = torch.full((n,), -1, dtype=torch.int64, device=device)
            self.made["all",] = torch.cat((stops, last)), torch.cat((none, self.holes))
        return self.made["all",]


def repeated(rows: Tensor | None, branches: int, q: Tensor) -> Tensor | None:
    """`rows` of sequences for their branches, the rows of `q`; a single one of several sequences is for all."""
    if rows is None or branches == 1 or rows.shape[0] * branches != q.shape[0]:
        return rows
    return rows.repeat_interleave(branches, dim=0)
