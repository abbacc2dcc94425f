"""Who runs a block's forwards: every operation as it comes, or a step captured once and replayed."""

from __future__ import annotations

from torch import Tensor

from fdpp.cache import BlockCache
from fdpp.decoding.advance import Advance
from fdpp.decoding.state import BlockState, Outcome, Window


class EagerRunner:
    """Runs every operation as it comes: the readable reference, and the way on a CPU."""

    def __init__(self, advance: Advance, state: BlockState, schedule: Tensor, cache: BlockCache | None) -> None:
        self.advance, self.state, self.schedule, self.cache = advance, state, schedule, cache

    @property
    def size(self) -> int:
        """How many sequences take part."""
        return self.state.row.shape[0]

    def step(self, window: Window, drafts: int) -> tuple[Outcome, list[int]]:
        """A forward of all sequences: what came of it, and its summary on the host."""
        self.state, outcome = self.advance(self.state, window, self.schedule, self.cache, drafts)
        # The forward's only synchronisation: all that the host must know, in one transfer.
        return outcome, outcome.summary.tolist()

    def keep(self, sequences: Tensor) -> None:
        """Go on with `sequences` `[c]`, in the order of the cache's rows."""
        self.state = self.state.take(self.state.places(sequences))
