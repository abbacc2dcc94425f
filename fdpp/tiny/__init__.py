"""The embedded models: small LLaDAs, each trained on one task by `python -m fdpp.tiny.train --task NAME`.

- `sums`: arithmetic word problems, the default: `tiny.generate`, `tiny.is_right`, ... are its own.
- `sudoku`: 6 x 6 grids with few givens, of which several are right. Rules differ most on it.
- `stories`: short texts with several right wordings, whose words must agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdpp.tiny import stories, sudoku, sums
from fdpp.tiny.sums import Problem, answer_of, generate, is_problem, is_right
from fdpp.tiny.task import Recipe, Task

if TYPE_CHECKING:
    from fdpp.models.llada import LLaDAModelLM

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (sums, sudoku, stories)}

__all__ = ["TASKS", "Problem", "Recipe", "Task", "answer_of", "generate", "is_problem", "is_right", "load", "task_of"]


def task_of(model: str) -> Task | None:
    """The task of the embedded model that a model's name means: "tiny" or "tiny:TASK"; None for all other names.

    Raises `ValueError` for "tiny:" and no task.
    """
    if model == "tiny":
        return TASKS["sums"]
    kind, colon, name = model.partition(":")
    if kind != "tiny" or not colon:
        return None
    if name not in TASKS:
        raise ValueError(f"expected one of {', '.join(f'tiny:{task}' for task in TASKS)}, got {model!r}")
    return TASKS[name]


def load(task: str | Path = "sums") -> tuple[LLaDAModelLM, Any]:
    """The model of a task (float32, CPU, evaluation mode) and its tokenizer, or those of another folder.

    The checkpoint's own settings, which `generate` takes, leave room for every problem of the task in its window.

    Raises `FileNotFoundError` if the folder holds no checkpoint.
    """
    from transformers import AutoTokenizer

    from fdpp.models.llada import LLaDAModelLM

    path = TASKS[task].checkpoint if task in TASKS else Path(task)
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"expected one of {', '.join(TASKS)}, or a folder with a checkpoint (model.safetensors), got {path}"
        )
    return LLaDAModelLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
