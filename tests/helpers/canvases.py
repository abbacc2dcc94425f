"""Inputs of a canvas's step, its implementations, and the comparison of each with the float64 specification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from inputs import generator, to_device
from torch import Tensor
from torch.distributions import Categorical

from fdpp import CanvasStep
from fdpp.step.canvas import cpu, gpu, reference

CLOSE = 1e-5
"""Nats between a sum of entropies and the bound, or between two entropies, below which float32 may decide otherwise."""


@dataclass(frozen=True)
class Canvases:
    """Arguments of a step of canvases; one number or one for each."""

    logits: Tensor
    canvas: Tensor
    bound: Sequence[float] = (0.1,)
    temperature: Sequence[float] = (0.7,)
    softcap: float = 0.0
    seed: int = 0
    finished: Sequence[bool] | None = None

    @property
    def argmax(self) -> Tensor:
        """That of the step before: anything that is not the canvas."""
        return self.canvas + 1

    @property
    def seeds(self) -> Tensor:
        return self.seed + torch.arange(len(self.canvas))

    @property
    def numbers(self) -> Tensor:
        return torch.tensor([self.bound, self.temperature], dtype=torch.float64).T

    def arguments(self, device: str = "cpu") -> tuple[Tensor | float | None, ...]:
        """Those of `fdpp::denoise_canvas`."""
        finished = None if self.finished is None else torch.tensor(self.finished, device=device)
        logits, canvas = to_device(self.logits, device), to_device(self.canvas, device)
        others = (tensor.to(device) for tensor in (self.numbers, self.seeds))
        return logits, canvas, to_device(self.argmax, device), finished, *others, self.softcap


def canvases(seed: int, B: int, T: int, V: int, dtype: torch.dtype = torch.float32, **settings: object) -> Canvases:
    """One raised output a row, so that entropies spread from certain to uniform."""
    g = generator(seed)
    logits = torch.randn(B, T, V, generator=g) * 2
    raised = torch.randint(V, (B, T, 1), generator=g)
    logits.scatter_(2, raised, torch.rand(B, T, 1, generator=g) * 14 + torch.tensor(float(V)).log())
    canvas = torch.randint(V, (B, T), generator=g)
    return Canvases(logits.to(dtype), canvas, seed=int(torch.randint(2**62, (), generator=g)), **settings)  # type: ignore[arg-type]


def run(implementation: str, problem: Canvases) -> CanvasStep:
    """The step that an implementation takes; the outputs lie on the CPU."""
    denoise = cpu.denoise_canvas if implementation == "cpu" else gpu.denoise_canvas
    device = "cuda" if implementation == "cuda" else "cpu"
    return CanvasStep(*(output.cpu() for output in denoise(*problem.arguments(device))))  # type: ignore[arg-type]


def expected(problem: Canvases) -> CanvasStep:
    logits, canvas, argmax, finished, numbers, seeds, softcap = problem.arguments()
    B = len(canvas)
    bound, temperature = numbers.expand(B, 2).unbind(1)
    finished = torch.zeros(B, dtype=torch.bool) if finished is None else finished
    return reference.denoise_canvas(logits, canvas, bound, temperature, seeds, softcap, argmax, finished)


def in_float32(problem: Canvases) -> tuple[Tensor, Tensor]:
    """Entropies and lse `[B, T]` as plain float32 PyTorch has them, in the order of transformers."""
    x = problem.logits.float()
    if problem.softcap:
        x = (x / problem.softcap).tanh() * problem.softcap
    x = x / problem.numbers[:, 1].float()[:, None, None]
    return Categorical(logits=x, validate_args=False).entropy(), x.logsumexp(2)


def is_close_call(problem: Canvases, truth: CanvasStep, b: int) -> bool:
    """Whether rounding may decide what sequence `b` accepts."""
    ordered = truth.entropy[b][truth.entropy[b] < torch.inf].sort().values
    before = ordered.cumsum(0) - ordered
    at_bound = (before - problem.bound[b % len(problem.bound)]).abs() < CLOSE
    n = int(truth.accepted[b].sum())
    near = 0 < n < len(ordered) and float(ordered[n] - ordered[n - 1]) < CLOSE
    return near or bool(at_bound[1:].any())


def assert_as_specified(out: CanvasStep, problem: Canvases, truth: CanvasStep | None = None) -> None:
    """Ids exactly, acceptance too but in close calls; numbers as exactly as in plain float32, or to a millionth."""
    truth = truth or expected(problem)
    B = len(problem.canvas)
    for name, value in truth._asdict().items():
        mine = getattr(out, name)
        assert mine.shape == value.shape and mine.dtype == (torch.float32 if value.is_floating_point() else value.dtype)
    assert out.argmax.equal(truth.argmax)
    assert out.sample.equal(truth.sample)
    running = [b for b in range(B) if problem.finished is None or not problem.finished[b]]
    finished = [b for b in range(B) if b not in running]
    for name, plain in zip(("entropy", "lse"), in_float32(problem), strict=True):
        assert not getattr(out, name)[finished].any()
        mine, exact = getattr(out, name).double()[running], getattr(truth, name)[running]
        usable = exact.isfinite()
        torch.testing.assert_close(mine[~usable], exact[~usable], rtol=0, atol=0, equal_nan=True)
        error, theirs = ((value - exact).abs()[usable] for value in (mine, plain.double()[running]))
        # An lse is a float32 of the logits' size; a kernel's tanh is exact to 6e-8.
        allowed = 1e-6 + 6e-8 * problem.softcap / min(problem.temperature)
        allowed += 3e-7 * float(exact[usable].abs().max()) if name == "lse" and len(error) else 0.0
        assert not len(error) or float(error.max()) <= float(theirs.max()) + allowed
    torch.testing.assert_close(out.mean_entropy, out.entropy.double().mean(1).float(), rtol=1e-6, atol=0.0)
    for b in range(B):
        if not is_close_call(problem, truth, b):
            assert out.accepted[b].equal(truth.accepted[b])
            assert out.canvas[b].equal(truth.canvas[b])


def assert_equal(a: CanvasStep, b: CanvasStep) -> None:
    for name, mine, other in zip(CanvasStep._fields, a, b, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True, msg=name)
