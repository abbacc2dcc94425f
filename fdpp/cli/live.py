"""A live view of a decode in a terminal: the block's masks fill in as positions are committed."""

from __future__ import annotations

import re
import shutil
import sys
import time
from typing import Any, TextIO

from torch import Tensor
from transformers.generation.streamers import BaseStreamer, TextStreamer

from fdpp.cli.terminal import fit, paint, word_wrap

NEW, MASK, LOST, STATUS = "1;32", "2", "1;35", "2"
"""Terminal attributes: bold green for what the last forward committed or edited, dim for masks and the counter, bold
magenta for masks whose tokens it took back."""


def wrap(pieces: list[tuple[str, str]], width: int) -> list[str]:
    """Lines of at most `width` characters from `(text, style)` pieces; lines break between pieces and at newlines."""
    lines, column = [""], 0
    for text, style in pieces:
        for index, part in enumerate(text.split("\n")):
            if index or (column and column + len(part) > width):
                lines.append("")
                column, part = 0, part if index else part.lstrip()
            part = "".join(char if char.isprintable() else " " for char in part)
            lines[-1] += paint(part, style)
            column += len(part)
    return lines


class PlainView(TextStreamer):
    """Streamer for `generate` with one sequence: prints the response on `out`, block by block."""

    def __init__(self, tokenizer: Any, out: TextIO, skip_prompt: bool = True) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.out, self.wrap = out, word_wrap(out)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(self.wrap(text), file=self.out, flush=True, end="\n" if stream_end else "")


class LiveView(BaseStreamer):
    """Streamer for `generate` with one sequence: redraws the response after every forward and erases it at the end.

    A context manager, which restores the cursor at exit.

    Args:
        tokenizer: decodes the response.
        mask_id: the id that is drawn as a dot.
        out: the terminal; None: standard output.
        pause: seconds to wait after every drawing.
        row: tokens of a row, where the text is a grid of words; the last of them, the sign that ends it, is drawn as
            the line's end. None: lines are wrapped.
    """

    def __init__(
        self, tokenizer: Any, mask_id: int, out: TextIO | None = None, pause: float = 0.0, row: int | None = None
    ) -> None:
        self.tokenizer, self.mask_id, self.pause, self.row = tokenizer, mask_id, pause, row
        self.out = sys.stdout if out is None else out
        self.hidden = set(tokenizer.all_special_ids) | {mask_id}
        self.hidden |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.dot = fit(self.out, " ·", " _")
        self.prompt_seen = False
        self.done: list[int] = []
        self.block: list[int] = []
        self.forwards = self.taken = self.height = 0

    def __enter__(self) -> LiveView:
        # Without automatic margins a line of wide characters is cut, not wrapped, so the height stays known.
        self.out.write("\x1b[?25l\x1b[?7l")
        return self

    def __exit__(self, *exception: object) -> None:
        self.out.write("\x1b[?25h\x1b[?7h")
        self.out.flush()

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.done += value[0].tolist()
            self.block = []
        self.prompt_seen = True

    def put_draft(self, value: Tensor) -> None:
        before = self.block or [self.mask_id] * value.shape[1]
        self.block = value[0].tolist()
        self.forwards += 1
        self.taken += sum(old != self.mask_id == token for old, token in zip(before, self.block, strict=True))
        self.draw(before)
        time.sleep(self.pause)

    def end(self) -> None:
        self.out.write(f"\x1b[{self.height}F\x1b[J" if self.height else "")
        self.height = 0

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def pieces(self, before: list[int]) -> list[tuple[str, str]]:
        """Text and style of every visible token; those that `before` does not have are new."""
        visible = [token for token in self.done if token not in self.hidden]
        text = self.decode(visible)
        pieces = [(word, "") for word in re.split("(?= )", text) if word]
        ids = visible
        for old, token in zip(before, self.block, strict=True):
            ids = [*ids, token]
            longer = self.decode(ids)
            if token == self.mask_id:
                pieces.append((self.dot, MASK if old == self.mask_id else LOST))
            elif token not in self.hidden:
                pieces.append((longer[len(text) :], "" if old == token else NEW))
            text = longer
        row = self.row or len(pieces) + 1
        pieces[row - 1 :: row] = [("\n", "")] * len(pieces[row - 1 :: row])
        return [(piece if index % row else piece.lstrip(" "), style) for index, (piece, style) in enumerate(pieces)]

    def draw(self, before: list[int]) -> None:
        width, rows = shutil.get_terminal_size()
        tokens = sum(token not in self.hidden for token in self.done + self.block)
        status = f"forward {self.forwards}, {tokens} tokens, {tokens / self.forwards:.2f} tokens per forward"
        status += f", {self.taken} taken back" if self.taken else ""
        lines = wrap(self.pieces(before), width - 1)[-max(rows - 3, 1) :]
        lines += ["", paint(status[: width - 1], STATUS)]
        up = f"\x1b[{self.height}F" if self.height else ""
        self.out.write(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self.out.flush()
        self.height = len(lines)
