"""The plot of `make quality`, from its JSON: `python bench/quality_plot.py bench/results/quality.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CLOSE = (8.4, 10.6), (86.5, 98.5)
"""Tokens per forward and percents between which the parallel rules lie so close that they get a panel of their own."""

LOOKS: dict[str, tuple[str, str, float, str, tuple[int, int]]] = {
    "one": ("one per step", "s", 7, "tab:blue", (-8, 13)),
    "threshold": ("Threshold", "o", 10, "tab:orange", (-70, 15)),
    "factor": ("Factor", "^", 8, "tab:green", (-60, -10)),
    "frechet": ("Frechet", "D", 6, "tab:red", (14, -26)),
    "entropy": ("EntropyBound", "p", 8, "tab:purple", (-82, 0)),
    "localleap": ("LocalLeap", "x", 6, "tab:brown", (22, 15)),
    "klass": ("Klass", "v", 7, "tab:pink", (-12, 13)),
    "dawn": ("Dawn", "+", 8, "black", (-52, -34)),
}
"""By rule: its name in the table, marker, the marker's size, colour, and where the name stands in the upper panel, in
points. Rules that coincide have markers of other sizes, so that each shows."""


def kind_of(run: dict[str, Any]) -> str:
    return run["rule"].split()[0]


def draw_run(axes: Any, run: dict[str, Any], hollow: bool) -> None:
    _, marker, size, colour, _ = LOOKS[kind_of(run)]
    axes.plot(
        run["tokens_per_forward"],
        100 * run["exact"],
        marker,
        color=colour,
        markerfacecolor="none" if hollow else colour,
        markersize=size,
        alpha=0.8,
    )


def whole(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Every rule with its default numbers, by name, and an arrow to where drafts take it."""
    for kind, (name, _, _, colour, offset) in LOOKS.items():
        group = [run for run in runs if kind_of(run) == kind]
        # Runs without drafts begin with the rule's default; drafted ones may end with more depths of the same.
        plain = next((run for run in group if run["drafts"] == 1), None)
        drafted = next((run for run in group if run["drafts"] not in (1, "auto")), None)
        for run in (plain, drafted):
            if run is not None:
                draw_run(axes, run, hollow=run is drafted)
        if plain is None:
            continue
        at = plain["tokens_per_forward"], 100 * plain["exact"]
        if drafted is not None and drafted["tokens_per_forward"] > at[0] + 0.2:
            to = drafted["tokens_per_forward"], 100 * drafted["exact"]
            axes.annotate("", to, at, arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7}
        axes.annotate(name, at, offset, textcoords="offset points", va="center", arrowprops=line)
    axes.margins(0.07, 0.12)
    axes.set_title("dual cache, blocks of 32; hollow: with drafts")
    axes.set(xlabel="tokens per forward", ylabel="exact answers, %")


def close_up(axes: Any, runs: list[dict[str, Any]]) -> None:
    """The rules that commit most, a line for each with its number swept, without drafts."""
    for kind, (name, marker, size, colour, _) in LOOKS.items():
        group = [run for run in runs if kind_of(run) == kind and run["drafts"] == 1]
        group.sort(key=lambda run: run["tokens_per_forward"])
        inside = [run for run in group if CLOSE[0][0] <= run["tokens_per_forward"] <= CLOSE[0][1]]
        if not inside:
            continue
        axes.plot(
            [run["tokens_per_forward"] for run in group], [100 * run["exact"] for run in group], color=colour, alpha=0.5
        )
        for run in inside:
            draw_run(axes, run, hollow=True)
        axes.plot([], [], marker, color=colour, markerfacecolor="none", markersize=size, label=name)
    axes.set(xlim=CLOSE[0], ylim=CLOSE[1], title="the parallel rules, numbers swept")
    axes.set(xlabel="tokens per forward", ylabel="exact answers, %")
    axes.legend(loc="lower left")


def calibration(axes: Any, bins: list[dict[str, float]]) -> None:
    """Share of right proposals against confidence, with bars for the number of proposals."""
    total = sum(b["count"] for b in bins)
    counts = axes.twinx()
    counts.bar([b["confidence"] for b in bins], [100 * b["count"] / total for b in bins], width=0.03, color="lightgrey")
    counts.set(ylabel="proposals, %", yscale="log", ylim=(0.005, 300))
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    # Two standard errors of a share tell noise from a miscalibrated bin.
    errors = [2 * (b["correct"] * (1 - b["correct"]) / b["count"]) ** 0.5 for b in bins]
    axes.errorbar(
        [b["confidence"] for b in bins], [b["correct"] for b in bins], errors, fmt="o", markersize=4, linewidth=1
    )
    axes.set(xlabel="confidence", ylabel="right", ylim=(-0.02, 1.05), title="calibration (bars: how many, log)")


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write `quality.png` and `quality.svg`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "fdpp", "font.size": 9, "axes.titlesize": 10}
    # As wide as a README on GitHub, 830 pixels of which an inch has 96.
    figure = plt.figure(figsize=(8.6, 7.4))
    panels = figure.subplot_mosaic([["whole", "whole"], ["close", "calibration"]])
    runs = [run for run in results["runs"] if run["cache"] == "dual"]
    whole(panels["whole"], runs)
    close_up(panels["close"], runs)
    calibration(panels["calibration"], results["calibration"])
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"quality.{suffix}", dpi=192, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    draw(json.loads(path.read_text()), path.parent)
