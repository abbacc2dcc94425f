"""The README's picture: one held-out problem decoded by the embedded model with two rules (`make picture`)."""

from __future__ import annotations

import html
from pathlib import Path
from textwrap import wrap

import fdpp
from fdpp import tiny

WIDTH, LEFT, LINE, TOP = 960, 24, 26, 64
GLYPH = 7.25
"""Width of one 12 px monospace character, with some room."""


def shade(forward: int, forwards: int) -> tuple[str, str]:
    """Background and text colour of a word committed by the given forward: light first, dark last."""
    share = forward / max(forwards - 1, 1)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip((222, 235, 247), (8, 64, 129), strict=True))
    return f"rgb({red},{green},{blue})", "#fff" if share > 0.5 else "#123"


def panel(title: str, words: list[str], forward_of: list[int], forwards: int, top: int) -> tuple[list[str], int]:
    """SVG elements of one decode and the height below them."""
    parts = [f'<text x="{LEFT}" y="{top - 10}" class="title" fill="#123">{html.escape(title)}</text>']
    x, y = float(LEFT), top
    for word, forward in zip(words, forward_of, strict=True):
        width = GLYPH * len(word) + 8
        if x + width > WIDTH - LEFT:
            x, y = float(LEFT), y + LINE
        fill, ink = shade(forward, forwards)
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" rx="3" fill="{fill}"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{y + 14}" fill="{ink}">{html.escape(word)}</text>')
        x += width + 3
    return parts, y + 2 * LINE + 24


def main() -> None:
    model, tokenizer = tiny.load()
    problem = tiny.generate("held-out", 1, seed=1, steps=5)[0]
    prompt = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
    parts, top = [], TOP
    for number, line in enumerate(wrap(problem.prompt, int((WIDTH - 2 * LEFT) / GLYPH))):
        parts.append(f'<text x="{LEFT}" y="{24 + 18 * number}" fill="#123">{html.escape(line)}</text>')
        top = TOP + 18 * number
    for name, rule in (("one position per forward", fdpp.Quota(1)), ("Fréchet, margin 0.25", fdpp.Frechet(0.25))):
        out = model.generate(prompt, rule=rule, max_new_tokens=128)
        response = out.sequences[0, prompt.shape[1] :]
        nfe = int(out.nfe)
        written = round(float(out.tokens_per_forward) * nfe)
        words = tokenizer.convert_ids_to_tokens(response[:written].tolist())
        title = f"{name}: {nfe} forwards, {written / nfe:.1f} tokens per forward"
        panel_parts, top = panel(title, words, out.commit_step[0, :written].tolist(), nfe, top)
        parts += panel_parts
    style = "text{font:12px ui-monospace,Menlo,Consolas,monospace}.title{font-weight:bold;font-size:13px}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - 2 * LINE}" width="{WIDTH}">'
    body = "\n".join(parts)
    path = Path(__file__).parent / "results" / "picture.svg"
    path.write_text(
        f'{svg}\n<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n',
        encoding="utf-8",
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
