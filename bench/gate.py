"""Fail if ours has become slower against the published way than this device's stored baseline allows.

`python bench/gate.py` times both in turn, pair by pair, and takes the median of the pairs' ratios: what else the
machine does reaches both. The exit status is

- 0 if no median is above what the baseline allows,
- 1 if one is, or if a group of the baseline was not measured,
- 75 (EX_TEMPFAIL) if the ratios of a group lie too far apart to tell: try again on a quieter machine.

The baselines are `bench/baselines/<device>.json`. Without one the gate passes, says so and stores what it saw.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import bench_gate
import measure

BASELINES = Path(__file__).parent / "baselines"
ALLOWED = 1.15 if measure.ON_GPU else 1.5
"""Slowdown a new baseline allows. A GPU's times in a graph repeat within a few percent; two shared CPU cores do not."""

PAIRS, SECONDS = 9, 4.0
"""At least so many pairs of a group, and pairs for so long."""


def pairs(only: str = "") -> dict[str, list[float]]:
    """Ours over the published way, pair by pair, of the groups whose name holds `only`."""
    found = {}
    for group, make in bench_gate.groups().items():
        if only in group:
            seconds = measure.in_turn(dict(zip(("fdpp", "published"), make(), strict=True)), PAIRS, SECONDS)
            found[group] = [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)]
    return found


def verdict(ratios: list[float], before: float, allowed: float) -> tuple[int, str]:
    """Exit status and a sentence of one group, whose baseline is `before`.

    The middle half of the pairs says how far to trust their median. If its ends are more than a factor of `allowed`
    apart, the median could be off by as much as a slowdown that matters; then only a middle half that is all within
    what is allowed says anything.
    """
    low, middle, high = (ratio / before for ratio in statistics.quantiles(ratios, n=4))
    if high <= allowed or (high / low <= allowed and middle <= allowed):
        return 0, f"{middle:.2f} times the baseline's time, ratios from {low:.2f} to {high:.2f}"
    if high / low > allowed:
        return os.EX_TEMPFAIL, f"too noisy to say: ratios from {low:.2f} to {high:.2f} times the baseline's"
    return 1, f"{middle:.2f} times as slow as the baseline, at most {allowed} is allowed"


def compare(measured: dict[str, list[float]], baseline: dict[str, Any]) -> int:
    """The exit status for all groups of `baseline`; prints a line for each."""
    statuses = []
    for group, before in baseline["ratios"].items():
        status, text = 1, "not measured"
        if group in measured:
            status, text = verdict(measured[group], before, baseline["allowed"])
        statuses.append(status)
        print(f"{group}: {text}")
    return 1 if 1 in statuses else max(statuses, default=0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "local", help="folder of the result file")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="folder of the baselines")
    parser.add_argument("--only", default="", metavar="TEXT", help="only groups whose name holds TEXT")
    parser.add_argument("--store", action="store_true", help="make this run the device's baseline")
    options = parser.parse_args(arguments)
    measured, about = pairs(options.only), measure.environment()
    written = measure.write(options.out, "gate", {"ratios": measured})
    name = f"{measure.slug(about['device'])}.json"
    path = options.baselines / name
    if options.store or not path.exists():
        medians = {group: statistics.median(ratios) for group, ratios in measured.items()}
        # Against itself: too noisy to say anything is too noisy to be compared with.
        if options.store and compare(measured, {"allowed": ALLOWED, "ratios": medians}):
            print("gate: not stored")
            return os.EX_TEMPFAIL
        target = path if options.store else options.out / f"baseline-{name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"environment": about, "allowed": ALLOWED, "ratios": medians}, indent=1) + "\n")
        if not options.store:
            print(
                f"gate: no baseline for {about['device']} yet; to make this run the baseline, copy {target} to {path}"
            )
        return 0
    baseline = json.loads(path.read_text())
    baseline["ratios"] = {group: ratio for group, ratio in baseline["ratios"].items() if options.only in group}
    status = compare(measured, baseline)
    print(f"gate: {({0: 'passed', 1: 'failed'}).get(status, 'too noisy to say, try again')}; pairs in {written}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
