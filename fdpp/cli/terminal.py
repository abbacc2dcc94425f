"""Text in a terminal: what it can show, its attributes, its width."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from typing import TextIO


def is_live(out: TextIO) -> bool:
    """Whether `out` is a terminal that can move its cursor."""
    return out.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def fit(out: TextIO, text: str, ascii_text: str) -> str:
    """`text` where the encoding of `out` holds it, else `ascii_text`."""
    try:
        text.encode(getattr(out, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return ascii_text
    return text


def paint(text: str, style: str) -> str:
    """`text` in terminal attributes; without the colours where NO_COLOR is set (https://no-color.org)."""
    if os.environ.get("NO_COLOR"):
        style = style.split(";")[0]
    return f"\x1b[{style}m{text}\x1b[0m" if style and text else text


class WordWrap:
    """Breaks the lines of a text, which may come in parts, between its words, to at most `width` characters.

    A word that is longer stays whole. So do the lines of fenced code, which a reader may want to copy.
    """

    def __init__(self, width: int) -> None:
        self.width, self.column, self.code = width, 0, False

    def __call__(self, text: str) -> str:
        parts = []
        for part in re.findall(r"\n|[^\S\n]*\S+|[^\S\n]+", text):
            if part == "\n":
                self.column = 0
            else:
                if self.column == 0 and part.lstrip().startswith("```"):
                    self.code = not self.code
                if not self.code and self.column and not part.isspace() and self.column + len(part) > self.width:
                    part, self.column = part.lstrip(), 0
                    parts.append("\n")
                self.column += len(part)
            parts.append(part)
        return "".join(parts)


def word_wrap(out: TextIO) -> Callable[[str], str]:
    """What a text on `out` passes through: wrapped by words in a terminal, and as it is elsewhere."""
    return WordWrap(shutil.get_terminal_size().columns - 1) if out.isatty() else str
