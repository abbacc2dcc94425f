"""What quantised weights change in decodes of the embedded models: `python bench/quantised.py`.

For every task, two rules and the dual cache: right answers, responses that are those of float32's weights, forwards.
Weights are torchao's, by `fdpp.models.quantised`, as `fdpp generate --quantize` makes them. Runs that `--out` has are
not made again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import environment
from quality_report import interval
from quality_runs import batches, digest, named

import fdpp
from fdpp import tiny
from fdpp.models import quantised

RULES = (fdpp.Frechet(0.25), fdpp.Threshold(0.9))
WEIGHTS = ("float32", "bfloat16", *quantised.KINDS)
IN_BFLOAT16 = ("bfloat16", "float8-dynamic")
"""The rest stay in float32, so that nothing but the quantisation differs."""


def model_of(task: str, weights: str) -> tuple[fdpp.LLaDAModelLM, Any]:
    """A task's model with these weights, and its tokenizer."""
    model, tokenizer = tiny.load(task)
    if weights in IN_BFLOAT16:
        model = model.to(torch.bfloat16)
    if weights in quantised.KINDS:
        if weights == "float8-dynamic":  # PyTorch has these products on a CPU, and torchao and fdpp refuse them there
            importlib.import_module("torchao.quantization.quant_api")._check_hardware_support = lambda granularity: None
            quantised.check_kind = lambda kind, device, dtype: None
        model = quantised.quantise(model, weights, torch.device("cpu"))
    return model, tokenizer


def run(task: str, rule: fdpp.Rule, weights: str, count: int) -> dict[str, Any]:
    model, tokenizer = model_of(task, weights)
    problems = tiny.TASKS[task].generate("held-out", count)
    given = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    responses: list[list[int]] = [[]] * count
    right, nfe = 0, 0
    started = time.perf_counter()
    for batch in batches(given, model.config.mask_token_id):
        ids = torch.tensor([given[index] for index in batch])
        out: Any = model.generate(ids, rule=rule, cache="dual")
        nfe += int(out.nfe.sum())
        for index, row in zip(batch, out.sequences[:, ids.shape[1] :].tolist(), strict=True):
            right += tiny.TASKS[task].is_right(tokenizer.decode(row), problems[index])
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            responses[index] = row[:end]
    facts = {"task": task, "checkpoint": digest(task), "rule": named(rule), "weights": weights, "problems": count}
    return facts | {
        "right": right,
        "nfe": nfe / count,
        "seconds": time.perf_counter() - started,
        "responses": responses,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, from runs with their responses or with the number that are float32's."""
    lines = ["| task, rule | weights | right, % | as in float32 | NFE |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        count = row["problems"]
        low, high = interval(row["right"], count)
        share = f"{100 * row['right'] / count:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        same = "" if row["weights"] == "float32" else f"{row['same']} of {count}"
        said = [f"{row['task']}, `{row['rule']}`", row["weights"], share, same, f"{row['nfe']:.2f}"]
        lines.append(f"| {' | '.join(said)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--tasks", nargs="+", choices=tiny.TASKS, default=tuple(tiny.TASKS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/quantised.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    partial = arguments.out.with_suffix(".partial.json")
    source = partial if partial.exists() else arguments.out
    rows: list[dict[str, Any]] = json.loads(source.read_text())["runs"] if source.exists() else []
    keys = ("task", "checkpoint", "rule", "weights", "problems")
    for task in arguments.tasks:
        for rule in RULES:
            whole: dict[str, Any] | None = None
            for weights in dict.fromkeys(("float32", *arguments.weights)):
                key = (task, digest(task), named(rule), weights, arguments.problems)
                found = next((row for row in rows if tuple(row[name] for name in keys) == key), None)
                if found is None or (weights == "float32" and "responses" not in found):
                    rows = [row for row in rows if row is not found]
                    found = run(task, rule, weights, arguments.problems)
                    rows.append(found)
                    partial.write_text(json.dumps({"runs": rows}))
                    print(key, found["right"], f"{found['seconds']:.0f} s", flush=True)
                whole = found if weights == "float32" else whole
                if "responses" in found and whole is not None:
                    pairs = zip(found["responses"], whole["responses"], strict=True)
                    found["same"] = sum(one == other for one, other in pairs)
    order = {weights: at for at, weights in enumerate(WEIGHTS)}
    rows.sort(key=lambda row: (list(tiny.TASKS).index(row["task"]), row["rule"], order[row["weights"]]))
    kept = [{name: value for name, value in row.items() if name != "responses"} for row in rows]
    lines = ",\n".join(map(json.dumps, kept))
    arguments.out.write_text(f'{{"environment": {json.dumps(environment())},\n"runs": [\n{lines}\n]}}\n')
    partial.unlink(missing_ok=True)
    print(table(kept))


if __name__ == "__main__":
    main()
