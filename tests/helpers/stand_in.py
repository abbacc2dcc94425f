"""Where hypothesis is not installed, as on a bare machine with a GPU: its tests are skipped, the others run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import pytest


class Anything:
    """Whatever strategies are built from, at import, for tests that will not run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self


def skipped(*arguments: Any, **keywords: Any) -> Callable[[Any], Any]:
    return pytest.mark.skip(reason="hypothesis is not installed")


def unchanged(*arguments: Any, **keywords: Any) -> Callable[[Any], Any]:
    return lambda test: test


def install() -> None:
    """Put the stand-in where `import hypothesis` finds it, unless the real one is installed.

    torch's compiler looks for hypothesis as well, by `find_spec`, which fails on a module without a spec.
    """
    if importlib.util.find_spec("hypothesis") is not None:
        return
    module: Any = importlib.util.module_from_spec(ModuleSpec("hypothesis", None))
    module.given, module.settings = skipped, unchanged
    for name in ("assume", "strategies", "HealthCheck"):
        setattr(module, name, Anything())
    sys.modules["hypothesis"] = module
