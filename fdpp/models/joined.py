"""Linear layers that read the same input, as one matrix product."""

from __future__ import annotations

import threading
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fdpp.models.linear import Linear

JOINING = threading.Lock()
"""Of threads that find no matrix at the same time, one joins."""


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else: no hook, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain(layer: nn.Module | None) -> TypeGuard[Linear]:
    """Whether `layer` is nothing but its weight."""
    return type(layer) is Linear and is_untouched(layer)


class Joined:
    """One matrix `[sum of outputs, inputs]` of which the layers' weights are views.

    Parameters, their names and their checkpoints stay as they are, and no weight is held twice. The matrix is made on
    first use and again whenever a weight has moved. Layers with hooks, adapters, quantised or sharded weights are left
    alone.

    Args:
        modules: the block's own table of submodules, so that a layer that is replaced later is seen.
        names: of the layers to join, which have no biases.
    """

    def __init__(self, modules: dict[str, nn.Module | None], *names: str) -> None:
        self.modules, self.names = modules, names
        self.weight: Tensor | None = None

    def matrix(self) -> Tensor | None:
        """The joined weight, None where the layers must be called one by one.

        That is so while gradients are recorded, which belong to the parameters, and under `torch.compile`, which cannot
        follow addresses.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        weights = []
        for name in self.names:
            layer = self.modules[name]
            if not is_plain(layer):
                return None
            weights.append(layer._parameters["weight"])
        held = self.held(weights)
        if held is None:
            with JOINING:
                held = self.held(weights)
                return self.join(weights) if held is None else held
        return held

    def held(self, weights: list[nn.Parameter | None]) -> Tensor | None:
        """The matrix, if the weights are still its views. Its memory is alive, so equal addresses prove it."""
        matrix = self.weight
        if matrix is None:
            return None
        address, row = matrix.data_ptr(), matrix.stride(0) * matrix.element_size()
        for weight in weights:
            if weight is None or weight.data_ptr() != address or weight.dtype != matrix.dtype:
                return None
            address += weight.shape[0] * row
        return matrix

    def part(self) -> None:
        """Drop the matrix; only the weights then keep its memory."""
        self.weight = None

    def join(self, weights: list[nn.Parameter | None]) -> Tensor | None:
        plain = [w for w in weights if type(w) is nn.Parameter and not w.is_meta]
        if len(plain) < len(weights) or any(hasattr(self.modules[name], "_hf_hook") for name in self.names):
            return None
        # Parameters that are views of an inference tensor could not be trained any more.
        with torch.inference_mode(False), torch.no_grad():
            matrix = torch.cat([weight.data for weight in plain])
            for weight, part in zip(plain, matrix.split([weight.shape[0] for weight in plain]), strict=True):
                weight.data = part
        self.weight = matrix
        return matrix
