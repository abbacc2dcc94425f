"""What captured steps rely on in a model, so that a change is seen without being announced."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
INTERNAL = nn.Module().__dict__.keys() - {"training"} | {"_static_steps"}


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """The attributes that say how a module computes: numbers, strings, collections of them, and functions."""

    def setting(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(setting, value))
        if isinstance(value, dict):
            return tuple((setting(name), setting(value)) for name, value in value.items())
        return value if isinstance(value, PLAIN) or (callable(value) and not isinstance(value, nn.Module)) else None

    return {name: setting(values[name]) for name in values.keys() - INTERNAL}


def held_by(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that have memory: `tensor`, or those that a subclass without consists of, as a quantised weight."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    # A sharded tensor also names its mesh among its parts.
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    for part in parts:
        if isinstance(part, Tensor):
            yield from held_by(part)


def places(model: nn.Module) -> list[Any]:
    """Where every weight and buffer lies, and as what."""
    tensors = chain.from_iterable(map(held_by, chain(model.parameters(), model.buffers())))
    return [(t.device, t.dtype, t.data_ptr(), t.shape, t.stride()) for t in tensors]


def identity(model: nn.Module) -> tuple[Any, ...]:
    """What captured steps rely on: the modules, their settings, and where every weight lies.

    A layer that is exchanged, wrapped, switched or moved changes it; a weight that is written in place does not.
    """
    modules = [(weakref.ref(module), type(module), settings_of(vars(module))) for module in model.modules()]
    config = getattr(model, "config", None)
    return {} if config is None else settings_of(vars(config)), *modules, *places(model)
