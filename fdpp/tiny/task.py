"""What a task of the embedded models is: problems with a prompt and a response that a program can check."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPEN, END = "<mask>", "<eos>"
CHECKPOINTS = Path(__file__).parent / "checkpoints"
SPLITS = ("train", "held-out")
HELD_OUT_SHARE = 8
"""One problem in so many is held out, by a checksum of what it is about."""


@dataclass(frozen=True)
class Recipe:
    """How a task's model is trained, see `fdpp.tiny.train`.

    Attributes:
        steps: optimizer steps without a cache.
        cached_steps: steps after them, most as caches decode.
        tokens: about how many tokens a step takes.
        late: words whose successor confident decoding leaves for last; a third of the examples masks these alone.
        recent: whether half of the cached examples refresh two blocks alone.
        holes: whether one batch in four is a response without its prompt, to be filled in.
    """

    steps: int
    cached_steps: int
    tokens: int
    late: tuple[str, ...] = ()
    recent: bool = False
    holes: bool = False


@dataclass(frozen=True)
class Task:
    """A task by its `name`, with the model that learns it.

    Attributes:
        words: every word that a prompt or response can hold, a token each.
        generate: `generate(split, count, seed=0, ...)`, problems with a `prompt` and a `response` of `words`, the same
            for the same seed. The splits, "train" and "held-out", have no problem in common.
        is_right: `is_right(text, problem)`, whether a response, up to its first `<eos>`, is right.
        is_problem: `is_problem(text)`, whether the model was trained on prompts like this one; signs may follow a word
            without a space, as the tokenizer splits them off.
        completable: `completable(words, problem)`, whether some right response, filled up with `<eos>`, has all of
            `words`, as many as it has tokens; a `<mask>` is open.
        sizes: a fourth argument of `generate`, the problems of one of which have equal lengths; None: all have.
        max_new_tokens, block_length: with which the model decodes; the grid of a block-diffusion model.
        recipe: how it was trained.
        family: of the model: "llada", or "sdar", a block-diffusion model.
    """

    name: str
    words: tuple[str, ...]
    generate: Callable[..., Sequence[Any]]
    is_right: Callable[[str, Any], bool]
    is_problem: Callable[[str], bool]
    completable: Callable[[Sequence[str], Any], bool]
    max_new_tokens: int
    block_length: int
    recipe: Recipe
    sizes: range | None = None
    family: str = "llada"

    @property
    def checkpoint(self) -> Path:
        """The folder of the trained model, in this package."""
        return CHECKPOINTS / self.name


def agrees(words: Sequence[str], response: Sequence[str]) -> bool:
    """Whether `response`, filled up with `<eos>`, has all of `words` that are not open."""
    filled = [*response, *[END] * (len(words) - len(response))]
    return len(filled) == len(words) and all(a in (OPEN, b) for a, b in zip(words, filled, strict=True))


def spaced(text: str) -> str:
    """The words and signs of a text as the tokenizer splits them, with one space between."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text))


def split_by(text: str) -> str:
    """The split of all problems that are about `text`: "held-out" for one residue class of its checksum."""
    return "held-out" if zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0 else "train"


def check_split(split: str) -> None:
    """Raise `ValueError` unless `split` exists."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
