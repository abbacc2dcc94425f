"""Turn a pytest-benchmark file into a small result file and a table: `python bench/report.py FILE --out FOLDER`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from measure import environment


def rows(benchmarks: list[dict]) -> list[dict]:
    """One row a size: both ways' median time and peak memory, and their ratios."""
    sizes: dict[str, dict[str, dict]] = {}
    for entry in benchmarks:
        info = entry["extra_info"]
        sizes.setdefault(info["size"], {})[info["way"]] = {
            "median_ms": entry["stats"]["median"] * 1e3,
            "spread_ms": entry["stats"]["iqr"] * 1e3,
            "rounds": entry["stats"]["rounds"],
            "peak_mb": info["peak_bytes"] / 1e6,
            "committed": info["committed"],
        }
    return [
        {
            "size": size,
            **ways,
            "speedup": ways["published"]["median_ms"] / ways["fdpp"]["median_ms"],
            "memory_ratio": ways["fdpp"]["peak_mb"] / ways["published"]["peak_mb"],
        }
        for size, ways in sizes.items()
    ]


def table(results: list[dict]) -> str:
    lines = ["| one step, V = 126,464, bf16 | published | fdpp | faster | extra memory, published | fdpp |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in results:
        published, ours = row["published"], row["fdpp"]
        lines.append(
            f"| {row['size']} | {published['median_ms']:.1f} ms | {ours['median_ms']:.2f} ms | {row['speedup']:.0f}x "
            f"| {published['peak_mb']:.0f} MB | {ours['peak_mb']:.1f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the result files")
    arguments = parser.parse_args()
    results = rows(json.loads(arguments.file.read_text())["benchmarks"])
    about = environment()
    device = "cpu" if about["device"].startswith("CPU") else re.sub(r"\W+", "-", about["device"].lower())
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"select-{device}.json"
    path.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    print(table(results), f"\n{about}\nwritten to {path}")


if __name__ == "__main__":
    main()
