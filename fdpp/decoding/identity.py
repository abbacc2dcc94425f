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


def setting(value: Any) -> Any:
    """`value`, collections as tuples; None where it says nothing of how a module computes."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(setting, value))
    if isinstance(value, dict):
        return tuple((setting(name), setting(value)) for name, value in dict(value).items())
    return value if callable(value) and not isinstance(value, nn.Module) else None


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """The attributes that say how a module computes: numbers, strings, collections of them, and functions."""
    # Of a copy, made in one operation: another thread may set an attribute meanwhile, or forget the captures.
    return {name: setting(value) for name, value in dict(values).items() if name not in INTERNAL}


def held_by(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that have memory: `tensor`, or those that a subclass without consists of, as a quantised weight."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    # A sharded tensor also names its mesh among its parts.
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    for part in parts:
        if isinstance(part, Tensor):
            yield from held_by(part)


def places(model: nn.Module) -> list[Any]:
    """Where every weight and buffer lies, and as what."""
    return [place for module in model.modules() for place in own_places(module)]


def own_places(module: nn.Module) -> list[Any]:
    """`places` of what the module itself holds. By its tables: `parameters()` takes longer, to find each once."""
    tensors = (t for t in chain(module._parameters.values(), module._buffers.values()) if t is not None)
    return [(t.device, t.dtype, t.data_ptr(), t.shape, t.stride()) for t in chain.from_iterable(map(held_by, tensors))]


def identity(model: nn.Module) -> tuple[Any, ...]:
    """What captured steps rely on: the modules, their settings, and where every weight lies.

    A layer that is exchanged, wrapped, switched or moved changes it; a weight that is written in place does not.
    """
    config = getattr(model, "config", None)
    modules = [(weakref.ref(m), type(m), settings_of(vars(m)), *own_places(m)) for m in model.modules()]
    return {} if config is None else settings_of(vars(config)), *modules
