"""Programs out of chat answers, for tasks whose own check expects the bare continuation of a prompt.

The task `humaneval_chat` scores every answer twice, by filters of these names:

- `create_test` (`program_of`): the block of the answer that defines the entry point, wherever and however it stands;
- `fast_dllm` (`published_program_of`): as the scripts of Fast-dLLM and DAWN do it, for figures that compare to theirs.
"""

from __future__ import annotations

import ast
import re
import symtable
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from textwrap import dedent, indent
from typing import Any, NamedTuple

FENCE = re.compile(r"`{3,}|~{3,}")
LANGUAGE = re.compile(r"\s*\{?\.?(?:python|py)\d*(?:\.\d+)?\b\}?", re.IGNORECASE)
DEFINITION = re.compile(r"\s*(?:async\s+def|def|class)\b")
STEP = "    "
EVERYWHERE = "*"
"""Stands for the names that a star import binds and for what an import from `__future__` does."""

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Piece(NamedTuple):
    """A statement at the outermost level of a program, and the global names that it binds, reads and changes."""

    node: ast.stmt
    binds: frozenset[str]
    reads: frozenset[str]
    changes: frozenset[str]


def humaneval_programs(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Filter of `humaneval_chat`: the program of every response, by `program_of`."""
    return programs(program_of, resps, docs)


def published_humaneval_programs(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Filter of `humaneval_chat`: the program of every response, by `published_program_of`."""
    return programs(published_program_of, resps, docs)


def programs(
    program: Callable[[str, str, str], str], resps: list[list[str]], docs: list[dict[str, Any]]
) -> list[list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes and the like, in what the model wrote
        return [
            [program(doc["prompt"], doc["entry_point"], answer) for answer in answers]
            for answers, doc in zip(resps, docs, strict=True)
        ]


def program_of(prompt: str, entry_point: str, answer: str) -> str:
    """The program that an answer means: what the prompt defines, and of the answer what the entry point needs.

    Of the answer's blocks the first that defines the entry point counts: its fenced blocks in order, whatever their
    language is called, then the text outside of them. Where none does, the first that continues the prompt's last
    function, at any indentation. What the entry point reads and its block lacks is taken from the others. Prints,
    asserts, examples and everything else that it does not need is left out; a definition without a body is none.

    Returns:
        The program's text, empty where nothing defines the entry point.
    """
    candidates = blocks(answer.replace("\r\n", "\n").replace("\r", "\n").replace("\0", ""))
    found = [pieces(block) for block in candidates]
    given = of_prompt = [piece for piece in pieces(prompt) if entry_point not in piece.binds]
    chosen = position(found, lambda own: any(defines(piece, entry_point) for piece in own))
    if chosen is None:
        chosen = position(found, lambda own: any(entry_point in piece.binds for piece in own if is_import(piece)))
    if chosen is None:
        bodies = [continuation(prompt, entry_point, block) for block in candidates]
        chosen = position(bodies, bool)
        if chosen is None:
            return ""
        found[chosen], given = bodies[chosen], []
    made = [piece for piece in found[chosen] if defines(piece, entry_point)]
    own = [piece for piece in found[chosen] if entry_point not in piece.binds or piece in made or not made]
    bound = {entry_point}.union(*(piece.binds for piece in (*given, *own)))
    others = [[piece for piece in other if not bound & (piece.binds | piece.changes)] for other in found]
    last = len(found) - 1  # the whole answer, which the others are parts of
    before, after = ([], []) if chosen == last else (others[:chosen], others[chosen + 1 : last])
    asked = {entry_point, EVERYWHERE}.union(*(piece.binds for piece in of_prompt))
    return text_of(needed([*given, *chain(*before), *own, *chain(*after)], asked))


def position(found: Sequence[list[Piece]], fits: Callable[[list[Piece]], bool]) -> int | None:
    return next((i for i, own in enumerate(found) if fits(own)), None)


def blocks(answer: str) -> list[str]:
    """The fenced blocks of an answer, then the text outside of them; last all of it without the fences.

    A fence may be indented or end a line of text, and may never be closed. What follows it on its line is code, but for
    the name of the language.
    """
    fenced: list[list[str]] = []
    outside: list[str] = []
    whole: list[str] = []
    fence = ""
    for line in answer.split("\n"):
        mark = FENCE.search(line)
        before, after = (line, "") if mark is None else (line[: mark.start()], line[mark.end() :])
        if not fence:
            outside.append(before)
            whole.append(before)
            if mark is None or (mark[0][0] == "~" and before.strip()):
                outside[-1] = whole[-1] = line
                continue
            code, closed, after = LANGUAGE.sub("", after, count=1).partition(mark[0])
            fenced.append([code])
            whole.append(code)
            outside.append(after)
            fence = "" if closed else mark[0]
        elif mark is None or not mark[0].startswith(fence) or (before.strip() and after.strip()):
            fenced[-1].append(line)
            whole.append(line)
        else:
            fenced[-1].append(before)
            whole.append(before)
            if after.strip():  # the block was never closed: this opens the next one
                fenced.append([LANGUAGE.sub("", after, count=1)])
                whole += fenced[-1]
            else:
                fence = ""
    return ["\n".join(lines) for lines in ((*fenced, outside, whole) if fenced else (whole,))]


def parsed(lines: Sequence[str]) -> tuple[list[ast.stmt], int]:
    """The statements of the longest run of first lines that parses, and how many lines it has.

    No run with the line of an error parses either, so the next one to try ends before it.
    """
    n = len(lines)
    while n:
        try:
            return ast.parse("\n".join(lines[:n])).body, n
        except SyntaxError as error:
            n = min(n, error.lineno or n) - 1
        except (ValueError, MemoryError, RecursionError):
            n -= 1
    return [], 0


def pieces(text: str) -> list[Piece]:
    """The statements at the outermost level of every run of lines that parses; lines between such runs are prose."""
    lines, found, i = text.split("\n"), [], 0
    while i < len(lines):
        margin = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
        own = []
        for line in lines[i:]:
            if line.strip() and not line.startswith(margin):
                break
            own.append(line.removeprefix(margin))
        nodes, n = parsed(own) if lines[i].strip() else ([], 1)
        found += [piece for piece in map(piece_of, nodes) if piece is not None]
        i += max(n, 1)
    return found


def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for inner in table.get_children():
        yield inner
        yield from tables(inner)


def piece_of(node: ast.stmt) -> Piece | None:
    """A statement with its names; None for one that no program can have and for `if __name__ == "__main__"`."""
    try:
        table = symtable.symtable(ast.unparse(node), "answer", "exec")
    except (SyntaxError, ValueError, RecursionError):
        return None
    symbols = table.get_symbols()
    reads = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    if isinstance(node, ast.If) and "__name__" in reads:
        return None
    reads |= {symbol.get_name() for inner in tables(table) for symbol in inner.get_symbols() if symbol.is_global()}
    binds = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    changes = set[str]()
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and (inner.module == "__future__" or inner.names[0].name == "*"):
            binds.add(EVERYWHERE)
        elif isinstance(inner, (ast.Attribute, ast.Subscript)) and not isinstance(inner.ctx, ast.Load):
            changes |= owner(inner)
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            changes |= owner(inner.value.func)
    return Piece(node, *map(frozenset, (binds, reads, changes)))


def owner(node: ast.expr) -> set[str]:
    """The name of the object that `node`, an attribute or an item, is a part of; none for a bare name."""
    part = node
    while isinstance(part, (ast.Attribute, ast.Subscript)):
        part = part.value
    return {part.id} if isinstance(part, ast.Name) and part is not node else set()


def is_import(piece: Piece) -> bool:
    return isinstance(piece.node, (ast.Import, ast.ImportFrom))


def defines(piece: Piece, name: str) -> bool:
    """Whether a statement makes what `name` stands for; neither an import nor a function without a body does."""
    if isinstance(piece.node, Function) and piece.node.name == name:
        return not all(map(is_idle, piece.node.body))
    return name in piece.binds and not is_import(piece)


def is_idle(node: ast.stmt) -> bool:
    """Whether a statement of a function's body stands for one that is still to be written, or is a docstring."""
    if isinstance(node, ast.Raise):
        return node.exc is not None and "NotImplementedError" in ast.unparse(node.exc)
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def is_prose(node: ast.stmt) -> bool:
    """Whether a statement is a word, or two with a colon, as of a text that parses by chance."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Name)


def returns(node: ast.AST) -> bool:
    """Whether a function's own code returns anything."""
    inner = (child for child in ast.iter_child_nodes(node) if not isinstance(child, (*Function, ast.ClassDef)))
    return any(isinstance(child, ast.Return) or returns(child) for child in inner)


def continuation(prompt: str, entry_point: str, block: str) -> list[Piece]:
    """The prompt continued by a block from its first line that does, indented so that the body is the longest."""
    lines = block.expandtabs(len(STEP)).split("\n")
    for start in range(len(lines)):
        body = "\n".join(lines[start:])
        made: list[tuple[int, str]] = []
        for variant in (body, indent(dedent(body), STEP), STEP + body.lstrip()):
            text = f"{prompt}\n{variant}"
            for node in parsed(text.split("\n"))[0]:
                if isinstance(node, Function) and node.name == entry_point and returns(node):
                    if not any(map(is_prose, node.body)):
                        made.append((ast.unparse(node).count("\n"), text))
                    break
        if made:
            return pieces(max(made, key=lambda item: item[0])[1])
        if DEFINITION.match(lines[start]):
            break  # what follows is the body of something else
    return []


def needed(given: Sequence[Piece], names: Iterable[str]) -> list[Piece]:
    """Those of `given`, in their order, that bind one of `names` or what these in turn read, or change it in place.

    What only calls something of a module, as `sys.exit()`, changes nothing.
    """
    modules = set[str]().union(*(piece.binds for piece in given if is_import(piece)))
    wanted, kept = set(names), set[int]()
    while more := {
        i
        for i, piece in enumerate(given)
        if i not in kept and (piece.binds & wanted or piece.changes & wanted - modules)
    }:
        kept |= more
        wanted.update(*(given[i].reads for i in more))
    return [given[i] for i in sorted(kept)]


def text_of(kept: Iterable[Piece]) -> str:
    """The program, imports from `__future__` first."""
    nodes = [piece.node for piece in kept]
    nodes.sort(key=lambda node: not (isinstance(node, ast.ImportFrom) and node.module == "__future__"))
    return "\n\n".join(map(ast.unparse, nodes))


def published_program_of(prompt: str, entry_point: str, answer: str) -> str:
    """The program that the published evaluations of Fast-dLLM (arXiv 2505.22618) and DAWN (arXiv 2602.06953) run.

    It is made from the prompt and, below it, the answer from after its first "```python" to the next fence. Of the
    first hundred lines the longest run that parses counts. Kept are its imports, and those definitions that the entry
    point reaches by the names in them: classes, functions with a `return`, and names assigned to.
    """
    head, fence, tail = answer.partition("```python\n")
    text = prompt + "\n" + (tail if fence else head).partition("```")[0]
    text = text.replace("\t", STEP).replace("\r\n", "\n").replace("\r", "\n").strip()
    lines = text.splitlines()[:100]
    body: list[ast.stmt] = []
    longest = 0
    for start in range(len(lines)):
        nodes, n = parsed(lines[start:])
        filled = sum(bool(line.strip()) for line in lines[start : start + n])
        if filled > longest:
            body, longest = nodes, filled
    definitions: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.ClassDef) or (
            isinstance(node, ast.FunctionDef) and any(isinstance(inner, ast.Return) for inner in ast.walk(node))
        ):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
    reached, new = set[str](), {entry_point}
    while new:
        reached |= new
        new = {name for owner in new & definitions.keys() for name in mentioned(definitions[owner])} - reached
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    kept = [node for name, node in definitions.items() if name in reached]
    return "\n".join(map(ast.unparse, [*imports, *kept]))


def mentioned(node: ast.AST) -> Iterator[str]:
    """Names and attributes in `node`; of `a.b` it is `b` alone."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.Name):
            yield inner.id
        elif isinstance(inner, ast.Attribute):
            yield inner.attr
        else:
            yield from mentioned(inner)
