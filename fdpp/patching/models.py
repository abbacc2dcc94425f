"""fdpp's `generate` for a model that transformers loaded with the code of its repository.

The published classes `LLaDAModelLM` (GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5), `DreamModel` (Dream-org's
Dream-v0-Base-7B, -Instruct-7B), `SDARForCausalLM` (SDAR, TraDo), `LLaDA2MoeModelLM` (LLaDA2.0, 2.1) and
`Fast_dLLM_QwenForCausalLM` (Fast-dLLM v2) have our layouts of modules. A patched instance gets attributes of its own
and is otherwise left alone, its `forward` and Dream's `diffusion_generate` included:

- `generate` and `infill`: those of our model of the same family (`DiffusionLM.published`) whose embedding, linear
  layers and norms are the instance's own modules. No weight is copied or moved, and weights that are moved, cast,
  loaded or hooked later are seen. So are layers that are replaced later: every decode begins with a look at the
  instance. A layer that is more than its weights, with an adapter for one, is called. One that is missing or does not
  fit is refused by name. The layers run one by one, where a model of ours joins those with the same input
  (`fdpp.models.joined`).
- `denoising_step`: a `fdpp.DenoisingStep` with the default rule of `generate` and the model's mask id. Its logits are
  those that predict each position: of a `forward` with a `shift` the rows before (`DiffusionLM.aligned`).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, ClassVar

import torch
from torch import nn

from fdpp.decoding.adapters import check_adapters
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models.families import families
from fdpp.models.language_model import DiffusionLM
from fdpp.step.module import DenoisingStep

BECOMES = "fdpp's block loop"

BINDING = threading.Lock()
"""Of threads that find a layer replaced at the same time, one takes it over."""


def supported() -> str:
    names = sorted(family.published for family in families().values() if family.published is not None)
    return f"a {' or '.join(names)} of the published remote code"


def family_of(module: nn.Module) -> type[DiffusionLM] | None:
    """The family whose published class, by its name, is that of `module` or one that it derives from.

    None where there is none, and for a model of ours.
    """
    names = set() if isinstance(module, DiffusionLM) else {kind.__name__ for kind in type(module).__mro__}
    return next((family for family in families().values() if family.published in names), None)


def replacements(model: nn.Module) -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    family = family_of(model)
    assert family is not None
    if hasattr(model, "denoising_step") and "denoising_step" not in model._modules:
        raise ValueError("expected no attribute denoising_step, or a submodule of that name")
    ours = bound(family)(model)
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


class Bound(DiffusionLM):
    """A model of ours whose layers are those of `model`, whatever they are when a decode begins. `bound` makes it.

    Raises:
        ValueError: a layer is missing or does not fit, or there are weights outside of all layers; or there is no
            configuration, one with an option that is not implemented, or one without a mask id.
    """

    family: ClassVar[type[DiffusionLM]]

    def __init__(self, model: nn.Module) -> None:
        theirs = getattr(model, "config", None)
        if theirs is None:
            raise ValueError("expected a config, found none")
        kind: Any = self.family.config_class
        config = kind.from_dict(theirs.to_dict() if hasattr(theirs, "to_dict") else dict(vars(theirs)))
        if config.mask_token_id is None:
            raise ValueError("config.mask_token_id: expected the id of the mask, got None")
        with torch.device("meta"):
            super().__init__(config)
        for block in self.model.blocks:
            for joined in block.joins():
                joined.allowed = False  # the weights are theirs
        self.expected: dict[str, dict[str, list[int]]] = {}
        for key, value in self.named_parameters():
            path, _, name = key.rpartition(".")
            self.expected.setdefault(path, {})[name] = list(value.shape)
        self.owner = Owner(model)
        self.bind(model)

    def __reduce__(self) -> Any:
        return blank, (self.family,), vars(self).copy()

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
        """Why `layer` cannot stand at `path`. Of one that is more than its weights only the sizes it names count."""
        shapes = self.expected[path]
        held: Any = (
            {} if layer is None else {name: value for name, value in layer._parameters.items() if value is not None}
        )
        plain = layer is not None and type(held.get("weight")) is nn.Parameter and next(layer.children(), None) is None
        if layer is None or plain:
            found = [f"missing {path}.{name} {shape}" for name, shape in shapes.items() if name not in held]
            found += [f"unexpected {path}.{name}" for name in held if name not in shapes]
            found += [
                f"{path}.{name}: expected {shape}, got {list(held[name].shape)} {held[name].dtype}"
                for name, shape in shapes.items()
                if name in held and (list(held[name].shape) != shape or not held[name].is_floating_point())
            ]
            return found
        shape = shapes["weight"]
        sizes = [getattr(layer, name, None) for name in ("out_features", "in_features")]
        # Of an embedding, adapters name the rows as the inputs.
        if len(shape) == 1 or None in sizes or set(sizes) == set(shape):
            return []
        return [f"{path}: expected {shape}, got {sizes} of a {type(layer).__name__}"]


BOUND: dict[type[DiffusionLM], type[Bound]] = {}


def bound(family: type[DiffusionLM]) -> type[Bound]:
    """`Bound` for a family."""
    if family not in BOUND:
        made = type(f"Bound{family.__name__}", (Bound, family), {"family": family, "__module__": __name__})
        BOUND.setdefault(family, made)  # by one of the threads that found none
    return BOUND[family]


def blank(family: type[DiffusionLM]) -> Bound:
    """An empty one, for a copy or a file to fill."""
    kind = bound(family)
    return kind.__new__(kind)


def layer_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
