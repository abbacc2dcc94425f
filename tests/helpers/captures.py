"""A stand-in for CUDA graphs on a CPU: a capture records every operator, a replay runs the step again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdpp.decoding import static
from fdpp.decoding.advance import Advance, stop_ids

Log = list[tuple[Any, ...]]


def described(argument: Any) -> Any:
    """What a library plans by."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    if argument != argument:
        return "nan"  # which else is not equal to itself
    return argument if isinstance(argument, (bool, int, float, str, type(None), torch.dtype)) else type(argument)


def leaves(arguments: Iterable[Any]) -> Iterator[Any]:
    """As PyTorch's `tree_leaves`, which takes longer than the operators that it is to describe."""
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from leaves(argument)
        else:
            yield argument


class Operators(TorchDispatchMode):
    """Records every operator with the shapes, strides and dtypes of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.log: Log = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.log.append((func, *map(described, leaves(args)), *map(described, leaves(kwargs.values()))))
        return func(*args, **kwargs)


class Graph:
    """Runs a step again and copies the outcome into the tensors of its capture. Like CUDA's it keeps nothing alive."""

    def __init__(self, run: partial[None]) -> None:
        arena, advance = run.args
        step = run.func.__self__  # type: ignore[attr-defined]
        self.step, self.arena, self.model = map(weakref.ref, (step, arena, advance.forwards.model))
        self.config, self.grid, self.device, self.replays = advance.config, advance.forwards.grid, step.device, 0

    def replay(self) -> None:
        self.replays += 1
        step: Any = self.step()
        eos = stop_ids(self.config, self.device)
        step.run(self.arena(), Advance(self.model(), self.config, eos, grid=self.grid))
        for captured, now in zip(tree_leaves(step.captured), tree_leaves(step.outcome), strict=True):
            captured.copy_(now)


class Captures:
    """The captures of all models, which can be made to fail.

    Attributes:
        logs: every step, with the operators of its warm-up and those of its capture.
        fail: called in every capture, may raise.
    """

    def __init__(self) -> None:
        self.logs: list[tuple[static.Step, Log, Log]] = []
        self.warm: Log = []
        self.fail: Callable[[], None] = lambda: None

    def capture(self, run: partial[None]) -> Graph:
        """`run` is a step's. Unlike a CUDA graph's capture this one runs it, and so restores the state after it."""
        arena, step = run.args[0], run.func.__self__  # type: ignore[attr-defined]
        before = arena.state.each(torch.clone)
        with Operators() as mode:
            run()
        arena.restore(before)
        self.fail()
        self.logs.append((step, self.warm, mode.log))
        return Graph(run)


@contextmanager
def captured_on_cpu() -> Iterator[Captures]:
    """Within it, static steps on a CPU are warmed up and captured as on a GPU."""
    captures, warm_up, graphs_on = Captures(), static.Step.warm_up, static.graphs_on

    def logged(step: static.Step, arena: static.Arena, advance: Any) -> None:
        with Operators() as mode:
            warm_up(step, arena, advance)
        captures.warm = mode.log

    static.Step.warm_up, static.graphs_on = logged, lambda device: captures  # type: ignore[assignment,method-assign]
    try:
        yield captures
    finally:
        static.Step.warm_up, static.graphs_on = warm_up, graphs_on  # type: ignore[method-assign]
