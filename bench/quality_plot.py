"""The plot of `make quality`, from its JSON: `python bench/quality_plot.py bench/results/quality.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CLOSE = (8.4, 10.6), (86.5, 98.5)
"""Tokens per forward and percents between which the parallel rules lie so close that they get a panel of their own."""


def frontier(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Exact answers against tokens per forward, a line for every rule with its settings swept, a star for drafts."""
    runs = [run for run in runs if run["cache"] == "dual"]
    for kind in dict.fromkeys(run["rule"].split()[0] for run in runs):
        group = sorted(
            (run for run in runs if run["rule"].split()[0] == kind), key=lambda run: run["tokens_per_forward"]
        )
        colour = None
        for drafted, style in ((False, "o-"), (True, "*")):
            rows = [run for run in group if run["drafts"] != "auto" and (run["drafts"] > 1) == drafted]
            if rows:
                (line,) = axes.plot(
                    [run["tokens_per_forward"] for run in rows],
                    [100 * run["exact"] for run in rows],
                    style,
                    markersize=10 if drafted else 4,
                    label=None if drafted else kind,
                    color=colour,
                )
                colour = line.get_color()
    axes.set(xlabel="tokens per forward", ylabel="exact answers, %")


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

    plt.rcParams["svg.hashsalt"] = "fdpp"
    figure, (whole, close, right) = plt.subplots(1, 3, figsize=(15, 4.4))
    for axes in (whole, close):
        frontier(axes, results["runs"])
    whole.set_title("dual cache, blocks of 32 (stars: with drafts)")
    whole.legend(fontsize=8)
    close.set(xlim=CLOSE[0], ylim=CLOSE[1], title="the parallel rules, close up")
    calibration(right, results["calibration"])
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"quality.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    draw(json.loads(path.read_text()), path.parent)
