"""The runs of `make quality`: which rules with which settings, and what one of them measures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import failures
import torch
import transformers
from quality_report import BEGINNINGS, interval

import fdpp
from fdpp import tiny

BATCH = 50
CACHES = ("none", "prefix", "dual")

FAMILIES: dict[str, tuple[fdpp.Rule, ...]] = {
    "Quota": tuple(fdpp.Quota(k) for k in (1, 2, 3)),
    "Threshold": tuple(fdpp.Threshold(tau) for tau in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)),
    "Factor": tuple(fdpp.Factor(f) for f in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)),
    "Frechet": tuple(fdpp.Frechet(margin) for margin in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)),
    "EntropyBound": tuple(fdpp.EntropyBound(gamma) for gamma in (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5)),
    "Budget": (
        fdpp.Budget(0.02),
        fdpp.Budget(),
        fdpp.Budget(rise=0.3),
        fdpp.Budget(0.02, rise=1.0),
        fdpp.Budget(rise=1.0),
        fdpp.Budget(sure=0.8, rise=1.0),
    ),
    "LocalLeap": (
        fdpp.LocalLeap(threshold=0.7, relaxed=0.5),
        fdpp.LocalLeap(),
        fdpp.LocalLeap(threshold=0.95, relaxed=0.85),
    ),
    "Klass": (fdpp.Klass(kl=0.1, window=1), fdpp.Klass(), fdpp.Klass(confidence=0.9)),
    "Dawn": (
        fdpp.Dawn(tau_induce=0.5, tau_low=0.55, tau_high=0.7),
        fdpp.Dawn(),
        fdpp.Dawn(tau_induce=0.85, tau_low=0.9, tau_high=0.95),
    ),
    "Editing": (fdpp.Editing(tau=0.7, edit=0.5), fdpp.Editing(tau=0.7), fdpp.Editing()),
    "Hierarchy": tuple(fdpp.Hierarchy(low) for low in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
    "Credit": tuple(fdpp.Credit(tau) for tau in (0.7, 0.8, 0.9, 0.95)),
    "Wino": (fdpp.Wino(), fdpp.Wino(cap=None)),
    "Revocable": tuple(fdpp.Revocable(rule) for rule in (fdpp.Frechet(0.25), fdpp.Threshold(0.7), fdpp.Threshold(0.9))),
    "Saber": (fdpp.Saber(),),
}
"""The rules by family, their numbers swept from one end to the other."""


def others_of(rule: fdpp.Rule) -> dict[str, Any]:
    """The fields of a rule that are not at their default."""
    values = {field.name: (getattr(rule, field.name), field.default) for field in dataclasses.fields(rule)}
    return {name: value for name, (value, default) in values.items() if value != default}


def is_default(rule: fdpp.Rule) -> bool:
    """Whether no field has another value than its default; a rule within must be at its own."""
    return all(isinstance(value, fdpp.Rule) and is_default(value) for value in others_of(rule).values())


ONE = fdpp.Quota(1)
DEFAULTS = [rule for family in FAMILIES.values() for rule in family if rule == ONE or is_default(rule)]
OF_BLOCKS = (fdpp.ThresholdQuota(0.85), fdpp.ThresholdLeftmost(), fdpp.EntropySum(), fdpp.LeftmostRun())
"""What block-diffusion models are decoded by as published, besides."""
FOUR = tuple((rule, 4) for rule in DEFAULTS if rule != ONE)
DRAFTED: dict[str, tuple[tuple[fdpp.Rule, int | str], ...]] = {
    "none": ((ONE, 8), *FOUR),
    "dual": ((ONE, 8), (ONE, "auto"), *FOUR, (fdpp.Frechet(), 8)),
}
SHARES = (1, 2, 4)
"""Tenths of the problems that slow runs take."""
THREE = (ONE, fdpp.Threshold(), fdpp.Frechet())
"""The rules that stand for all where something else is compared."""
REFRESHES = {
    "recent": "recent",
    "recent:2": "recent:2",
    "recent:4": "recent:4",
    "onward": "window:{block}:end",
    "block": "block",
}
"""What blocks begin with, as `refresh` has it."""
SHORT = {"sums": 16, "sudoku": 5, "stories": 6}
"""Block lengths of eight blocks or nine, where the task's own are two to four."""
REFRESHED = ("short", *BEGINNINGS)
EXPLAINED = ("sudoku", "stories", "stories-block")
"""Tasks whose wrong decodes are explained. A sum's answer can be right in a text that no right response holds."""
MARGINS = (0.0, 0.1, 0.25, 0.5, 0.75)
"""Of `Frechet` with the task's measured calibration."""


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        how: "plain"; "bfloat16" or "int8", the weights; "holes", puzzles to fill in; "undivided", the response in one
            block; one of `REFRESHES`; "short", blocks of `SHORT` positions, also followed by one of `REFRESHES`.
        problems: how many held-out ones, the first of them.
    """

    task: str
    rule: fdpp.Rule
    cache: str
    drafts: int | str = 1
    how: str = "plain"
    problems: int = 500

    def facts(self) -> dict[str, Any]:
        """What tells this run from all others, as the results keep it."""
        return {
            "task": self.task,
            "checkpoint": digest(self.task),
            "rule": named(self.rule),
            "numbers": self.rule.saved(),
            "cache": self.cache,
            "drafts": self.drafts,
            "how": self.how,
            "problems": self.problems,
        }


def key_of(row: dict[str, Any]) -> str:
    """The identity of a run, from its facts."""
    known = ("task", "checkpoint", "numbers", "cache", "drafts", "how", "problems")
    return json.dumps([row.get(fact) for fact in known], sort_keys=True)


@cache
def digest(task: str) -> str:
    """Of a task's weights."""
    return hashlib.sha256((tiny.MODELS[task].checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]


def named(rule: fdpp.Rule) -> str:
    """The rule as one writes it: its first number if the predicate alone decides, others where they are not default."""
    main = next(iter(rule.numbers), None) if type(rule).decide is fdpp.Rule.decide else None
    said = [] if main is None else [written(getattr(rule, main))]
    for field, value in others_of(rule).items():
        if field != main:
            said.append(named(value) if isinstance(value, fdpp.Rule) else f"{field}={written(value)}")
    return f"{type(rule).__name__}({', '.join(said)})"


def written(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else repr(value)


def tenths(task: str, rule: fdpp.Rule, cache: str, drafts: int | str, how: str) -> int:
    """How many tenths of the problems a run takes: fewer where it is slow, or where rules hardly differ."""
    if how in ("bfloat16", "int8"):
        return {"bfloat16": 2, "int8": 4}[how]
    if drafts == 1:
        if task == "sudoku":
            return 10 if how != "undivided" or rule in DEFAULTS else 4
        slow = task == "sums" and (cache == "none" or how in REFRESHED)
        return 4 if slow or rule not in DEFAULTS else 10
    if cache == "dual" and drafts != "auto":
        return 4
    return 1 if rule == ONE and cache != "dual" else 2


def settings_of(
    task: str, parts: Sequence[str], caches: Sequence[str], count: int, sweep: bool, allowance: float | None
) -> list[Setting]:
    """The runs of a task for these parts of `quality.PARTS`, each once; `allowance` is `Frechet`'s calibration.

    A block-diffusion model has the rules and the drafts: what it stores is exact, so that every cache decodes alike,
    nothing is refreshed, and its blocks are those of its training.
    """
    found: list[Setting] = []
    if task not in tiny.TASKS:
        parts, caches = [part for part in parts if part in ("rules", "drafts")], [at for at in caches if at == "dual"]

    def rules_of(swept: bool) -> list[fdpp.Rule]:
        return [rule for family in FAMILIES.values() for rule in family if swept or rule in DEFAULTS]

    def add(rules: Iterable[fdpp.Rule], at: str, drafts: int | str = 1, how: str = "plain") -> None:
        for rule in rules:
            problems = max(count * tenths(task, rule, at, drafts, how) // 10, 1)
            found.append(Setting(task, rule, at, drafts, how, problems))

    for at in caches:
        if "rules" in parts:
            # Without a cache sums and stories take longest, and the dual cache's sweep shows what theirs would.
            add(rules_of(sweep and (at == "dual" or (at == "none" and task == "sudoku"))), at)
            add(() if task in tiny.TASKS else OF_BLOCKS, at)
        if "drafts" in parts and at != "prefix":
            add(DEFAULTS, at)
            for rule, drafts in DRAFTED[at]:
                add([rule], at, drafts)
        if "calibration" in parts and allowance is not None and (at == "dual" or (at == "none" and task == "sudoku")):
            for calibration in (0.0, round(allowance, 4)):
                add([fdpp.Frechet(margin, calibration) for margin in MARGINS], at)
    if "dual" in caches:
        for how in ("recent", "int8"):
            if how in parts:
                add(THREE, "dual")
                add(THREE, "dual", how=how)
        if "refresh" in parts:
            add(THREE[1:], "dual")
            for how in REFRESHED:
                add(THREE[1:], "dual", how=how)
        if "drafts" in parts:
            add(THREE, "dual", 1, "bfloat16")
            add(THREE, "dual", 8, "bfloat16")
    if "undivided" in parts and task == "sudoku" and "none" in caches:
        add(rules_of(sweep), "none", how="undivided")
    if "holes" in parts and task == "sudoku" and "none" in caches:
        add(DEFAULTS, "none")
        add(DEFAULTS, "none", how="holes")
    return list(dict.fromkeys(found))


def batches(rows: Sequence[Sequence[int]], mask_id: int) -> list[list[int]]:
    """Indices of rows of ids that decode together, at most `BATCH`: equally long, with the same first mask."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        first = row.index(mask_id) if mask_id in row else -1
        groups.setdefault((len(row), first), []).append(index)
    return [group[first : first + BATCH] for group in groups.values() for first in range(0, len(group), BATCH)]


def model_of(task: str, how: str) -> tuple[Any, Any]:
    """The model of a task with the weights that `how` asks for, and its tokenizer."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    model, tokenizer = tiny.load(task)
    if how == "bfloat16":
        model = model.to(torch.bfloat16)
    if how == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    return model, tokenizer


def blocks_of(task: tiny.Task, how: str) -> dict[str, Any]:
    """The settings of `generate` that `how` asks for."""
    length = SHORT[task.name] if how.startswith("short") else task.block_length
    length = task.max_new_tokens if how == "undivided" else length
    refresh = REFRESHES.get(how.removeprefix("short "), "all").format(block=length)
    return {"block_length": length, "refresh": refresh}


def run(setting: Setting) -> dict[str, Any]:
    """Decode the problems of a setting: its facts, what was measured, and the `responses` as ids up to EOS."""
    task, how = tiny.MODELS[setting.task], setting.how
    model, tokenizer = model_of(setting.task, how)
    mask_id, eos = model.config.mask_token_id, tokenizer.eos_token_id
    problems = task.generate("held-out", setting.problems)
    given = [tokenizer(problem.holes if how == "holes" else problem.prompt)["input_ids"] for problem in problems]
    options: dict[str, Any] = {"rule": setting.rule, "cache": setting.cache, "drafts": setting.drafts}
    options |= blocks_of(task, how) | ({"max_new_tokens": 0} if how == "holes" else {})
    responses: list[list[int]] = [[]] * len(problems)
    right = [False] * len(problems)
    nfe = [0] * len(problems)
    tokens = queries = 0
    explains = setting.task in EXPLAINED and how in ("plain", "undivided") and setting.drafts == 1
    failed: list[failures.Failure] = []
    started = time.perf_counter()
    for batch in batches(given, mask_id):
        ids = torch.tensor([given[index] for index in batch])
        out: Any = model.generate(ids, **options)
        first = 0 if how == "holes" else ids.shape[1]
        for place, (index, row) in enumerate(zip(batch, out.sequences[:, first:].tolist(), strict=True)):
            nfe[index] = int(out.nfe[place])
            right[index] = task.is_right(tokenizer.decode(row), problems[index])
            responses[index] = row[: row.index(eos)] if eos in row else row
            if explains and not right[index]:
                words, steps = tokenizer.convert_ids_to_tokens(row), out.commit_step[place].tolist()
                failed.append(
                    failures.explained(words, steps, lambda said, of=problems[index]: task.completable(said, of))
                )
        tokens += round(float((out.tokens_per_forward * out.nfe).sum()))
        queries += int(out.query_tokens.sum())
    count = len(problems)
    shares = {max(count * part // 10, 1) for part in SHARES}
    low, high = interval(sum(right), count)
    return {
        **setting.facts(),
        "share": sum(right) / count,
        "low": low,
        "high": high,
        "nfe": sum(nfe) / count,
        "nfe_error": statistics.stdev(nfe) / math.sqrt(count) if count > 1 else 0.0,
        "tokens_per_forward": tokens / sum(nfe),
        "query_tokens": queries / count,
        "seconds": time.perf_counter() - started,
        "right": "".join("01"[each] for each in right),
        # Others take the first problems alone.
        "nfe_of": {str(n): sum(nfe[:n]) / n for n in shares} if setting.drafts == 1 else {},
        **({"failures": failures.counted(failed)} if explains else {}),
        "responses": responses,
    }
