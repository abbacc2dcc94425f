"""The README's picture: one held-out problem decoded by the embedded model with two rules (`make picture`)."""

from __future__ import annotations

import html
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import fdpp
from fdpp import tiny

WIDTH, LEFT, LINE, TOP = 830, 20, 26, 72
"""The width is that of a README on GitHub, so that a pixel stays one."""
GLYPH = 7.85
"""Width of one 13 px monospace character, with some room."""
SWATCHES, SWATCH = 8, 16
"""Most shades of a legend, and the width of one."""

PAPER, INK = {"light": "#ffffff", "dark": "#0d1117"}, {"light": "#112233", "dark": "#e6edf3"}
"""Background and text by the reader's colour scheme. Words have their own background, the same in both."""

PICTURE = Path(__file__).parent / "results" / "picture.svg"


class Decode(NamedTuple):
    """Attributes:
    name: of the rule.
    words: of the response, up to its end.
    forward_of: for every word the forward that committed it, from 0.
    forwards: how many there were.
    """

    name: str
    words: list[str]
    forward_of: list[int]
    forwards: int


def shade(forward: int, forwards: int) -> tuple[str, str]:
    """Background and text colour of a word committed by the given forward: light first, dark last."""
    share = forward / max(forwards - 1, 1)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip((198, 219, 239), (8, 64, 129), strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if share > 0.635 else "#000000"


def text(x: float, y: float, content: str, style: str = "", fill: str = "", anchor: str = "start") -> str:
    colour = f'fill="{fill}"' if fill else f'class="{f"ink {style}".strip()}"'
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" {colour}>{html.escape(content)}</text>'


def box(x: float, y: float, width: float, height: int, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="3" fill="{fill}"/>'


def legend(forwards: int, y: int) -> list[str]:
    """The shades from the first forward to the last, at the right edge of a panel's title."""
    count = min(forwards, SWATCHES)
    last = WIDTH - LEFT - GLYPH * len(str(forwards)) - 6
    first = last - SWATCH * count
    shown = [round(i * (forwards - 1) / max(count - 1, 1)) for i in range(count)]
    parts = [box(first + SWATCH * i, y - 12, SWATCH - 2, 14, shade(f, forwards)[0]) for i, f in enumerate(shown)]
    return [
        text(first - 6, y, "forward 1", anchor="end"),
        *parts,
        text(WIDTH - LEFT, y, str(forwards), anchor="end"),
    ]


def panel(decode: Decode, top: int) -> tuple[list[str], int]:
    """SVG elements of one decode and the height below them."""
    per_forward = len(decode.words) / decode.forwards
    title = f"{decode.name}: {decode.forwards} forwards, {per_forward:.1f} tokens per forward"
    parts = [text(LEFT, top - 10, title, style="title"), *legend(decode.forwards, top - 10)]
    x, y = float(LEFT), top
    for word, forward in zip(decode.words, decode.forward_of, strict=True):
        width = GLYPH * len(word) + 8
        if x + width > WIDTH - LEFT:
            x, y = float(LEFT), y + LINE
        fill, ink = shade(forward, decode.forwards)
        parts.append(box(x, y, width, 20, fill))
        parts.append(text(x + 4, y + 14, word, fill=ink))
        x += width + 3
    return parts, y + 2 * LINE + 28


def draw(prompt: str, decodes: list[Decode]) -> str:
    """The picture as SVG text."""
    parts, top = [], TOP
    for number, line in enumerate(wrap(prompt, int((WIDTH - 2 * LEFT) / GLYPH))):
        parts.append(text(LEFT, 26 + 18 * number, line))
        top = TOP + 18 * number
    for decode in decodes:
        panel_parts, top = panel(decode, top)
        parts += panel_parts
    light, dark = (f".paper{{fill:{PAPER[scheme]}}}.ink{{fill:{INK[scheme]}}}" for scheme in ("light", "dark"))
    style = "text{font:13px ui-monospace,Menlo,Consolas,monospace}.title{font-weight:bold}"
    height = top - 2 * LINE + 12
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">',
            f"<style>{style}{light}@media (prefers-color-scheme:dark){{{dark}}}</style>",
            '<rect class="paper" width="100%" height="100%"/>',
            *parts,
            "</svg>\n",
        ]
    )


def decodes_of(problem: tiny.Problem) -> list[Decode]:
    """One decode with every rule of the picture."""
    model, tokenizer = tiny.load()
    prompt = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
    found = []
    for name, rule in (("one position per forward", fdpp.Quota(1)), ("Fréchet, margin 0.25", fdpp.Frechet(0.25))):
        out = model.generate(prompt, rule=rule, max_new_tokens=128)
        nfe = int(out.nfe)
        written = round(float(out.tokens_per_forward) * nfe)
        words = tokenizer.convert_ids_to_tokens(out.sequences[0, prompt.shape[1] :][:written].tolist())
        found.append(Decode(name, words, out.commit_step[0, :written].tolist(), nfe))
    return found


def main() -> None:
    problem = tiny.generate("held-out", 1, seed=1, steps=5)[0]
    PICTURE.write_text(draw(problem.prompt, decodes_of(problem)), encoding="utf-8")
    print(f"written to {PICTURE}")


if __name__ == "__main__":
    main()
