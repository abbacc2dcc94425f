"""No import runs upward: each layer knows only those below it. One that is missing is named."""

import ast
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("fdpp.kernels", "fdpp.version"),
    ("fdpp.selection",),
    ("fdpp.attention",),
    ("fdpp.rules",),
    ("fdpp.step",),
    ("fdpp.decoding",),
    ("fdpp.models", "fdpp.trace", "fdpp.moved"),
    ("fdpp.patching", "fdpp.tiny"),
    ("fdpp.integrations",),
    ("fdpp.cli",),
    ("fdpp.__main__",),
)


def layer_of(module: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if any(module == n or module.startswith(n + ".") for n in names)]
    assert found, f"{module} stands in no layer"
    return found[0]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fdpp":
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= whole if node.module == "fdpp" else {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("fdpp.")}
    return names


def test_every_import_goes_down_or_stays_in_its_layer() -> None:
    upward = []
    files = [path for folder in ("fdpp", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    for path in files:
        relative = path.relative_to(ROOT).with_suffix("")
        module = ".".join(relative.parts)
        module = module.removesuffix(".__init__") if module != "fdpp.__init__" else "fdpp"
        module = f"fdpp.{module}" if module.startswith("kernels") else module
        if module == "fdpp":
            continue
        upward += [f"{module} -> {name}" for name in imports(path) if layer_of(name) > layer_of(module)]
    assert upward == []


def test_sglang_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sglang", "sglang.srt.dllm.algorithm"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fdpp.integrations.sglang", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fdpp\[sglang\]'"):
        import_module("fdpp.integrations.sglang")
