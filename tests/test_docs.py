"""README and docs: every link leads somewhere, every block of Python runs by itself, every command parses."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import documents
import pytest

from fdpp.cli import build_parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OTHERS = ("CONTRIBUTING.md", "bench/README.md", "kernels/README.md", "examples/README.md")
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in OTHERS if (ROOT / name).exists())]
EVERY = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

ELSEWHERE = {"gpu", "network"}
"""Needs that are no module: a block with one of them is compiled, and never run here."""

OPERATORS = {"|", "&&", "||", ";", ">", "<", "&"}


def test_the_front_page_is_short_and_leads_to_all_others():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170
    linked = {(ROOT / link.split("#")[0]).resolve() for link in documents.links(README) if ":" not in link}
    assert [path.name for path in DOCUMENTS[1:] if path not in linked] == []


@EVERY
def test_links_lead_somewhere(document):
    missing = []
    for link in documents.links(document):
        if link.startswith("https://"):
            if "arxiv.org" in link and not re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link):
                missing.append(link)
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in documents.anchors(target)):
            missing.append(link)
    assert missing == []


@EVERY
def test_every_block_is_of_a_kind_that_is_checked(document):
    for block in documents.blocks(document):
        assert block.language in ("python", "sh", "text", "yaml", "bibtex", ""), block.where
        assert not (block.needs or block.runs) or block.language in ("python", "sh"), block.where


def missing(needs: list[str]) -> list[str]:
    return [name for name in needs if name in ELSEWHERE or importlib.util.find_spec(name) is None]


@EVERY
def test_python_runs_as_pasted(document, tmp_path):
    jobs, expected, left_out = [], {}, []
    for block in documents.blocks(document):
        if block.language == "python":
            block.compile()
            if lacking := missing(block.needs):
                left_out += [
                    f"line {block.line}: could not import '{name}'" for name in lacking if name not in ELSEWHERE
                ]
            else:
                jobs.append({"line": block.line, "code": block.code})
                expected[block.line] = block.output
        elif block.language == "sh" and block.runs:
            [(argv, stdin)] = fdpp_commands(block)
            jobs.append({"line": block.line, "argv": argv, "stdin": stdin})
            expected[block.line] = block.output
    if jobs:
        run(document, jobs, expected, tmp_path)
    if left_out:
        pytest.skip(f"compiled alone, {'; '.join(left_out)}")


def run(document: Path, jobs: list[dict], expected: dict[int, str | None], tmp_path: Path) -> None:
    """Run the blocks of `document` in one process and compare what they print with what stands beneath them."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    # Not counted for coverage, which makes an import of transformers take a third longer.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "TRITON_INTERPRET"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "documents.py"), "jobs.json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(jobs), done.stderr
    name = document.relative_to(ROOT)
    wrong = [f"{name}, line {result['line']}: {result['error']}" for result in results if result["error"]]
    for result in results:
        output = expected[result["line"]]
        if not result["error"] and output is not None and not documents.agrees(result["output"], output):
            wrong.append(f"{name}, line {result['line']}: printed\n{result['output']}not\n{output}")
    assert not wrong, "\n".join(wrong)


def commands(block: documents.Block) -> list[list[str]]:
    """The words of every line of a block of shell, operators among them."""
    lines = block.code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        if words := list(lexer):
            found.append(words)
    return found


def simple(words: list[str]) -> list[list[str]]:
    """A line's commands, cut at its operators."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in OPERATORS:
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def fdpp_commands(block: documents.Block) -> list[tuple[list[str], str]]:
    """The arguments of every command of fdpp's, with what is piped into it."""
    found = []
    for words in commands(block):
        before: list[str] = []
        for part in simple(words):
            stdin = before[1].replace("\\n", "\n") if before[:1] == ["printf"] else ""
            for i, word in enumerate(part):
                if word == "fdpp" and (i == 0 or part[i - 1] == "-m"):
                    found.append((part[i + 1 :], stdin))
                    break
            before = part
    return found


@EVERY
def test_commands_parse(document):
    targets = set(re.findall(r"^([\w\- ]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    targets = {name for line in targets for name in line.split()}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for block in documents.blocks(document):
        if block.language != "sh":
            continue
        for argv, _ in fdpp_commands(block):
            build_parser().parse_args(argv)
        for words in commands(block):
            for part in simple(words):
                part = part[next((i for i, word in enumerate(part) if "=" not in word), len(part)) :]
                if part[:1] == ["make"]:
                    asked = {word for word in part[1:] if "=" not in word}
                    assert asked <= targets, f"{block.where}: make knows no {asked - targets}"
                elif part[:1] == ["python"] and part[1].endswith(".py"):
                    assert (ROOT / part[1]).exists(), f"{block.where}: {part[1]}"
                for extra in re.findall(r"^\.\[(\w+)\]$", "\n".join(part), re.MULTILINE):
                    assert f'"{extra}": [' in setup, f"{block.where}: no extra {extra}"


def test_a_block_that_fails_is_named(tmp_path):
    document = tmp_path / "page.md"
    text = "# A\n\n```python\nprint(1)\n```\n\n```text\n2\n```\n\n<!-- needs: gpu, lm_eval -->\n```python\n1 +\n```\n"
    document.write_text(text, encoding="utf-8")
    first, second, third = documents.blocks(document)
    assert (first.line, first.output, first.needs) == (4, "2\n", [])
    assert (second.language, third.needs, third.line) == ("text", ["gpu", "lm_eval"], 13)
    with pytest.raises(SyntaxError, match="line 13"):
        third.compile()
    assert documents.agrees("a\nb\nc\n", "a\n...\nc\n") and documents.agrees("a\n", "a\n")
    assert not documents.agrees("a\nb\n", "a\n") and not documents.agrees("a\nb\n", "a\n...\nc\n")


def test_anchors_are_githubs(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("# Which one, when?\n## As in LLaDA's own `generate`\n## A\n## A\n", encoding="utf-8")
    assert documents.anchors(document) == {"which-one-when", "as-in-lladas-own-generate", "a", "a-1"}
