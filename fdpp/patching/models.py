"""fdpp's `generate` for a LLaDA that transformers loaded with the code of its repository.

The published class `LLaDAModelLM` (GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5) has our layout of modules. A patched
instance gets attributes of its own and is otherwise left alone, its `forward` included:

- `generate` and `infill`: those of a `fdpp.LLaDAModelLM` whose embedding, linear layers and norms are the instance's
  own modules. No weight is copied or moved, and weights that are moved, cast, loaded or hooked later are seen. So are
  layers that are replaced later: every decode begins with a look at the instance. A layer that is more than its
  weight, with an adapter for one, is called. One that is missing or does not fit is refused by name. The layers run
  one by one, where a model of ours joins those with the same input (`fdpp.models.joined`).
- `denoising_step`: a `fdpp.DenoisingStep` with the default rule of `generate` and the model's mask id.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn

from fdpp.decoding.adapters import check_adapters
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models.llada import LLaDAModelLM
from fdpp.models.llada_config import LLaDAConfig
from fdpp.step.module import DenoisingStep

SUPPORTED = "a LLaDAModelLM of the published remote code (model.transformer.wte, .blocks, .ln_f and .ff_out)"

BECOMES = "fdpp's block loop"

BINDING = threading.Lock()
"""Of threads that find a layer replaced at the same time, one takes it over."""


def is_llada(module: nn.Module) -> bool:
    """Whether the class of `module` is, or derives from, one with the published name that is not ours."""
    names = {kind.__name__ for kind in type(module).__mro__}
    return LLaDAModelLM.__name__ in names and not isinstance(module, LLaDAModelLM)


def replacements(model: nn.Module) -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    if hasattr(model, "denoising_step") and "denoising_step" not in model._modules:
        raise ValueError("expected no attribute denoising_step, or a submodule of that name")
    ours = Bound(model)
    step = DenoisingStep(DiffusionGenerationConfig().rule, ours.config.mask_token_id).to(ours.device)
    return [("", "generate", ours.generate), ("", "infill", ours.infill), ("", "denoising_step", step)]


class Owner:
    """The patched model, which this does not keep alive. A copy of the model is the owner of what is copied with it."""

    def __init__(self, model: nn.Module | None) -> None:
        self.reference = (lambda: None) if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        return self.reference()

    def __reduce__(self) -> Any:
        return Owner, (self(),)


class Bound(LLaDAModelLM):
    """A model of ours whose layers are those of `model`, whatever they are when a decode begins.

    Raises:
        ValueError: a layer is missing or does not fit, or there are weights outside of all layers; or there is no
            configuration, one with an option that is not implemented, or one without a mask id.
    """

    def __init__(self, model: nn.Module) -> None:
        theirs = getattr(model, "config", None)
        if theirs is None:
            raise ValueError("expected a config, found none")
        config = LLaDAConfig.from_dict(theirs.to_dict() if hasattr(theirs, "to_dict") else dict(vars(theirs)))
        if config.mask_token_id is None:
            raise ValueError("config.mask_token_id: expected the id of the mask, got None")
        with torch.device("meta"):
            super().__init__(config)
        for block in self.model.transformer["blocks"]:
            block.qkv.allowed = block.gate_up.allowed = False  # the weights are theirs
        self.expected = {key.removesuffix(".weight"): weight.shape for key, weight in self.named_parameters()}
        self.owner = Owner(model)
        self.bind(model)

    def before_decode(self) -> None:
        model = self.owner()
        if model is None:
            return super().before_decode()
        check_adapters(model)
        try:
            self.bind(model)
        except ValueError as error:
            raise ValueError(f"generate of a patched {type(model).__name__}: {error}") from error

    def bind(self, model: nn.Module) -> None:
        """Take over those layers of `model` that are not ours yet; none, if one is refused."""
        with BINDING:
            layers = {path: layer_at(model, path) for path in self.expected}
            new = {path: layer for path, layer in layers.items() if layer is not layer_at(self, path)}
            if not new:
                return
            refused = [problem for path, layer in layers.items() for problem in self.misfits(path, layer)]
            strays = {name for name, _ in model.named_parameters() if not any(name.startswith(f"{p}.") for p in layers)}
            refused += [f"unexpected {name}" for name in strays]
            if refused:
                raise ValueError("; ".join(sorted(refused)[:8]))
            for path, layer in new.items():
                self.set_submodule(path, layer)

    def misfits(self, path: str, layer: nn.Module | None) -> list[str]:
        """Why `layer` cannot stand at `path`. Of one that is more than a weight only the sizes that it names count."""
        shape = list(self.expected[path])
        if layer is None:
            return [f"missing {path}.weight {shape}"]
        weight, inner = layer._parameters.get("weight"), next(layer.children(), None)
        if type(weight) is nn.Parameter and inner is None:
            found = [f"unexpected {path}.{name}" for name, _ in layer.named_parameters() if name != "weight"]
            if list(weight.shape) != shape or not weight.is_floating_point():
                found.append(f"{path}.weight: expected {shape}, got {list(weight.shape)} {weight.dtype}")
            return found
        sizes = [getattr(layer, name, None) for name in ("out_features", "in_features")]
        # Of an embedding, adapters name the rows as the inputs.
        if len(shape) == 1 or None in sizes or set(sizes) == set(shape):
            return []
        return [f"{path}: expected {shape}, got {sizes} of a {type(layer).__name__}"]


def layer_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
