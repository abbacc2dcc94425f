"""Fail if ours has become slower against the published way than this device's stored baseline allows.

`python bench/gate.py FILE` reads what `pytest bench/bench_gate.py --benchmark-json=FILE` measured. It compares ours
over the published way, each its fastest round of the same run: a busy machine slows both, and speeds up neither. The
baselines are `bench/baselines/<device>.json`. Without one the gate passes, says so and stores what it saw.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import measure

BASELINES = Path(__file__).parent / "baselines"
ALLOWED = 1.15 if measure.ON_GPU else 1.5
"""Slowdown a new baseline allows. A GPU's times in a graph repeat within a few percent; two shared CPU cores do not."""


def ratios(benchmarks: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over the published way, by group."""
    fastest: dict[str, dict[str, float]] = {}
    for entry in benchmarks:
        fastest.setdefault(entry["group"], {})[entry["extra_info"]["way"]] = entry["stats"]["min"]
    return {group: ways["fdpp"] / ways["published"] for group, ways in fastest.items()}


def compare(measured: dict[str, float], baseline: dict[str, Any]) -> list[str]:
    """A line for every group that is slower than allowed or was not measured; prints all of them."""
    allowed, problems = baseline["allowed"], []
    for group, before in baseline["ratios"].items():
        now = measured.get(group)
        if now is None:
            problems.append(f"{group}: not measured")
            continue
        line = (
            f"{group}: {1 / now:.2f}x the published way, baseline {1 / before:.2f}x: {now / before:.2f} times as slow"
        )
        print(line)
        if now / before > allowed:
            problems.append(f"{line}, at most {allowed} is allowed")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="folder of the baselines")
    parser.add_argument("--store", action="store_true", help="make this run the device's baseline")
    options = parser.parse_args(arguments)
    measured = ratios(json.loads(options.file.read_text())["benchmarks"])
    about = measure.environment()
    name = f"{measure.slug(about['device'])}.json"
    path, seen = options.baselines / name, {"environment": about, "allowed": ALLOWED, "ratios": measured}
    if options.store or not path.exists():
        target = path if options.store else options.file.with_name(f"baseline-{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(seen, indent=1) + "\n")
        if not options.store:
            print(
                f"gate: no baseline for {about['device']} yet; to make this run the baseline, copy {target} to {path}"
            )
        return 0
    problems = compare(measured, json.loads(path.read_text()))
    print("\n".join(["gate: failed", *problems]) if problems else "gate: passed")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
