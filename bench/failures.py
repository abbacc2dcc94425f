"""Why a wrong decode failed: which step left no right response, and whether one commit of it is enough for that.

A decode is replayed from the step that committed each position. Of a step after which no right response is possible:

- "confidence": one of its commits alone makes the state before it impossible. The model was sure of a wrong token.
- "coupling": each of its commits alone is possible, and only together they are not. That is what committing several
  positions at once costs: their proposals come from the same forward, so none of them sees the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from fdpp.tiny.task import END, OPEN

PADDING = "<pad>"


class Failure(NamedTuple):
    """Attributes:
    kind: "confidence", "coupling", or "never", if every state leaves a right response.
    commits: of the step that failed.
    conflict: of a coupling the fewest commits that are impossible together: 2, or 3 for more than 2; else 0.
    """

    kind: str
    commits: int = 0
    conflict: int = 0


def counted(found: Sequence[Failure]) -> dict[str, Any]:
    """How many of which kind; pairs: couplings of two commits; commits: of the step that failed, on average."""
    kinds = Counter(failure.kind for failure in found)
    return {
        "wrong": len(found),
        **{kind: kinds[kind] for kind in ("confidence", "coupling", "never")},
        "pairs": sum(failure.conflict == 2 for failure in found),
        "commits": sum(failure.commits for failure in found) / max(len(found), 1),
    }


def explained(words: Sequence[str], steps: Sequence[int], completable: Callable[[list[str]], bool]) -> Failure:
    """Why the decode that wrote `words` at `steps` failed.

    `steps` are `DiffusionGenerationOutput.commit_step`. A position that no step committed stays open: an `<eos>` before
    it says that it is empty. Padding that was written over a commit counts as the `<eos>` before it.
    """
    said = [END if word == PADDING else word for word in words]

    def after(step: int) -> list[str]:
        return [word if 0 <= at <= step else OPEN for word, at in zip(said, steps, strict=True)]

    # States only gain words, so the first impossible one is found by bisection. The state before step 0 is possible.
    possible, impossible = -1, max(steps)
    if completable(after(impossible)):
        return Failure("never")
    while impossible - possible > 1:
        middle = (possible + impossible) // 2
        if completable(after(middle)):
            possible = middle
        else:
            impossible = middle
    before = after(possible)
    commits = [place for place, at in enumerate(steps) if at == impossible]

    def fits(places: Sequence[int]) -> bool:
        return completable([said[place] if place in places else word for place, word in enumerate(before)])

    if not all(fits([place]) for place in commits):
        return Failure("confidence", len(commits))
    is_pair = any(not fits(pair) for pair in combinations(commits, 2))
    return Failure("coupling", len(commits), 2 if is_pair else 3)
