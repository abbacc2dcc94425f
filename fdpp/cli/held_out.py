"""`fdpp demo`: an embedded model on held-out problems, live, then rule by rule in a table."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fdpp import tiny
from fdpp.cli.terminal import fit, is_live, paint
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.rules import Budget, EntropyBound, Factor, Frechet, Quota, Rule, Threshold
from fdpp.tiny import sudoku

if TYPE_CHECKING:
    from fdpp.models.language_model import DiffusionLM

RULES: tuple[Rule, ...] = (
    Quota(),
    Threshold(0.9),
    Factor(0.75),
    Frechet(0.5),
    Frechet(0.25),
    EntropyBound(0.1),
    Budget(),
)
"""The rules of the table."""

SHOWN = Budget()
"""The rule of the problems that are shown one by one."""

ROWS = {"sudoku": sudoku.SIDE + 1}
"""By task: the tokens of a row with the sign that ends it, where prompt and response are grids."""

PROBLEMS = 100
LIVE_PROBLEMS = 3
PAUSE = 0.15
BATCH = 16


@dataclass(frozen=True)
class Decoded:
    """Responses to some problems, cut before EOS, and what they cost."""

    texts: list[str]
    tokens: int
    nfe: int
    seconds: float


def decode(
    model: DiffusionLM,
    tokenizer: Any,
    task: tiny.Task,
    problems: Sequence[Any],
    rule: Rule,
    cache: str,
    streamer: Any = None,
) -> Decoded:
    """Decode one batch of a task's problems."""
    prompts = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt")
    config = DiffusionGenerationConfig(
        max_new_tokens=task.max_new_tokens, block_length=task.block_length, rule=rule, cache=cache
    )
    started = time.perf_counter()
    out: Any = model.generate(prompts["input_ids"], prompts["attention_mask"], config, streamer)
    seconds = time.perf_counter() - started
    responses = tokenizer.batch_decode(out.sequences[:, prompts["input_ids"].shape[1] :])
    texts = [response.split(tokenizer.eos_token)[0].strip() for response in responses]
    return Decoded(texts, round(float((out.tokens_per_forward * out.nfe).sum())), int(out.nfe.sum()), seconds)


def laid_out(task: tiny.Task, text: str) -> str:
    """A prompt or response as a terminal shows it: a line for every row of a grid, or wrapped by words."""
    if task.name in ROWS:
        return text.replace(f" {sudoku.ROW_END} ", "\n")
    return fill(text, shutil.get_terminal_size().columns - 1)


def verdict(task: tiny.Task, text: str, problem: Any) -> str:
    if task.is_right(text, problem):
        return "correct"
    answer = getattr(problem, "answer", None)
    return "wrong" if answer is None else f"wrong, the answer is {answer}"


def show(model: DiffusionLM, tokenizer: Any, task: tiny.Task, problem: Any, cache: str) -> None:
    """Decode one problem before the reader's eyes; plain lines where standard output is no terminal."""
    live = is_live(sys.stdout)
    print(laid_out(task, problem.prompt) if live else problem.prompt)
    if live:
        from fdpp.cli.live import LiveView

        with LiveView(tokenizer, model.config.mask_token_id, pause=PAUSE, row=ROWS.get(task.name)) as view:
            decoded = decode(model, tokenizer, task, [problem], SHOWN, cache, view)
    else:
        decoded = decode(model, tokenizer, task, [problem], SHOWN, cache)
    [text] = decoded.texts
    figures = f"{decoded.tokens} tokens, {decoded.nfe} forwards, {decoded.tokens / decoded.nfe:.2f} tokens per forward"
    print(paint(laid_out(task, text), "1") if live else text)
    print(f"{verdict(task, text, problem)}: {figures}\n", flush=True)


def table(model: DiffusionLM, tokenizer: Any, task: tiny.Task, problems: Sequence[Any], cache: str) -> list[str]:
    """One line for each rule, under a head; a progress bar on standard error where that is a terminal."""
    lines = [f"{'rule':<13}  {'right answers':>14}  {'NFE':>6}  {'tokens/forward':>14}  {'tok/s':>6}"]
    with tqdm(total=len(RULES) * len(problems), unit="problem", leave=False, disable=None) as bar:
        for rule in RULES:
            name = rule.label()
            bar.set_description(name)
            right = tokens = nfe = 0
            seconds = 0.0
            for start in range(0, len(problems), BATCH):
                batch = problems[start : start + BATCH]
                decoded = decode(model, tokenizer, task, batch, rule, cache)
                right += sum(map(task.is_right, decoded.texts, batch))
                tokens, nfe, seconds = tokens + decoded.tokens, nfe + decoded.nfe, seconds + decoded.seconds
                bar.update(len(batch))
            share = f"{right}/{len(problems)} {right / len(problems):4.0%}"
            per_second = f"{tokens / seconds:6.0f}"
            lines.append(f"{name:<13}  {share:>14}  {nfe / len(problems):6.1f}  {tokens / nfe:14.2f}  {per_second}")
    return [fit(sys.stdout, line, line.replace("é", "e")) for line in lines]


def run(name: str, problems: int, cache: str) -> int:
    """Show the first problems of a task one by one, then all of them in a table; returns the exit code."""
    import transformers

    # The operators of so small a model are too short for two threads to share.
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    task = tiny.MODELS[name]
    model, tokenizer = tiny.load(name)
    held_out = task.generate("held-out", problems)
    rule = fit(sys.stdout, SHOWN.label(), SHOWN.label().replace("é", "e"))
    family, size = model.title(), f"{model.num_parameters() / 1e6:.1f} M parameters"
    print(f"{family}, {size}, on held-out problems of {name}: {rule}, cache {cache}\n")
    for problem in held_out[:LIVE_PROBLEMS]:
        show(model, tokenizer, task, problem, cache)
    print(f"{problems} problems with every rule, in batches of {BATCH}", flush=True)
    print("\n".join(["", *table(model, tokenizer, task, held_out, cache)]))
    print("\nNFE: forwards per problem. Tokens and tok/s: the response's, without EOS and padding.")
    return 0
