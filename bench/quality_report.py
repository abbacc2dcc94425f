"""The tables of `make quality`, from its JSON alone: `python bench/quality_report.py bench/results/quality.json`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CACHES = {"none": "no cache", "prefix": "prefix", "dual": "dual"}
ONE = "Quota(1)"
BLOCKS = "-block"
"""What the name of a block-diffusion model ends with, behind that of its task."""
BEGINNINGS = (
    *("recent", "onward", "block"),
    *("short recent:4", "short recent:2", "short recent", "short onward", "short block"),
)
"""Runs with a partial refresh, by what blocks begin with (`quality_runs.REFRESHES`); "short": with short blocks."""


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.959964
    share, denominator = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / denominator
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / denominator
    return middle - half, middle + half


def plain(rows: Iterable[Row], task: str, how: str = "plain") -> list[Row]:
    """The runs of a task without drafts, in float32; "undivided": those that decode in one block."""
    return [row for row in rows if row["task"] == task and row["how"] == how and row["drafts"] == 1]


def is_calibrated(row: Row) -> bool:
    return bool(row["numbers"].get("calibration"))


def found(rows: Iterable[Row], **facts: Any) -> Row | None:
    """The first row with these facts."""
    return next((row for row in rows if all(row.get(fact) == value for fact, value in facts.items())), None)


def rules_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["rule"] for row in rows))


def table(head: str, rows: list[list[str]]) -> str:
    """Markdown; `head` are the columns' names, all but the first to the right."""
    names = head.split(" | ")
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(marks: str) -> str:
    """Right answers in % with their interval, from a run's "right"."""
    low, high = interval(marks.count("1"), len(marks))
    return f"{100 * marks.count('1') / len(marks):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def right(row: Row) -> str:
    return share(row["right"])


def right_of(most: int) -> Callable[[Row], str]:
    """`right`, with the number of problems if it is not `most`."""
    return lambda row: right(row) + (f" of {row['problems']}" if row["problems"] != most else "")


def cells(row: Row | None, *made: Callable[[Row], str]) -> list[str]:
    """What is said of a row, or nothing where there is none."""
    return ["" if row is None else make(row) for make in made]


def nfe(row: Row) -> str:
    return f"{row['nfe']:.2f} ± {row['nfe_error']:.2f}"


def nfe_of(row: Row, problems: int) -> float:
    """The mean NFE of a run's first `problems`, all of them or one of the shares that others take."""
    return float(row["nfe"] if problems == row["problems"] else row["nfe_of"][str(problems)])


def per_forward(row: Row) -> str:
    return f"{row['tokens_per_forward']:.2f}"


def fed(row: Row) -> str:
    """Positions fed per problem, with drafts and a rule's rows."""
    return f"{row['query_tokens']:.0f}"


def times_fed(row: Row, base: Row) -> str:
    """Positions fed against those of `base`; empty unless both have the same problems, which differ in that."""
    return f"{row['query_tokens'] / base['query_tokens']:.2f}x" if row["problems"] == base["problems"] else ""


def same(fact: str) -> Callable[[Row], str]:
    return lambda row: f"{row[fact]} of {row['problems']}" if fact in row else ""


def summary(rows: list[Row], cache: str) -> str:
    """Every rule that the LLaDAs of all tasks decoded with, a task beside the other."""
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if not task.endswith(BLOCKS)]
    own = {task: [row for row in plain(rows, task) if not is_calibrated(row)] for task in tasks}
    lines = []
    for rule in rules_of(row for of_task in own.values() for row in of_task):
        line = [found(own[task], rule=rule, cache=cache) for task in tasks]
        if all(row is not None for row in line):
            lines.append([f"`{rule}`", *(cell for row in line for cell in cells(row, right, nfe, fed))])
    head = "rule" + "".join(f" | {task}: right, % | NFE | positions fed" for task in tasks)
    return table(head, lines) if lines else ""


def rules_table(rows: list[Row], task: str) -> str:
    """Every rule with every cache."""
    own = [row for row in plain(rows, task) if not is_calibrated(row)]
    most = max((row["problems"] for row in own), default=0)
    head = "rule" + "".join(f" | {name}: right, % | NFE | tok/fwd | positions fed" for name in CACHES.values())
    lines = []
    for rule in rules_of(own):
        line = [f"`{rule}`"]
        for cache in CACHES:
            line += cells(found(own, rule=rule, cache=cache), right_of(most), nfe, per_forward, fed)
        lines.append(line + cells(found(own, rule=rule, cache="dual"), same("same_as_one")))
    return table(head + " | dual: same as one per step", lines)


def frontier(rows: list[Row], cost: str = "nfe") -> list[Row]:
    """The runs that no other beats: none is right as often or more often at the same `cost` or less."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[cost], -row["share"])):
        if not kept or row["share"] > kept[-1]["share"]:
            kept.append(row)
    return kept


def undivided_table(rows: list[Row], task: str) -> str:
    """Every rule with the whole response in one block, and why wrong decodes failed."""
    lines = []
    for row in plain(rows, task, "undivided"):
        said = row["failures"]
        counts = [str(said[kind]) for kind in ("wrong", "confidence", "coupling")]
        lines.append([f"`{row['rule']}`", right(row), nfe(row), per_forward(row), fed(row), *counts])
    return (
        table("rule | right, % | NFE | tok/fwd | positions fed | wrong | confidence | coupling", lines) if lines else ""
    )


def frontiers(rows: list[Row], task: str) -> str:
    """The frontiers of every cache, by forwards and by positions fed, a line each."""
    lines = []
    views = [(name, plain(rows, task), cache) for cache, name in CACHES.items()]
    for name, own, cache in (*views, ("no cache, one block", plain(rows, task, "undivided"), "none")):
        for by, cost, digits in (("NFE", "nfe", 2), ("positions fed", "query_tokens", 0)):
            best = frontier([row for row in own if row["cache"] == cache], cost)
            said = [f"`{row['rule']}` {100 * row['share']:.1f}% at {row[cost]:.{digits}f}" for row in best]
            lines += [f"- {name}, by {by}: {', '.join(said)}"] if said else []
    return "\n".join(lines)


def drafts_table(rows: list[Row], task: str) -> str:
    """NFE of the same problems without and with drafts, and how many responses stay."""
    own = [row for row in rows if row["task"] == task and row["how"] == "plain"]
    drafted = [row for row in own if row["drafts"] != 1]
    lines = []
    for rule, drafts in dict.fromkeys((row["rule"], row["drafts"]) for row in drafted):
        line, dual = [f"`{rule}`", str(drafts)], None
        for cache in CACHES:
            alone = found(own, rule=rule, cache=cache, drafts=1)
            row = found(drafted, rule=rule, cache=cache, drafts=drafts)
            if row is None or alone is None:
                line += ["", ""]
                continue
            line += [f"{nfe_of(alone, row['problems']):.1f} → {row['nfe']:.1f}", same("same_as_undrafted")(row)]
            dual = row["query_tokens"] / alone["query_tokens"] if cache == "dual" else dual
        lines.append([*line, "" if dual is None else f"{dual:.1f}x"])
    head = "rule | drafts" + "".join(f" | {name}: NFE | same response" for name in CACHES.values())
    return table(head + " | dual: positions fed", lines)


def pairs_table(rows: list[Row], task: str) -> str:
    """A block-diffusion model's runs beside those of the LLaDA of its task, with the dual cache."""
    pair, lines = (task.removesuffix(BLOCKS), task), []
    own = [row for row in rows if row["task"] == task and row["how"] == "plain"] if pair[0] != task else []
    for row in own:
        same = {"cache": "dual", "how": "plain", "numbers": row["numbers"], "drafts": row["drafts"]}
        line = [f"`{row['rule']}`" + ("" if row["drafts"] == 1 else f", drafts {row['drafts']}"), str(row["problems"])]
        for of in pair:
            beside = found(rows, task=of, **same, problems=row["problems"])
            line += cells(beside, right, nfe, per_forward, fed)
        lines.append(line)
    head = "rule | problems" + "".join(f" | {of}: right, % | NFE | tok/fwd | positions fed" for of in pair)
    return table(head, lines) if lines else ""


def bfloat16_lines(rows: list[Row], task: str) -> str:
    """How many responses drafts leave as they are in bfloat16."""
    drafted = [row for row in rows if row["task"] == task and row["how"] == "bfloat16" and row["drafts"] != 1]
    return "\n".join(
        f"- bfloat16, dual cache, `{row['rule']}`, {row['drafts']} drafts: {same('same_as_undrafted')(row)} as without"
        for row in drafted
    )


def against(rows: list[Row], task: str, how: str, name: str) -> str:
    """Runs made another way against the plain ones of the same rule, cache and problems."""
    lines = []
    for row in (row for row in rows if row["task"] == task and row["how"] == how):
        other = found(plain(rows, task), rule=row["rule"], cache=row["cache"])
        if other is None:
            continue
        pairs = list(zip(other["right"], row["right"], strict=False))
        first = share(other["right"][: row["problems"]])
        lost, won = pairs.count(("1", "0")), pairs.count(("0", "1"))
        before = f"{nfe_of(other, row['problems']):.2f}"
        said = [str(row["problems"]), first, before, right(row), nfe(row), f"{lost}, {won}", times_fed(row, other)]
        lines.append([f"`{row['rule']}`, {CACHES[row['cache']]}", *said])
    head = f"rule, cache | problems | plain: right, % | NFE | {name}: right, % | NFE | lost, won | positions fed"
    return table(head, lines) if lines else ""


def refreshes_table(rows: list[Row], task: str) -> str:
    """Partial refreshes against full ones, with the task's own blocks and with short ones."""
    lines = []
    for full, blocks in (("plain", "own"), ("short", "short")):
        names = {how: how.split()[-1] for how in BEGINNINGS if how.startswith("short") == (full == "short")}
        for base in (row for row in plain(rows, task, full) if row["cache"] == "dual"):
            same = {fact: base[fact] for fact in ("task", "cache", "drafts", "numbers")}
            partial = [row for how in names if (row := found(rows, **same, how=how)) is not None]
            for row in [base, *partial] if partial else []:
                lines.append([f"`{row['rule']}`, {blocks}", names.get(row["how"], "all"), *beside(row, base)])
    head = "rule, blocks | begin with | problems | right, % | NFE | positions fed | of all | lost, won | same responses"
    return table(head, lines) if lines else ""


def beside(row: Row, base: Row) -> list[str]:
    """A run with a partial refresh, and what changed against that with full ones."""
    said = [str(row["problems"]), right(row), nfe(row), fed(row)]
    if row is base:
        return [*said, "", "", ""]
    pairs = list(zip(base["right"], row["right"], strict=False))
    changed = f"{pairs.count(('1', '0'))}, {pairs.count(('0', '1'))}"
    return [*said, times_fed(row, base), changed, same("same_as_full")(row)]


def failures_table(rows: list[Row], task: str) -> str:
    """Why wrong decodes failed; pairs: of the couplings, those of two commits."""
    own = [row for row in plain(rows, task) if "failures" in row and not is_calibrated(row)]
    caches = [cache for cache in CACHES if cache != "prefix"]
    lines = []
    for rule in rules_of(own):
        line = [f"`{rule}`"]
        for cache in caches:
            row = found(own, rule=rule, cache=cache)
            said = None if row is None else row["failures"]
            kinds = ("wrong", "confidence", "coupling", "pairs", "never")
            line += [""] * 6 if said is None else [*(str(said[kind]) for kind in kinds), f"{said['commits']:.1f}"]
        lines.append(line)
    columns = "wrong | confidence | coupling | pairs | never | commits"
    return table("rule" + "".join(f" | {CACHES[cache]}: {columns}" for cache in caches), lines)


def calibration_table(scored: list[Row], task: str) -> str:
    lines = [
        [
            row["split"],
            str(row["problems"]),
            f"{row['proposals']:,}",
            *(f"{row[fact]:.4f}" for fact in ("error", "allowance", "allowance_mean")),
        ]
        for row in scored
        if row["task"] == task
    ]
    return table("split | problems | proposals | expected error | allowance | mean allowance", lines) if lines else ""


def bins_table(scored: list[Row], task: str) -> str:
    row = found(scored, task=task, split="held-out")
    if row is None:
        return ""
    lines = [
        [f"{b['from']:g}", f"{b['confidence']:.3f}", f"{b['correct']:.3f}", f"{b['count']:,}"] for b in row["bins"]
    ]
    return table("from | confidence | right | proposals", lines)


def calibrated_table(rows: list[Row], task: str) -> str:
    """`Frechet` with the measured calibration, against none."""
    own = plain(rows, task)
    caches = [cache for cache in CACHES if cache != "prefix"]
    lines = []
    for rule in rules_of(row for row in own if is_calibrated(row)):
        line = [f"`{rule}`"]
        for cache in caches:
            row = found(own, rule=rule, cache=cache)
            numbers = {} if row is None else row["numbers"] | {"calibration": 0.0}
            line += cells(row, right, nfe) + cells(found(own, numbers=numbers, cache=cache), right, nfe)
        lines.append(line)
    columns = "".join(f" | {CACHES[c]}: right, % | NFE | uncalibrated | NFE" for c in caches)
    return table("rule" + columns, lines) if lines else ""


def report(results: dict[str, Any]) -> str:
    """All tables, a chapter per task; those without a row are left out."""
    runs, scored = results["runs"], results["calibration"]
    parts = [f"## all tasks: {name}\n\n{text}" for cache, name in CACHES.items() if (text := summary(runs, cache))]
    for task in dict.fromkeys(row["task"] for row in [*runs, *scored]):
        chapters = {
            "every rule": rules_table(runs, task),
            "in one block": undivided_table(runs, task),
            "frontier": frontiers(runs, task),
            "drafts": drafts_table(runs, task),
            "drafts in bfloat16": bfloat16_lines(runs, task),
            "beside the same task's LLaDA": pairs_table(runs, task),
            "blocks that begin with two blocks fed": against(runs, task, "recent", "recent"),
            "partial refreshes": refreshes_table(runs, task),
            "weights in int8": against(runs, task, "int8", "int8"),
            "as holes": against(runs, task, "holes", "holes"),
            "why decodes failed": failures_table(runs, task),
            "calibration": calibration_table(scored, task),
            "calibration, held-out, bin by bin": bins_table(scored, task),
            "calibrated": calibrated_table(runs, task),
        }
        parts += [
            f"## {task}: {name}\n\n{text}"
            for name, text in chapters.items()
            if text.count("\n") > 1 or "- " in text[:2]
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("bench/results/quality.json"))
    print(report(json.loads(parser.parse_args().file.read_text())))
