"""The headline figures of every version and device: `python bench/history.py [FOLDER]`, after `make bench`.

Reads the results that the benchmarks left in FOLDER (default: bench/results), adds one row for each device they were
measured on to bench/results/history.json, and writes the table bench/history.md. A row of the same version and device
is replaced. What failed says why; what nobody ran says so, too. The version is that of the measured commit, not of the
checkout, so that old results are never shown as those of a new version.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import Result, markdown, number

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
KINDS = ("select", "decode", "quality")
VERSION = re.compile(r'^\s*(?:__version__ = |version=)"([^"]+)"', re.MULTILINE)
Row = dict[str, Any]


def select_speed(result: Result) -> str:
    """The selection of one sequence's block of 32."""
    row = row_of(result["rows"], sequences=1, positions=32, rows=32)
    if row is None or "fdpp" not in row:
        return missing(row)
    us = row["fdpp"].get("us", row["fdpp"].get("us_warm"))
    return f"{number(us)} us, {row['speedup']:.1f}x"


def decode_speed(shape: str, **wanted: Any) -> Callable[[Result], str]:
    def read(result: Result) -> str:
        row = row_of(result["rows"], shape=shape, cache="dual", batch=1, **wanted)
        if row is None:  # the model could not even be made, or there was no time for it
            failed = [found for found in result["rows"] if found["shape"] == shape and "cache" not in found]
            late = [{"error": "no time"} for facts in result["left_out"] if facts["shape"] == shape]
            row = next(iter([*failed, *late]), None)
        ours = {} if row is None else row.get("fdpp", {})
        if "tokens_per_second" not in ours:
            return missing(row)
        faster = f", {row['speedup']:.2f}x" if row is not None and "speedup" in row else ""
        return f"{number(ours['tokens_per_second'])} tok/s{faster}"

    return read


def quality(result: Result) -> str:
    row = row_of(result["runs"], task="sums", rule="Frechet(0.25)", how="plain", cache="dual", drafts=1)
    if row is None or "share" not in row:
        return missing(row)
    return f"{100 * row['share']:.1f}%, {row['nfe']:.1f} forwards"


FIGURES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "select, 32 rows": ("select", select_speed),
    "embedded, dual, Frechet": ("decode", decode_speed("tiny", tokens_per_forward="Frechet(0.25)")),
    "96 M, dual, 4.00": ("decode", decode_speed("100m", tokens_per_forward="4.00, set")),
    "8 B, dual": ("decode", decode_speed("8b")),
    "embedded, exact, dual, Frechet": ("quality", quality),
}
"""A column each: the kind of result it is in, and how it is read. Faster: than the published way in the same run."""


def row_of(found: list[Result], **wanted: Any) -> Result | None:
    """The first row with these facts."""
    return next((row for row in found if all(row.get(key) == value for key, value in wanted.items())), None)


def missing(row: Result | None) -> str:
    """Why there is no figure."""
    if row is None:
        return "not run: not in these results"
    errors = (found["error"] for found in (row, row.get("fdpp", {})) if "error" in found)
    return f"failed: {next(errors, 'no figure')}"


def version_now() -> str:
    found = VERSION.search((ROOT / "fdpp" / "version.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def version_at(commit: str) -> str:
    """The version of a commit; the checkout's where git does not know it."""
    for path in ("fdpp/version.py", "setup.py"):
        command = ["git", "show", f"{commit.removesuffix('+changes')}:{path}"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            break
        found = VERSION.search(done.stdout) if done.returncode == 0 else None
        if found is not None:
            return found[1]
    return version_now()


def kind_of(device: str) -> str:
    return "CPU" if device.startswith("CPU") else "GPU"


def rows_of(folder: Path) -> list[Row]:
    """One row for each version and device that the results in `folder` are of."""
    found: dict[tuple[str, str], dict[str, Result]] = {}
    for kind in KINDS:
        for path in sorted([*folder.glob(f"{kind}-*.json"), *folder.glob(f"{kind}.json")]):
            result = json.loads(path.read_text(encoding="utf-8"))
            about = result["environment"]
            found.setdefault((version_at(about["commit"]), about["device"]), {})[kind] = result
    rows = []
    for (version, device), results in found.items():
        about = [result["environment"] for result in results.values()]
        figures = {
            name: read(results[kind]) if kind in results else f"not run: no {kind} results"
            for name, (kind, read) in FIGURES.items()
        }
        facts = {key: ", ".join(dict.fromkeys(str(each[key]) for each in about)) for key in ("date", "commit", "torch")}
        rows.append({"version": version, "device": device, **facts, "figures": figures})
    return rows


def not_run(version: str, kind: str) -> Row:
    figures = dict.fromkeys(FIGURES, f"not run: no {kind}")
    return {"version": version, "device": kind, "date": "-", "commit": "-", "torch": "-", "figures": figures}


def merged(history: list[Row], rows: list[Row], version: str) -> list[Row]:
    """`history` with `rows` in it, and with one that says so for each kind of device that `version` has none of."""
    held = {(row["version"], row["device"]): row for row in [*history, *rows]}
    measured = {(row["version"], kind_of(row["device"])) for row in held.values() if row["commit"] != "-"}
    for kind in ("CPU", "GPU"):
        held.setdefault((version, kind), not_run(version, kind))
    kept = [row for row in held.values() if row["commit"] != "-" or (row["version"], row["device"]) not in measured]
    return sorted(kept, key=lambda row: (in_order(row["version"]), kind_of(row["device"]), row["device"]))


def in_order(version: str) -> list[tuple[int, str]]:
    """A key that puts 0.10 behind 0.9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"[.]|(?<=\d)(?=[a-z])", version)]


def table(history: list[Row]) -> str:
    header = ["version", "device", "measured", "commit", "torch", *FIGURES]
    facts = ("version", "device", "date", "commit", "torch")
    rows = [
        [*(row[fact] for fact in facts), *(row["figures"].get(name, "-").replace("|", "/") for name in FIGURES)]
        for row in history
    ]
    about = (
        "# Headline figures by version\n\n"
        "Written by `make history` from the results of `make bench` and `make quality`; do not edit it. Speeds are of\n"
        "the device that is named; Nx is how many times as fast as the published way in the same run. Figures of\n"
        "different devices, and of one device with other versions of torch, are not comparable.\n\n"
    )
    return about + markdown(header, rows) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="results of the benchmarks")
    parser.add_argument("--store", type=Path, default=RESULTS / "history.json", help="default: %(default)s")
    parser.add_argument("--table", type=Path, default=ROOT / "bench" / "history.md", help="default: %(default)s")
    options = parser.parse_args(arguments)
    history = json.loads(options.store.read_text(encoding="utf-8")) if options.store.exists() else []
    rows = rows_of(options.folder)
    if not rows:
        expected = ", ".join(f"{kind}-*.json" for kind in KINDS)
        raise SystemExit(f"{options.folder}: expected one of {expected}, found none")
    history = merged(history, rows, version_now())
    options.store.write_text(json.dumps(history, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    options.table.write_text(table(history), encoding="utf-8")
    print(f"{len(rows)} of {len(history)} rows are of these results: {options.table}")


if __name__ == "__main__":
    main()
