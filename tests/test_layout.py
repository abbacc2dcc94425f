"""The folder kernels/ is fdpp.kernels and nothing else: in a wheel, an editable install and a plain checkout."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path

import pytest
import release_check

from fdpp import tiny

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
SITE = [path for path in sys.path if path.endswith("-packages")]

# Started with -S, so that an fdpp installed in the running environment is not seen, nor another editable one.
PROBE = """
import importlib, importlib.util, json, site, sys
sys.path.extend({install} + {site})
for folder in {install}:
    site.addsitedir(folder)
top = importlib.util.find_spec("kernels")
modules = [importlib.import_module("fdpp.kernels." + name) for name in {modules}]
from transformers import AutoModel
import transformers.modeling_utils
print(json.dumps({{
    "fdpp": sys.modules["fdpp"].__file__,
    "kernels": [module.__file__ for module in modules],
    "top": None if top is None else [top.origin, *(top.submodule_search_locations or [])],
    "auto_model": AutoModel.__module__,
}}))
"""


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: object, cwd: Path) -> None:
    # Not by an import: a process that has looked for pip's module cannot import setuptools any more.
    if not list(distributions(name="pip")):
        pytest.skip("needs pip")
    run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", cwd=cwd)


def probe(cwd: Path, install: Path | None = None, path: Path | None = None) -> dict:
    code = PROBE.format(site=SITE, install=[] if install is None else [str(install)], modules=MODULES)
    return json.loads(run(sys.executable, "-S", "-c", code, cwd=cwd, path=path).splitlines()[-1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a clone holds, so that building leaves nothing in the real one."""
    target = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fdpp", "kernels"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-build-isolation", "--wheel-dir", target, checkout, cwd=target)
    return next(target.glob("fdpp-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", target, wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("editable")
    pip("install", "--no-build-isolation", "--target", target, "-e", checkout, cwd=target)
    return target


def test_kernels_is_a_relative_link_to_a_folder_without_init():
    link = ROOT / "fdpp" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert MODULES


def test_checkout(checkout, tmp_path):
    for cwd, path in ((checkout, None), (tmp_path, checkout)):
        seen = probe(cwd, path=path)
        assert Path(seen["fdpp"]) == checkout / "fdpp" / "__init__.py"
        assert {Path(file).resolve().parent for file in seen["kernels"]} == {checkout / "kernels"}
        assert seen["auto_model"].startswith("transformers.")


@pytest.mark.parametrize("layout", ["installed", "editable"])
def test_install(layout, checkout, tmp_path, request):
    install = request.getfixturevalue(layout)
    home = install if layout == "installed" else checkout
    elsewhere = probe(tmp_path, install)
    assert Path(elsewhere["fdpp"]) == home / "fdpp" / "__init__.py"
    assert {Path(file).parent for file in elsewhere["kernels"]} == {home / "fdpp" / "kernels"}
    assert elsewhere["auto_model"].startswith("transformers.")
    ours = [path for path in elsewhere["top"] or [] if path and Path(path).is_relative_to(home)]
    assert not ours, "an install must leave the top-level name `kernels` to Hugging Face's package"

    assert probe(checkout, install)["auto_model"].startswith("transformers.")


def test_hugging_face_kernels_is_found_from_the_root(checkout, tmp_path):
    """A regular package wins over the folder kernels/, though the root comes first on the path."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.0'\n")
    seen = probe(checkout, tmp_path)
    assert seen["top"][0] == str(package / "__init__.py")
    assert seen["auto_model"].startswith("transformers.")


def test_wheel_holds_kernels_types_and_license(wheel, checkout):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"fdpp", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert {f"fdpp/kernels/{name}.py" for name in MODULES} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "fdpp/py.typed" in names, "without it a type checker takes nothing from fdpp's annotations"
    sources = {path.relative_to(checkout).as_posix() for path in (checkout / "fdpp").rglob("*.py")}
    assert sources <= names


@pytest.mark.parametrize("task", tiny.MODELS)
def test_wheel_holds_every_model_in_a_small_file(task, wheel):
    folder = f"fdpp/tiny/checkpoints/{task}"
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {f"{folder}/{name}" for name in files} <= sizes.keys()
    assert {f"{folder}/{path.name}" for path in tiny.MODELS[task].checkpoint.iterdir()} <= sizes.keys()
    assert sizes[f"{folder}/model.safetensors"] <= 8 * 2**20
    assert task in release_check.MODELS, "a release must look for it, too"


def imported(*folders: str, besides: tuple[str, ...] = ()) -> set[str]:
    """Top-level names that the folders' files import, except those in `besides`, the standard library and fdpp."""
    found = set()
    files = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    for path in files - {file for name in besides for file in (ROOT / name, *(ROOT / name).rglob("*.py"))}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"fdpp"}


def test_every_imported_package_is_declared(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    names = {line: re.match(r"[\w-]+", line)[0] for line in required}
    always = {name for line, name in names.items() if "extra ==" not in line}
    plugins = (
        "fdpp/integrations",
        "fdpp/cli/eval.py",
        "fdpp/models/adapters.py",
        "fdpp/models/quantised.py",
        "fdpp/trace/still.py",
    )
    assert imported("fdpp", "kernels", besides=plugins) <= always
    users = {name for line, name in names.items() if not re.search(r'extra == "(test|lint|bench)"', line)}
    assert imported("fdpp", "kernels") <= users
    own = [path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    helpers = {name for path in own for name in (path.stem, path.parent.name)}
    assert imported("tests", "bench") - helpers <= set(names.values())
