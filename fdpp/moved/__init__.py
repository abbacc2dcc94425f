"""Former import paths: every module that moved is still found under its old name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "fdpp.cache": "fdpp.attention.cache",
    "fdpp.chat": "fdpp.cli.conversation",
    "fdpp.cpu": "fdpp.step.cpu",
    "fdpp.dawn": "fdpp.moved.dawn",
    "fdpp.dawn.decide": "fdpp.rules.dawn.decide",
    "fdpp.dawn.edges": "fdpp.rules.dawn.edges",
    "fdpp.dawn.probe": "fdpp.attention.probe",
    "fdpp.dawn.reference": "fdpp.rules.dawn.reference",
    "fdpp.dawn.rule": "fdpp.rules.dawn.rule",
    "fdpp.decoding.config": "fdpp.moved.config",
    "fdpp.demo": "fdpp.cli.held_out",
    "fdpp.gpu": "fdpp.step.gpu",
    "fdpp.klass": "fdpp.moved.klass",
    "fdpp.live": "fdpp.cli.live",
    "fdpp.models.configuration": "fdpp.models.llada_config",
    "fdpp.noise": "fdpp.step.noise",
    "fdpp.ops": "fdpp.moved.ops",
    "fdpp.parallel": "fdpp.step.parallel",
    "fdpp.project": "fdpp.step.project",
    "fdpp.reference": "fdpp.step.reference",
}
"""Old name, new name; both are one module."""


class Moved(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(MOVED[spec.name])
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has given it the spec of its old name.
        module.__spec__ = self.own


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        # First: a folder left by an older checkout, with nothing but bytecode, would be found as a namespace package.
        sys.meta_path.insert(0, Moved())
