"""Linear layers that read the same input, as one matrix product."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from fdpp.models.linear import is_product, is_untouched
from fdpp.models.weights import Parts, assembled, differ_in_rows, is_quantised, parts_of, parts_of_all

JOINING = threading.Lock()
"""Of threads that find no matrix at the same time, one joins."""


class Joined:
    """One matrix `[sum of outputs, inputs]` of which the layers' weights are views.

    Parameters, their names and their checkpoints stay as they are, and no weight is held twice. The matrix is made on
    first use and again whenever a weight has moved. Weights that torchao quantised alike are joined part by part
    (numbers, scales, zero points), where every row has scales of its own. Layers that are more than a product
    (`fdpp.models.linear.is_product`) are left alone.

    Args:
        modules: the own table of submodules of what holds the layers, so that one that is replaced later is seen.
        names: of the layers to join.
        biased: whether they may have biases, which the caller adds.
        what: "weight", or "bias" for their biases as one vector.

    Attributes:
        allowed: False for layers that belong to somebody else's model, whose weights stay where they are.
    """

    def __init__(
        self, modules: dict[str, nn.Module | None], *names: str, biased: bool = False, what: str = "weight"
    ) -> None:
        self.modules, self.names, self.biased, self.what = modules, names, biased, what
        self.weight: Tensor | None = None
        self.allowed = True

    def matrix(self) -> Tensor | None:
        """The joined weight, for `fdpp.models.linear.linear`; None where the layers must be called one by one.

        That is so while gradients are recorded, which belong to the parameters, and under `torch.compile`, which cannot
        follow addresses. Of quantised layers it is a tensor of their weights' class.
        """
        return self.matrix_of(self.layers()) if self.usable() else None

    def usable(self) -> bool:
        return self.allowed and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def matrix_of(self, layers: list[nn.Module | None]) -> Tensor | None:
        """`matrix` of the layers as they are now."""
        weights = []
        for layer in layers:
            # Not as an attribute, which takes a module long to find.
            weight: Any = layer._parameters[self.what] if is_product(layer, self.biased) else None
            if weight is None:
                self.part()  # a layer that was quantised has no use for its former weight's memory
                return None
            weights.append(weight)
        parts = parts_of_all(weights)
        if parts is None:
            self.part()
            return None
        held = self.held(parts)
        if held is None:
            with JOINING:
                parts = parts_of_all(weights)
                held = None if parts is None else self.held(parts)
                return self.join(weights, parts) if held is None and parts is not None else held
        return held

    def layers(self) -> list[nn.Module | None]:
        """The layers as they are now, in the order of their rows."""
        return [self.modules[name] for name in self.names]

    def held(self, parts: list[Parts]) -> Tensor | None:
        """The matrix, if the weights are still its views. Its memory is alive, so equal addresses prove it."""
        matrix = self.weight
        whole = None if matrix is None else parts_of(matrix)
        if whole is None or whole.keys() != parts[0].keys():
            return None
        for name, joint in whole.items():
            address, row = joint.data_ptr(), joint.stride(0) * joint.element_size()
            for of_weight in parts:
                part = of_weight[name]
                if part.data_ptr() != address or part.dtype != joint.dtype:
                    return None
                address += part.shape[0] * row
        return matrix

    def part(self) -> None:
        """Drop the matrix; only the weights then keep its memory."""
        self.weight = None

    def join(self, weights: list[Tensor], parts: list[Parts]) -> Tensor | None:
        self.part()
        pieces = {name: [of_weight[name] for of_weight in parts] for name in parts[0]}
        if any(piece.is_meta for of_name in pieces.values() for piece in of_name) or not differ_in_rows(weights):
            return None
        whole: Parts = {}
        # Parameters that are views of an inference tensor could not be trained any more.
        with torch.inference_mode(False), torch.no_grad():
            for name, of_name in pieces.items():
                together = beside_each_other(of_name)
                if together is None:
                    together = torch.cat([piece.data for piece in of_name])
                    rows = [piece.shape[0] for piece in of_name]
                    for weight, part in zip(weights, together.split(rows), strict=True):
                        setattr(weight, name, part)
                whole[name] = together
            self.weight = assembled(whole, weights[0])
        return self.weight


class Stacked(Joined):
    """The weights of layers that many experts have, those of one expert after those of the one before.

    Args:
        modules: the own table of a list of experts.
        names: of the layers to join, in every expert's own table.
    """

    seen: tuple[list[Any], list[int]] | None = None

    def layers(self) -> list[nn.Module | None]:
        tables = [{} if expert is None else expert._modules for expert in self.modules.values()]
        return [table.get(name) for table in tables for name in self.names]

    def stack(self) -> Tensor | None:
        """`matrix()` as `[experts, rows of one, inputs]`; None also for quantised weights, which have no such views."""
        if not self.usable():
            return None
        layers: list[Any] = self.layers()
        if not self.stands(layers):
            matrix = self.matrix_of(layers)
            if matrix is None or is_quantised(matrix):
                self.seen = None
                return None
            self.seen = layers, addresses(layers)
        assert self.weight is not None
        return self.weight.view(len(self.modules), -1, self.weight.shape[1])

    def stands(self, layers: list[Any]) -> bool:
        """Whether nothing has changed since `seen`; of hundreds of layers a quarter of the time that `matrix` takes."""
        if self.weight is None or self.seen is None or self.seen[0] != layers:
            return False
        if not all(type(layer) is nn.Linear and is_untouched(layer) for layer in layers):
            return False
        return self.seen[1] == addresses(layers)


def addresses(layers: list[nn.Linear]) -> list[Any]:
    """Where the weights lie, and the biases, if any."""
    held = [layer._parameters for layer in layers]
    return [weight["weight"].data_ptr() for weight in held] + [weight["bias"] for weight in held]  # type: ignore[union-attr]


def beside_each_other(weights: list[Tensor]) -> Tensor | None:
    """The matrix of which `weights` are the rows already, as after a layer was wrapped and unwrapped; else None."""
    first, rows = weights[0], 0
    for weight in weights:
        same = weight.dtype == first.dtype and weight.shape[1:] == first.shape[1:] and weight.is_contiguous()
        offset = first.storage_offset() + rows * first.stride(0)
        storages = weight.untyped_storage().data_ptr(), first.untyped_storage().data_ptr()
        if not same or storages[0] != storages[1] or weight.storage_offset() != offset:
            return None
        rows += weight.shape[0]
    return first.data.as_strided((rows, *first.shape[1:]), first.stride())
