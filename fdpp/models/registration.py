"""LLaDA in transformers' `Auto` classes, without importing transformers before somebody does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": "fdpp.models.configuration",
    "transformers.models.auto.modeling_auto": "fdpp.models.llada",
}
"""Modules that hold `Auto` classes, and the module that registers LLaDA with them when it is imported."""


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
            import_module(REGISTERED_BY[fullname])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now where the `Auto` classes are there already, else as soon as they are imported."""
    for module, registers in REGISTERED_BY.items():
        if module in sys.modules:
            import_module(registers)
    if not any(isinstance(finder, Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, Registration())
