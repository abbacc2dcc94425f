"""A roofline and bars of tokens per second, from the results in a folder: `python bench/report.py FOLDER --plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLOURS = {"published": "tab:grey", "two launches": "tab:orange", "fdpp": "tab:blue"}


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
    axes.legend(fontsize=7)


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
    axes.legend(fontsize=7)


def bars(axes: Any, decode: dict[str, Any]) -> None:
    """Tokens per second of every setting, both ways."""
    rows = [row for row in decode["rows"] if "error" not in row]
    for offset, way in ((-0.2, "published"), (0.2, "fdpp")):
        rates = {
            i + offset: row[way]["tokens_per_second"] for i, row in enumerate(rows) if "seconds" in row.get(way, {})
        }
        if rates:
            drawn = axes.barh(list(rates), list(rates.values()), height=0.4, color=COLOURS[way], label=way)
            if way == "fdpp":
                labels = [
                    f" {row['speedup']:.1f}x" if "speedup" in row else ""
                    for row in rows
                    if "seconds" in row.get(way, {})
                ]
                axes.bar_label(drawn, labels, fontsize=6)
    names = [
        f"{row['shape']}, {row['cache']}, {row['batch']}: {row['tokens_per_forward'].split('(')[0]}" for row in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="tokens per second", title="decode")
    axes.legend(fontsize=7)


def draw(folder: Path) -> None:
    """Write `roofline-<device>.svg` and `.png` for every device with both kinds of results."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fdpp"
    for path in sorted(folder.glob("decode-*.json")):
        device = path.stem.removeprefix("decode-")
        other = path.with_name(f"select-{device}.json")
        decode = json.loads(path.read_text())
        select = json.loads(other.read_text()) if other.exists() else None
        figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
        roofline(axes[0], select, decode)
        if select is not None:
            bandwidth(axes[1], select)
        bars(axes[2], decode)
        figure.suptitle(decode["environment"]["device"], fontsize=9)
        figure.tight_layout()
        for suffix in ("svg", "png"):
            target = folder / f"roofline-{device}.{suffix}"
            figure.savefig(target, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            print(f"written to {target}")
        plt.close(figure)
