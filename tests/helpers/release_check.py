"""What a release must be, checked on the archives themselves: `python tests/helpers/release_check.py --out DIR`.

The source archive is built from this checkout and the wheel from the source archive, so both hold all they need. The
wheel is then installed into a new environment, and decodes with the embedded model from an empty folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "setup.py", "pyproject.toml")
"""What the source archive holds beside the package."""

MODELS = ("sums", "sudoku", "stories", "stories-block")
"""The embedded models."""

LOOK = """
import importlib.metadata, importlib.util, sys, sysconfig
import fdpp
assert fdpp.__file__.startswith(sysconfig.get_path("purelib")), fdpp.__file__
assert fdpp.__version__ == importlib.metadata.version("fdpp") == sys.argv[1], fdpp.__version__
"""


class ReleaseError(Exception):
    """Something that is not as a release must be."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ReleaseError(message)


def run(*command: object, cwd: Path) -> str:
    """The output of `command`, in which no setting of this process's Python counts."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "TRITON"))}
    parts = [str(part) for part in command]
    done = subprocess.run(parts, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"{' '.join(parts)}\n{done.stdout}{done.stderr}")
    return done.stdout


def version_of(root: Path) -> str:
    namespace: dict[str, str] = {}
    exec((root / "fdpp" / "version.py").read_text(encoding="utf-8"), namespace)
    return namespace["__version__"]


def check_names(root: Path, tag: str | None) -> str:
    """The version, which tag, citation and changelog must agree on."""
    version = version_of(root)
    expect(tag in (None, f"v{version}"), f"tag: expected v{version}, as fdpp/version.py says, got {tag}")
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    found = cited[1] if cited else "none"
    expect(found == version, f"CITATION.cff: expected version {version}, got {found}")
    heading = f"## {version}"
    lines = (root / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    expect(any(line.split(" (")[0] == heading for line in lines), f"CHANGELOG.md: expected the heading {heading!r}")
    return version


def copy_of(root: Path, target: Path) -> Path:
    """What git would take of the checkout, so that nothing is built from files that no clone has."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root).split("\0")
    for name in filter(None, listed):
        source = root / name
        if not source.is_dir() or source.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name, follow_symlinks=False)
    return target


def build(root: Path, out: Path) -> tuple[Path, Path]:
    """Source archive and wheel, with the setuptools of the running environment."""
    out.mkdir(parents=True, exist_ok=True)
    call = "from setuptools import build_meta; import sys; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    with tempfile.TemporaryDirectory() as folder:
        checkout = copy_of(root, Path(folder) / "checkout")
        run(sys.executable, "-c", call, "build_sdist", out.resolve(), cwd=checkout)
        sdist = out / f"fdpp-{version_of(root)}.tar.gz"
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        unpacked = Path(folder) / sdist.name.removesuffix(".tar.gz")
        run(sys.executable, "-c", call, "build_wheel", out.resolve(), cwd=unpacked)
    return sdist, out / f"fdpp-{version_of(root)}-py3-none-any.whl"


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    top = sdist.name.removesuffix(".tar.gz")
    names = {member.name.removeprefix(f"{top}/") for member in members}
    missing = [name for name in BESIDE if name not in names]
    expect(not missing, f"{sdist.name}: missing {', '.join(missing)}")
    links = [member.name for member in members if member.issym() or member.islnk()]
    expect(not links, f"{sdist.name}: expected plain files, got the links {', '.join(links)}")
    loose = sorted(name for name in names if name.startswith(("tests/", "bench/", ".github/")))
    expect(not loose, f"{sdist.name}: expected the package alone, got {', '.join(loose[:3])}")


def check_wheel(wheel: Path, root: Path) -> None:
    """The package whole, and no top-level `kernels`, which is a package of Hugging Face's."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    info = f"{wheel.name.split('-py3')[0]}.dist-info"
    expect(tops == {"fdpp", info}, f"{wheel.name}: expected fdpp and its metadata, got {', '.join(sorted(tops))}")
    wanted = {f"fdpp/kernels/{path.name}" for path in (root / "kernels").glob("*.py")}
    sources = (path for path in (root / "fdpp").rglob("*.py") if "__pycache__" not in path.parts)
    wanted |= {path.relative_to(root).as_posix() for path in sources}
    checkpoints = root / "fdpp" / "tiny" / "checkpoints"
    wanted |= {path.relative_to(root).as_posix() for path in checkpoints.rglob("*") if path.is_file()}
    wanted |= {f"fdpp/tiny/checkpoints/{name}/model.safetensors" for name in MODELS}
    wanted |= {"fdpp/py.typed", f"{info}/licenses/LICENSE"}
    missing = sorted(wanted - names)
    expect(not missing, f"{wheel.name}: missing {', '.join(missing)}")


def check_install(wheel: Path, version: str, packages: Path | None) -> str:
    """What the wheel says in a new environment; the packages it requires are installed, or those in `packages`."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "env"
        venv.create(home, with_pip=True, symlinks=True)
        python, elsewhere = home / "bin" / "python", Path(folder) / "elsewhere"
        elsewhere.mkdir()
        options = [] if packages is None else ["--no-deps", "--no-index"]
        run(python, "-m", "pip", "install", *options, wheel.resolve(), cwd=elsewhere)
        [site] = home.glob("lib/python*/site-packages")
        expect(not (site / "kernels").exists(), f"{wheel.name}: an install brings a top-level kernels")
        if packages is not None:
            # The .pth files of that folder, by which an editable fdpp would come along, are not read.
            (site / "packages.pth").write_text(f"{packages.resolve()}\n")
        run(python, "-c", LOOK, version, cwd=elsewhere)
        said = run(home / "bin" / "fdpp", "--version", cwd=elsewhere).strip()
        expect(said == f"fdpp {version}", f"fdpp --version: expected fdpp {version}, got {said}")
        shown = run(python, "-m", "fdpp", "demo", "--problems", "2", cwd=elsewhere)
    expect("tokens/forward" in shown, f"fdpp demo: expected its table, got\n{shown}")
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the archives are left (default: dist)")
    parser.add_argument("--tag", help="the tag that is released, to be v and the version")
    text = "take what the wheel requires from this folder instead of downloading it"
    parser.add_argument("--packages", type=Path, metavar="SITE_PACKAGES", help=text)
    options = parser.parse_args(arguments)
    try:
        version = check_names(ROOT, options.tag)
        sdist, wheel = build(ROOT, options.out)
        check_sdist(sdist)
        check_wheel(wheel, ROOT)
        print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=ROOT).strip())
        print(check_install(wheel, version, options.packages))
    except ReleaseError as error:
        raise SystemExit(f"release check: {error}") from error
    print(f"fdpp {version} may be released: {sdist.name}, {wheel.name}")


if __name__ == "__main__":
    main()
