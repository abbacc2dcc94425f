"""How far an evaluation is, on standard error: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from tqdm import tqdm

FIRST, LONGEST = 10.0, 600.0
"""Seconds to the first line, and at most between two. Each comes after a quarter more of the time than the last."""


class Progress:
    """Counts to `total`, from the `done` that were there before; shows nothing where `shown` is False."""

    def __init__(self, what: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.done, self.shown = what, total, done, shown
        self.bar = None
        self.figures = ""
        self.started = time.monotonic()
        self.due, self.told = FIRST, done

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=self.done, desc=self.what, unit="")
        elif self.shown and self.done:
            self.print(f"{self.done} of {self.total} are in the journal")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.told < self.done:
            self.tell()

    def update(self, more: int = 1, figures: str = "") -> None:
        """`more` are done; `figures` is shown beside their number."""
        self.done, self.figures = self.done + more, figures
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(more)
        elif time.monotonic() - self.started >= self.due:
            self.tell()

    def tell(self) -> None:
        seconds = time.monotonic() - self.started
        self.told = self.done
        self.due = seconds + min(max(FIRST, seconds / 4), LONGEST)
        elapsed = f"{self.done} of {self.total}, {timedelta(seconds=int(seconds))} elapsed"
        self.print(f"{elapsed}, {self.figures}" if self.figures else elapsed)

    def print(self, text: str) -> None:
        if self.shown:
            print(f"{self.what}: {text}", file=sys.stderr, flush=True)
