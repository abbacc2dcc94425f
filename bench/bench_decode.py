"""Whole decodes: `generate` against the published way, on the same weights in the same process.

`python bench/bench_decode.py --out FOLDER` writes `decode-<device>.json`. On a GPU: LLaDA-8B's shape with random
weights (or `--checkpoint PATH`), prompt 800, 256 new tokens, blocks of 32. On a CPU: the embedded model with real
rules, and a random model of 96 M parameters with LLaDA's vocabulary.

Random weights have no confidence profile, so their tokens per forward are set: both ways follow LLaDA's schedule with
as many steps as the published 4.24 (Fast-dLLM++) and 2.88 (threshold 0.9) tokens per forward would take, rounded up.

What a step costs outside of the model is the time of the same decode with a model that has its logits ready. Two
schedules differ only in the number of cached forwards, so their difference gives the time of one.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import published_decode
import torch
from measure import DEVICE, ON_GPU
from torch import Tensor

import fdpp
from fdpp import LLaDAConfig, LLaDAModelLM, tiny
from fdpp.decoding.config import DiffusionGenerationConfig
from fdpp.decoding.generate import with_token_ids

WAYS = ("published", "fdpp", "fdpp, compiled")
SET_TOKENS_PER_FORWARD = (4.24, 2.88)
TINY_RULES = (fdpp.Frechet(0.25), fdpp.Threshold(0.9))


@dataclass(frozen=True)
class Shape:
    """A model and what is decoded with it; `config` None is the embedded model."""

    config: LLaDAConfig | None
    prompt: int
    new: int
    batches: tuple[int, ...]
    block: int = 32


SPECIAL = ("mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id")


def ids(vocab_size: int) -> dict[str, int]:
    """A small vocabulary's size and special ids, which are its last ones."""
    return {"vocab_size": vocab_size} | {name: vocab_size - 1 - i for i, name in enumerate(SPECIAL)}


SHAPES: dict[str, Callable[[], Shape]] = {
    "8b": lambda: Shape(LLaDAConfig(mlp_hidden_size=12288), 800, 256, (1, 8, 32)),
    "100m": lambda: Shape(LLaDAConfig(d_model=320, n_layers=12, n_heads=5, mlp_hidden_size=864), 96, 64, (1,)),
    "tiny": lambda: Shape(None, 0, 128, (1, 8)),
    "smoke": lambda: Shape(LLaDAConfig(d_model=32, n_layers=2, n_heads=2, init_std=0.3, **ids(300)), 8, 16, (1, 3), 8),
}


def random_model(config: LLaDAConfig) -> LLaDAModelLM:
    """Random weights, made on the device; bfloat16 on a GPU. The mask's logit is 0, so that it is never proposed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if ON_GPU else torch.float32)
    try:
        with torch.device(DEVICE):
            model = LLaDAModelLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.get_output_embeddings().weight.data[config.mask_token_id] = 0.0
    return model


def random_prompts(model: Any, shape: Shape, B: int) -> Tensor:
    ordinary = min(getattr(model.config, name) for name in SPECIAL)
    return torch.randint(0, ordinary, (B, shape.prompt), generator=torch.Generator().manual_seed(B)).to(DEVICE)


def tiny_prompts(tokenizer: Any, B: int) -> Tensor:
    """Held-out problems of equal length, since the published decode ignores padding."""
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in tiny.generate("held-out", 40 * B)]
    lengths = [len(prompt) for prompt in prompts]
    common = max(set(lengths), key=lengths.count)
    return torch.tensor([prompt for prompt in prompts if len(prompt) == common][:B], device=DEVICE)


class Run:
    """One setting: how both ways decode it, with the real model or with one that has its logits ready."""

    def __init__(self, model: Any, prompt: Tensor, settings: DiffusionGenerationConfig) -> None:
        self.model, self.prompt = model, prompt
        self.settings = with_token_ids(settings, model.config)

    def published(self, forward: published_decode.Forward, settings: DiffusionGenerationConfig) -> tuple[Tensor, int]:
        return published_decode.decode(
            forward,
            self.prompt,
            blocks=settings.blocks(),
            rules=settings.block_rules(),
            cache=settings.cache,
            mask_id=self.model.config.mask_token_id,
        )

    def ready_logits(self, rows: int) -> Tensor:
        B, config = self.prompt.shape[0], self.model.config
        generator = torch.Generator(DEVICE).manual_seed(1)
        dtype = next(self.model.parameters()).dtype
        logits = torch.randn(B, rows, config.vocab_size, generator=generator, device=DEVICE, dtype=dtype)
        logits[..., config.mask_token_id] = -100.0
        return logits

    def published_without_model(self, settings: DiffusionGenerationConfig) -> Callable[[], Any]:
        logits = self.ready_logits(self.prompt.shape[1] + settings.max_new_tokens)

        def forward(tokens: Tensor, past: Any, replace: Any) -> tuple[Tensor, published_decode.Past]:
            return logits[:, : tokens.shape[1]], []

        return lambda: self.published(forward, settings)

    def without_model(self, settings: DiffusionGenerationConfig) -> Callable[[], Any]:
        config = self.model.config
        sizes: dict[str, Any] = {"d_model": 2, "n_layers": 1, "n_heads": 1, "mlp_hidden_size": 2}
        kept = {name: getattr(config, name) for name in (*SPECIAL, "vocab_size", "max_sequence_length")}
        hollow = random_model(LLaDAConfig(**sizes, **kept))
        logits = self.ready_logits(settings.block_length).view(-1, config.vocab_size)

        def forward(input_ids: Tensor, *_: Any, wanted: Any = None, **__: Any) -> Tensor:
            hidden = logits.new_empty(*input_ids.shape, 1)
            return hidden if wanted is None else hidden[:, wanted]

        hollow.model.forward = forward
        hollow.project = lambda hidden: logits[: hidden.numel()].view(*hidden.shape[:-1], -1)
        return lambda: hollow.generate(self.prompt, generation_config=settings)


def timed(decode: Callable[[], Any], repeats: int) -> tuple[Any, float, int]:
    """What a decode returns, its median time and its peak memory in bytes: everything on a GPU, its own on a CPU.

    The first decode, which compiles and captures, is not timed; of slow ones fewer than `repeats` are, to 5 seconds.
    """
    decode()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    peak = 0 if ON_GPU else measure.peak_bytes(decode)
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < 5.0):
        measure.synchronize()
        begin = time.perf_counter()
        result = decode()
        measure.synchronize()
        times.append(time.perf_counter() - begin)
    return result, statistics.median(times), torch.cuda.max_memory_reserved() if ON_GPU else peak


def release(model: Any) -> None:
    """Give back what nobody holds, and what `generate` has captured on `model`: it would count as the next one's."""
    model.forget_captures()
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()


def measured(
    model: Any, prompt: Tensor, settings: DiffusionGenerationConfig, repeats: int, compiled: bool = False
) -> dict[str, Any]:
    """One row of the results: both ways on one setting; `compiled`: ours once more after `compile_layers`."""
    run = Run(model, prompt, settings)
    settings, eos = run.settings, torch.tensor(run.settings.eos_token_id, device=DEVICE)
    row: dict[str, Any] = {}
    responses: dict[str, Tensor] = {}

    def note(way: str, decode: Callable[[], Any], read: Callable[[Any], tuple[Tensor, int]], bare: Any) -> None:
        try:
            result, seconds, peak = timed(decode, repeats)
            sequences, nfe = read(result)
            release(model)
            schedule = replace(settings, rule=fdpp.Quota(), steps=nfe, stop_at_eos=False)
            _, without, _ = timed(bare(schedule), repeats)
        except torch.OutOfMemoryError:
            row[way] = {"error": "out of memory"}
            return
        finally:
            release(model)
        responses[way] = sequences[:, prompt.shape[1] :]
        counted = torch.isin(responses[way], eos).cumsum(1) == 0 if settings.stop_at_eos else responses[way] >= 0
        outside = 1e3 * without / nfe
        row[way] = {
            "seconds": seconds,
            "nfe": nfe,
            "tokens": int(counted.sum()),
            "tokens_per_second": float(counted.sum()) / seconds,
            "ms_per_forward": 1e3 * seconds / nfe - outside,
            "ms_outside_model": outside,
            "peak_gb": peak / 1e9,
        }

    forward = published_decode.PublishedModel(model)
    note("published", lambda: run.published(forward, settings), lambda out: out, run.published_without_model)
    for way in ("fdpp", "fdpp, compiled")[: 1 + compiled]:
        model.compile_layers(way == "fdpp, compiled")
        note(
            way,
            lambda: model.generate(prompt, generation_config=settings),
            lambda out: (out.sequences, int(out.nfe.max())),
            run.without_model,
        )
    model.compile_layers(False)
    if {"published", "fdpp"} <= responses.keys():
        row["same_tokens"] = agreement(responses["published"], responses["fdpp"], eos if settings.stop_at_eos else None)
        row["speedup"] = row["published"]["seconds"] / row["fdpp"]["seconds"]
    return row


def agreement(published: Tensor, ours: Tensor, eos: Tensor | None) -> float:
    """The share of equal tokens, up to the published response's first EOS where decodes end there."""
    counted = torch.ones_like(ours, dtype=torch.bool)
    if eos is not None:
        counted = torch.isin(published, eos).cumsum(1).cumsum(1) <= 1
    return float((published == ours)[counted].double().mean())


def cached_forward(rows: list[dict[str, Any]], floor: float) -> None:
    """Add to the rows of one cache and batch what one cached forward takes, all in, from their difference."""
    for way in WAYS:
        runs = sorted((row[way] for row in rows if "seconds" in row.get(way, {})), key=lambda result: result["nfe"])
        if len(runs) == 2 and runs[0]["nfe"] < runs[1]["nfe"]:
            ms = 1e3 * (runs[1]["seconds"] - runs[0]["seconds"]) / (runs[1]["nfe"] - runs[0]["nfe"])
            for result in runs if ms > 0 else ():  # else all noise
                result |= {"ms_cached_forward": ms, "floor_percent": 100 * floor / ms}


def weight_bytes(model: Any) -> int:
    """What a forward must read of the weights: all but the embedding, unless it is the head as well."""
    skipped = None if model.config.weight_tying else model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not skipped)


def settings_of(name: str, shape: Shape, cache: str) -> list[tuple[str, DiffusionGenerationConfig]]:
    """What is decoded with one cache: the label of the tokens per forward, and the settings."""
    base = DiffusionGenerationConfig(max_new_tokens=shape.new, block_length=shape.block, cache=cache, stop_at_eos=False)
    if name == "tiny":
        rules = {f"{type(rule).__name__}({rule.params()[0]:g})": rule for rule in TINY_RULES}
        return [(label, replace(base, rule=rule, stop_at_eos=True)) for label, rule in rules.items()]
    steps = [math.ceil(shape.new / wanted) for wanted in SET_TOKENS_PER_FORWARD]
    return [(f"{shape.new / n:.2f}, set", replace(base, rule=fdpp.Quota(), steps=n)) for n in steps]


def order(shape: Shape, caches: list[str]) -> list[tuple[int, str]]:
    """Batch sizes and caches, the quick and telling ones first: a big batch without a cache takes longest."""
    return sorted(((B, cache) for B in shape.batches for cache in caches), key=lambda c: c[1] == "none" and c[0] > 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8b"] if ON_GPU else ["tiny", "100m"])
    parser.add_argument("--smoke", action="store_true", help="a very small model alone, to see that it runs")
    parser.add_argument("--checkpoint", help="a LLaDA checkpoint in place of random weights in the shape 8b")
    parser.add_argument("--caches", nargs="+", choices=("dual", "prefix", "none"), default=["dual", "prefix", "none"])
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes (default: those of the shape)")
    text = "measure batch 1 also with norm, rotation and gate fused by torch.compile (default: on a GPU)"
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=ON_GPU, help=text)
    parser.add_argument("--repeats", type=int, default=3, help="timed decodes of each (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no setting is begun")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "local", help="folder of the result file")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    bandwidth = measure.copy_bandwidth(1 << (31 if ON_GPU else 20 if options.smoke else 28))
    rate = measure.matmul_rate(
        8192 if ON_GPU else 64 if options.smoke else 1024, torch.bfloat16 if ON_GPU else torch.float32
    )
    results: dict[str, Any] = {"copy_gb_s": bandwidth / 1e9, "matmul_tflop_s": rate / 1e12, "rows": [], "left_out": []}
    for name in ["smoke"] if options.smoke else options.shapes:
        shape = SHAPES[name]()
        if options.batches:
            shape = replace(shape, batches=tuple(options.batches))
        if shape.config is None:
            model, tokenizer = tiny.load()
            model = model.to(DEVICE)
        elif name == "8b" and options.checkpoint:
            model = LLaDAModelLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16).to(DEVICE).eval()
        else:
            model = random_model(shape.config)
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))  # lays weights out as `generate` wants them
        weights = weight_bytes(model)
        for B, cache in order(shape, options.caches):
            prompt = tiny_prompts(tokenizer, B) if shape.config is None else random_prompts(model, shape, B)
            rows = []
            for label, settings in settings_of(name, shape, cache):
                facts = {"shape": name, "cache": cache, "batch": B, "tokens_per_forward": label}
                if time.monotonic() - began > options.budget:
                    results["left_out"].append(facts)
                    continue
                sizes = {"prompt": prompt.shape[1], "new": shape.new, "block": shape.block, "weight_gb": weights / 1e9}
                rows.append(
                    facts
                    | sizes
                    | measured(model, prompt, settings, options.repeats, compiled=options.compiled and B == 1)
                )
                print(facts, f"{rows[-1].get('speedup', math.nan):.2f}x", flush=True)
            if cache != "none" and name != "tiny":
                cached_forward(rows, 1e3 * weights / bandwidth)
            results["rows"] += rows
            written = measure.write(options.out, "decode", results)  # after each: who runs out of time keeps the rest
        release(model)
        del model
    print(f"written to {written}")


if __name__ == "__main__":
    main()
