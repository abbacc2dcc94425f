"""Every rule, cache and draft depth on held-out problems of the embedded model: `make quality`.

For each setting: exact answers with a 95% interval, NFE, tokens per forward (response tokens before EOS) and how many
responses are those of one position per step with the same cache. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import environment
from tqdm import tqdm

import fdpp
from fdpp import tiny

BATCH = 25
CACHES = ("none", "prefix", "dual")
ONE = "one per step"
MAIN: dict[str, fdpp.Rule] = {
    ONE: fdpp.Quota(1),
    "threshold 0.9": fdpp.Threshold(0.9),
    "factor 0.75": fdpp.Factor(0.75),
    "frechet 0.25": fdpp.Frechet(0.25),
    "entropy 0.1": fdpp.EntropyBound(0.1),
    "localleap": fdpp.LocalLeap(),
    "klass": fdpp.Klass(),
    "dawn": fdpp.Dawn(),
}
SWEEP: dict[str, fdpp.Rule] = {
    **{f"threshold {tau}": fdpp.Threshold(tau) for tau in (0.5, 0.6, 0.7, 0.8, 0.95, 0.99)},
    **{f"factor {f}": fdpp.Factor(f) for f in (0.25, 0.5, 1.0, 1.25, 1.5)},
    **{f"frechet {margin}": fdpp.Frechet(margin) for margin in (0.0, 0.1, 0.5, 0.75, 0.9)},
}
RULES = MAIN | SWEEP
DRAFTED: dict[str, tuple[tuple[str, int | str], ...]] = {
    "dual": ((ONE, 8), (ONE, "auto"), ("threshold 0.9", 8), ("frechet 0.25", 4), ("frechet 0.25", 8)),
    "prefix": ((ONE, 8), ("frechet 0.25", 4)),
    "none": ((ONE, 8), ("frechet 0.25", 4)),
}
SETTINGS: list[tuple[str, str, int | str]] = [
    *((rule, cache, 1) for rule in MAIN for cache in CACHES),
    *((rule, cache, drafts) for cache, drafted in DRAFTED.items() for rule, drafts in drafted),
    *((rule, "dual", 1) for rule in SWEEP),
]
"""Rule, cache and drafts of every run."""


def share_of(rule: str, cache: str, drafts: int | str, count: int) -> int:
    """How many of `count` problems a run takes: eight states of a hundred full forwards are dear, so a fifth."""
    return max(count // 5, 1) if (rule, drafts) == (ONE, 8) and cache != "dual" else count


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


def run(rule: str, cache: str, drafts: int | str, count: int) -> dict[str, Any]:
    """Decode `count` problems; responses are kept for the comparison with one per step."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    model, tokenizer = tiny.load()
    problems = tiny.generate("held-out", count)
    responses = [""] * count
    exact = tokens = nfe = queries = 0
    started = time.perf_counter()
    for batch in batches(problems):
        prompt = tokenizer([problems[index].prompt for index in batch], return_tensors="pt")["input_ids"]
        out: Any = model.generate(prompt, rule=RULES[rule], cache=cache, drafts=drafts, max_new_tokens=128)
        texts = tokenizer.batch_decode(out.sequences[:, prompt.shape[1] :])
        for index, text in zip(batch, texts, strict=True):
            responses[index] = text.split(tokenizer.eos_token)[0].strip()
            exact += tiny.is_exact(text, problems[index])
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


def calibration(count: int) -> list[dict[str, float]]:
    """Confidence against agreement: how often a masked position's proposal is what one per step commits there later."""
    torch.set_num_threads(1)
    model, tokenizer = tiny.load()
    confidences, agreements = [], []
    for problem in tiny.generate("held-out", count, seed=1):
        prompt = torch.tensor([tokenizer(problem.prompt)["input_ids"]])
        states: list[Any] = []
        tokens = torch.cat((prompt, torch.full((1, 128), model.config.mask_token_id)), dim=1)
        for first in range(prompt.shape[1], tokens.shape[1], 32):
            block = slice(first, first + 32)
            seen = []
            while True:
                with torch.no_grad():
                    logits = model.project(model.model(tokens)[:, block])
                step = fdpp.select(logits, tokens[:, block], rule=fdpp.Quota(1), mask_id=model.config.mask_token_id)
                seen.append((step.proposal, step.confidence))
                tokens[:, block] = step.tokens
                if not step.remaining:
                    break
            states += [(proposal, confidence, tokens[:, block]) for proposal, confidence in seen]
            if (tokens[:, block] == model.config.eos_token_id).any():
                break
        for proposal, confidence, final in states:
            masked = confidence > 0
            confidences += confidence[masked].tolist()
            agreements += (proposal == final)[masked].tolist()
    confidence, agreement = torch.tensor(confidences), torch.tensor(agreements).double()
    bins = []
    for low in torch.arange(0, 1, 0.05).tolist():
        chosen = (confidence >= low) & (confidence < low + 0.05 + 1e-9 * (low > 0.94))
        if chosen.any():
            bins.append(
                {
                    "confidence": float(confidence[chosen].mean()),
                    "agreement": float(agreement[chosen].mean()),
                    "count": int(chosen.sum()),
                }
            )
    return bins


def plot(results: dict[str, Any], folder: Path) -> None:
    """Accuracy against tokens per forward, and calibration; PNG and SVG."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fdpp"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    rows = [row for row in results["runs"] if row["cache"] == "dual" and row["drafts"] == 1]
    for kind in dict.fromkeys(name.split()[0] for name in RULES):
        group = [row for row in rows if row["rule"].split()[0] == kind]
        group.sort(key=lambda row: row["tokens_per_forward"])
        left.plot(
            [row["tokens_per_forward"] for row in group],
            [100 * row["exact"] for row in group],
            marker="o",
            markersize=4,
            label=kind,
        )
    left.set(xlabel="tokens per forward", ylabel="exact answers, %", title="dual cache, blocks of 32")
    left.legend(fontsize=8)
    bins = results["calibration"]
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    right.plot([b["confidence"] for b in bins], [b["agreement"] for b in bins], marker="o", markersize=4)
    right.set(xlabel="confidence", ylabel="agreement with one per step", title="calibration of the embedded model")
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"quality.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| rule | cache | drafts | exact answers, % (95% interval) | NFE | tokens per forward | same as one per step |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for row in runs:
        lines.append(
            f"| {row['rule']} | {row['cache']} | {row['drafts']} | {100 * row['exact']:.1f} ({100 * row['low']:.1f} "
            f"to {100 * row['high']:.1f}) | {row['nfe']:.1f} | {row['tokens_per_forward']:.2f} | "
            f"{row['agreement']} of {row['problems']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--no-sweep", action="store_true", help="leave out the rules' other margins and thresholds")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((tiny.CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:12]
    fresh: dict[str, Any] = {"checkpoint": digest, "problems": arguments.problems, "runs": [], "calibration": []}
    partial = arguments.out.with_suffix(".partial.json")
    results = json.loads(partial.read_text()) if partial.exists() else fresh
    if (results["checkpoint"], results["problems"]) != (digest, arguments.problems):
        results = fresh
    done = {(row["rule"], row["cache"], row["drafts"]) for row in results["runs"]}
    wanted = [s for s in SETTINGS if s[1] in arguments.caches and not (arguments.no_sweep and s[0] in SWEEP)]
    todo = [setting for setting in wanted if setting not in done]

    def save() -> None:
        partial.write_text(json.dumps(results))

    with ProcessPoolExecutor(arguments.jobs) as pool, tqdm(total=len(todo) + 1, unit="setting") as bar:
        runs = [pool.submit(run, *setting, share_of(*setting, arguments.problems)) for setting in todo]
        bins = None if results["calibration"] else pool.submit(calibration, 25)
        for future in as_completed(runs):
            results["runs"].append(future.result())
            save()
            bar.update()
        if bins is not None:
            results["calibration"] = bins.result()
            save()
        bar.update()

    results["runs"].sort(key=lambda row: SETTINGS.index((row["rule"], row["cache"], row["drafts"])))
    one = {row["cache"]: row["responses"] for row in results["runs"] if (row["rule"], row["drafts"]) == (ONE, 1)}
    undrafted = {(row["rule"], row["cache"]): row["responses"] for row in results["runs"] if row["drafts"] == 1}
    for row in results["runs"]:
        # A run of fewer problems takes the first of them.
        row["agreement"] = sum(map(str.__eq__, row["responses"], one[row["cache"]]))
        row["same_as_undrafted"] = sum(map(str.__eq__, row["responses"], undrafted[row["rule"], row["cache"]]))
    for row in results["runs"]:
        del row["responses"]
    plot(results, arguments.out.parent)
    arguments.out.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    partial.unlink()
    print(table(results["runs"]))


if __name__ == "__main__":
    main()
