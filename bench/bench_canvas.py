"""DiffusionGemma's step and self-conditioning against transformers' own code, in the same run and on one thread.

`python bench/bench_canvas.py --out FOLDER` writes `canvas-<device>.json`:

- steps: all that `_denoising_step` of transformers does after the forward, called with a forward that has its result
  ready, against `fdpp.denoise_canvas` and `processed_logits`; from float32 logits, and from a head's outputs, where the
  softcap belongs to it;
- embeddings: the decoder's softmax and product against `soft_embeddings`, with both's distance from float64;
- batch: memory of a step of many canvases by fdpp, conditioned on soft embeddings. It runs once.

Times are wall time, ways in turn. Memory is the most that a call holds beyond what was held before: resident pages on a
CPU, the allocator's bytes on a GPU (`measure.peak_bytes`). A failure is a row that says why.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import torch
from measure import DEVICE
from torch import Tensor

import fdpp
from fdpp.step.canvas.conditioning import processed_logits, soft_embeddings

BOUND, T_MIN, T_MAX, STEPS, STABLE, CONFIDENT = 0.1, 0.4, 0.8, 48, 1, 0.005
"""The defaults of transformers' generation config."""

CAP = 30.0
AT = 24
"""Steps remaining: the temperature is then 0.6."""

Ways = dict[str, Callable[[], Any]]


def temperature() -> float:
    return T_MIN + (T_MAX - T_MIN) * AT / STEPS


def outputs_of(B: int, T: int, V: int, dtype: torch.dtype) -> Tensor:
    """A head's outputs `[B, T, V]`: every second position is certain of one id, the others of none.

    Sequences are copies of one.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = torch.empty(T, V, device=DEVICE).normal_(generator=generator).mul_(3.0)
    best = torch.randint(V, (T // 2, 1), device=DEVICE, generator=generator)
    rows[1::2].scatter_(1, best, 40.0)
    return torch.empty(B, T, V, dtype=dtype, device=DEVICE).copy_(rows)


def capped(outputs: Tensor) -> Tensor:
    """The last lines of transformers' `DiffusionGemmaForBlockDiffusion.forward`."""
    logits = outputs.to(torch.float32)
    logits = logits / CAP
    logits = torch.tanh(logits)
    return logits * CAP


def transformers_step(logits: Callable[[], Tensor], canvas: Tensor, dtype: torch.dtype, V: int) -> Callable[[], Any]:
    """A call of transformers' `_denoising_step`, whose forward is `logits`, with embeddings in `dtype`."""
    from transformers.generation import LogitsProcessorList
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

    sampler = theirs.EntropyBoundSampler(theirs.EntropyBoundSamplerConfig(BOUND), canvas.shape[1], V, STEPS)
    schedule = theirs.LinearTemperatureScheduleLogitsProcessor(T_MIN, T_MAX, STEPS)
    criterion = theirs.StableAndConfidentStoppingCriteria(STABLE, CONFIDENT)
    embedding = SimpleNamespace(weight=torch.empty(0, dtype=dtype))
    model = SimpleNamespace(
        config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=V)),
        model=SimpleNamespace(decoder=SimpleNamespace(embed_tokens=embedding)),
    )
    finished = torch.zeros(canvas.shape[0], dtype=torch.bool, device=canvas.device)

    def step() -> Any:
        return theirs.DiffusionGemmaGenerationMixin._denoising_step(
            model,
            decoder_forward=lambda **_: SimpleNamespace(logits=logits()),
            current_canvas=canvas,
            argmax_canvas=canvas,
            input_ids=canvas,
            decoder_position_ids=None,
            self_conditioning_logits=None,
            mask_mapping=None,
            past_key_values=None,
            finished_denoising=finished.clone(),
            cur_step=AT,
            sampler=sampler,
            logits_processor=LogitsProcessorList([schedule]),
            diffusion_stopping_criteria=criterion,
        )

    return step


def numbers(device: torch.device) -> Tensor:
    return torch.tensor([[BOUND, temperature()]], dtype=torch.float64).to(device)


def fdpp_step(outputs: Tensor, canvas: Tensor, softcap: float, dtype: torch.dtype | None) -> Callable[[], Any]:
    """The same by fdpp, its stopping criterion included; without logits for the next forward if `dtype` is None."""
    given, history = numbers(outputs.device), canvas

    def step() -> Any:
        nonlocal history
        out = fdpp.denoise_canvas(
            outputs, canvas, bound=BOUND, temperature=temperature(), seed=0, softcap=softcap or None, argmax=history
        )
        finished = (history == out.argmax).all(1) & (out.mean_entropy < CONFIDENT)
        history = out.argmax
        x = None if dtype is None else processed_logits(outputs, given, softcap, dtype)
        return out.canvas, out.argmax, x, finished

    return step


def decoder_embeddings(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The lines of transformers' `DiffusionGemmaDecoderModel.forward`, from processed logits `x` `[B, T, V]`."""
    return torch.matmul(x.softmax(dim=-1, dtype=torch.float32).to(weight.dtype), weight) * scale.to(weight.dtype)


def timed(ways: Ways, rounds: int) -> dict[str, Any]:
    """Seconds and extra memory of each way; transformers' time over fdpp's, round by round."""
    found: dict[str, Any] = {way: {"peak_mb": measure.peak_bytes(call) / 1e6} for way, call in ways.items()}
    seconds = measure.in_turn(ways, rounds, 0.0)
    for way, times in seconds.items():
        found[way]["ms"] = 1e3 * statistics.median(times)
    for way in list(ways)[1:]:
        ratios = [a / b for a, b in zip(seconds["transformers"], seconds[way], strict=True)]
        found[way] |= {"faster": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return found


@torch.no_grad()
def steps(B: int, T: int, V: int, given: torch.dtype, rounds: int) -> dict[str, Any]:
    """From float32 `given`, logits; from bfloat16, a head's outputs."""
    outputs, canvas = outputs_of(B, T, V, given), torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    dtype, softcap = torch.bfloat16, CAP if given == torch.bfloat16 else 0.0
    ways: Ways = {
        "transformers": transformers_step(lambda: capped(outputs) if softcap else outputs, canvas, dtype, V),
        "fdpp": fdpp_step(outputs, canvas, softcap, dtype),
        "fdpp, no logits": fdpp_step(outputs, canvas, softcap, None),
    }
    (_, best, x, _), (_, same, y, _) = ways["transformers"](), ways["fdpp"]()
    # A GPU's tanh is ours there, and may round otherwise.
    agrees = x.equal(y) if x.device.type == "cpu" else torch.allclose(x.float(), y.float(), rtol=2**-7, atol=1e-4)
    assert best.equal(same) and agrees, "another argmax, or other logits"
    return timed(ways, rounds)


def exact(outputs: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Soft embeddings `[n, D]` of positions `[n, V]` in float64, some thousand ids at a time."""
    x = CAP * (outputs.double() / CAP).tanh() / temperature()
    p = x.softmax(1).split(1 << 13, dim=1)
    return scale * sum(part @ rows.double() for part, rows in zip(p, weight.split(1 << 13), strict=True))


def distance(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the error over that of the truth."""
    return float((found.double() - truth).norm() / truth.norm())


@torch.no_grad()
def embeddings(B: int, T: int, V: int, D: int, rounds: int) -> dict[str, Any]:
    outputs, given = outputs_of(B, T, V, torch.bfloat16), numbers(DEVICE)
    weight = torch.empty(V, D, dtype=torch.bfloat16, device=DEVICE).normal_()
    scale = torch.tensor(D**0.5, device=DEVICE).to(weight.dtype)
    x = processed_logits(outputs, given, CAP)
    canvas = torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    lse = fdpp.denoise_canvas(outputs, canvas, bound=BOUND, temperature=temperature(), seed=0, softcap=CAP).lse
    ways: Ways = {
        "transformers": partial(decoder_embeddings, x, weight, scale),
        "fdpp": partial(soft_embeddings, outputs, lse, given, weight, CAP, float(scale)),
    }
    truth = exact(outputs[0, :4], weight, float(scale))
    distances = {way: {"distance": distance(call()[0, :4], truth)} for way, call in ways.items()}
    return {way: distances.get(way, {}) | found for way, found in timed(ways, rounds).items()}


@torch.no_grad()
def batch(B: int, T: int, V: int, D: int) -> dict[str, Any]:
    outputs, given = outputs_of(B, T, V, torch.bfloat16), numbers(DEVICE)
    weight = torch.empty(V, D, dtype=torch.bfloat16, device=DEVICE).normal_()
    canvas = torch.zeros(B, T, dtype=torch.int64, device=DEVICE)

    def step() -> Tensor:
        out = fdpp.denoise_canvas(outputs, canvas, bound=BOUND, temperature=temperature(), seed=0, softcap=CAP)
        return soft_embeddings(outputs, out.lse, given, weight, CAP, D**0.5)

    return {"outputs_mb": outputs.nbytes / 1e6, "fdpp": {"peak_mb": measure.peak_bytes(step) / 1e6}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=("steps", "embeddings", "batch"), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="how often every way is timed, default: %(default)s")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "local", help="folder of the result file")
    options = parser.parse_args(arguments)
    only = options.only or ("steps", "embeddings", "batch")
    T, V, D, many, rounds = (256, 262144, 2816, 32, options.rounds) if not options.smoke else (8, 1000, 32, 3, 1)
    results: dict[str, Any] = {"smoke": options.smoke, "vocabulary": V, "channels": D}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kinds: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = [
            ("steps", {"sequences": 1, "positions": T, "from": name}, partial(steps, 1, T, V, given, rounds))
            for name, given in (("float32 logits", torch.float32), ("bfloat16 outputs", torch.bfloat16))
        ]
        kinds.append(("embeddings", {"sequences": 1, "positions": T}, partial(embeddings, 1, T, V, D, rounds)))
        kinds.append(("batch", {"sequences": many, "positions": T}, partial(batch, many, T, V, D)))
        for kind, about, call in kinds:
            if kind in only:
                results.setdefault(kind, []).append(about | measure.attempt(call))
                print(kind, about, flush=True)
                written = measure.write(options.out, "canvas", results)
    finally:
        torch.set_num_threads(before)
    measure.close(written, results)


if __name__ == "__main__":
    main()
