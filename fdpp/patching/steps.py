"""Our denoising step in the place of another one that a module holds.

A child is shaped like `fdpp.DenoisingStep` if

- it is a `torch.nn.Module`, at any depth, and not a `fdpp.DenoisingStep` already,
- its `forward` takes `logits` and `tokens`, then perhaps `active`, then perhaps `seeds`, and nothing else, and
- it has the attributes `rule` and `mask_id`, and perhaps `temperature`.

It is exchanged for a `fdpp.DenoisingStep` with these attributes, on its device and in its mode, under the same name
and, if it is registered in several places, in all of them; if `torch.compile` wrapped it, together with the wrapper.
That it also returns a `fdpp.Selection` cannot be seen from outside; what stands around it must be content with one.
Hooks stay with the child.
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
            # What torch.compile wrapped is called as it was then: it goes with its wrapper.
            child = getattr(registered, "_orig_mod", registered)
            if name != "_orig_mod" and child is not None and is_step(child):
                where = f"{path}.{name}".lstrip(".")
                found.append((path, name, ours.setdefault(child, like(child, parent, where))))
    if not found:
        raise ValueError("found no child shaped like a fdpp.DenoisingStep")
    return found


def like(child: Any, parent: nn.Module, where: str) -> DenoisingStep:
    """Our step with the settings of `child`."""
    if not isinstance(child.rule, Rule):
        raise ValueError(f"{where}.rule: expected a fdpp.Rule such as fdpp.Frechet(0.25), got {child.rule!r}")
    step = DenoisingStep(child.rule, child.mask_id, getattr(child, "temperature", 0.0))
    held = itertools.chain(child.buffers(), child.parameters(), parent.parameters(), parent.buffers())
    device = next((tensor.device for tensor in held), None)
    return step.to(device).train(child.training)
