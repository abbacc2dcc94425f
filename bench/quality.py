"""Every rule on held-out problems of the embedded models: `make quality`.

For each task and cache: every rule with its numbers swept, and with drafts; why wrong decodes failed; the weights in
int8; blocks that begin without feeding everything, also short ones; puzzles as holes; how well confidences are
calibrated, and `Frechet` with that. Of the block-diffusion model the rules and drafts, beside the same task's LLaDA.

A run is known by its task's weights, its number of problems and its settings. What `--out` or a stopped run has of them
is not measured again; runs of other weights, numbers or settings are dropped.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import calibration
import quality_plot
import quality_report
from measure import environment
from quality_runs import CACHES, DEFAULTS, ONE, Setting, digest, key_of, run, settings_of
from tqdm import tqdm

from fdpp import tiny

PARTS = ("rules", "undivided", "drafts", "recent", "refresh", "int8", "holes", "calibration")
CALIBRATED = 150
"""Problems of each split, for 500 decoded ones."""


def marks(responses: list[list[int]]) -> str:
    """Three characters a response: different ones agree once in 262,144."""
    digests = [hashlib.sha256(json.dumps(ids).encode()).digest() for ids in responses]
    return "".join(base64.b64encode(each)[:3].decode() for each in digests)


def marked(setting: Setting) -> dict[str, Any]:
    """A run with marks in place of its responses."""
    row = run(setting)
    return row | {"marks": marks(row.pop("responses"))}


def agreement(row: dict[str, Any], other: dict[str, Any]) -> int:
    """How many responses of a run are those of another, which may have more problems."""
    return sum(row["marks"][at : at + 3] == other["marks"][at : at + 3] for at in range(0, len(row["marks"]), 3))


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their agreement, and with marks only where other rows need them.

    "same_as_one": responses that are those of one per step with the same cache. "same_as_undrafted": those of the same
    rule without drafts. "same_as_full": those of the same rule and blocks with full refreshes. What a row of an earlier
    run says of this stays.
    """
    for row in (row for row in rows if "marks" in row):
        same = {"task": row["task"], "cache": row["cache"], "drafts": 1}
        one = quality_report.found(rows, **same, how="plain", numbers=ONE.saved())
        undrafted = quality_report.found(rows, **same, how=row["how"], numbers=row["numbers"])
        if one is not None and "marks" in one:
            row["same_as_one"] = agreement(row, one)
        if row["drafts"] != 1 and undrafted is not None and "marks" in undrafted:
            row["same_as_undrafted"] = agreement(row, undrafted)
        if row["how"] in quality_report.BEGINNINGS:
            blocks = "short" if row["how"].startswith("short") else "plain"
            full = quality_report.found(rows, **same, how=blocks, numbers=row["numbers"])
            if full is not None and "marks" in full and len(full["marks"]) >= len(row["marks"]):
                row["same_as_full"] = agreement(row, full)
    defaults = [rule.saved() for rule in DEFAULTS]
    done = [row for row in rows if row["drafts"] != 1 or row["numbers"] not in defaults]
    for row in done:
        row.pop("marks", None)
    return rows


def written(results: dict[str, Any]) -> str:
    """As JSON, a run on a line."""
    lists = {name: value for name, value in results.items() if isinstance(value, list)}
    rest = json.dumps({name: value for name, value in results.items() if name not in lists})[1:-1]
    parts = [f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in lists.items()]
    return "{" + ",\n".join([rest, *parts]) + "}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", choices=tiny.MODELS, default=tuple(tiny.MODELS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--no-sweep", action="store_true", help="leave out the sweeps of the rules' numbers")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    arguments = parser.parse_args()
    started, count = time.monotonic(), arguments.problems
    parts = [part for part in arguments.only if part != "int8" or importlib.util.find_spec("torchao")]
    if len(parts) < len(arguments.only):
        print("int8 is left out: torchao is not installed")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_suffix(".partial.json")
    results = {"environment": environment(), "runs": [], "calibration": []}
    for path in (arguments.out, partial):
        if path.exists():
            stored = json.loads(path.read_text())
            results |= {name: stored.get(name, []) for name in ("runs", "calibration")}

    def keep(kind: str, row: dict[str, Any]) -> None:
        results[kind].append(row)
        # Written whole or not at all, so that a run killed here can resume too.
        unfinished = partial.with_suffix(".tmp")
        unfinished.write_text(written(results))
        unfinished.replace(partial)

    few = max(count * CALIBRATED // 500, 1)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        now = {task: digest(task) for task in tiny.MODELS if task in arguments.tasks or known(results, task)}
        results["calibration"] = [
            row
            for row in results["calibration"]
            if (row.get("checkpoint"), row.get("problems")) == (now.get(row.get("task")), few)
        ]
        done = [(row["task"], row["split"]) for row in results["calibration"]]
        scored = [task for task in arguments.tasks if task in tiny.TASKS and "calibration" in parts]
        wanted = [(task, split) for task in scored for split in ("train", "held-out")]
        futures = [pool.submit(calibration.scored, *each, few) for each in wanted if each not in done]
        for future in tqdm(as_completed(futures), total=len(futures), unit="split", disable=not futures):
            keep("calibration", future.result())
        allowances = {row["task"]: row["allowance"] for row in results["calibration"] if row["split"] == "train"}

        every = [s for task in now for s in settings_of(task, PARTS, CACHES, count, True, allowances.get(task))]
        order = list(dict.fromkeys(key_of(setting.facts()) for setting in every))
        rows = {key_of(row): row for row in results["runs"]}
        results["runs"] = [rows[key] for key in order if key in rows]
        asked = [
            setting
            for task in arguments.tasks
            for setting in settings_of(
                task, parts, arguments.caches, count, not arguments.no_sweep, allowances.get(task)
            )
            if key_of(setting.facts()) not in rows
        ]
        futures = [pool.submit(marked, setting) for setting in asked]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", disable=not futures):
            keep("runs", future.result())

    results["runs"] = compared(sorted(results["runs"], key=lambda row: order.index(key_of(row))))
    results["calibration"].sort(key=lambda row: (list(tiny.MODELS).index(row["task"]), row["split"]))
    arguments.out.write_text(written(results))
    partial.unlink(missing_ok=True)
    quality_plot.draw(results, arguments.out.parent)
    report = quality_report.report(results)
    head = "# Quality\n\nWritten by `make quality`, see [bench/README.md](../README.md#quality); do not edit it.\n\n"
    arguments.out.with_suffix(".md").write_text(f"{head}{report}\n")
    print(report)
    print(f"{time.monotonic() - started:.0f} s")
    never = sum(row["failures"]["never"] for row in results["runs"] if "failures" in row)
    if never:
        raise SystemExit(
            f"{never} wrong decodes left a right response after every step: is_right and completable differ"
        )


def known(results: dict[str, Any], task: str) -> bool:
    return any(row.get("task") == task for kind in ("runs", "calibration") for row in results[kind])


if __name__ == "__main__":
    main()
