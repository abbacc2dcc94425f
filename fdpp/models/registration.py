"""Our families in transformers' `Auto` classes, without importing transformers before somebody does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from fdpp.models.families import CONFIGURATIONS, MODELS, TOKENIZERS

REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": CONFIGURATIONS,
    "transformers.models.auto.modeling_auto": MODELS,
    "transformers.models.auto.tokenization_auto": TOKENIZERS,
}
"""Modules that hold `Auto` classes, and the modules that register families with them when they are imported."""


class Registration(MetaPathFinder):
    """Lets the import of an `Auto` class end with the registration."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in REGISTERED_BY else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register(module: str) -> None:
    """Register all families with the `Auto` classes of `module`."""
    for registers in REGISTERED_BY[module]:
        import_module(registers)


def install() -> None:
    """Register now where the `Auto` classes are there already, else as soon as they are imported."""
    for module in REGISTERED_BY:
        if module in sys.modules:
            register(module)
    if not any(isinstance(finder, Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, Registration())
