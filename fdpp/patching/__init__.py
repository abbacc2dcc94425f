"""`patch` and `unpatch`: fdpp's step in other people's scripts, models and modules, reversibly."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from torch import nn

from fdpp.decoding.generate import DiffusionGenerationMixin
from fdpp.patching import diffusion_gemma, dllm_gemma, models, schedulers, scripts, steps

RECORD = "_fdpp_patch"
"""Where a patched target keeps what was replaced: on itself, so that a copy of it can be unpatched too."""


def supported() -> str:
    return f"""fdpp.patch takes one of
- a Python module with {scripts.SUPPORTED}
- a torch.nn.Module that is {models.supported()}
- a torch.nn.Module that is {diffusion_gemma.SUPPORTED}
- a torch.nn.Module that holds {steps.SUPPORTED}
- {schedulers.SUPPORTED}
- {dllm_gemma.SUPPORTED}"""


class Patch:
    """What `patch` returns; printed, it says what was replaced by what.

    As a context manager it gives the target, and unpatches it at exit if it patched it.
    """

    def __init__(self, target: Any, record: list[Any] | None) -> None:
        self.target, self.record = target, record
        # A pipeline may have another scheduler later.
        self.owner = unwrapped(target)

    def __enter__(self) -> Any:
        return self.target

    def __exit__(self, *exception: object) -> None:
        if self.holds():
            unpatch(self.owner)

    def holds(self) -> bool:
        """Whether what this patch replaced is still so."""
        return self.record is not None and vars(self.owner).get(RECORD) is self.record

    def __repr__(self) -> str:
        owner = self.owner
        becomes = kind_of(owner).BECOMES
        said = "already patched" if self.record is None else "undone"
        if self.record is not None and self.holds():
            shown = (
                (path, name, repr(new) if isinstance(new, nn.Module) else becomes)
                for path, name, *_, new in self.record
            )
            said = ", ".join(f"{path}.{name}".lstrip(".") + f" -> {new}" for path, name, new in shown)
        return f"fdpp.patch of {described(owner)}: {said}"


def patch(target: Any, **options: Any) -> Patch:
    """Let `target` work with fdpp until `unpatch(target)`; in a `with` statement, until its end.

    - A module of a script (Fast-dLLM's `generate.py` and relatives): see `fdpp.patching.scripts`.
    - A model of one of our families that transformers loaded with remote code: see `fdpp.patching.models`.
    - transformers' DiffusionGemma: see `fdpp.patching.diffusion_gemma`. Its option `conditioning` is "logits" or
      "streamed".
    - A `torch.nn.Module` that holds a denoising step: see `fdpp.patching.steps`.
    - A scheduler of diffusers, or a pipeline that has one: see `fdpp.patching.schedulers`.
    - dllm's sampler for DiffusionGemma: see `fdpp.patching.dllm_gemma`.

    Only `target` changes, and after an error nothing does. Patching it again does nothing: one `unpatch`, or the end of
    the outermost `with`, undoes it. Of a compiled module, or of a model in peft's wrapper, what it wraps is patched.

    Raises:
        TypeError: `target` is none of these kinds, or takes no such option.
        ValueError: nothing to replace was found in `target`, or not as expected.
    """
    owner = unwrapped(target)
    if RECORD in vars(owner):
        return Patch(target, None)
    record = []
    for path, name, new in replacements(owner, **options):
        table = table_of(owner, path, new)
        record.append((path, name, name in table, table.get(name), new))
        table[name] = new
    vars(owner)[RECORD] = record
    return Patch(target, record)


def unpatch(target: Any) -> None:
    """Give `target` back the objects that `patch` replaced.

    Raises:
        ValueError: `target` is not patched.
    """
    owner = unwrapped(target)
    if RECORD not in vars(owner):
        raise ValueError(
            f"fdpp.unpatch: expected a target of fdpp.patch, got {described(target)}, which is not patched"
        )
    for path, name, existed, old, new in reversed(vars(owner).pop(RECORD)):
        table = table_of(owner, path, new)
        if existed:
            table[name] = old
        else:
            del table[name]


def kind_of(owner: Any) -> Any:
    """The module of this package that knows what to replace in `owner`."""
    if isinstance(owner, ModuleType):
        return scripts
    if not isinstance(owner, nn.Module):
        return dllm_gemma if dllm_gemma.is_one(owner) else schedulers
    if diffusion_gemma.is_one(owner):
        return diffusion_gemma
    return steps if models.family_of(owner) is None else models


def replacements(owner: Any, **options: Any) -> list[tuple[str, str, Any]]:
    """What to replace in `owner`: path of the submodule, name in it, new object."""
    kind = kind_of(owner)
    unknown = options.keys() - inspect.signature(kind.replacements).parameters.keys()
    if unknown:
        raise TypeError(f"fdpp.patch: {described(owner)} takes no option {', '.join(sorted(unknown))}")
    try:
        return kind.replacements(owner, **options)
    except ValueError as error:
        own = " (fdpp's own, which needs no patch)" if isinstance(owner, DiffusionGenerationMixin) else ""
        raise ValueError(f"fdpp.patch: {described(owner)}{own}: {error}. {supported()}") from error


def unwrapped(target: Any) -> Any:
    """What `torch.compile` and peft wrapped, a pipeline's scheduler, or `target`; `TypeError` if it is of no kind."""
    if dllm_gemma.is_one(target):
        return target
    scheduler = schedulers.scheduler_of(target)
    if scheduler is not None:
        return scheduler
    if not isinstance(target, (ModuleType, nn.Module)):
        raise TypeError(f"fdpp.patch: got {described(target)}. {supported()}")
    owner: Any = target
    while isinstance(target, nn.Module):
        base = getattr(owner, "get_base_model", None)
        inner = getattr(owner, "_orig_mod", None) if base is None else base()
        if inner is None:
            break
        owner = inner
    return owner


def table_of(owner: Any, path: str, new: Any) -> dict[str, Any]:
    """The dict in which the submodule at `path` keeps objects like `new`."""
    holder = owner.get_submodule(path) if path else owner
    return holder._modules if isinstance(new, nn.Module) else vars(holder)


def described(target: Any) -> str:
    return f"module {target.__name__!r}" if isinstance(target, ModuleType) else f"a {type(target).__name__}"
