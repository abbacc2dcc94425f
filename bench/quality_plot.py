"""The plots of `make quality`, from its JSON: `python bench/quality_plot.py bench/results/quality.json`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from quality_report import ONE, is_calibrated, plain

LOOKS: dict[str, tuple[str, str]] = {
    "Quota": ("s", "tab:blue"),
    "Threshold": ("o", "tab:orange"),
    "Factor": ("^", "tab:green"),
    "Frechet": ("D", "tab:red"),
    "EntropyBound": ("p", "tab:purple"),
    "Budget": ("*", "tab:cyan"),
    "LocalLeap": ("X", "tab:brown"),
    "Klass": ("v", "tab:pink"),
    "Dawn": ("P", "black"),
    "Editing": ("x", "slateblue"),
    "Hierarchy": ("H", "goldenrod"),
    "Credit": ("8", "teal"),
    "Wino": ("1", "crimson"),
    "Revocable": ("2", "magenta"),
    "Saber": ("+", "sienna"),
}
"""Marker and colour of a family. One that is not here gets the next of `OTHERS`."""
OTHERS = (("h", "tab:olive"), ("<", "tab:gray"), (">", "navy"), ("d", "darkgreen"))
PANELS = {"none": "no cache", "dual": "dual cache"}
REACHES, DIRECTIONS = (16, 26, 38, 52, 68, 86, 106), 12
"""Where a name may stand beside one of its points: how far, in points of type, and in how many directions."""
HEADROOM = 1.5
"""Percents from the best interval to where the scale would be endless. Less spreads the best rules wider."""
SHARES = (0, 20, 40, 60, 70, 80, 90, 95, 98, 100)


def families(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs by family, each from the fewest forwards to the most."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["nfe"]):
        found.setdefault(run["numbers"]["name"].split(".")[-1], []).append(run)
    return found


class Window(NamedTuple):
    """The first and last NFE, and the lowest and highest percents."""

    start: float
    end: float
    lowest: float
    highest: float


def window_of(runs: list[dict[str, Any]]) -> Window:
    """What the panels of a task show: all but rules of a fixed number, which would leave all others a corner."""
    kept = [run for run in runs if run["numbers"]["name"] != "Quota"] or runs
    at = [run["nfe"] for run in kept]
    low, high = min(100 * run["low"] for run in kept), max(100 * run["high"] for run in kept)
    return Window(0.93 * min(at), 1.08 * max(at), max(low - 3, -1), min(high, 100))


def looks_of(names: list[str]) -> dict[str, tuple[str, str]]:
    others = iter(OTHERS * len(names))
    return {name: LOOKS.get(name) or next(others) for name in names}


def prepare(axes: Any, runs: list[dict[str, Any]], looks: dict[str, tuple[str, str]], window: Window) -> None:
    """Right answers against NFE, a line for each family through its numbers."""
    import numpy as np
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    for name, group in families(runs).items():
        marker, colour = looks[name]
        at = [run["nfe"] for run in group]
        share = [100 * run["share"] for run in group]
        bars = [
            [100 * (run["share"] - run["low"]) for run in group],
            [100 * (run["high"] - run["share"]) for run in group],
        ]
        # An interval's end may be rounded past the share.
        bars = [[max(length, 0.0) for length in side] for side in bars]
        looks_like = {"color": colour, "markersize": 5, "linewidth": 1, "elinewidth": 0.4, "alpha": 0.8}
        axes.errorbar(at, share, bars, fmt=f"{marker}-", **looks_like)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    start, end, lowest, highest = window
    axes.set_xticks([tick for tick in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 40, 60) if start <= tick <= end])
    axes.set_xlim(start, end)
    limit = highest + HEADROOM
    functions = lambda y: -np.log10(limit - np.minimum(y, limit - 0.5)), lambda z: limit - 10.0**-z
    axes.set_yscale("function", functions=functions)
    axes.set_yticks([share for share in SHARES if lowest <= share <= highest], [])
    axes.set_ylim(lowest, highest + 0.4)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(alpha=0.2)
    axes.set(xlabel="forwards per problem (NFE)", ylabel="right answers, %")
    one = next((run for run in runs if run["rule"] == ONE), None)
    if one is not None:
        axes.axhline(100 * one["share"], color="grey", linewidth=0.8, linestyle="--")
        said = f"one per step: {100 * one['share']:.1f}%, {one['nfe']:.0f} forwards"
        axes.set_title(said, loc="right", fontsize=8, color="grey")


def name_lines(axes: Any, groups: dict[str, list[dict[str, Any]]], looks: dict[str, tuple[str, str]]) -> None:
    """A name beside each line, where it covers no point and no other name."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()
    renderer, frame = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    at = {name: [(run["nfe"], 100 * run["share"]) for run in group] for name, group in groups.items()}
    seen = {name: [tuple(axes.transData.transform(point)) for point in points] for name, points in at.items()}
    on_points = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for group in seen.values() for x, y in group]
    on_lines = [dot for group in seen.values() for dot in dots(group)]
    names: list[Any] = []
    leaders: list[Any] = []
    scale = axes.figure.dpi / 72
    turns = [2 * math.pi * turn / DIRECTIONS for turn in range(DIRECTIONS)]
    offsets = [(1.3 * reach * math.cos(turn), reach * math.sin(turn)) for reach in REACHES for turn in turns]
    for name, points in at.items():
        sample = axes.text(0, 0, name)
        size = sample.get_window_extent(renderer)
        sample.remove()
        places = []
        for rank, (right, up) in enumerate(offsets):
            for point, (x, y) in zip(points, seen[name], strict=True):
                if not frame.contains(x, y):
                    continue
                middle = x + right * scale - size.width / 2, y + up * scale - size.height / 2
                box = Bbox.from_bounds(*middle, size.width, size.height).padded(2)
                inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
                leader = dots([(x, y), (x + right * scale, y + up * scale)])
                cost = 1000 * (not inside) + rank / DIRECTIONS / 2
                for weight, boxes in ((100, names), (10, on_points), (10, leaders), (1, on_lines)):
                    cost += weight * sum(box.overlaps(other) for other in boxes)
                cost += 10 * sum(dot.overlaps(other) for dot in leader for other in names)
                places.append((cost, point, (right, up), box, leader))
        if not places:
            continue
        _, point, offset, box, leader = min(places, key=lambda place: place[0])
        names.append(box)
        leaders += leader
        colour = looks[name][1]
        axes.annotate(
            name,
            point,
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkB": 3},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )


def dots(points: list[tuple[float, ...]]) -> list[Any]:
    """Small boxes along the lines from point to point."""
    from matplotlib.transforms import Bbox

    found = []
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        count = int(math.hypot(to_x - x, to_y - y) // 12)
        steps = [step / count for step in range(1, count)]
        found += [Bbox.from_bounds(x + (to_x - x) * at - 2, y + (to_y - y) * at - 2, 4, 4) for at in steps]
    return found


def calibration(axes: Any, scored: dict[str, Any]) -> None:
    """Share of right proposals against confidence, with bars for the number of proposals."""
    bins, total = scored["bins"], scored["proposals"]
    counts = axes.twinx()
    counts.bar(
        [b["confidence"] for b in bins], [100 * b["count"] / total for b in bins], width=0.015, color="lightgrey"
    )
    counts.set(ylabel="proposals, % (bars)", yscale="log", ylim=(0.05, 3000))
    counts.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    counts.minorticks_off()
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    # Two standard errors of a share tell noise from a miscalibrated bin.
    errors = [2 * (b["correct"] * (1 - b["correct"]) / b["count"]) ** 0.5 for b in bins]
    axes.errorbar(
        [b["confidence"] for b in bins], [b["correct"] for b in bins], errors, fmt="o", markersize=4, linewidth=1
    )
    title = f"{scored['task']}: expected error {scored['error']:.3f}"
    axes.set(xlabel="confidence", ylabel="right", xlim=(-0.02, 1.03), ylim=(-0.02, 1.05), title=title)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write `quality-<task>` for every task with runs, "-undivided" too, and `calibration`, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "fdpp", "font.size": 9, "axes.titlesize": 10}

    def save(figure: Any, name: str) -> None:
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=144, metadata={"Date": None} if suffix == "svg" else None)
        plt.close(figure)

    tasks = dict.fromkeys(run["task"] for run in results["runs"])
    for task, how in itertools.product(tasks, ("plain", "undivided")):
        runs = [run for run in plain(results["runs"], task, how) if not is_calibrated(run)]
        panels = [cache for cache in PANELS if any(run["cache"] == cache for run in runs)]
        if not panels:
            continue
        # As wide as a README on GitHub, 830 pixels of which an inch has 96.
        figure, all_axes = plt.subplots(1, len(panels), figsize=(8.6, 5.2), sharey=True, squeeze=False)
        looks = looks_of(list(families(runs)))
        window = window_of(runs)
        for axes, cache in zip(all_axes[0], panels, strict=True):
            prepare(axes, [run for run in runs if run["cache"] == cache], looks, window)
            name = PANELS[cache] if how == "plain" else f"{PANELS[cache]}, one block"
            axes.set_title(f"{task}, {name}", loc="left")
        figure.tight_layout()
        for axes, cache in zip(all_axes[0], panels, strict=True):
            name_lines(axes, families([run for run in runs if run["cache"] == cache]), looks)
            axes.label_outer()
        save(figure, f"quality-{task}" if how == "plain" else f"quality-{task}-{how}")
    scored = [row for row in results["calibration"] if row["split"] == "held-out"]
    if scored:
        figure, all_axes = plt.subplots(1, len(scored), figsize=(3.6 * len(scored), 3.4), squeeze=False)
        for axes, row in zip(all_axes[0], scored, strict=True):
            calibration(axes, row)
        figure.tight_layout()
        save(figure, "calibration")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("bench/results/quality.json"))
    path = parser.parse_args().file
    draw(json.loads(path.read_text()), path.parent)
