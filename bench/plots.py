"""Pictures of the results in a folder, by `python bench/report.py FOLDER --plot`: roofline, selection and decodes.

They are as wide as a README on GitHub, 830 pixels, so that a point of theirs is a point on the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import report

COLOURS = {"published": "tab:grey", "two launches": "tab:orange", "fdpp": "tab:blue"}
MARKERS = {"published": "o", "fdpp": "D"}
WIDTH = 8.6
"""Inches, of 96 pixels."""


def roofline(axes: Any, select: dict[str, Any] | None, decode: dict[str, Any]) -> None:
    """Operations per byte against operations per second; the roof is this run's copy and matrix product.

    A decode's forward does two operations per weight and fed position and reads every weight once; a selection does
    about four per logit (subtract, exponential, sum, compare).
    """
    bandwidth, peak = decode["copy_gb_s"] / 1e3, decode["matmul_tflop_s"]
    low, high = 0.5, 4e4
    axes.plot([low, peak / bandwidth, high], [low * bandwidth, peak, peak], color="black", linewidth=1, label="roof")
    item = 4 if decode["environment"]["device"].startswith("CPU") else 2
    for way in ("published", "fdpp"):
        points = set()
        for row in decode["rows"]:
            ms = row.get(way, {}).get("ms_cached_forward")
            if ms is None or row["shape"] == "smoke":
                continue
            fed = row["batch"] * row["block"]
            if row["cache"] == "prefix":  # on average the block stands in the middle of the response
                fed = row["batch"] * (row["new"] + row["block"]) / 2
            points.add((2 * fed / item, 2 * fed * row["weight_gb"] / item / ms))
        if points:
            axes.scatter(*zip(*sorted(points), strict=True), s=18, color=COLOURS[way], label=f"cached forward, {way}")
    if select is not None:
        for way in ("published", "two launches", "fdpp"):
            rows = [row for row in select["rows"] if way in row]
            if rows:
                speed = [4 * row[way]["gb_s"] / 2 / 1e3 for row in rows]
                axes.scatter([2.0] * len(rows), speed, s=10, marker="_", color=COLOURS[way], label=f"select, {way}")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title="roofline")
    axes.legend(fontsize=8)


def bandwidth(axes: Any, select: dict[str, Any]) -> None:
    """Masked rows against GB/s of one selection, the logits not in the L2."""
    for way in ("published", "two launches", "fdpp"):
        rows = [row for row in select["rows"] if way in row and row["positions"] <= 32]
        if rows:
            axes.plot(
                [row["rows"] for row in rows], [row[way]["gb_s"] for row in rows], ".-", label=way, c=COLOURS[way]
            )
    axes.axhline(select["copy_gb_s"], color="black", linewidth=1, label="copy")
    axes.set(xscale="log", yscale="log", xlabel="masked rows", ylabel="GB/s", title="selection")
    axes.legend(fontsize=8)


def rates(axes: Any, decode: dict[str, Any]) -> None:
    """Tokens per second of every setting, both ways, on a logarithmic axis: equal distances are equal speed-ups."""
    rows = [row for row in decode["rows"] if "error" not in row]
    for i, row in enumerate(rows):
        found = {way: row[way]["tokens_per_second"] for way in ("published", "fdpp") if "seconds" in row.get(way, {})}
        if len(found) == 2:
            axes.plot(list(found.values()), [i, i], color="lightgrey", linewidth=2, zorder=1)
        for way, rate in found.items():
            axes.plot(rate, i, MARKERS[way], color=COLOURS[way], markersize=6)
        if found and "speedup" in row:
            axes.annotate(
                f"{row['speedup']:.2f}x", (max(found.values()), i), (8, 0), textcoords="offset points", va="center"
            )
    for way in ("published", "fdpp"):
        axes.plot([], [], MARKERS[way], color=COLOURS[way], label=way)
    short, long = (
        [f"{report.setting(row, prompt)}: {row['tokens_per_forward']}" for row in rows] for prompt in (False, True)
    )
    labels = short if len(set(short)) == len(short) else long
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(xscale="log", xlabel="tokens per second")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(decode["environment"]["device"], loc="left")
    axes.margins(x=0.15)
    axes.grid(axis="x", which="both", color="whitesmoke")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)


def draw(folder: Path) -> None:
    """Write `roofline-<device>` and `decode-<device>` as .svg and .png for every device with results of decodes."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "fdpp", "font.size": 9, "axes.titlesize": 10}
    for path in sorted(folder.glob("decode-*.json")):
        device = path.stem.removeprefix("decode-")
        other = path.with_name(f"select-{device}.json")
        decode = json.loads(path.read_text())
        select = json.loads(other.read_text()) if other.exists() else None
        count = sum("error" not in row for row in decode["rows"])
        both, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.9))
        alone, axes = plt.subplots(figsize=(WIDTH, 1.0 + 0.24 * max(count, 3)))
        roofline(left, select, decode)
        if select is not None:
            bandwidth(right, select)
        rates(axes, decode)
        both.suptitle(decode["environment"]["device"], fontsize=10)
        for name, figure in (("roofline", both), ("decode", alone)):
            figure.tight_layout()
            for suffix in ("svg", "png"):
                target = folder / f"{name}-{device}.{suffix}"
                figure.savefig(target, dpi=192, metadata={"Date": None} if suffix == "svg" else None)
                print(f"written to {target}")
            plt.close(figure)
