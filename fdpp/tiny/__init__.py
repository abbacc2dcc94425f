"""The embedded model: a small LLaDA that works out arithmetic word problems, trained by `python -m fdpp.tiny.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fdpp.models.llada import LLaDAModelLM
from fdpp.tiny.problems import Problem, answer_of, generate, is_exact, is_problem

CHECKPOINT = Path(__file__).parent / "checkpoint"

__all__ = ["CHECKPOINT", "Problem", "answer_of", "generate", "is_exact", "is_problem", "load"]


def load(path: str | Path = CHECKPOINT) -> tuple[LLaDAModelLM, Any]:
    """The model (float32, CPU, evaluation mode) and its tokenizer, from the package's checkpoint or another folder.

    The checkpoint's own settings, which `generate` takes, leave room for every problem in its window: 128 new tokens.

    Raises `FileNotFoundError` if the folder holds no checkpoint.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"expected a checkpoint (model.safetensors) in {path}, found none")
    return LLaDAModelLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
