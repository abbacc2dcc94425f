"""Linear layers that read the same input, as one matrix product."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from fdpp.models.linear import is_plain

JOINING = threading.Lock()
"""Of threads that find no matrix at the same time, one joins."""


class Joined:
    """One matrix `[sum of outputs, inputs]` of which the layers' weights are views.

    Parameters, their names and their checkpoints stay as they are, and no weight is held twice. The matrix is made on
    first use and again whenever a weight has moved. Layers that are not plain (`fdpp.models.linear.is_plain`) are left
    alone.

    Args:
        modules: the block's own table of submodules, so that a layer that is replaced later is seen.
        names: of the layers to join.

    Attributes:
        allowed: False for layers that belong to somebody else's model, whose weights stay where they are.
    """

    def __init__(self, modules: dict[str, nn.Module | None], *names: str) -> None:
        self.modules, self.names = modules, names
        self.weight: Tensor | None = None
        self.allowed = True

    def matrix(self) -> Tensor | None:
        """The joined weight, None where the layers must be called one by one.

        That is so while gradients are recorded, which belong to the parameters, and under `torch.compile`, which cannot
        follow addresses.
        """
        if not self.allowed or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        weights = []
        for name in self.names:
            layer = self.modules[name]
            if not is_plain(layer):
                self.part()  # a layer that was quantised has no use for its former weight's memory
                return None
            weights.append(layer.weight)
        held = self.held(weights)
        if held is None:
            with JOINING:
                held = self.held(weights)
                return self.join(weights) if held is None else held
        return held

    def held(self, weights: list[Tensor]) -> Tensor | None:
        """The matrix, if the weights are still its views. Its memory is alive, so equal addresses prove it."""
        matrix = self.weight
        if matrix is None:
            return None
        address, row = matrix.data_ptr(), matrix.stride(0) * matrix.element_size()
        for weight in weights:
            if weight.data_ptr() != address or weight.dtype != matrix.dtype:
                return None
            address += weight.shape[0] * row
        return matrix

    def part(self) -> None:
        """Drop the matrix; only the weights then keep its memory."""
        self.weight = None

    def join(self, weights: list[Tensor]) -> Tensor | None:
        if any(weight.is_meta for weight in weights):
            return None
        # Parameters that are views of an inference tensor could not be trained any more.
        with torch.inference_mode(False), torch.no_grad():
            matrix = beside_each_other(weights)
            if matrix is None:
                matrix = torch.cat([weight.data for weight in weights])
                for weight, part in zip(weights, matrix.split([weight.shape[0] for weight in weights]), strict=True):
                    weight.data = part
        self.weight = matrix
        return matrix


def beside_each_other(weights: list[Tensor]) -> Tensor | None:
    """The matrix of which `weights` are the rows already, as after a layer was wrapped and unwrapped; else None."""
    first, rows = weights[0], 0
    for weight in weights:
        same = weight.dtype == first.dtype and weight.shape[1] == first.shape[1] and weight.is_contiguous()
        offset = first.storage_offset() + rows * first.shape[1]
        storages = weight.untyped_storage().data_ptr(), first.untyped_storage().data_ptr()
        if not same or storages[0] != storages[1] or weight.storage_offset() != offset:
            return None
        rows += weight.shape[0]
    return first.data.as_strided((rows, first.shape[1]), (first.shape[1], 1))
