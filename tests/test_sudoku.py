"""The Sudokus: their grids, what a partial grid can become, grading and the split."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from fdpp.tiny import sudoku
from fdpp.tiny.sudoku import Sudoku, written
from fdpp.tiny.tokenizer import build_tokenizer

ALL = tuple(range(36))
PEERS = [
    {
        other
        for other in ALL
        if other // 6 == cell // 6
        or other % 6 == cell % 6
        or (other // 12, other % 6 // 3) == (cell // 12, cell % 6 // 3)
    }
    - {cell}
    for cell in ALL
]


def solved(cells: list[int] | tuple[int, ...]) -> list[int] | None:
    """Some grid that keeps `cells`, found by trying digits in the cell that has the fewest; None: there is none."""
    cells = list(cells)
    if any(cells[cell] and cells[cell] == cells[peer] for cell in ALL for peer in PEERS[cell]):
        return None
    empty = {cell: {*range(1, 7)} - {cells[peer] for peer in PEERS[cell]} for cell in ALL if not cells[cell]}
    if not empty:
        return cells
    cell = min(empty, key=lambda cell: len(empty[cell]))
    for digit in empty[cell]:
        found = solved([*cells[:cell], digit, *cells[cell + 1 :]])
        if found is not None:
            return found
    return None


def grid_of(number: int) -> list[int]:
    return sudoku.grids()[number].tolist()


def relabelled(grid: list[int] | tuple[int, ...], labels: tuple[int, ...]) -> tuple[int, ...]:
    """Digit d becomes `labels[d - 1]`; an empty cell stays empty."""
    return tuple(labels[cell - 1] if cell else 0 for cell in grid)


def canonical(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Relabelled so that the first row is 1 to 6."""
    return tuple(grid.index(cell) + 1 for cell in grid)


def partial_grids(rng: random.Random) -> list[list[int]]:
    """Of grids with cells removed, some with one or two altered, some relabelled; and of random digits."""
    made = []
    for removed in (4, 10, 16, 20, 24, 28, 31):
        for altered in (0, 1, 2):
            for labels in (range(1, 7), rng.sample(range(1, 7), 6)):
                for _ in range(8):
                    cells = list(relabelled(grid_of(rng.randrange(39168)), tuple(labels)))
                    for cell in rng.sample(ALL, removed):
                        cells[cell] = 0
                    for cell in rng.sample(ALL, altered):
                        cells[cell] = rng.randint(1, 6)
                    made.append(cells)
    for said in (2, 4, 6, 8):
        for _ in range(25):
            cells = [0] * 36
            for cell in rng.sample(ALL, said):
                cells[cell] = rng.randint(1, 6)
            made.append(cells)
    return made


def test_all_grids_with_the_first_row_in_order_are_known() -> None:
    """28,200,960 is how many 6 x 6 Sudokus there are; each is 720 by relabelling."""
    grids = sudoku.grids().long()
    rows = grids.view(-1, 6, 6)
    boxes = grids.view(-1, 3, 2, 2, 3).transpose(2, 3).reshape(-1, 6, 6)
    for groups in (rows, rows.transpose(1, 2), boxes):
        assert (groups.sort(dim=2).values == torch.arange(1, 7)).all()
    assert grids.shape == (28_200_960 // 720, 36)
    assert len(grids.unique(dim=0)) == len(grids)
    assert (grids[:, :6] == torch.arange(1, 7)).all()


def test_groups_are_rows_columns_and_boxes() -> None:
    groups = sudoku.groups()
    assert len(groups) == 18
    for cell in ALL:
        assert {other for group in groups if cell in group for other in group} == PEERS[cell] | {cell}


def test_partial_grids_against_a_plain_solver() -> None:
    outcomes = []
    for cells in partial_grids(random.Random(0)):
        outcomes.append(solved(cells) is not None)
        assert sudoku.has_grid(cells) == outcomes[-1], cells
    assert min(outcomes.count(True), outcomes.count(False)) > 100


def test_empty_full_and_broken_grids() -> None:
    full = grid_of(17_000)
    assert sudoku.has_grid([0] * 36)
    assert sudoku.has_grid(full)
    assert all(sudoku.has_grid(relabelled(full, labels)) for labels in itertools.permutations(range(1, 7)))
    for cell in ALL:
        assert not sudoku.has_grid([*full[:cell], full[cell] % 6 + 1, *full[cell + 1 :]])
    assert not sudoku.has_grid([1, 1, *[0] * 34])


def puzzle(givens: int, seed: int = 0) -> Sudoku:
    return sudoku.generate("held-out", 1, seed, givens)[0]


def test_states_against_a_plain_solver() -> None:
    """A state and the givens together leave a grid or none."""
    rng, outcomes = random.Random(1), []
    for problem in sudoku.generate("held-out", 60, seed=3):
        for altered in (0, 1, 1, 2):
            cells = list(problem.solution)
            for cell in rng.sample(ALL, rng.randint(0, 36)):
                cells[cell] = 0
            for cell in rng.sample(ALL, altered):
                cells[cell] = rng.randint(1, 6)
            pairs = list(zip(cells, problem.givens, strict=True))
            kept = all(not cell or not given or cell == given for cell, given in pairs)
            outcomes.append(kept and solved([cell or given for cell, given in pairs]) is not None)
            words = written(cells, "<mask>").split()
            for at in rng.sample(range(6, 41, 7), 2):
                words[at] = "<mask>"
            assert sudoku.completable([*words, rng.choice(("<mask>", "<eos>"))], problem) == outcomes[-1]
    assert min(outcomes.count(True), outcomes.count(False)) > 50


def test_a_full_state_can_be_completed_where_it_is_right() -> None:
    rng, outcomes = random.Random(2), []
    for problem in sudoku.generate("held-out", 40, seed=4):
        other = solved(problem.givens)
        assert other is not None
        broken = list(problem.solution)
        broken[rng.randrange(36)] = rng.randint(1, 6)
        swapped = relabelled(problem.solution, (2, 1, 3, 4, 5, 6))
        for grid in (problem.solution, other, broken, swapped):
            text = written(grid)
            outcomes.append(sudoku.is_right(text, problem))
            assert sudoku.completable([*text.split(), "<eos>"], problem) == outcomes[-1]
    assert min(outcomes.count(True), outcomes.count(False)) > 40


def test_a_contradicted_given_cannot_be_completed() -> None:
    problem = puzzle(12)
    for cell, given in enumerate(problem.givens):
        words = ["<mask>"] * 42
        at = cell // 6 * 7 + cell % 6
        words[at] = str(problem.solution[cell])
        assert sudoku.completable(words, problem)
        if given:
            words[at] = str(given % 6 + 1)
            assert not sudoku.completable(words, problem)


@pytest.mark.parametrize("at", [*range(6, 41, 7), 41])
def test_wrong_signs_cannot_be_completed(at: int) -> None:
    problem = puzzle(4)
    words = [*problem.response.split(), "<eos>"]
    for wrong in ("1", ".", "=", "<pad>", "<unk>", "/" if at == 41 else "<eos>"):
        assert not sudoku.completable([*words[:at], wrong, *words[at + 1 :]], problem)
    assert sudoku.completable([*words[:at], "<mask>", *words[at + 1 :]], problem)


@pytest.mark.parametrize("word", ["/", ".", "=", "0", "7", "<eos>", "<pad>", "<unk>", "11"])
def test_a_cell_is_a_digit_or_open(word: str) -> None:
    problem = puzzle(4)
    for at in (at for at in range(41) if at % 7 != 6):
        assert not sudoku.completable([*["<mask>"] * at, word, *["<mask>"] * (41 - at)], problem)


def test_a_state_has_42_words() -> None:
    problem = puzzle(4)
    words = [*problem.response.split(), "<eos>"]
    assert len(words) == 42 and sudoku.completable(words, problem)
    for other in ([], words[:-1], words[1:], [*words, "<eos>"], words[:35], [*words, *words]):
        assert not sudoku.completable(other, problem)


def test_any_grid_that_keeps_the_givens_is_right() -> None:
    others = 0
    for problem in sudoku.generate("held-out", 100, seed=5):
        found = solved(problem.givens)
        assert found is not None and sudoku.is_right(written(found), problem)
        others += tuple(found) != problem.solution
    assert others > 20


@pytest.mark.parametrize("kind", ["row", "column", "box"])
def test_a_grid_that_breaks_one_kind_of_rule_is_wrong(kind: str) -> None:
    cells = grid_of(123)
    if kind == "box":
        cells = [(row + column) % 6 + 1 for row in range(6) for column in range(6)]
    else:
        # Two cells of a box and of a column change places, which breaks their rows alone; or of a row.
        other = 6 if kind == "row" else 1
        cells[0], cells[other] = cells[other], cells[0]
    groups = sudoku.groups()
    kinds = {"row": groups[:6], "column": groups[6:12], "box": groups[12:]}
    broken = {name for name, of in kinds.items() if any(len({cells[cell] for cell in group}) < 6 for group in of)}
    assert broken == {kind}
    assert not sudoku.is_right(written(cells), Sudoku((0,) * 36, tuple(cells)))


def test_a_grid_without_the_givens_is_wrong() -> None:
    problem = puzzle(20)
    for one, other in itertools.combinations({*problem.givens} - {0}, 2):
        labels = tuple({one: other, other: one}.get(digit, digit) for digit in range(1, 7))
        grid = relabelled(problem.solution, labels)
        assert sudoku.has_grid(grid) and not sudoku.is_right(written(grid), problem)


def test_grading_is_strict_about_form() -> None:
    problem = puzzle(8)
    text = problem.response
    assert sudoku.is_right(text, problem)
    for ending in (" <eos>", "<eos>", " <eos> <eos> 1 / 2", " <eos> <mask>"):
        assert sudoku.is_right(text + ending, problem)
    rows = text.split(" / ")
    wrong = {
        "nothing": "",
        "an end first": f"<eos> {text}",
        "a row too few": " / ".join(rows[:5]),
        "a row too many": f"{text} / {rows[0]}",
        "a sign at the end": f"{text} /",
        "a sign first": f"/ {text}",
        "a sign too few": text.replace(" / ", " ", 1),
        "another sign": text.replace("/", "=", 1),
        "a digit too many": f"{text} 1",
        "a digit too few": text[:-2],
        "a digit in the next row": " / ".join([*rows[:4], rows[4] + f" {rows[5][0]}", rows[5][2:]]),
        "an open cell": f"<mask>{text[1:]}",
        "an empty cell": f".{text[1:]}",
        "a seven": f"7{text[1:]}",
        "a word": f"one {text}",
        "digits without spaces": text.replace(" ", ""),
        "an end in the midst": text.replace(" / ", " <eos> ", 1),
        "padding": f"<pad> {text}",
    }
    assert [name for name, wrong_text in wrong.items() if sudoku.is_right(wrong_text, problem)] == []


def test_puzzles_state_givens_of_their_solution() -> None:
    problems = sudoku.generate("train", 400, seed=1)
    for problem in problems:
        assert all(given in (0, cell) for given, cell in zip(problem.givens, problem.solution, strict=True))
        assert sudoku.has_grid(problem.solution) and 0 not in problem.solution
    counts = [36 - problem.givens.count(0) for problem in problems]
    assert set(counts) == set(range(4, 21))
    assert {problem.solution[0] for problem in problems} == set(range(1, 7))


@pytest.mark.parametrize("givens", [4, 5, 12, 20])
def test_the_number_of_givens_can_be_set(givens: int) -> None:
    problems = sudoku.generate("held-out", 30, seed=2, givens=givens)
    assert {36 - problem.givens.count(0) for problem in problems} == {givens}
    assert len({tuple(map(bool, problem.givens)) for problem in problems}) == 30


@pytest.mark.parametrize("givens", [3, 21, 0, -1])
def test_another_number_of_givens_is_named(givens: int) -> None:
    with pytest.raises(ValueError, match=f"givens: expected 4 to 20, got {givens}"):
        sudoku.generate("train", 1, givens=givens)


def test_prompt_and_response_have_fixed_lengths() -> None:
    tokenizer = build_tokenizer(sudoku.WORDS)
    for problem in sudoku.generate("train", 50, seed=6):
        prompt, response = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.response))
        assert (len(prompt), len(response)) == (43, 41)
        assert len(tokenizer(f"{problem.prompt} {problem.response} <eos>")["input_ids"]) == 85
        words = problem.prompt.split()
        assert words[-2:] == ["/", "="] and words[6:41:7] == ["/"] * 5
        stated = [word for at, word in enumerate(words[:41]) if at % 7 != 6]
        assert stated == [str(given) if given else "." for given in problem.givens]


def test_holes_are_the_response_without_what_is_not_given() -> None:
    for problem in sudoku.generate("train", 20, seed=7):
        holes, response = problem.holes.split(), problem.response.split()
        assert len(holes) == len(response) == 41
        assert all(hole in ("<mask>", word) for hole, word in zip(holes, response, strict=True))
        assert holes.count("<mask>") == problem.givens.count(0)
        assert sudoku.completable([*holes, "<mask>"], problem)


def test_the_split_does_not_change_by_relabelling() -> None:
    rng, seen = random.Random(3), set()
    for number in rng.sample(range(39168), 30):
        grid = grid_of(number)
        splits = {sudoku.split_of(relabelled(grid, labels)) for labels in itertools.permutations(range(1, 7))}
        assert len(splits) == 1
        seen |= splits
    assert seen == {"train", "held-out"}


def test_every_grid_is_of_one_split_and_an_eighth_is_held_out() -> None:
    train, held_out = sudoku.grids_of("train"), sudoku.grids_of("held-out")
    assert {*train, *held_out} == set(map(tuple, sudoku.grids().tolist()))
    assert len(train) + len(held_out) == 39168
    assert len(held_out) / 39168 == pytest.approx(1 / 8, abs=0.01)


def test_no_held_out_solution_is_a_relabelled_training_solution() -> None:
    trained = {problem.solution for problem in sudoku.generate("train", 5000, seed=8)}
    held_out = {problem.solution for problem in sudoku.generate("held-out", 3000, seed=8)}
    assert not {canonical(grid) for grid in trained} & {canonical(grid) for grid in held_out}

    every = set(sudoku.grids_of("train"))
    for solution in sorted(held_out)[:5]:
        assert not any(relabelled(solution, labels) in every for labels in itertools.permutations(range(1, 7)))
    for solution in sorted(trained)[:5]:
        assert sum(relabelled(solution, labels) in every for labels in itertools.permutations(range(1, 7))) == 1
