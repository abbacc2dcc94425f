"""Queries and keys of a forward, kept for a rule that reads attention."""

from __future__ import annotations

from torch import Tensor

from fdpp.attention.cache import BlockCache
from fdpp.attention.cache import attend as attend_uncached
from fdpp.attention.rotary import Place


class Probe(BlockCache):
    """Stands in for the `cache` of one forward: attends as it does, and keeps queries and keys for the rule.

    A model hands every layer's queries and keys to its cache anyway, so probing costs other rules nothing.

    Attributes:
        queries, own: per probed layer the fed positions' queries `[rows, H, n, hd]` and keys `[rows, kv_heads, n, hd]`,
            a row per sequence and branch, in either layout of the branches.
        shared: per probed layer the keys of all columns that are seen, `[b, kv_heads, L, hd]`; empty after a full
            forward.
        start: the column of the first of the queries.
    """

    def __init__(
        self,
        layers: range,
        cache: BlockCache | None = None,
        branches: int = 1,
        layout: str = "batch",
        start: int = 0,
        skipped: int = 0,
    ) -> None:
        """Of positions from column `start` on, of which the first `skipped` see less than the others: left out."""
        super().__init__(layout)
        self.layers, self.cache, self.branches = layers, cache, branches
        self.start, self.skipped = start + skipped, skipped
        self.queries: list[Tensor] = []
        self.own: list[Tensor] = []
        self.shared: list[Tensor] = []

    def place(self, layer: int, start: int | Tensor, k: Tensor) -> Place | None:
        return None if self.cache is None else self.cache.place(layer, start, k)

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
        if self.cache is None:
            out = attend_uncached(q, k, v, mask)
        else:
            out = self.cache.attend(layer, q, k, v, mask, start, stored, wanted)
        if layer in self.layers:
            if self.layout == "tree" and self.branches > 1:
                q, k = (x.unflatten(2, (self.branches, -1)).transpose(1, 2).flatten(0, 1) for x in (q, k))
            self.queries.append(q[:, :, self.skipped :])
            self.own.append(k[:, :, self.skipped :])
            if self.cache is not None and self.own[-1].shape[2] < self.cache.length:
                self.shared.append(self.cache.keys[layer][:, :, : self.cache.behind(k.shape[2], start)])
            elif self.skipped:  # in every branch alike, since they see nothing of the block
                self.shared.append(k[:: self.branches])
        return out
