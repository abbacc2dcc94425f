"""Programs out of chat answers, for tasks whose own check expects the bare continuation of a prompt."""

from __future__ import annotations

import ast
import re
from typing import Any

KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def code_of(answer: str) -> str:
    """The first fenced block of an answer, up to its end if it is never closed; without a fence the whole answer."""
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return block[1] if block else answer


def definitions(program: str) -> str:
    """The imports, definitions and assignments in the longest run of a program's first lines that parses.

    Prints, asserts and calls at module level are left out: a task's tests call what they need.
    """
    lines = program.splitlines()
    for end in range(len(lines), 0, -1):
        text = "\n".join(lines[:end])
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        return "\n\n".join(ast.unparse(node) for node in tree.body if isinstance(node, KEPT))
    return ""


def humaneval_programs(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Filter of the task `humaneval_chat`: for every response the prompt, then the code of the answer.

    An answer that repeats the function defines it anew; one that only continues the body stands below the prompt's
    docstring.
    """
    return [
        [definitions(doc["prompt"] + "\n" + code_of(answer)) for answer in answers]
        for answers, doc in zip(resps, docs, strict=True)
    ]
