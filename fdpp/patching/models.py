"""fdpp's `generate` for a LLaDA that transformers loaded with the code of its repository.

The published class `LLaDAModelLM` (GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5) has our layout of modules. A patched
instance gets attributes of its own and is otherwise left alone, its `forward` included:

- `generate` and `infill`: those of a `fdpp.LLaDAModelLM` whose embedding, linear layers and norms are the instance's
  own modules. No weight is copied or moved, and weights that are moved, cast, loaded or hooked later are seen. A layer
  that is replaced later is not: unpatch first. The layers run one by one, where a model of ours joins those with the same
  input (`fdpp.models.joined`).
- `denoising_step`: a `fdpp.DenoisingStep` with the default rule of `generate` and the model's mask id.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models.configuration import LLaDAConfig
from fdpp.models.llada import LLaDAModelLM
from fdpp.step.module import DenoisingStep

SUPPORTED = "a LLaDAModelLM of the published remote code (model.transformer.wte, .blocks, .ln_f and .ff_out)"


def is_llada(module: nn.Module) -> bool:
    """Whether the class of `module` is, or derives from, one with the published name that is not ours."""
    names = {kind.__name__ for kind in type(module).__mro__}
    return LLaDAModelLM.__name__ in names and not isinstance(module, LLaDAModelLM)


def replacements(model: nn.Module) -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    if hasattr(model, "denoising_step") and "denoising_step" not in model._modules:
        raise ValueError("expected no attribute denoising_step, or a submodule of that name")
    ours = with_layers_of(model)
    step = DenoisingStep(DiffusionGenerationConfig().rule, ours.config.mask_token_id).to(ours.device)
    return [("", "generate", ours.generate), ("", "infill", ours.infill), ("", "denoising_step", step)]


def with_layers_of(model: nn.Module) -> LLaDAModelLM:
    """A model of ours whose layers are those of `model`.

    Raises:
        ValueError: a parameter is missing, unexpected, of another shape or not floating point; or there is no
            configuration, one with an option that is not implemented, or one without a mask id.
    """
    theirs = getattr(model, "config", None)
    if theirs is None:
        raise ValueError("expected a config, found none")
    config = LLaDAConfig.from_dict(theirs.to_dict() if hasattr(theirs, "to_dict") else dict(vars(theirs)))
    if config.mask_token_id is None:
        raise ValueError("config.mask_token_id: expected the id of the mask, got None")
    with torch.device("meta"):
        ours = LLaDAModelLM(config)
    # A tied head is the embedding, and is listed once.
    expected, came = dict(ours.named_parameters()), dict(model.named_parameters())
    problems = [f"missing {key} {list(expected[key].shape)}" for key in expected.keys() - came.keys()]
    problems += [f"unexpected {key}" for key in came.keys() - expected.keys()]
    for key in expected.keys() & came.keys():
        wanted, weight = expected[key], came[key]
        if weight.shape != wanted.shape or not weight.is_floating_point():
            problems.append(f"{key}: expected {list(wanted.shape)}, got {list(weight.shape)} {weight.dtype}")
    if problems:
        raise ValueError("; ".join(sorted(problems)[:8]))
    for key in expected:
        path = key.removesuffix(".weight")
        ours.set_submodule(path, model.get_submodule(path))
    return ours
