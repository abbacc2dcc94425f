"""The embedded models, each trained on one task by `python -m fdpp.tiny.train --task NAME`: small LLaDAs.

- `sums`: arithmetic word problems, the default: `tiny.generate`, `tiny.is_right`, ... are its own.
- `sudoku`: 6 x 6 grids with few givens, of which several are right. Rules differ most on it.
- `stories`: short texts with several right wordings, whose words must agree.

And one block-diffusion model, of SDAR's architecture, by the same command:

- `stories-block`: the stories, in blocks of 16 on a grid that the prompt is no multiple of.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdpp.tiny import stories, sudoku, sums
from fdpp.tiny.sums import Problem, answer_of, generate, is_problem, is_right
from fdpp.tiny.task import Recipe, Task

if TYPE_CHECKING:
    from fdpp.models.language_model import DiffusionLM

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (sums, sudoku, stories)}
"""The tasks by name, each with its LLaDA."""

MODELS: dict[str, Task] = TASKS | {stories.BLOCK_TASK.name: stories.BLOCK_TASK}
"""All embedded models by name, each with its task."""

__all__ = [
    "MODELS",
    "TASKS",
    "Problem",
    "Recipe",
    "Task",
    "answer_of",
    "generate",
    "is_problem",
    "is_right",
    "load",
    "task_of",
]


def task_of(model: str) -> Task | None:
    """The task of the embedded model that a model's name means: "tiny" or "tiny:NAME"; None for all other names.

    Raises `ValueError` for "tiny:" and no model.
    """
    if model == "tiny":
        return TASKS["sums"]
    kind, colon, name = model.partition(":")
    if kind != "tiny" or not colon:
        return None
    if name not in MODELS:
        raise ValueError(f"expected one of {', '.join(f'tiny:{known}' for known in MODELS)}, got {model!r}")
    return MODELS[name]


def load(task: str | Path = "sums") -> tuple[DiffusionLM, Any]:
    """The embedded model of a name (float32, CPU, evaluation mode) and its tokenizer, or those of another folder.

    The checkpoint's own settings, which `generate` takes, leave room for every problem of the task in its window.

    Raises `FileNotFoundError` if the folder holds no checkpoint.
    """
    from transformers import AutoTokenizer

    from fdpp.models import families

    path = MODELS[task].checkpoint if task in MODELS else Path(task)
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"expected one of {', '.join(MODELS)}, or a folder with a checkpoint (model.safetensors), got {path}"
        )
    return families.load(str(path)).eval(), AutoTokenizer.from_pretrained(path)
