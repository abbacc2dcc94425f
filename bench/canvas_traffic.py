"""What a step of DiffusionGemma moves and holds on a GPU besides its forward, counted there without one.

transformers' own code and ours run on tensors without memory (`nodes.recorded`). What PyTorch composes of several
kernels on a GPU is composed here as its sources (`ATen/native`) have it, so that each is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import bench_canvas
import nodes
import torch
from nodes import GPU, Launch
from report import markdown, number
from roofline import Device, seconds
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from fdpp.step.canvas.conditioning import soft_embeddings

T, V, D = 256, 262144, 2816


def logsumexp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    largest = x.amax(dim, True)
    return (x - largest).exp_().sum(dim, keepdim).log_().add_(largest if keepdim else largest.squeeze(dim))


def multinomial(p: Tensor, num_samples: int) -> Tensor:
    """One sample a row: checks, then the largest of p over exponential noise."""
    (p.max() < float("inf")) & (p.min() >= 0.0)
    (p.sum(1) == 0.0).any()
    noise = torch.empty_like(p).exponential_(1.0)
    return torch.div(p, noise, out=noise).argmax(-1, keepdim=True)


class Composed(TorchFunctionMode):
    """Operators of several kernels as those. No sequence has finished, and all that is checked is as it should be."""

    answers: ClassVar[dict[Any, Callable[..., Any]]] = {
        torch.Tensor.logsumexp: logsumexp,
        torch.multinomial: multinomial,
        torch.Tensor.any: lambda finished: False,
        torch.Tensor.__bool__: lambda valid: True,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.answers.get(func, func)(*args, **(kwargs or {}))


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def ways(B: int) -> dict[str, Callable[[], Any]]:
    """A step of `B` canvases from a head's outputs; how the next forward begins; and ours, both in one, with no logits
    in between."""
    bf16, softcap = torch.bfloat16, bench_canvas.CAP
    outputs, weight, canvas = empty(B, T, V, dtype=bf16), empty(V, D, dtype=bf16), empty(B, T, dtype=torch.int64)
    x, scale, numbers = empty(B, T, V, dtype=bf16), empty(dtype=torch.float32), empty(1, 2, dtype=torch.float64)
    lse, step = empty(B, T, dtype=torch.float32), bench_canvas.fdpp_step(outputs, canvas, softcap, None)

    def embedded() -> Tensor:
        return soft_embeddings(outputs, lse, numbers, weight, softcap, 53.0)

    return {
        "transformers, step": bench_canvas.transformers_step(lambda: bench_canvas.capped(outputs), canvas, bf16, V),
        "transformers, embeddings": partial(bench_canvas.decoder_embeddings, x, weight, scale),
        "fdpp, step and logits": bench_canvas.fdpp_step(outputs, canvas, softcap, bf16),
        "fdpp, step": step,
        "fdpp, embeddings": embedded,
    }


@contextmanager
def checked() -> Iterator[None]:
    """Distributions check their arguments, as they do until something was compiled in the process: `torch.compile` ends
    that for good."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def count(B: int, way: str) -> tuple[list[Launch], int]:
    """The launches of one of `ways`, and the most bytes that it holds beyond what it is given."""
    with nodes.recorded() as record, Composed(), checked():
        call = ways(B)[way]
        record.launches.clear()
        with nodes.Held() as held:
            call()
        return list(record.launches), held.most


def table(on: Device, batches: list[int]) -> str:
    """Launches, bytes moved and held, and predicted time, a column for each number of canvases."""
    rows = []
    with nodes.recorded():
        names = list(ways(1))
    for way in names:
        found = [count(B, way) for B in batches]
        rows.append([f"{way}: launches", *(number(len(launches)) for launches, _ in found)])
        rows.append([f"{way}: GB moved", *(number(sum(x.bytes for x in launches) / 1e9) for launches, _ in found)])
        rows.append([f"{way}: MB held", *(number(most / 1e6) for _, most in found)])
        rows.append([f"{way}: ms", *(number(1e3 * sum(seconds(x, on) for x in launches)) for launches, _ in found)])
    return markdown([f"predicted, {on.name}", *(f"{B} canvases" if B > 1 else "1 canvas" for B in batches)], rows)
