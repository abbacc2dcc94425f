"""Tables of what the benchmarks left in a folder: `python bench/report.py FOLDER`. `--plot` draws it, too."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import measure

Result = dict[str, Any]

SHAPES = {
    "tiny": "embedded",
    "100m": "96 M",
    "dream-7b": "Dream-7B",
    "dream-100m": "Dream, 96 M",
    "sdar-4b": "SDAR-4B",
    "sdar-100m": "SDAR, 96 M, blocks of 4",
    "sdar-100m-32": "SDAR, 96 M, blocks of 32",
    "fast-dllm-v2-7b": "Fast-dLLM v2-7B",
    "llada2-mini": "LLaDA2.0-mini",
}
"""The models' names in tables and pictures."""


def load(folder: Path, kind: str) -> list[Result]:
    """The result files `<kind>-<device>.json` in `folder`."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-*.json"))]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:" if i else "---" for i in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def failed(found: Result, width: int) -> list[str]:
    """An error in the place of `width` cells."""
    return [found["error"].replace("|", "/"), *["-"] * (width - 1)]


def number(value: float | None) -> str:
    """Three significant digits, or the whole number where it has more."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value else "0"


def select_table(result: Result) -> str:
    """With times from graphs: warm and cold, launches and bandwidth; without: time and memory."""
    graphs = any("us_warm" in row.get("fdpp", {}) for row in result["rows"])
    return (graph_table if graphs else call_table)(result)


def call_table(result: Result) -> str:
    header = [f"one step, V = {result['vocabulary']:,}, bf16", "published, ms", "fdpp, ms", "faster"]
    header += ["float32 softmax, ms", "faster"]
    header += ["extra memory, published, MB", "fdpp, MB"]
    rows = []
    for row in result["rows"]:
        masked = "all" if row["rows"] == row["sequences"] * row["positions"] else f"{row['rows']}"
        first = f"{row['sequences']} x {row['positions']} positions, {masked} masked"
        if "fdpp" not in row:
            rows.append([first, *failed(row, len(header) - 1)])
            continue
        both = (row["published"], row["fdpp"])
        times = [number(way["us"] / 1e3) for way in both]
        # Older results have no plain softmax.
        plain = [number(row["plain"]["us"] / 1e3), f"{row['speedup_plain']:.2f}x"] if "plain" in row else ["-", "-"]
        rows.append([first, *times, f"{row['speedup']:.1f}x", *plain, *(number(way["peak_mb"]) for way in both)])
    return markdown(header, rows) + differing(result)


def graph_table(result: Result) -> str:
    header = ["masked rows (of)", "published, us", "float32 softmax, us"]
    header += ["two launches warm / cold", "fdpp warm / cold", "faster"]
    header += ["launches, published", "two", "fdpp", "fdpp, GB/s cold", "% of copy", "extra MB, published", "fdpp"]
    rows = []
    for row in result["rows"]:
        first = f"{row['rows']} ({row['sequences']} x {row['positions']})"
        if "fdpp" not in row:
            rows.append([first, *failed(row, len(header) - 1)])
            continue
        published, two, ours = row["published"], row.get("two launches", {}), row["fdpp"]
        rows.append(
            [
                first,
                number(published["us"]),
                number(row.get("plain", {}).get("us")),
                *(f"{number(way.get('us_warm'))} / {number(way.get('us_cold'))}" for way in (two, ours)),
                f"{row['speedup']:.1f}x",
                *(str(way.get("launches", "-")) for way in (published, two, ours)),
                number(ours["gb_s"]),
                number(ours["copy_percent"]),
                number(published["peak_mb"]),
                number(ours["peak_mb"]),
            ]
        )
    return markdown(header, rows) + differing(result)


def differing(result: Result) -> str:
    """Where the selections that were timed are not the same."""
    rows = [row for row in result["rows"] if "error" in row and "fdpp" in row]
    return "".join(f"\n{row['rows']} ({row['sequences']} x {row['positions']}): {row['error']}" for row in rows)


def setting(row: Result, prompt: bool = True) -> str:
    """Model, cache, batch and, unless left out, the prompt's length: what names a decode in tables and pictures."""
    keys = ("cache", "batch", "prompt") if prompt else ("cache", "batch")
    return ", ".join([SHAPES.get(row["shape"], row["shape"]), *(str(row[key]) for key in keys if key in row)])


def decode_table(result: Result) -> str:
    header = ["model, cache, batch, prompt", "tokens per forward", "way", "tok/s", "forwards", "ms per forward (model)"]
    header += [
        "ms outside the model",
        "ms per cached forward, all in",
        "% of the weight-read floor",
        "ms, full step / other step",
        "peak memory, MB",
        "faster",
    ]
    rows, notes = [], [f"\nleft out for time: {facts}" for facts in result["left_out"]]
    for row in result["rows"]:
        name = setting(row)
        if "error" in row:
            rows.append([name, row.get("tokens_per_forward", "-"), "-", *failed(row, len(header) - 3)])
        for way in ("published", "fdpp", "fdpp, compiled"):
            if way not in row:
                continue
            found, first = row[way], [name, row["tokens_per_forward"], way]
            if "error" in found:
                rows.append([*first, *failed(found, len(header) - 3)])
                continue
            keys = ("tokens_per_second", "nfe", "ms_per_forward", "ms_outside_model", "ms_cached_forward")
            faster = f"{row['speedup']:.2f}x" if way == "fdpp" and "speedup" in row else ""
            values = [number(found.get(key)) for key in (*keys, "floor_percent")]
            steps = found.get("steps", {})
            values.append(" / ".join(number(steps.get(key)) for key in ("ms_refresh", "ms_step")))
            rows.append([*first, *values, number(1e3 * found["peak_gb"]), faster])
            parts = (found.get(part, {}) for part in ("steps", "without_model"))
            notes += [f"\n{name}, {way}: {part['error']}" for part in parts if "error" in part]
    return markdown(header, rows) + "".join(notes)


def kernels_table(result: Result) -> str:
    """The fused head and the split attention beside what they would replace."""
    rows = []
    for kind, ways in (
        ("head", ("library", "fused")),
        ("attention", ("sdpa, mask", "sdpa, no mask", "block_attention")),
        ("branches", ("copies", "block_attention")),
    ):
        # Older results have no branches.
        for row in result.get(kind, []):
            drafts = f"{row['branches']} branches, " if kind == "branches" else ""
            size = f"{row['sequences']} x {row.get('queries')} queries over {row.get('columns')} columns"
            size = f"attention, {drafts}{size}"
            if kind == "head":
                size = f"head, {row['rows']} masked rows of {row['sequences']} x {row['positions']}"
            if "error" in row:
                rows.append([size, "-", *failed(row, 2)])
                continue
            for way in ways:
                found = row[way]
                cells = failed(found, 2) if "error" in found else [number(found["us"]), number(found["peak_mb"])]
                rows.append([size, way, *cells])
    return markdown(["kernel", "way", "us", "extra MB"], rows)


def canvas_table(result: Result) -> str:
    """DiffusionGemma's step and self-conditioning by transformers and by fdpp; memory of a step of many canvases."""
    rows = []
    for kind in ("steps", "embeddings", "batch"):
        for row in result.get(kind, []):
            size = f"{row['sequences']} x {row['positions']}"
            name = {"steps": f"step from {row.get('from')}", "embeddings": "soft embeddings", "batch": "a whole step"}
            name = f"{name[kind]}, {size}"
            if "error" in row:
                rows.append([name, "-", *failed(row, 5)])
            for way in [way for way in ("transformers", "fdpp", "fdpp, no logits") if way in row]:
                found = row[way]
                spread = f"{found['least']:.2f}x, {found['most']:.2f}x" if "faster" in found else "-"
                cells = [number(found.get("ms")), f"{found['faster']:.2f}x" if "faster" in found else "-", spread]
                rows.append([name, way, *cells, number(found["peak_mb"]), number(found.get("distance"))])
    title = f"V = {result['vocabulary']:,}, {result['channels']:,} channels"
    return markdown([title, "way", "ms", "faster", "least and most", "extra MB", "distance from float64"], rows)


def targets(select: list[Result], decode: list[Result]) -> list[tuple[str, str, bool]]:
    """Each target on one H200, the measurement, and whether it is met; only for results that are there."""
    found: list[tuple[str, str, bool]] = []
    for result in select:
        if result["environment"]["device"].startswith("CPU"):
            continue
        rows = [row for row in result["rows"] if "fdpp" in row]
        for row in rows:
            ours = row["fdpp"]
            if (row["sequences"], row["rows"]) == (1, 32) and row["positions"] == 32:
                warm, launched = ours["us_warm"], ours["launches_in_graph"]
                found.append(("select, 32 rows, warm, in a graph: at most 10 us", f"{warm:.1f} us", warm <= 10))
                found.append(("the same: one launch", str(launched), launched == 1))
                found.append(("the same: 20x the published", f"{row['speedup']:.0f}x", row["speedup"] >= 20))
            if row["rows"] >= 1024:
                share = ours["copy_percent"]
                found.append((f"select, {row['rows']} rows: 85% of copy bandwidth", f"{share:.0f}%", share >= 85))
        if rows:
            most = max(row["fdpp"]["peak_mb"] for row in rows)
            found.append(("select: transient memory under 1 MB", f"{most:.2f} MB", most < 1))
    for result in decode:
        for shape in ("tiny", "100m"):
            rows = [row for row in result["rows"] if row["shape"] == shape and "speedup" in row]
            if rows:
                slow, fast = (bound(row["speedup"] for row in rows) for bound in (min, max))
                same = min(row["same_tokens"] for row in rows)
                found.append((f"{shape}: 2x the published in all settings", f"{slow:.2f} to {fast:.2f}x", slow >= 2))
                found.append((f"{shape}: same tokens", f"{100 * same:.1f}%", same == 1))
        for row in result["rows"]:
            ours = row.get("fdpp", {})
            if row["shape"] != "8b" or ours.get("nfe", 62) > 61 or row["batch"] != 1 or row["cache"] == "none":
                continue
            name = f"8b, {row['cache']}, batch 1, prompt {row['prompt']}, 4.2 tokens per forward"
            rate = ours["tokens_per_second"]
            found.append((f"{name}: 500 tok/s", f"{rate:.0f}", rate >= 500))
            if "speedup" in row:
                found.append((f"{name}: 4.5x the published", f"{row['speedup']:.2f}x", row["speedup"] >= 4.5))
            ways = [row[way] for way in ("fdpp", "fdpp, compiled") if way in row]
            times = [way["steps"]["ms_step"] for way in ways if "ms_step" in way.get("steps", {})]
            if row["cache"] == "dual" and times:
                over = min(times) * result["copy_gb_s"] / row["weight_gb"] / 1e3
                found.append((f"{name}: block step at most 1.2x the floor", f"{over:.2f}x", over <= 1.2))
    return found


def report(folder: Path) -> str:
    tables = {"select": select_table, "decode": decode_table, "kernels": kernels_table, "canvas": canvas_table}
    found = {kind: load(folder, kind) for kind in tables}
    if not any(found.values()):
        raise SystemExit(f"{folder}: expected one of {', '.join(f'{kind}-*.json' for kind in tables)}, found none")
    parts = []
    for kind, table in tables.items():
        for result in found[kind]:
            about = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
            copy = f"; copy bandwidth {result['copy_gb_s']:.0f} GB/s" if "copy_gb_s" in result else ""
            parts += [about + copy, table(result)]
            if result.get("smoke"):
                parts.append(measure.SMOKE)
    rows = [
        [name, value, "met" if met else "NOT met"] for name, value, met in targets(found["select"], found["decode"])
    ]
    if rows:
        parts.append(markdown(["target", "measured", ""], rows))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the benchmarks left their results")
    parser.add_argument(
        "--plot", action="store_true", help="draw roofline- and decode-<device> as .svg and .png (needs matplotlib)"
    )
    options = parser.parse_args(arguments)
    print(report(options.folder))
    if options.plot:
        import plots

        plots.draw(options.folder)


if __name__ == "__main__":
    main()
