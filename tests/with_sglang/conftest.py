"""The released SGLang as it is, on a machine without a GPU: only torchvision has a stand-in."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from made_up import BLOCK, MASK


class Torchvision(MetaPathFinder, Loader):
    """An empty torchvision: PyPI's build needs the CUDA build of torch, and SGLang imports it only for images."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]


if importlib.util.find_spec("sglang") and not importlib.util.find_spec("torchvision"):
    import sglang  # noqa: F401  (imports transformers, which must not take the stand-in for the real one)

    sys.meta_path.append(Torchvision())


@pytest.fixture(scope="session")
def plugin() -> Any:
    """fdpp's plugin, loaded by SGLang's own loader from its installed entry point."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return sys.modules["fdpp.integrations.sglang"]


@pytest.fixture
def algorithm(plugin: Any) -> Callable[..., Any]:
    """`algorithm(name, fdfo=False, **settings)`: from SGLang's registry, as SGLang's own lookup gives it."""
    from sglang.srt.dllm.algorithm import get_algorithm
    from sglang.srt.dllm.config import DllmConfig

    def build(name: str, fdfo: bool = False, **settings: Any) -> Any:
        return get_algorithm(DllmConfig(name, settings, BLOCK, MASK, 8, first_done_first_out_mode=fdfo))

    return build
