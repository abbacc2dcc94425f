"""Generated arithmetic word problems with worked solutions.

A problem is a chain: a start value and four to eight changes by 1 to 9, each applied to the result of the one before.
One sentence of the prompt states one change, one line of the response works it out:

    Mia has 12 apples . In May she finds 5 . In June she loses 3 . ... How many apples now ?
    In May she finds 5 , so there are 17 apples . In June she loses 3 , so there are 14 apples . ... Answer : 9 apples .

A line does not restate the result it starts from, so no result but the last (the answer) is stated twice. The opening
("Mia has", "that makes", "there are") is a free choice of the response, so its tokens are uncertain and depend on each
other until one of them is committed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fdpp.tiny.task import END, Recipe, Task, agrees, check_split, spaced, split_by

MIN_STEPS, MAX_STEPS = 4, 8
MIN_VALUE, MAX_VALUE = 2, 20
MAX_CHANGE = 9
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
SHE = ("Mia", "Ana", "Zoe", "Eva", "Ida", "Lea", "Nora", "Rosa")
HE = ("Ben", "Leo", "Max", "Tom", "Sam", "Noah", "Omar", "Yuri")
OBJECTS = ("apples", "books", "coins", "cards", "shells", "stamps", "pens", "marbles")
GAINS = ("finds", "buys", "gets", "wins")
LOSSES = ("loses", "sells", "drops", "spends")
OPENINGS = (("{name}", "has"), ("that", "makes"), ("there", "are"))
OTHER_WORDS = (
    "that", "makes", "there", "are", "has", "In", "she", "he", "so", "How", "many", "now", "Answer", ".", ",", ":", "?",
)  # fmt: skip
NUMBERS = tuple(str(value) for value in range(MAX_VALUE + 1))
WORDS = (*MONTHS, *SHE, *HE, *OBJECTS, *GAINS, *LOSSES, *OTHER_WORDS, *NUMBERS)
"""Every word that a problem can hold."""


def _any(words: Sequence[str]) -> str:
    return f"(?:{'|'.join(words)})"


START = re.compile(rf"{_any(SHE + HE)} has (\d+) ({_any(OBJECTS)}) \. ")
CHANGE = re.compile(rf"In {_any(MONTHS)} (?:she|he) (?:({_any(GAINS)})|{_any(LOSSES)}) (\d+) \. ")


@dataclass(frozen=True)
class Problem:
    """One problem: its numbers (`start`, signed `changes`), the texts made of them and the `answer`."""

    start: int
    changes: tuple[int, ...]
    prompt: str
    response: str
    answer: int

    @property
    def split(self) -> str:
        return split_of(self.start, self.changes)


def split_of(start: int, changes: Sequence[int]) -> str:
    """The split that a chain of numbers belongs to: "held-out" for one residue class in eight of its checksum.

    The split is a function of the numbers alone. Training draws only chains of the one class and evaluation only chains
    of the other, so no held-out chain is ever trained on, whatever its names and objects.
    """
    chain = str(start) + "".join(f"{change:+d}" for change in changes)
    return split_by(chain)


def generate(split: str, count: int, seed: int = 0, steps: int | None = None) -> list[Problem]:
    """`count` problems of a split ("train" or "held-out"), the same for the same seed.

    `steps` (4 to 8) fixes the length of the chains; None draws it uniformly for each problem.
    """
    check_split(split)
    if steps is not None and not MIN_STEPS <= steps <= MAX_STEPS:
        raise ValueError(f"steps: expected {MIN_STEPS} to {MAX_STEPS}, got {steps}")
    rng = random.Random(seed)
    return [_draw(rng, split, steps) for _ in range(count)]


def answer_of(text: str) -> int | None:
    """The final answer that a response states, or None; the text ends at the first `<eos>`."""
    found = re.search(r"\bAnswer : (\d+)\b", text.split(END)[0])
    return int(found[1]) if found else None


def is_problem(text: str) -> bool:
    """Whether the embedded model was trained on prompts like `text`: its form, number of changes and size of results.

    Signs may follow a word without a space, as the tokenizer splits them off.
    """
    text = spaced(text)
    begins = START.match(text)
    if begins is None:
        return False
    value, at, values = int(begins[1]), begins.end(), []
    while change := CHANGE.match(text, at):
        value += int(change[2]) if change[1] else -int(change[2])
        values.append(value)
        at = change.end()
    fits = all(MIN_VALUE <= each <= MAX_VALUE for each in (int(begins[1]), *values))
    return fits and MIN_STEPS <= len(values) <= MAX_STEPS and text[at:] == f"How many {begins[2]} now ?"


def is_right(text: str, problem: Problem) -> bool:
    """Whether the final answer that a response states is the problem's."""
    return answer_of(text) == problem.answer


def worded(problem: Problem) -> list[str]:
    """The right responses, which differ in how their lines open; the problem's own first."""
    openings = [" ".join(words).format(name=problem.prompt.split()[0]) for words in OPENINGS]
    texts = [re.sub(r"so \w+ \w+ (\d+)", rf"so {opening} \1", problem.response) for opening in openings]
    return sorted(texts, key=lambda text: text != problem.response)


def completable(words: Sequence[str], problem: Problem) -> bool:
    """Whether some right response, filled up with `<eos>`, has all of these words; `<mask>` is open."""
    return any(agrees(words, text.split()) for text in worded(problem))


def _draw(rng: random.Random, split: str, steps: int | None) -> Problem:
    while True:
        start, changes = _chain(rng, rng.randint(MIN_STEPS, MAX_STEPS) if steps is None else steps)
        if split_of(start, changes) == split:
            return _write(rng, start, changes)


def _chain(rng: random.Random, steps: int) -> tuple[int, tuple[int, ...]]:
    start = value = rng.randint(MIN_VALUE, MAX_VALUE)
    changes = []
    for _ in range(steps):
        change = rng.randint(1, MAX_CHANGE) * rng.choice((-1, 1))
        if not MIN_VALUE <= value + change <= MAX_VALUE:
            change = -change
        value += change
        changes.append(change)
    return start, tuple(changes)


def _write(rng: random.Random, start: int, changes: tuple[int, ...]) -> Problem:
    she = rng.random() < 0.5
    name, pronoun = rng.choice(SHE if she else HE), "she" if she else "he"
    thing = rng.choice(OBJECTS)
    opening = " ".join(rng.choice(OPENINGS)).format(name=name)
    first = rng.randrange(len(MONTHS))
    prompt, response, value = [f"{name} has {start} {thing} ."], [], start
    for index, change in enumerate(changes):
        month = MONTHS[(first + index) % len(MONTHS)]
        verb = rng.choice(GAINS if change > 0 else LOSSES)
        value += change
        prompt.append(f"In {month} {pronoun} {verb} {abs(change)} .")
        response.append(f"In {month} {pronoun} {verb} {abs(change)} , so {opening} {value} {thing} .")
    prompt.append(f"How many {thing} now ?")
    response.append(f"Answer : {value} {thing} .")
    return Problem(start, changes, " ".join(prompt), " ".join(response), value)


TASK = Task(
    name="sums",
    words=WORDS,
    generate=generate,
    is_right=is_right,
    is_problem=is_problem,
    completable=completable,
    max_new_tokens=128,
    block_length=32,
    recipe=Recipe(steps=3500, cached_steps=1500, tokens=8192, late=("has", "makes", "are", ":")),
    sizes=range(MIN_STEPS, MAX_STEPS + 1),
)
