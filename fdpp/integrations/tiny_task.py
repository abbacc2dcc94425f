"""The embedded sums as a task of lm-evaluation-harness; `tasks/tiny_sums.yaml` names these functions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fdpp import tiny

PROBLEMS = 500


def held_out(**_: Any) -> dict[str, Any]:
    """The held-out problems of `make quality`, as the split "test" of a data set."""
    from datasets import Dataset

    return {"test": Dataset.from_list([asdict(problem) for problem in tiny.generate("held-out", PROBLEMS)])}


def exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the final answer that the response states is the problem's."""
    return {"exact_match": float(tiny.answer_of(results[0]) == doc["answer"])}
