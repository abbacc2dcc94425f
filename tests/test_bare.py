"""The tests where nothing is installed but torch, triton, transformers, pytest and what these require."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
INSTALLED = ("torch", "triton", "transformers", "pytest")
ABSENT = (
    "hypothesis",
    "xdist",
    "pytest_cov",
    "coverage",
    "accelerate",
    "matplotlib",
    "mypy",
    "fdpp",
)
SAMPLE = (
    "tests/test_step.py::test_compiles_inside_a_model",
    "tests/test_ops.py::test_opcheck_of_awkward_arguments",
    "tests/test_rules.py",
    "tests/test_bench.py::test_a_step_is_checked_before_it_is_timed",
    "tests/test_docs.py::test_python_runs_as_pasted[docs/many-devices.md]",
    "tests/test_layout.py::test_every_imported_package_is_declared",
)
"""`torch.compile`, an operator check, a file that hypothesis runs in part, a benchmark, and what needs accelerate or
pip."""


def closure(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions `names` and all that they require here, without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [*names]
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            required = map(Requirement, found[name].requires or [])
            wanted += [each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def top_level(distribution: importlib.metadata.Distribution) -> set[Path]:
    """What the distribution has in site-packages: its packages, modules and metadata."""
    names = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    return {Path(str(distribution.locate_file(name))) for name in names}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with links to these distributions alone."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    [packages] = folder.glob("lib/python*/site-packages")
    for path in set().union(*map(top_level, closure(INSTALLED).values())):
        (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In the root of the checkout, without this process's settings of Python, pytest and coverage."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "COV"))}
    return subprocess.run(
        [str(python), *arguments], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=300, check=False
    )


def run_pytest(python: Path, *arguments: str) -> tuple[int, str]:
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    return done.returncode, done.stdout + done.stderr


def test_nothing_else_is_there(python: Path) -> None:
    look = (
        "import importlib.util, sys; sys.path.pop(0); print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    )
    assert run(python, "-c", look, *ABSENT).stdout.strip() == "[]"
    assert run(python, "-c", look, *INSTALLED, "numpy").stdout.count("'") == 2 * len((*INSTALLED, "numpy"))
    assert run(python, "-c", "import hypothesis").returncode == 1
    assert run(python, "--version").stdout == f"Python {sys.version.split()[0]}\n"


def test_every_test_is_collected(python: Path) -> None:
    status, text = run_pytest(python, "--collect-only")
    assert status == 0, text[-3000:]
    assert not re.search(r"\d+ error", text) and int(re.search(r"(\d+) tests collected", text)[1]) > 1000  # type: ignore[index]


def test_a_sample_runs(python: Path) -> None:
    status, text = run_pytest(python, "-rs", *SAMPLE)
    assert status == 0, text[-3000:]
    assert "hypothesis is not installed" in text and "could not import 'accelerate'" in text
    assert re.search(r"\d+ passed, \d+ skipped", text)
