"""What a document holds: its blocks of code, its headings and its links. Run as a script it runs such blocks.

`python documents.py JOBS` reads a JSON list of blocks, runs each in a namespace of its own, and writes one JSON line
for each: its output, and what it raised.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"<!-- needs: ([\w, ]+) -->\n$")
RUNS = "<!-- runs -->\n"
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
CODE = re.compile(r"`[^`\n]*`")


@dataclass
class Block:
    """A fenced block.

    Attributes:
        line: of its first line of code, from 1.
        needs: what its comment says that it needs.
        runs: whether its comment asks for its commands to be run.
        output: the block of text directly beneath, None without one.
    """

    document: Path
    line: int
    language: str
    code: str
    needs: list[str] = field(default_factory=list)
    runs: bool = False
    output: str | None = None

    @property
    def where(self) -> str:
        return f"{self.document.name}, line {self.line}"

    def compile(self) -> None:
        compile("\n" * (self.line - 1) + self.code, self.where, "exec")


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found: list[Block] = []
    end = None
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        if match[1] == "text" and end is not None and not text[end : match.start()].strip():
            found[-1].output = match[2]
        needs = NEEDS.search(before)
        found.append(
            Block(
                document,
                line=before.count("\n") + 2,
                language=match[1],
                code=match[2],
                needs=re.split(r",\s*", needs[1]) if needs else [],
                runs=before.endswith(RUNS),
            )
        )
        end = match.end()
    return found


def prose(document: Path) -> str:
    """The text without its code."""
    return CODE.sub("", FENCE.sub("", document.read_text(encoding="utf-8")))


def links(document: Path) -> list[str]:
    return LINK.findall(prose(document))


def anchors(document: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


def agrees(output: str, expected: str) -> bool:
    """Whether `output` is as `expected`, in which a line `...` stands for any lines."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", expected, flags=re.MULTILINE)]
    return re.fullmatch(r"(?:.*\n)*".join(parts), output) is not None


def run(job: dict) -> dict:
    """`{"line": ..., "output": ..., "error": ...}` of a block of Python or of an fdpp command."""
    out = io.StringIO()
    error = None
    stdin = sys.stdin
    try:
        with contextlib.redirect_stdout(out):
            if "argv" in job:
                from fdpp.cli import main

                sys.stdin = io.StringIO(job["stdin"])
                code = main(job["argv"])
                if code:
                    error = f"exit code {code}"
            else:
                # Triton reads a kernel's source from a file. Empty lines above: tracebacks have the document's lines.
                path = Path(f"line_{job['line']}.py").absolute()
                path.write_text("\n" * (job["line"] - 1) + job["code"], encoding="utf-8")
                runpy.run_path(str(path), run_name=path.stem)
    except BaseException:
        error = traceback.format_exc()
    finally:
        sys.stdin = stdin
    return {"line": job["line"], "output": out.getvalue(), "error": error}


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(json.dumps(run(job)), file=sys.__stdout__, flush=True)
