"""fdpp's denoising step in place of another one that a module holds.

A child is shaped like `fdpp.DenoisingStep` if

- it is a `torch.nn.Module`, at any depth, and not a `fdpp.DenoisingStep` already,
- its `forward` takes `logits` and `tokens`, then perhaps `active`, then perhaps `seeds`, and nothing else, and
- it has the attributes `rule` and `mask_id`, and perhaps `temperature`.

It is replaced by a `fdpp.DenoisingStep` with these attributes, on its device and in its mode, under every name that it
has. A wrapper of `torch.compile` is replaced with it; hooks stay with the child. Whether the child returns a
`fdpp.Selection` cannot be checked: the code around it must accept one.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

from torch import nn

from fdpp.rules import Rule
from fdpp.step.module import DenoisingStep

PARAMETERS = ("logits", "tokens", "active", "seeds")
ATTRIBUTES = ("rule", "mask_id")

SUPPORTED = (
    f"a child other than fdpp.DenoisingStep with forward({', '.join(PARAMETERS)}), the last two optional, and the "
    f"attributes {' and '.join(ATTRIBUTES)} (and perhaps temperature)"
)

BECOMES = "fdpp's step"


def is_step(child: nn.Module) -> bool:
    """Whether `child` is shaped like `fdpp.DenoisingStep`, see above."""
    if isinstance(child, DenoisingStep) or not all(hasattr(child, name) for name in ATTRIBUTES):
        return False
    names = tuple(inspect.signature(child.forward).parameters)
    return len(names) >= 2 and names == PARAMETERS[: len(names)]


def replacements(parent: nn.Module) -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    ours: dict[nn.Module, DenoisingStep] = {}
    found = []
    for path, holder in parent.named_modules():
        if holder is not parent and is_step(holder):
            continue
        for name, registered in holder._modules.items():
            # A wrapper of torch.compile keeps calling the child that it compiled, so it is replaced with it.
            child = getattr(registered, "_orig_mod", registered)
            if name != "_orig_mod" and child is not None and is_step(child):
                where = f"{path}.{name}".lstrip(".")
                found.append((path, name, ours.setdefault(child, like(child, parent, where))))
    if not found:
        raise ValueError("found no child shaped like a fdpp.DenoisingStep")
    return found


def like(child: Any, parent: nn.Module, where: str) -> DenoisingStep:
    """A step of fdpp with the settings of `child`."""
    if not isinstance(child.rule, Rule):
        raise ValueError(f"{where}.rule: expected a fdpp.Rule such as fdpp.Frechet(0.25), got {child.rule!r}")
    step = DenoisingStep(child.rule, child.mask_id, getattr(child, "temperature", 0.0))
    held = itertools.chain(child.buffers(), child.parameters(), parent.parameters(), parent.buffers())
    device = next((tensor.device for tensor in held), None)
    return step.to(device).train(child.training)
