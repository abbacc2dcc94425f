"""The forms for issues and the workflows are YAML that GitHub takes, and CONTRIBUTING names targets that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
FIELDS = {"input", "textarea", "dropdown", "checkboxes", "markdown"}


def read(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(path: Path) -> None:
    form = read(path)
    assert form.keys() == {"name", "description", "labels", "body"} and all(form.values())
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"} and field["type"] in FIELDS
        texts = {key: value for key, value in field["attributes"].items() if key != "options"}
        assert texts["label"] and all(isinstance(value, str) for value in texts.values())
        assert ("options" in field["attributes"]) == (field["type"] in ("dropdown", "checkboxes"))


def test_there_is_a_form_for_each_kind_of_report() -> None:
    assert {path.stem for path in FORMS} == {"bug", "performance", "rule_or_model", "wrong_tokens"}


@pytest.mark.parametrize("name", ["cpu", "gpu", "release"])
def test_a_workflow_has_jobs_with_a_time_limit_and_no_more_rights_than_it_needs(name: str) -> None:
    workflow = read(ROOT / ".github" / "workflows" / f"{name}.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] and job["steps"] for job in workflow["jobs"].values())
    rights = [job["permissions"] for job in workflow["jobs"].values() if "permissions" in job]
    assert rights == ([{"id-token": "write"}] if name == "release" else [])


@pytest.mark.parametrize(
    "path", ["CONTRIBUTING.md", ".github/pull_request_template.md", ".github/workflows/release.yml"]
)
def test_the_targets_that_are_named_exist(path: str) -> None:
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    known = {name for line in targets for name in line.split()}
    named = re.findall(r"(?:`|- run: )make ((?:[a-z-]+ ?)+)", (ROOT / path).read_text(encoding="utf-8"))
    assert named and {name for line in named for name in line.split()} <= known


def test_what_contributing_links_to_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / link).exists()] == []
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
