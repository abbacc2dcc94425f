"""Whole decodes: `generate` against the published way, on the same weights in the same process.

`python bench/bench_decode.py --out FOLDER` writes `decode-<device>.json`.

- On a GPU: LLaDA-8B's shape with random weights (or `--checkpoint PATH`), prompt 800, 256 new tokens, blocks of 32.
- On a CPU: the embedded model with real rules, and a random model of 96 M parameters with LLaDA's vocabulary.
- Named by `--shapes`: the shapes of Dream-7B and SDAR-4B, on a GPU, and random ones of 96 M parameters with their
  vocabularies, SDAR with blocks of 4 and of 32.

Random weights give no real confidence profile, so their tokens per forward are set. Both ways follow LLaDA's schedule,
with the steps that the published 4.24 (Fast-dLLM++) and 2.88 (threshold 0.9) tokens per forward take, rounded up.
The published way decides one token of Dream's in the forward that begins a block with a cache, and as many in all of
its steps; the tokens are then others than ours.
The forwards by which SDAR's published way stores the prompt and every block decide nothing, and are not among the
tokens per forward that are set.

`--headline` takes the figures of a first run on a GPU, the most telling first: batch 1, 4.24 tokens per forward, dual
and prefix cache, prompts of 800 tokens and of 801 (which is padded up to a bucket).

- `ms_outside_model`: the same decode with a model whose logits are ready, per forward.
- `ms_cached_forward`: two schedules differ only in their number of cached forwards, so their difference gives the time
  of one.
- `steps`: mean time of a full step, `ms_refresh`, and of the others, `ms_step`.
  - Ours lie between CUDA events around replays of the captured steps: without the host's work between two steps, and
    on a finished block, so that the selection reads no logits (some 10 us).
  - The published ones, in one more decode, last from one forward's call to the next's, synchronised: with the selection
    and the host.

Results are written after each way of each setting. A failure is recorded as its error.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import published_decode
import torch
from measure import DEVICE, ON_GPU
from torch import Tensor
from transformers import PretrainedConfig

import fdpp
from fdpp import DreamConfig, FastDLLMConfig, LLaDA2Config, LLaDAConfig, LLaDAModelLM, SDARConfig, tiny
from fdpp.decoding.advance import Advance, stop_ids
from fdpp.decoding.generate import with_token_ids
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.static import arenas_of
from fdpp.models.families import families

WAYS = ("published", "fdpp", "fdpp, compiled")
SET_TOKENS_PER_FORWARD = (4.24, 2.88)
FACTS = ("shape", "cache", "batch", "prompt", "tokens_per_forward")
TINY_RULES = (fdpp.Frechet(0.25), fdpp.Threshold(0.9), fdpp.Quota(1))


@dataclass(frozen=True)
class Shape:
    """A model and what is decoded with it.

    Attributes:
        config: None is the embedded model.
        prompt, new, block: tokens of each.
        rates: tokens per forward of random weights, rounded to a number of steps.
    """

    config: PretrainedConfig | None
    prompt: int
    new: int
    batches: tuple[int, ...]
    block: int = 32
    engine: str = "auto"
    rates: tuple[float, ...] = SET_TOKENS_PER_FORWARD
    caches: tuple[str, ...] = ("dual", "prefix", "none")


SPECIAL = ("mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id")


def ids(vocab_size: int) -> dict[str, int]:
    """A small vocabulary's size and special ids, which are its last ones."""
    return {"vocab_size": vocab_size} | {name: vocab_size - 1 - i for i, name in enumerate(SPECIAL)}


def dream(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> DreamConfig:
    """Dream with the vocabulary and the ids of Dream-7B."""
    return DreamConfig(
        vocab_size=152064,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        rope_theta=1e6,
        eos_token_id=151643,
    )


def sdar(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> SDARConfig:
    """SDAR with the vocabulary and the ids of SDAR-4B."""
    return SDARConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_theta=1e6,
        eos_token_id=151643,
    )


def fast_dllm_v2() -> FastDLLMConfig:
    """Fast-dLLM v2 of 7 B parameters."""
    return FastDLLMConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_theta=1e6,
    )


def small_sdar(block: int, *rates: float) -> Shape:
    """96 M parameters. Both caches are the same."""
    return Shape(sdar(256, 1152, 15, 8, 2, 64), 96, 64, (1,), block, rates=rates, caches=("dual",))


SHAPES: dict[str, Callable[[], Shape]] = {
    "8b": lambda: Shape(LLaDAConfig(mlp_hidden_size=12288), 800, 256, (1, 8, 32)),
    "100m": lambda: Shape(LLaDAConfig(d_model=320, n_layers=12, n_heads=5, mlp_hidden_size=864), 96, 64, (1,)),
    "dream-7b": lambda: Shape(dream(3584, 18944, 28, 28, 4), 800, 256, (1, 8, 32)),
    "dream-100m": lambda: Shape(dream(256, 1376, 15, 8, 2), 96, 64, (1,)),
    "sdar-4b": lambda: Shape(sdar(2560, 9728, 36, 32, 8, 128), 800, 256, (1,), 4, rates=(2.0, 1.0), caches=("dual",)),
    "sdar-100m": lambda: small_sdar(4, 4.0, 2.0, 1.0),
    "sdar-100m-32": lambda: small_sdar(32, 4.0, 2.0),
    "fast-dllm-v2-7b": lambda: Shape(fast_dllm_v2(), 800, 256, (1,)),
    "llada2-mini": lambda: Shape(LLaDA2Config(), 800, 256, (1,)),
    "tiny": lambda: Shape(None, 0, 128, (1, 8)),
    "smoke": lambda: Shape(
        LLaDAConfig(d_model=32, n_layers=2, n_heads=2, init_std=0.3, **ids(300)), 8, 16, (1, 3), 8, "static"
    ),
}


def random_model(config: PretrainedConfig) -> Any:
    """Random weights, made on the device; bfloat16 on a GPU. The mask's logit is 0, so that it is never proposed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if ON_GPU else torch.float32)
    try:
        with torch.device(DEVICE):
            model = families()[config.model_type](config).eval()
    finally:
        torch.set_default_dtype(before)
    model.get_output_embeddings().weight.data[config.mask_token_id] = 0.0
    return model


def special(config: PretrainedConfig) -> dict[str, int]:
    """The special ids that a model has."""
    return {name: getattr(config, name) for name in SPECIAL if getattr(config, name, None) is not None}


def random_prompts(model: Any, B: int, length: int) -> Tensor:
    ordinary = min(special(model.config).values())
    return torch.randint(0, ordinary, (B, length), generator=torch.Generator().manual_seed(B)).to(DEVICE)


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
        if self.model.block_causal:
            new, block = settings.max_new_tokens, settings.per_block
            return published_decode.decode_blocks(
                forward,
                self.prompt,
                new=new,
                block=block,
                rules=settings.rule.successive(0, block, max(new, block), settings.steps),
                mask_id=self.model.config.mask_token_id,
            )
        return published_decode.decode(
            forward,
            self.prompt,
            blocks=settings.blocks(),
            rules=self.published_rules(settings),
            cache=settings.cache,
            mask_id=self.model.config.mask_token_id,
            shift=self.model.shift,
        )

    def published_model(self) -> published_decode.PublishedModel:
        if self.model.block_causal:
            return published_decode.PublishedBlockModel(self.model, self.settings.per_block)
        return published_decode.PublishedModel(self.model)

    def published_rules(self, settings: DiffusionGenerationConfig) -> list[list[fdpp.Rule]]:
        """The rules of each block's steps; where the first one decides one token, the others share the rest."""
        rules = settings.block_rules()
        if not self.model.shift or settings.cache == "none" or settings.steps is None:
            return rules
        found = []
        for (start, stop), steps in zip(settings.blocks(), rules, strict=True):
            left, n = stop - start, 0
            while left > 0:
                left, n = left - steps[min(n, len(steps) - 1)].params()[0], n + 1
            others = max(n - 1, 1)
            share, more = divmod(stop - start - 1, others)
            found.append([fdpp.Quota(1), *(fdpp.Quota(share + (i < more)) for i in range(others))])
        return found

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
            return logits[:, : tokens.shape[1]], past or []

        return lambda: self.published(forward, settings)

    def without_model(self, settings: DiffusionGenerationConfig) -> Callable[[], Any]:
        config = self.model.config
        sizes = {"hidden_size": 2, "intermediate_size": 2}
        sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
        sizes |= {name: getattr(config, name) for name in ("vocab_size", "max_position_embeddings")}
        sizes |= {"head_dim": 2} if hasattr(config, "head_dim") else {}
        hollow = random_model(type(config)(**sizes, **special(config)))
        logits = self.ready_logits(settings.per_block).view(-1, config.vocab_size)

        def forward(input_ids: Tensor, *_: Any, wanted: Any = None, **__: Any) -> Tensor:
            hidden = logits.new_empty(*input_ids.shape, 1)
            return hidden if wanted is None else hidden[:, wanted]

        hollow.model.forward = forward
        hollow.project = lambda hidden: logits[: hidden.numel()].view(*hidden.shape[:-1], -1)
        return lambda: hollow.generate(self.prompt, generation_config=settings)


def timed(decode: Callable[[], Any], repeats: int) -> tuple[Any, float, int]:
    """What a decode returns, its median time and its peak memory in bytes: everything on a GPU, its own on a CPU.

    The first decode compiles and captures, and is not timed. After 5 seconds no further repeat is started.
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
    """Free unused memory and what `generate` has captured on `model`, which would count towards the next setting."""
    model.forget_captures()
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()


class Watched:
    """A published forward that notes the time of each call, and whether it is a full forward."""

    def __init__(self, forward: published_decode.Forward) -> None:
        self.forward = forward
        self.called: list[tuple[float, bool]] = []

    def note(self, full: bool = False) -> None:
        measure.synchronize()
        self.called.append((time.perf_counter(), full))

    def __call__(self, tokens: Tensor, past: Any, replace: Any) -> tuple[Tensor, published_decode.Past]:
        self.note(past is None)
        return self.forward(tokens, past, replace)

    def steps(self) -> dict[str, float]:
        """Mean milliseconds from one note to the next."""
        pairs = list(itertools.pairwise(self.called))
        return means([(full, 1e3 * (after - at)) for (at, full), (after, _) in pairs])


def means(steps: list[tuple[bool, float]]) -> dict[str, float]:
    """The mean of the full steps and that of the others, where there are any."""
    found = {}
    for name, kind in (("ms_refresh", True), ("ms_step", False)):
        times = [ms for full, ms in steps if full == kind]
        if times:
            found[name] = statistics.mean(times)
    return found


@torch.no_grad()
def captured_steps(model: Any, settings: DiffusionGenerationConfig) -> dict[str, float]:
    """Mean milliseconds of the steps that the decodes of `model` have captured (or, on a CPU, made)."""
    grid = settings.per_block if model.block_causal else None
    found, advance = [], Advance(model, settings, stop_ids(settings, DEVICE), grid=grid)
    for arena in arenas_of(model):
        for step in arena.steps.values():
            replay = partial(step.replay, arena, advance) if step.graph is None else step.graph.replay
            found.append((step.window.full, 1e3 * measure.replay_seconds(replay, budget=0.2)))
    return means(found)


class Setting:
    """One row of the results: what each way takes for the same decode.

    Attributes:
        row: the results so far; facts about the setting to begin with.
    """

    def __init__(self, model: Any, run: Run, row: dict[str, Any], repeats: int, pairs: int = 0) -> None:
        self.model, self.run, self.row, self.repeats, self.pairs = model, run, row, repeats, pairs
        self.responses: dict[str, Tensor] = {}
        self.eos = torch.tensor(run.settings.eos_token_id, device=DEVICE) if run.settings.stop_at_eos else None

    def measure(self, way: str) -> None:
        """Add what `way` takes to the row."""
        self.row[way] = measure.attempt(partial(self.published if way == "published" else self.ours, way))
        release(self.model)
        both = [self.row.get(name, {}) for name in WAYS[:2]]
        if way in WAYS[:2] and all("seconds" in each for each in both):
            self.row["same_tokens"] = agreement(*(self.responses[name] for name in WAYS[:2]), self.eos)
            if self.pairs:
                self.in_turn()
            ratio = both[0]["seconds"] / both[1]["seconds"]
            self.row["speedup"] = statistics.median(self.row.get("ratios", [ratio]))

    def in_turn(self) -> None:
        """Time both ways again, pair by pair: the row gets the pairs' ratios, each way the median of its times."""
        model, prompt, settings = self.model, self.run.prompt, self.run.settings
        published = partial(self.run.published, self.run.published_model(), settings)
        ways = {"published": published, "fdpp": lambda: model.generate(prompt, generation_config=settings)}
        seconds = measure.in_turn(ways, self.pairs, 0.0)
        self.row["ratios"] = [theirs / ours for theirs, ours in zip(*seconds.values(), strict=True)]
        for way, times in seconds.items():
            median = statistics.median(times)
            self.row[way] |= {"seconds": median, "tokens_per_second": self.row[way]["tokens"] / median}

    def published(self, way: str) -> dict[str, Any]:
        forward, settings = self.run.published_model(), self.run.settings

        def steps() -> dict[str, float]:
            watched = Watched(forward)
            self.run.published(watched, settings)
            watched.note()
            return watched.steps()

        (sequences, nfe), seconds, peak = timed(lambda: self.run.published(forward, settings), self.repeats)
        return self.found(way, sequences, nfe, seconds, peak, steps, self.run.published_without_model)

    def ours(self, way: str) -> dict[str, Any]:
        prompt, settings = self.run.prompt, self.run.settings
        steps = partial(captured_steps, self.model, settings)
        self.model.compile_layers(way == "fdpp, compiled")
        try:
            out, seconds, peak = timed(lambda: self.model.generate(prompt, generation_config=settings), self.repeats)
            return self.found(way, out.sequences, int(out.nfe.max()), seconds, peak, steps, self.run.without_model)
        finally:
            self.model.compile_layers(False)

    def found(
        self, way: str, sequences: Tensor, nfe: int, seconds: float, peak: int, steps: Any, without_model: Any
    ) -> dict[str, Any]:
        """The results of a way; the times of its steps, and without a model, may be errors instead."""
        response = self.responses[way] = sequences[:, self.run.prompt.shape[1] :]
        counted = response >= 0 if self.eos is None else torch.isin(response, self.eos).cumsum(1) == 0
        result = {
            "seconds": seconds,
            "nfe": nfe,
            "tokens": int(counted.sum()),
            "tokens_per_second": float(counted.sum()) / seconds,
            "peak_gb": peak / 1e9,
            "steps": measure.attempt(steps),
        }
        release(self.model)

        def outside() -> dict[str, float]:
            settings = replace(self.run.settings, stop_at_eos=False)
            if settings.steps is None:
                settings = replace(settings, rule=fdpp.Quota(), steps=nfe)
            ms = 1e3 * timed(without_model(settings), self.repeats)[1] / nfe
            return {"ms_per_forward": 1e3 * seconds / nfe - ms, "ms_outside_model": ms}

        without = measure.attempt(outside)
        return result | ({"without_model": without} if "error" in without else without)


def agreement(published: Tensor, ours: Tensor, eos: Tensor | None) -> float:
    """The share of equal tokens, up to the published response's first EOS where decodes end there."""
    counted = torch.ones_like(ours, dtype=torch.bool)
    if eos is not None:
        counted = torch.isin(published, eos).cumsum(1).cumsum(1) <= 1
    return float((published == ours)[counted].double().mean())


def cached_forward(rows: list[dict[str, Any]], floor: float) -> None:
    """Add the time of a cached forward, all in, to the rows of one cache, batch and prompt: from their difference."""
    for way in WAYS:
        runs = sorted((row[way] for row in rows if "seconds" in row.get(way, {})), key=lambda result: result["nfe"])
        if len(runs) == 2 and runs[0]["nfe"] < runs[1]["nfe"]:
            ms = 1e3 * (runs[1]["seconds"] - runs[0]["seconds"]) / (runs[1]["nfe"] - runs[0]["nfe"])
            for result in runs if ms > 0 else ():  # else the difference is noise
                result |= {"ms_cached_forward": ms, "floor_percent": 100 * floor / ms}


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a forward must read: all but the embedding, unless that is tied to the head."""
    skipped = None if model.get_output_embeddings() is None else model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not skipped)


def settings_of(name: str, shape: Shape, cache: str) -> list[tuple[str, DiffusionGenerationConfig]]:
    """What is decoded with one cache: the label of the tokens per forward, and the settings."""
    base = DiffusionGenerationConfig(shape.new, shape.block, cache=cache, stop_at_eos=False, engine=shape.engine)
    if name == "tiny":
        rules = {f"{type(rule).__name__}({rule.params()[0]:g})": rule for rule in TINY_RULES}
        return [(label, replace(base, rule=rule, stop_at_eos=True)) for label, rule in rules.items()]
    steps = [math.ceil(shape.new / wanted) for wanted in shape.rates]
    return [(f"{shape.new / n:.2f}, set", replace(base, rule=fdpp.Quota(), steps=n)) for n in steps]


def order(shape: Shape, prompts: list[int], caches: Sequence[str]) -> list[tuple[int, int, str]]:
    """Batch sizes, prompts and caches; the slowest, big batches without a cache, come last."""
    found = [(B, P, cache) for B in shape.batches for P in prompts for cache in caches]
    return sorted(found, key=lambda setting: setting[2] == "none" and setting[0] > 1)


class Benchmark:
    """All settings of a run, and the file that their results are in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.bandwidth = measure.copy_bandwidth(1 << (31 if ON_GPU else 20 if options.smoke else 28))
        size, dtype = (8192, torch.bfloat16) if ON_GPU else (64 if options.smoke else 1024, torch.float32)
        self.rows: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {
            "smoke": options.smoke,
            "copy_gb_s": self.bandwidth / 1e9,
            "matmul_tflop_s": measure.matmul_rate(size, dtype) / 1e12,
            "rows": self.rows,
            "left_out": [],
        }

    def write(self) -> Path:
        return measure.write(self.options.out, "decode", self.results)

    def in_time(self, facts: dict[str, Any]) -> bool:
        """Whether there is time for a setting; if not, it is noted as left out."""
        if time.monotonic() - self.began <= self.options.budget:
            return True
        self.results["left_out"].append(facts)
        self.write()
        return False

    def model(self, name: str, shape: Shape) -> tuple[Any, Callable[[int, int], Tensor]]:
        """The model of a shape and `(batch, length) -> prompts` for it."""
        if shape.config is None:
            model, tokenizer = tiny.load()
            return model.to(DEVICE), lambda B, P: tiny_prompts(tokenizer, B)
        if name == "8b" and self.options.checkpoint:
            model = LLaDAModelLM.from_pretrained(self.options.checkpoint, dtype=torch.bfloat16).to(DEVICE).eval()
        else:
            model = random_model(shape.config)
        return model, partial(random_prompts, model)

    def shape(self, name: str) -> None:
        """All settings of one shape, each both ways; at the end, ours again with compiled layers."""
        shape, options = SHAPES[name](), self.options
        if options.batches:
            shape = replace(shape, batches=tuple(options.batches))
        prompts = options.prompts or [shape.prompt, shape.prompt + 1][: 1 + options.headline]
        facts = {"shape": name}
        if not self.in_time(facts):
            return
        try:
            model, prompts_of = self.model(name, shape)
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))  # lays weights out as `generate` wants them
        except Exception as error:
            self.rows.append(facts | {"error": measure.reason(error)})
            self.write()
            return
        weights = weight_bytes(model)
        done: list[Setting] = []
        caches = options.caches or shape.caches[: 2 if options.headline else None]
        for B, P, cache in order(shape, prompts, caches):
            rows: list[dict[str, Any]] = []
            for label, settings in settings_of(name, shape, cache)[: 1 if options.headline else None]:
                facts = {"shape": name, "cache": cache, "batch": B, "prompt": P, "tokens_per_forward": label}
                if not self.in_time(facts):
                    continue
                row = facts | {"new": shape.new, "block": shape.block, "weight_gb": weights / 1e9}
                rows.append(row)
                self.rows.append(row)
                try:
                    prompt = prompts_of(B, P)
                    row["prompt"] = prompt.shape[1]
                    setting = Setting(model, Run(model, prompt, settings), row, options.repeats, options.pairs)
                except Exception as error:
                    row["error"] = measure.reason(error)
                    self.write()
                    continue
                done.append(setting)
                for way in ("fdpp", "published"):
                    setting.measure(way)
                    if cache != "none" and name != "tiny" and not model.block_causal:
                        cached_forward(rows, 1e3 * weights / self.bandwidth)
                    self.write()
                print(facts, f"{row.get('speedup', math.nan):.2f}x", flush=True)
        for setting in done:
            facts = {key: setting.row[key] for key in FACTS} | {"way": "fdpp, compiled"}
            if options.compiled and setting.row["batch"] == 1 and self.in_time(facts):
                setting.measure("fdpp, compiled")
                self.write()
                print(facts, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8b"] if ON_GPU else ["tiny", "100m"])
    parser.add_argument("--smoke", action="store_true", help="only a very small model, to see that it runs")
    parser.add_argument("--headline", action="store_true", help="batch 1, both caches, two prompts, the first schedule")
    parser.add_argument("--checkpoint", help="a LLaDA checkpoint in place of random weights in the shape 8b")
    parser.add_argument("--caches", nargs="+", choices=("dual", "prefix", "none"))
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes (default: those of the shape)")
    text = "lengths of the prompts (default: that of the shape; the embedded model gets problems)"
    parser.add_argument("--prompts", nargs="+", type=int, help=text)
    text = "measure batch 1 also with norm, rotation and gate fused by torch.compile (default: on a GPU)"
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=ON_GPU, help=text)
    parser.add_argument("--repeats", type=int, default=3, help="timed decodes of each (default: %(default)s)")
    text = "on a machine that others use: time both ways in turn so often, and take the pairs' median ratio"
    parser.add_argument("--pairs", type=int, default=0, help=text)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no setting is started")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "local", help="folder of the result file")
    options = parser.parse_args(arguments)
    if options.headline:
        options.batches = options.batches or [1]
    benchmark = Benchmark(options)
    for name in ["smoke"] if options.smoke else options.shapes:
        benchmark.shape(name)
        if ON_GPU:
            gc.collect()
            torch.cuda.empty_cache()
    measure.close(benchmark.write(), benchmark.results)


if __name__ == "__main__":
    main()
