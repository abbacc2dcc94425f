"""Sudokus of 6 x 6 cells: every row, column and box of 2 x 3 holds the digits 1 to 6 once.

The prompt states 4 to 20 givens of a grid, the response is a full grid that keeps them:

    1 . . 4 . . / . . . . 2 . / ... =
    1 2 3 4 5 6 / 4 5 6 1 2 3 / ...

Few givens leave many grids, and any of them is right. So several digits of a cell can be right, and which of them are
depends on what other cells commit: confidences are graded and positions coupled.

Two grids are the same up to relabelling if one is the other with its digits renamed. All 28,200,960 grids are so one of
39,168, those whose first row is 1 to 6. These are split: no held-out solution is a training solution relabelled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

from fdpp.tiny.task import END, OPEN, Recipe, Task, agrees, check_split, spaced, split_by

SIDE, BOX_ROWS, BOX_COLUMNS = 6, 2, 3
CELLS = SIDE * SIDE
DIGITS = tuple(str(digit) for digit in range(1, SIDE + 1))
EMPTY, ROW_END, GIVES = ".", "/", "="
MIN_GIVENS, MAX_GIVENS = 4, 20
WORDS = (*DIGITS, EMPTY, ROW_END, GIVES)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sudoku:
    """One puzzle: its `givens` by row, 0 for an empty cell, and the grid that they were taken from."""

    givens: tuple[int, ...]
    solution: tuple[int, ...]

    @property
    def split(self) -> str:
        return split_of(self.solution)

    @property
    def prompt(self) -> str:
        return f"{written(self.givens, EMPTY)} {ROW_END} {GIVES}"

    @property
    def response(self) -> str:
        return written(self.solution)

    @property
    def holes(self) -> str:
        """The puzzle as a grid with a mask for every empty cell, to be filled in (`max_new_tokens=0`)."""
        return written(self.givens, OPEN)


def written(cells: Sequence[int], empty: str = "") -> str:
    """Cells by row, in words."""
    words = [str(cell) if cell else empty for cell in cells]
    rows = [" ".join(words[first : first + SIDE]) for first in range(0, CELLS, SIDE)]
    return f" {ROW_END} ".join(rows)


def cells_of(text: str) -> tuple[int, ...] | None:
    """The grid that a response states up to its first `<eos>`; None if it is no six rows of six digits."""
    rows = [row.split() for row in text.split(END)[0].split(ROW_END)]
    if [len(row) for row in rows] != [SIDE] * SIDE or not all(word in DIGITS for row in rows for word in row):
        return None
    return tuple(int(word) for row in rows for word in row)


def groups() -> list[list[int]]:
    """The cells of every row, column and box."""
    boxes: dict[tuple[int, int], list[int]] = {}
    for cell in range(CELLS):
        row, column = divmod(cell, SIDE)
        boxes.setdefault((row // BOX_ROWS, column // BOX_COLUMNS), []).append(cell)
    rows = [list(range(first, first + SIDE)) for first in range(0, CELLS, SIDE)]
    columns = [list(range(first, CELLS, SIDE)) for first in range(SIDE)]
    return [*rows, *columns, *boxes.values()]


def is_right(text: str, problem: Sudoku) -> bool:
    """Whether a response is a full grid that breaks no rule and keeps every given."""
    cells = cells_of(text)
    if cells is None or any(given not in (0, cell) for given, cell in zip(problem.givens, cells, strict=True)):
        return False
    return all(len({cells[cell] for cell in group}) == SIDE for group in groups())


def is_problem(text: str) -> bool:
    """Whether the model was trained on prompts like `text`: its form, number of givens, and that a grid keeps them."""
    text = spaced(text)
    givens = tuple(int(word) if word in DIGITS else 0 for word in text.split() if word in (*DIGITS, EMPTY))
    if len(givens) != CELLS or text != Sudoku(givens, givens).prompt:
        return False
    return MIN_GIVENS <= CELLS - givens.count(0) <= MAX_GIVENS and has_grid(givens)


@cache
def grids() -> Tensor:
    """All grids whose first row is 1 to 6: uint8 `[39168, 36]`."""
    rows = torch.tensor(list(permutations(range(1, SIDE + 1))), dtype=torch.uint8, device=CPU)
    found = rows[:1]
    for row in range(1, SIDE):
        taken = torch.zeros(len(found), SIDE, dtype=torch.uint8, device=CPU)
        for above in range(row):
            taken |= 1 << found[:, above * SIDE : (above + 1) * SIDE]
        for above in range(row - row % BOX_ROWS, row):
            box = (1 << found[:, above * SIDE : (above + 1) * SIDE]).unflatten(1, (-1, BOX_COLUMNS))
            taken |= box.sum(2, dtype=torch.uint8).repeat_interleave(BOX_COLUMNS, dim=1)
        # Some at a time: all pairs of grids and rows would take a gigabyte.
        fits = [~((1 << rows) & some[:, None]).bool().any(2) for some in taken.split(1024)]
        grid, next_row = torch.cat(fits).nonzero().unbind(1)
        found = torch.cat((found[grid], rows[next_row]), dim=1)
    return found


@cache
def labels() -> Tensor:
    """Each cell of these grids as one bit, uint8 `[36, 39168]`."""
    return (1 << grids().T).contiguous()


def completable(words: Sequence[str], problem: Sudoku) -> bool:
    """Whether some right response has all of these 42 words; `<mask>` is open."""
    at = [index for index in range(len(words)) if index % (SIDE + 1) < SIDE]
    signs = [*[ROW_END] * (SIDE - 1), END]
    if len(words) != CELLS + SIDE or not agrees(words[SIDE :: SIDE + 1], signs):
        return False
    if any(words[index] not in (*DIGITS, OPEN) for index in at):
        return False
    said = [0 if words[index] == OPEN else int(words[index]) for index in at]
    if any(cell and given and cell != given for cell, given in zip(said, problem.givens, strict=True)):
        return False
    return has_grid([cell or given for cell, given in zip(said, problem.givens, strict=True)])


def has_grid(cells: Sequence[int]) -> bool:
    """Whether some grid keeps all of `cells`, 0 for an empty one."""
    by_cell, possible = labels(), torch.ones(len(grids()), dtype=torch.bool, device=CPU)
    used = torch.zeros(len(grids()), dtype=torch.uint8, device=CPU)
    for digit in set(cells) - {0}:
        # A grid relabelled has them if each digit stands for one label, and no two for the same.
        same = by_cell[[cell for cell, value in enumerate(cells) if value == digit]]
        possible &= (same == same[0]).all(0) & (used & same[0] == 0)
        used |= same[0]
    return bool(possible.any())


def split_of(grid: Sequence[int]) -> str:
    """The split of a full grid, the same for all grids that are this one relabelled: one in eight is held out."""
    label = {digit: str(index) for index, digit in enumerate(grid[:SIDE], 1)}
    return split_by("".join(label[digit] for digit in grid))


@cache
def grids_of(split: str) -> list[tuple[int, ...]]:
    """The grids of a split whose first row is 1 to 6."""
    return [grid for grid in map(tuple, grids().tolist()) if split_of(grid) == split]


def generate(split: str, count: int, seed: int = 0, givens: int | None = None) -> list[Sudoku]:
    """`count` puzzles of a split ("train" or "held-out"), the same for the same seed.

    `givens` (4 to 20) fixes how many cells are given; None draws it uniformly for each puzzle.
    """
    check_split(split)
    if givens is not None and not MIN_GIVENS <= givens <= MAX_GIVENS:
        raise ValueError(f"givens: expected {MIN_GIVENS} to {MAX_GIVENS}, got {givens}")
    rng = random.Random(seed)
    return [_draw(rng, split, givens) for _ in range(count)]


def _draw(rng: random.Random, split: str, givens: int | None) -> Sudoku:
    digits = rng.sample(range(1, SIDE + 1), SIDE)
    solution = tuple(digits[label - 1] for label in rng.choice(grids_of(split)))
    shown = set(rng.sample(range(CELLS), rng.randint(MIN_GIVENS, MAX_GIVENS) if givens is None else givens))
    return Sudoku(tuple(digit if cell in shown else 0 for cell, digit in enumerate(solution)), solution)


TASK = Task(
    name="sudoku",
    words=WORDS,
    generate=generate,
    is_right=is_right,
    is_problem=is_problem,
    completable=completable,
    max_new_tokens=SIDE * (SIDE + 1),
    block_length=2 * (SIDE + 1),
    recipe=Recipe(steps=3500, cached_steps=1500, tokens=4096, recent=True, holes=True),
)
