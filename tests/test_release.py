"""One version, a citation that can be read, and archives that hold what a release must (see `release_check`)."""

from __future__ import annotations

import re
import shutil
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import release_check
from release_check import ROOT, ReleaseError, version_of

import fdpp

HAS_SETUPTOOLS = any(int(found.version.split(".")[0]) >= 77 for found in distributions(name="setuptools"))

REQUIRED = {"cff-version", "message", "title", "authors"}
"""By the schema of CFF 1.2.0; of a reference: type, title and authors."""

PAPERS = {"2606.02955", "2505.22618", "2510.00294", "2602.06953", "2502.09992", "2508.15487"} | {
    *("2503.09573", "2510.06303", "2509.06949", "2512.15745", "2509.26328"),
    *("2510.18165", "2508.19982", "2510.04147", "2507.18578", "2510.06133"),
}


def test_the_version_stands_in_one_place() -> None:
    version = version_of(ROOT)
    assert fdpp.__version__ == version and re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)
    for name in ("setup.py", "fdpp/__init__.py", "pyproject.toml"):
        assert version not in (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_is_valid() -> None:
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited.keys() >= REQUIRED
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert cited["version"] == fdpp.__version__
    assert cited["authors"] == [{"name": "The fdpp authors"}]
    for reference in cited["references"]:
        assert reference.keys() >= {"type", "title", "authors"} and reference["authors"]
        assert reference["url"].endswith(reference["identifiers"][0]["value"].removeprefix("arXiv:"))
    assert {reference["url"].rsplit("/", 1)[1] for reference in cited["references"]} == PAPERS


@pytest.fixture
def papers_of_a_release(tmp_path: Path) -> Path:
    for name in ("fdpp/version.py", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_tag_citation_and_changelog_agree(papers_of_a_release: Path) -> None:
    root, version = papers_of_a_release, version_of(ROOT)
    assert release_check.check_names(root, None) == release_check.check_names(root, f"v{version}") == version
    with pytest.raises(ReleaseError, match=rf"expected v{version}.*got v9.9.9"):
        release_check.check_names(root, "v9.9.9")
    (root / "fdpp" / "version.py").write_text('__version__ = "9.9.9"\n')
    with pytest.raises(ReleaseError, match=rf"CITATION.cff: expected version 9.9.9, got {version}"):
        release_check.check_names(root, None)
    (root / "CITATION.cff").write_text("version: 9.9.9\n")
    with pytest.raises(ReleaseError, match=r"expected the heading '## 9\.9\.9'"):
        release_check.check_names(root, None)


def test_the_wheel_of_the_source_archive_holds_everything(tmp_path: Path) -> None:
    """The link fdpp/kernels is a folder of plain files in both."""
    # Asked for by its number and not imported, which may fail in a process that knows distutils already.
    if not HAS_SETUPTOOLS:
        pytest.skip("needs setuptools 77")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, and a checkout of it")
    sdist, wheel = release_check.build(ROOT, tmp_path)
    release_check.check_sdist(sdist)
    release_check.check_wheel(wheel, ROOT)
    without = tmp_path / wheel.name.replace("fdpp-", "less/fdpp-")
    without.parent.mkdir()
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(without, "w") as part:
        for name in whole.namelist():
            if name != "fdpp/py.typed":
                part.writestr(name, whole.read(name))
    with pytest.raises(ReleaseError, match=r"missing fdpp/py.typed$"):
        release_check.check_wheel(without, ROOT)
    with zipfile.ZipFile(without, "a") as part:
        part.writestr("kernels/select.py", "")
    with pytest.raises(ReleaseError, match=r"expected fdpp and its metadata, got fdpp, .*, kernels"):
        release_check.check_wheel(without, ROOT)
