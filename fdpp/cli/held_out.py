"""`fdpp demo`: the embedded model on held-out problems, live, then rule by rule in a table."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import torch
import transformers
from tqdm import tqdm

from fdpp import tiny
from fdpp.cli.live import LiveView, fit, is_live, paint
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models.llada import LLaDAModelLM
from fdpp.rules import Factor, Frechet, Quota, Rule, Threshold

SHOWN = Frechet(0.25)
"""The rule of the problems that are shown one by one."""

RULES: dict[str, Rule] = {rule.label(): rule for rule in (Quota(), Threshold(0.9), Factor(0.75), SHOWN)}
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
    model: LLaDAModelLM, tokenizer: Any, problems: list[tiny.Problem], rule: Rule, cache: str, streamer: Any = None
) -> Decoded:
    """Decode one batch of problems."""
    prompts = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt")
    config = DiffusionGenerationConfig(max_new_tokens=128, block_length=32, rule=rule, cache=cache)
    started = time.perf_counter()
    out: Any = model.generate(prompts["input_ids"], prompts["attention_mask"], config, streamer)
    seconds = time.perf_counter() - started
    responses = tokenizer.batch_decode(out.sequences[:, prompts["input_ids"].shape[1] :])
    texts = [response.split(tokenizer.eos_token)[0].strip() for response in responses]
    return Decoded(texts, round(float((out.tokens_per_forward * out.nfe).sum())), int(out.nfe.sum()), seconds)


def show(model: LLaDAModelLM, tokenizer: Any, problem: tiny.Problem, cache: str) -> None:
    """Decode one problem before the reader's eyes; plain lines where standard output is no terminal."""
    rule, out = SHOWN, sys.stdout
    live = is_live(out)
    width = shutil.get_terminal_size().columns - 1
    print(fill(problem.prompt, width) if live else problem.prompt)
    if live:
        with LiveView(tokenizer, model.config.mask_token_id, pause=PAUSE) as view:
            decoded = decode(model, tokenizer, [problem], rule, cache, view)
    else:
        decoded = decode(model, tokenizer, [problem], rule, cache)
    [text] = decoded.texts
    verdict = "correct" if tiny.is_exact(text, problem) else f"wrong, the answer is {problem.answer}"
    figures = f"{decoded.tokens} tokens, {decoded.nfe} forwards, {decoded.tokens / decoded.nfe:.2f} tokens per forward"
    print(paint(fill(text, width), "1") if live else text)
    print(f"{verdict}: {figures}\n", flush=True)


def table(model: LLaDAModelLM, tokenizer: Any, problems: list[tiny.Problem], cache: str) -> list[str]:
    """One line for each rule, under a head; a progress bar on standard error where that is a terminal."""
    lines = [f"{'rule':<13}  {'exact answers':>14}  {'NFE':>6}  {'tokens/forward':>14}  {'tok/s':>6}"]
    with tqdm(total=len(RULES) * len(problems), unit="problem", leave=False, disable=None) as bar:
        for name, rule in RULES.items():
            bar.set_description(name)
            exact = tokens = nfe = 0
            seconds = 0.0
            for start in range(0, len(problems), BATCH):
                batch = problems[start : start + BATCH]
                decoded = decode(model, tokenizer, batch, rule, cache)
                exact += sum(map(tiny.is_exact, decoded.texts, batch))
                tokens, nfe, seconds = tokens + decoded.tokens, nfe + decoded.nfe, seconds + decoded.seconds
                bar.update(len(batch))
            share = f"{exact}/{len(problems)} {exact / len(problems):4.0%}"
            per_second = f"{tokens / seconds:6.0f}"
            lines.append(f"{name:<13}  {share:>14}  {nfe / len(problems):6.1f}  {tokens / nfe:14.2f}  {per_second}")
    return [fit(sys.stdout, line, line.replace("é", "e")) for line in lines]


def run(problems: int, cache: str) -> int:
    """Show the first problems one by one, then all of them in a table; returns the exit code."""
    # The operators of so small a model are too short for two threads to share.
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    model, tokenizer = tiny.load()
    held_out = tiny.generate("held-out", problems)
    shown = held_out[:LIVE_PROBLEMS]
    rule = fit(sys.stdout, SHOWN.label(), SHOWN.label().replace("é", "e"))
    print(f"LLaDA, {model.num_parameters() / 1e6:.1f} M parameters, on held-out problems: {rule}, cache {cache}\n")
    for problem in shown:
        show(model, tokenizer, problem, cache)
    print(f"{problems} problems with every rule, in batches of {BATCH}", flush=True)
    print("\n".join(["", *table(model, tokenizer, held_out, cache)]))
    print("\nNFE: forwards per problem. Tokens and tok/s: the response's, without EOS and padding.")
    return 0
