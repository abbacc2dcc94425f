"""Partial refreshes: what a block's first forward feeds, where that need not be everything.

Columns that it does not feed keep the keys and values of the forward that fed them last. Those of the block before are
stale then: in that block's last forward the positions committed last were still masks.

The two-block refresh (`Recent`) is ours. `BLOCK` is what remains of Fast-dLLM's dual cache (arXiv 2505.22618, section
3.1) without any refresh.
"""

from __future__ import annotations

from dataclasses import dataclass

from fdpp.selection import is_int

FORMS = "all, recent, recent:EVERY, block or window:BEFORE:AFTER"


@dataclass(frozen=True)
class Refresh:
    """What the first forward of every block but the first feeds. The first block begins with everything.

    `str()` and `of` are the form in files and commands: "all", "recent", "recent:4", "block", "window:32:end".
    """

    def span(self, number: int, block: slice, before: slice) -> tuple[int | None, int | None]:
        """The first column to feed, and that behind the last; None: the prompt's start, the sequence's end.

        Args:
            number: of the block, from 1 on.
            block: its columns.
            before: those of the block that the sequence decoded before. Where an infill left out blocks without masks,
                they are not next to `block`.
        """
        raise NotImplementedError

    def covers(self, block_length: int) -> bool:
        """Whether the block decoded before is always fed, so that nothing stays stale."""
        raise NotImplementedError

    def first(self, number: int, block: slice, before: slice, everything: slice, others: slice) -> slice:
        """The columns that the first forward feeds: of `everything`, and at least those that the `others` feed.

        Where these begin before the block, the forwards of the block before did so too: what they wrote there is stale
        as well.
        """
        start, stop = self.span(number, block, before)
        lead = block.start - others.start
        start = everything.start if start is None else max(start - lead, everything.start)
        stop = everything.stop if stop is None else min(stop, everything.stop)
        return slice(min(start, others.start), max(stop, others.stop))

    @staticmethod
    def of(given: object) -> Refresh:
        """A refresh as people give it: itself, or its text. `ValueError` on anything else."""
        if isinstance(given, Refresh):
            return given
        error = ValueError(f"refresh: expected {FORMS}, or a Recent or a Window, got {given!r}")
        if not isinstance(given, str):
            raise error
        if given in NAMED:
            return NAMED[given]
        name, *numbers = given.split(":")
        try:
            if name == "recent" and len(numbers) == 1:
                return Recent(int(numbers[0]))
            if name == "window" and len(numbers) == 2:
                before, after = numbers
                return Window(None if before == "start" else int(before), None if after == "end" else int(after))
        except ValueError:
            raise error from None
        raise error


@dataclass(frozen=True)
class Recent(Refresh):
    """Feeds the block decoded before and the block itself: two blocks wide, a shape that one capture serves.

    With a dual cache the columns behind the block then stay as they were fed when all of the response was masks. Over
    many blocks that costs answers, which `every`, or a `Window` to the end, brings back (docs/design.md, measured).

    Args:
        every: each so many blocks one begins with everything: of `Recent(4)` blocks 0, 4, 8, ...; None: block 0 alone.
    """

    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and not (is_int(self.every) and self.every >= 1):
            raise ValueError(f"Recent: expected every as an int of at least 1 or None, got {self.every!r}")

    def __str__(self) -> str:
        return "recent" if self.every is None else f"recent:{self.every}"

    def span(self, number: int, block: slice, before: slice) -> tuple[int | None, int | None]:
        full = self.every is not None and number % self.every == 0
        return (None, None) if full else (before.start, block.stop)

    def covers(self, block_length: int) -> bool:
        return True


@dataclass(frozen=True)
class Window(Refresh):
    """Feeds the block, and columns beside it.

    Args:
        before: how many before the block; None: to the prompt's start. As many as a block has, or more, also reach back
            over blocks that an infill left out.
        after: how many behind the block; None: to the end. A prefix cache feeds all of them anyway.
    """

    before: int | None = None
    after: int | None = None

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            value = getattr(self, name)
            if value is not None and not (is_int(value) and value >= 0):
                raise ValueError(f"Window: expected {name} as an int of at least 0 or None, got {value!r}")

    def __str__(self) -> str:
        named = {each: name for name, each in NAMED.items()}
        before = "start" if self.before is None else self.before
        after = "end" if self.after is None else self.after
        return named.get(self, f"window:{before}:{after}")

    def span(self, number: int, block: slice, before: slice) -> tuple[int | None, int | None]:
        stop = None if self.after is None else block.stop + self.after
        if self.before is None:
            return None, stop
        start = block.start - self.before
        return min(start, before.start) if self.covers(before.stop - before.start) else start, stop

    def covers(self, block_length: int) -> bool:
        return self.before is None or self.before >= block_length


ALL, BLOCK = Window(None, None), Window(0, 0)
NAMED: dict[str, Refresh] = {"all": ALL, "recent": Recent(), "block": BLOCK}
