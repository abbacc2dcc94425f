"""What is allocated without a value holds NaN, or the largest integer, until something is written to it.

New memory is often zero, or what an equal call left there a moment ago, so a kernel that leaves out a part of its
output would pass. `install` replaces PyTorch's functions for the callers in this project alone: with those of all
callers PyTorch's own compiler would be tested, and with its deterministic mode, which fills as well, other algorithms
than those that users run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _device

FUNCTIONS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))
FOLDERS = tuple(str(Path(__file__).parents[2] / name) + "/" for name in ("fdpp", "tests", "bench"))
MOST = 2**30
"""Bytes; what is larger is left alone: tests of far offsets allocate gigabytes that are never touched."""
paused = False


@torch.no_grad()
def fill(tensor: Tensor) -> Tensor:
    """`tensor` with nothing in it that could pass for a result; one without memory, of a compiler's, as it is."""
    # The storage is asked: tensors without memory may say that they have some (bench/nodes.py).
    if type(tensor) is not Tensor or tensor.untyped_storage().device.type == "meta" or tensor.nbytes > MOST:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


@functools.cache
def ours(file: str) -> bool:
    return file.startswith(FOLDERS)


def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        return fill(tensor) if not paused and ours(sys._getframe(1).f_code.co_filename) else tensor

    return allocate


def install() -> None:
    """For the whole process. A second call changes nothing."""
    if hasattr(torch.empty, "__wrapped__"):
        return
    # `with torch.device(...)` lists the functions that it reaches when it is first asked: let it be the true ones.
    _device._device_constructors()
    for owner, name in FUNCTIONS:
        setattr(owner, name, filled(getattr(owner, name)))


@contextmanager
def left_alone() -> Iterator[None]:
    """Within it nothing is filled: for what counts kernels and operators."""
    global paused
    before, paused = paused, True
    try:
        yield
    finally:
        paused = before
