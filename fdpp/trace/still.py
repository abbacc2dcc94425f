"""A recorded decode as a still picture. Needs matplotlib, the extra `png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTH = 10.0
LINE, GLYPH, FONT = 0.3, 0.094, 9.0
"""Inches of a line of text and of a monospace character, and its points."""

INK, SOFT, QUIET = "#1c1f24", "#5c636e", "#c3c8d0"
OWN, OTHERS = "#1f5fbf", ("#b4500c", "#0b7a56", "#5c636e")
LOST = "#a3165a"


def words(data: dict[str, Any]) -> list[tuple[str, int]]:
    """The response up to its end, one printable word and commit step per position."""
    stop = data["length"] if data["end"] is None else data["end"]
    found = []
    for piece, step in zip(data["response"][:stop], data["commit"], strict=False):
        text = data["pieces"][piece][1].strip() or "␣"
        found.append(("".join(char if char.isprintable() else "␣" for char in text), step))
    return found


def place(texts: list[str], width: float) -> list[tuple[float, int]]:
    """Left edge in inches and line of every word, in lines of `width` inches."""
    places, x, row = [], 0.0, 0
    for text in texts:
        length = GLYPH * len(text) + 0.09
        if x and x + length > width:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += length + 0.05
    return places


def draw(data: dict[str, Any], path: Path, step: int) -> None:
    """Write `data` (`fdpp.trace.page.data_of`) to a PNG.

    It shows the response shaded by commit step, every step's commits, and the profile and bound of `step`, from 0.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    response, steps = words(data), data["steps"]
    places = place([text for text, _ in response], WIDTH - 0.6)
    rows = places[-1][1] + 1 if places else 1
    height = 4.4 + LINE * rows
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    top = height - 0.5
    figure.text(0.03, 1 - 0.3 / height, title(data), fontsize=11, weight="bold", color=INK)

    text_axes = figure.add_axes((0.3 / WIDTH, (top - LINE * rows) / height, 1 - 0.6 / WIDTH, LINE * rows / height))
    text_axes.set(xlim=(0, WIDTH - 0.6), ylim=(-LINE * rows, 0))
    text_axes.axis("off")
    for (text, committed), (x, row) in zip(response, places, strict=True):
        back, ink = shade(committed, len(steps))
        y, length = -LINE * row - LINE + 0.04, GLYPH * len(text) + 0.09
        style = "round,pad=0,rounding_size=0.04"
        text_axes.add_patch(FancyBboxPatch((x, y), length, LINE - 0.07, boxstyle=style, facecolor=back, linewidth=0))
        text_axes.text(
            x + length / 2, y + LINE / 2 - 0.045, text, fontsize=FONT, color=ink, family="monospace", ha="center",
            va="center", parse_math=False,
        )  # fmt: skip

    figure.text(0.03, 3.4 / height, "Committed by each step", fontsize=10, color=INK)
    all_axes = figure.add_axes((0.06, 0.55 / height, 0.4, 2.55 / height))
    draw_all(all_axes, data, step)
    back = len(data["steps"][step].get("taken", ()))
    profile = f"Profile of step {step + 1}" + (f", taken back: {back}" if back else "")
    figure.text(0.53, 3.4 / height, profile, fontsize=10, color=INK)
    profile_axes = figure.add_axes((0.57, 1.95 / height, 0.4, 1.15 / height))
    bound_axes = figure.add_axes((0.57, 0.55 / height, 0.4, 1.15 / height), sharex=profile_axes)
    draw_profile(profile_axes, bound_axes, data, step)
    for axes in (all_axes, profile_axes, bound_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(labelsize=8, colors=SOFT, length=2)
    figure.savefig(path, format="png")


def title(data: dict[str, Any]) -> str:
    tokens, nfe = data["tokens"], data["nfe"]
    name = f"{data['rule']}, cache {data['settings']['cache']}"
    taken, edited = (sum(len(step.get(kind, ())) for step in data["steps"]) for kind in ("taken", "edited"))
    again = (f", {taken} taken back" if taken else "") + (f", {edited} edited" if edited else "")
    return f"{name}: {tokens} tokens in {nfe} forwards, {tokens / nfe:.1f} tokens per forward{again}"


def shade(step: int, steps: int) -> tuple[Any, str]:
    """Background and text colour of a word committed at `step`; white where no step did."""
    from matplotlib import colormaps

    if step < 0:
        return "white", SOFT
    red, green, blue, alpha = colormaps["viridis"](step / max(steps - 1, 1))
    bright = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return (red, green, blue, alpha), "black" if bright > 0.18 else "white"


def draw_all(axes: Any, data: dict[str, Any], step: int) -> None:
    steps = data["steps"]
    numbers = range(1, len(steps) + 1)
    axes.axvspan(step + 0.5, step + 1.5, color="#eef0f3", zorder=0)
    bars = axes.bar(numbers, [sum(s["committed"]) for s in steps], width=0.6, color=OWN)
    handles, revised = [bars], []
    for kind, name, sign, style in (
        ("edited", "edited", 1, {"facecolor": "white", "edgecolor": OWN}),
        ("taken", "taken back", -1, {"facecolor": LOST}),
    ):
        counts = [len(s.get(kind, ())) for s in steps]
        if any(counts):
            # Edits are among the commits, and are drawn over their upper end.
            above = [sum(s["committed"]) - n if sign > 0 else 0 for s, n in zip(steps, counts, strict=True)]
            handles.append(axes.bar(numbers, [sign * n for n in counts], bottom=above, width=0.6, **style))
            revised.append(name)
    share = 0.84 / len(data["others"])
    for i, color in enumerate(OTHERS[: len(data["others"])]):
        left = [number - 0.42 + i * share for number in numbers]
        counts = [s["would"][i] for s in steps]
        handles.append(axes.hlines(counts, left, [x + share for x in left], color=color, lw=2.5))
    axes.set_xlim(0.4, len(steps) + 0.6)
    axes.set_xlabel("step", fontsize=8, color=SOFT)
    axes.xaxis.get_major_locator().set_params(integer=True)
    names = [data["rule"], *revised, *(f"{name} would" for name in data["others"])]
    axes.legend(
        handles, names, fontsize=7.5, frameon=False, loc="lower left", bbox_to_anchor=(-0.03, 0.98), ncols=len(names),
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip


def draw_profile(profile: Any, bound: Any, data: dict[str, Any], step: int) -> None:
    s = data["steps"][step]
    n = range(1, len(s["positions"]) + 1)
    colors = [OWN if committed else QUIET for committed in s["committed"]]
    profile.bar(n, [1 - d for d in s["missing"]], width=0.8, color=colors)
    profile.set_xlim(0.4, len(n) + 0.6)
    profile.set(ylim=(0, 1.05), ylabel="confidence")
    profile.tick_params(labelbottom=False)
    for _name, confidence in data["lines"]:
        profile.axhline(confidence, color=INK, lw=0.8, ls=":")
    for curve, scores, style in zip(data["curves"], s["curves"], ("-o", "--o"), strict=False):
        bound.plot(n, scores, style, color=INK, ms=2.5, lw=1.2)
        bound.axhline(curve["limit"], color=INK, lw=0.8, ls=":")
    counts = [sum(s["committed"]), *s["would"]]
    for axes in (profile, bound):
        for count, color, style in zip(counts, (OWN, *OTHERS), ("-", "--", ":", "-."), strict=False):
            axes.axvline(count + 0.5, color=color, lw=1.2, ls=style)
    bound.set(ylim=(-1, 1.1), ylabel="bound $G_n$", xlabel="prefix length n")
    for axes in (profile, bound):
        axes.yaxis.label.set(fontsize=8, color=SOFT)
        axes.xaxis.label.set(fontsize=8, color=SOFT)
    bound.xaxis.get_major_locator().set_params(integer=True)
