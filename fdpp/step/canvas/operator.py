"""`denoise_canvas`: the heads' outputs and a canvas in, the next canvas out."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.selection import DTYPES, MAX_POSITIONS, expect, is_int, is_number
from fdpp.step.canvas import cpu, gpu
from fdpp.step.canvas.outcome import CanvasStep
from fdpp.step.terms import streams


@torch.library.custom_op("fdpp::denoise_canvas", mutates_args=(), device_types="cpu")
def denoise_op(
    logits: Tensor,
    canvas: Tensor,
    argmax: Tensor,
    finished: Tensor | None,
    numbers: Tensor,
    seeds: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`fdpp::denoise_canvas`; `numbers`: float64, a row (bound, temperature) for all sequences or one for each.

    A `softcap` of 0 is none.
    """
    return cpu.denoise_canvas(logits, canvas, argmax, finished, numbers, seeds, softcap)


@denoise_op.register_kernel("cuda")
def _(logits, canvas, argmax, finished, numbers, seeds, softcap):  # type: ignore[no-untyped-def]
    return gpu.denoise_canvas(logits, canvas, argmax, finished, numbers, seeds, softcap)


@denoise_op.register_fake
def _(logits, canvas, argmax, finished, numbers, seeds, softcap):  # type: ignore[no-untyped-def]
    return gpu.empty_outputs(canvas)


def check(
    logits: Tensor, canvas: Tensor, argmax: Tensor, finished: Tensor | None, numbers: Tensor, seeds: Tensor
) -> None:
    """Raise `ValueError` that names the argument of a step, what was expected and what came."""
    if logits.dim() != 3 or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits: expected [B, T, V] in bfloat16, float16 or float32, got {list(logits.shape)} in {logits.dtype}"
        )
    B, T, V = logits.shape
    if not 0 < T <= MAX_POSITIONS or not 0 < V < 2**31:
        raise ValueError(f"logits: expected 1 to {MAX_POSITIONS} positions and a vocabulary, got T={T}, V={V}")
    if logits.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits: expected a CPU or CUDA tensor, got {logits.device}")
    expect("canvas", canvas, (B, T), torch.int64, logits.device)
    expect("argmax", argmax, (B, T), torch.int64, logits.device)
    if finished is not None:
        expect("finished", finished, (B,), torch.bool, logits.device)
    expect("numbers", numbers, (1 if numbers.shape[0] == 1 else B, 2), torch.float64, logits.device)
    expect("seed", seeds, (B,), torch.int64, logits.device)


def step(
    logits: Tensor,
    canvas: Tensor,
    argmax: Tensor,
    finished: Tensor | None,
    numbers: Tensor,
    seeds: Tensor,
    softcap: float = 0.0,
) -> CanvasStep:
    """`denoise_canvas` with its numbers as tensors, as `denoise_op` takes them: nothing is copied to or from a GPU."""
    check(logits, canvas, argmax, finished, numbers, seeds)
    # A choice has no gradient, and logits of a model that is not run under no_grad record one.
    logits = logits.detach()
    if torch.compiler.is_compiling():
        return CanvasStep(*denoise_op(logits, canvas, argmax, finished, numbers, seeds, softcap))
    implementation = cpu.denoise_canvas if logits.device.type == "cpu" else gpu.denoise_canvas
    return implementation(logits, canvas, argmax, finished, numbers, seeds, softcap)


def pack(bound: float | Tensor, temperature: float | Tensor, B: int, device: torch.device) -> Tensor:
    """`numbers` as `step` takes them: one row where both are Python numbers. Float64, for 0.1 is no float32.

    Raises `ValueError` if a Python number is out of range; tensors are not read.
    """
    for name, value, least in (("bound", bound, "at least 0"), ("temperature", temperature, "above 0")):
        if isinstance(value, Tensor):
            if value.dim() > 1 or value.shape not in ((), (B,)) or not value.is_floating_point():
                raise ValueError(f"{name}: expected a number or float [{B}], got {list(value.shape)} {value.dtype}")
            if value.device != device:
                raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
        elif not is_number(value) or not 0.0 <= value < float("inf") or (name == "temperature" and value == 0.0):
            raise ValueError(f"{name}: expected a finite number {least}, got {value!r}")
    if isinstance(bound, Tensor) or isinstance(temperature, Tensor):
        both = (torch.as_tensor(value, dtype=torch.float64, device=device).expand(B) for value in (bound, temperature))
        return torch.stack(tuple(both), dim=1)
    return torch.tensor([[bound, temperature]], dtype=torch.float64, device=device)


def denoise_canvas(
    logits: Tensor,
    canvas: Tensor,
    *,
    bound: float | Tensor,
    temperature: float | Tensor,
    seed: int | Tensor,
    softcap: float | None = None,
    argmax: Tensor | None = None,
    finished: Tensor | None = None,
) -> CanvasStep:
    """One denoising step of canvases of uniform noise, as DiffusionGemma's `EntropyBoundSampler` takes it.

    Every position draws a token from p = softmax(l / t). Accepted are the least uncertain positions: by ascending
    entropy H(p), while the sum of those before is at most the bound (EB-sampler, arXiv 2505.24857); so at least one.
    All others are made anew. What was accepted earlier does not count. Equal entropies: the lower position first.

    Args:
        logits: `[B, T, V]` bfloat16, float16 or float32, T from 1 to 1024, rows of any stride. Those of finished
            sequences are never read.
        canvas: `[B, T]` int64.
        bound: nats, 0 or more; one, or float `[B]`.
        temperature: above 0; one, or float `[B]`.
        seed: an int (sequence b draws from the stream seed + b) or an int64 tensor `[B]` of streams.
        softcap: c of l = c tanh(h / c), where `logits` are a head's outputs h; None: they are l.
        argmax: `[B, T]` int64, that of the step before, which finished sequences keep; None: the canvas.
        finished: `[B]` bool; None: no sequence is.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a number that is out of range.
    """
    if softcap is not None and (not is_number(softcap) or not 0.0 < softcap < float("inf")):
        raise ValueError(f"softcap: expected a finite number above 0 or None, got {softcap!r}")
    B = logits.shape[0] if logits.dim() else 0
    if not isinstance(seed, Tensor) and not is_int(seed):
        raise ValueError(f"seed: expected an int or an int64 tensor [{B}], got {seed!r}")
    numbers = pack(bound, temperature, B, logits.device)
    seeds = seed if isinstance(seed, Tensor) else streams(seed, B, logits.device)
    argmax = canvas if argmax is None else argmax
    return step(logits, canvas, argmax, finished, numbers, seeds, float(softcap or 0.0))
