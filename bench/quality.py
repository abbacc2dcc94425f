"""Every rule, cache and draft depth on held-out problems of the embedded model: `make quality`.

For each setting: exact answers with a 95% interval, NFE, tokens per forward (response tokens before EOS), and how many
responses equal those of one position per step with the same cache. With drafts also how many responses equal, token for
token, those of the same rule without drafts; this is counted in bfloat16 as well. A stopped run resumes where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import quality_plot
import torch
import transformers
from measure import environment
from tqdm import tqdm

import fdpp
from fdpp import tiny
from fdpp.tiny.problems import OPENINGS

BATCH = 25
CACHES = ("none", "prefix", "dual")
ONE = "one per step"


def called(rule: fdpp.Rule) -> str:
    """The rule's name, with its first number if the predicate alone decides."""
    by_number = type(rule).decide is fdpp.Rule.decide
    return f"{rule.name} {rule.params()[0]:g}" if by_number else str(rule.name)


# fdpp's own rules alone: one registered elsewhere may refuse a cache or drafts.
OWN = [kind for kind in fdpp.Rule.named().values() if kind.__module__.startswith("fdpp.")]
MAIN: dict[str, fdpp.Rule] = {ONE: fdpp.Quota(1)} | {called(kind()): kind() for kind in OWN if kind is not fdpp.Quota}
SWEEP: dict[str, fdpp.Rule] = {
    **{f"threshold {tau}": fdpp.Threshold(tau) for tau in (0.5, 0.6, 0.7, 0.8, 0.95, 0.99)},
    **{f"factor {f}": fdpp.Factor(f) for f in (0.25, 0.5, 1.0, 1.25, 1.5)},
    **{f"frechet {margin}": fdpp.Frechet(margin) for margin in (0.0, 0.1, 0.5, 0.75, 0.9)},
}
RULES = MAIN | SWEEP
FOUR = tuple((rule, 4) for rule in MAIN if rule != ONE)
DRAFTED: dict[str, tuple[tuple[str, int | str], ...]] = {
    "dual": ((ONE, 8), (ONE, "auto"), *FOUR, ("frechet 0.25", 8)),
    "prefix": ((ONE, 8), *FOUR),
    "none": ((ONE, 8), *FOUR),
}
SETTINGS: list[tuple[str, str, int | str]] = [
    *((rule, cache, 1) for rule in MAIN for cache in CACHES),
    *((rule, cache, drafts) for cache, drafted in DRAFTED.items() for rule, drafts in drafted),
    *((rule, "dual", 1) for rule in SWEEP),
]
"""Rule, cache and drafts of every run."""

IN_BFLOAT16: list[tuple[str, str, int | str]] = [
    (ONE, "dual", 8),
    ("threshold 0.9", "dual", 8),
    ("frechet 0.25", "dual", 8),
]
"""Runs whose drafts are also compared in bfloat16, where equal confidences are common."""


def share_of(rule: str, cache: str, drafts: int | str, count: int) -> int:
    """How many of `count` problems a run takes: fewer where drafts are slow, without the dual cache or with "auto"."""
    if drafts == 1 or (cache == "dual" and drafts != "auto"):
        return count
    return max(count // (10 if rule == ONE and cache != "dual" else 5), 1)


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.959964
    share, denominator = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / denominator
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / denominator
    return middle - half, middle + half


def batches(problems: list[tiny.Problem]) -> list[list[int]]:
    """Indices of problems whose prompts are equally long, at most 25 at a time."""
    groups: dict[int, list[int]] = {}
    for index, problem in enumerate(problems):
        groups.setdefault(len(problem.changes), []).append(index)
    return [group[first : first + BATCH] for group in groups.values() for first in range(0, len(group), BATCH)]


def run(rule: str, cache: str, drafts: int | str, count: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Decode `count` problems; responses are kept for comparisons, as the ids before EOS."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    model, tokenizer = tiny.load()
    model = model.to(dtype)
    problems = tiny.generate("held-out", count)
    responses: list[list[int]] = [[]] * count
    exact = tokens = nfe = queries = 0
    started = time.perf_counter()
    for batch in batches(problems):
        prompt = tokenizer([problems[index].prompt for index in batch], return_tensors="pt")["input_ids"]
        out: Any = model.generate(prompt, rule=RULES[rule], cache=cache, drafts=drafts, max_new_tokens=128)
        for index, ids in zip(batch, out.sequences[:, prompt.shape[1] :].tolist(), strict=True):
            responses[index] = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
            exact += tiny.is_exact(tokenizer.decode(ids), problems[index])
        tokens += round(float((out.tokens_per_forward * out.nfe).sum()))
        nfe, queries = nfe + int(out.nfe.sum()), queries + int(out.query_tokens.sum())
    low, high = interval(exact, count)
    return {
        "rule": rule,
        "cache": cache,
        "drafts": drafts,
        "problems": count,
        "exact": exact / count,
        "low": low,
        "high": high,
        "nfe": nfe / count,
        "tokens_per_forward": tokens / nfe,
        "query_tokens": queries / count,
        "seconds": time.perf_counter() - started,
        "responses": responses,
    }


def in_bfloat16(rule: str, cache: str, drafts: int | str, count: int) -> dict[str, Any]:
    """How many of `count` responses drafts leave unchanged, all in bfloat16."""
    drafted, alone = (run(rule, cache, d, count, torch.bfloat16)["responses"] for d in (drafts, 1))
    same = sum(map(list.__eq__, drafted, alone))
    return {"rule": rule, "cache": cache, "drafts": drafts, "problems": count, "same_as_undrafted": same}


def worded(problem: tiny.Problem) -> list[str]:
    """The right responses, which differ in how their lines open; the problem's own first."""
    openings = [" ".join(words).format(name=problem.prompt.split()[0]) for words in OPENINGS]
    texts = [re.sub(r"so \w+ \w+ (\d+)", rf"so {opening} \1", problem.response) for opening in openings]
    return sorted(texts, key=lambda text: text != problem.response)


@torch.no_grad()
def calibration(count: int) -> list[dict[str, float]]:
    """Confidence against correctness, over all steps of a decode without a cache that commits one position per step.

    A proposal is correct if it is the token of the right response at its position. Three responses are right, which
    open their lines differently. The one that counts is the one whose opening has a committed word, before that the
    problem's own. Positions after the response are not counted.
    """
    torch.set_num_threads(1)
    model, tokenizer = tiny.load()
    mask_id = model.config.mask_token_id
    confidences, corrects = [], []
    for problem in tiny.generate("held-out", count, seed=1):
        prompt = torch.tensor([tokenizer(problem.prompt)["input_ids"]])
        ways = torch.tensor([tokenizer(text)["input_ids"] for text in worded(problem)])
        openings = (ways != ways[0]).any(0)
        P, N = prompt.shape[1], ways.shape[1]
        tokens = torch.cat((prompt, torch.full((1, 128), mask_id)), dim=1)
        for first in range(P, P + N, 32):
            block = slice(first, first + 32)
            while tokens[:, block].eq(mask_id).any():
                logits = model.project(model.model(tokens)[:, block])
                step = fdpp.select(logits, tokens[:, block], rule=fdpp.Quota(1), mask_id=mask_id)
                said = ((ways == tokens[:, P : P + N]) & openings).any(1)
                wanted = ways[int(said.int().argmax())][first - P : first - P + 32]
                counted = tokens[0, block].eq(mask_id)[: len(wanted)].nonzero().flatten()
                confidences += step.confidence[0, counted].tolist()
                corrects += (step.proposal[0, counted] == wanted[counted]).tolist()
                tokens[:, block] = step.tokens
    confidence, correct = torch.tensor(confidences), torch.tensor(corrects).double()
    return binned(confidence, correct)


def binned(confidence: torch.Tensor, correct: torch.Tensor) -> list[dict[str, float]]:
    """Mean confidence, share of correct ones and count of `[n]` proposals, in bins of 0.05; the last one holds 1."""
    bins, place = [], (confidence.double() * 20).long().clamp(max=19)
    for i_bin in range(20):
        chosen = place == i_bin
        if chosen.any():
            bins.append(
                {
                    "confidence": float(confidence[chosen].mean()),
                    "correct": float(correct[chosen].mean()),
                    "count": int(chosen.sum()),
                }
            )
    return bins


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| rule | cache | drafts | exact answers, % (95% interval) | NFE | tokens per forward | same as one per step "
        "| as without drafts |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in runs:
        lines.append(
            f"| {row['rule']} | {row['cache']} | {row['drafts']} | {100 * row['exact']:.1f} ({100 * row['low']:.1f} "
            f"to {100 * row['high']:.1f}) | {row['nfe']:.1f} | {row['tokens_per_forward']:.2f} | "
            f"{row['agreement']} of {row['problems']} | "
            + (f"{row['same_as_undrafted']} of {row['problems']} |" if row["drafts"] != 1 else "|")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--no-sweep", action="store_true", help="leave out the sweeps of the rules' numbers")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((tiny.CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:12]
    fresh: dict[str, Any] = {
        "environment": environment(),
        "checkpoint": digest,
        "problems": arguments.problems,
        "runs": [],
        "bfloat16": [],
        "calibration": [],
    }
    partial = arguments.out.with_suffix(".partial.json")
    results = json.loads(partial.read_text()) if partial.exists() else fresh
    # Results of another version, another model or another number of problems are not resumed.
    same = [(r["environment"]["commit"], r["checkpoint"], r["problems"]) for r in (results, fresh)]
    results = results if same[0] == same[1] else fresh
    wanted = [s for s in SETTINGS if s[1] in arguments.caches and not (arguments.no_sweep and s[0] in SWEEP)]
    compared = [s for s in IN_BFLOAT16 if s[1] in arguments.caches]

    def key(row: dict[str, Any]) -> tuple[str, str, int | str]:
        return row["rule"], row["cache"], row["drafts"]

    def left(
        settings: list[tuple[str, str, int | str]], rows: list[dict[str, Any]]
    ) -> list[tuple[str, str, int | str]]:
        return [setting for setting in settings if setting not in map(key, rows)]

    started = time.monotonic()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        count = arguments.problems
        futures = {
            pool.submit(run, *setting, share_of(*setting, count)): "runs" for setting in left(wanted, results["runs"])
        }
        for setting in left(compared, results["bfloat16"]):
            futures[pool.submit(in_bfloat16, *setting, max(count // 5, 1))] = "bfloat16"
        if not results["calibration"]:
            futures[pool.submit(calibration, 25)] = "calibration"
        for future in tqdm(as_completed(futures), total=len(futures), unit="setting"):
            kind = futures[future]
            results[kind] = future.result() if kind == "calibration" else [*results[kind], future.result()]
            # Written whole or not at all, so that a run killed here can resume too.
            unfinished = partial.with_suffix(".tmp")
            unfinished.write_text(json.dumps(results))
            unfinished.replace(partial)

    results["runs"] = sorted(
        (row for row in results["runs"] if key(row) in wanted), key=lambda row: wanted.index(key(row))
    )
    one = {row["cache"]: row["responses"] for row in results["runs"] if (row["rule"], row["drafts"]) == (ONE, 1)}
    undrafted = {(row["rule"], row["cache"]): row["responses"] for row in results["runs"] if row["drafts"] == 1}
    for row in results["runs"]:
        # A run of fewer problems takes the first of them.
        row["agreement"] = sum(map(list.__eq__, row["responses"], one[row["cache"]]))
        row["same_as_undrafted"] = sum(map(list.__eq__, row["responses"], undrafted[row["rule"], row["cache"]]))
    for row in results["runs"]:
        del row["responses"]
    quality_plot.draw(results, arguments.out.parent)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    partial.unlink()
    print(table(results["runs"]))
    for row in results["bfloat16"]:
        same = f"{row['same_as_undrafted']} of {row['problems']}"
        print(f"in bfloat16, {row['rule']}, {row['cache']}, {row['drafts']} drafts: {same} as without drafts")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
