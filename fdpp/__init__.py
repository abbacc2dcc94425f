"""fdpp: fused denoising steps and block-wise decoding for masked-diffusion language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fdpp import moved
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models import registration
from fdpp.rules import (
    Budget,
    Credit,
    Dawn,
    Drawn,
    Editing,
    EntropyBound,
    EntropySum,
    Factor,
    Frechet,
    Hierarchy,
    Klass,
    LeastEntropy,
    Leftmost,
    LeftmostRun,
    LocalLeap,
    MaskgitPlus,
    Origin,
    Prophet,
    Quota,
    Revocable,
    Rule,
    Saber,
    Threshold,
    ThresholdLeftmost,
    ThresholdQuota,
    TopkMargin,
    Wino,
)
from fdpp.selection import Selection
from fdpp.step import DenoisingStep, select
from fdpp.step.canvas import CanvasStep, denoise_canvas
from fdpp.version import __version__

if TYPE_CHECKING:
    from fdpp.decoding.output import DiffusionGenerationOutput
    from fdpp.models.dream import DreamModelLM
    from fdpp.models.dream_config import DreamConfig
    from fdpp.models.fast_dllm import FastDLLMModelLM
    from fdpp.models.fast_dllm_config import FastDLLMConfig
    from fdpp.models.llada import LLaDAModelLM
    from fdpp.models.llada2 import LLaDA2ModelLM
    from fdpp.models.llada2_config import LLaDA2Config
    from fdpp.models.llada_config import LLaDAConfig
    from fdpp.models.sdar import SDARModelLM
    from fdpp.models.sdar_config import SDARConfig
    from fdpp.patching import patch, unpatch

moved.install()
registration.install()

WITH_TRANSFORMERS = {
    "DiffusionGenerationOutput": "fdpp.decoding.output",
    "DreamConfig": "fdpp.models.dream_config",
    "DreamModelLM": "fdpp.models.dream",
    "FastDLLMConfig": "fdpp.models.fast_dllm_config",
    "FastDLLMModelLM": "fdpp.models.fast_dllm",
    "LLaDA2Config": "fdpp.models.llada2_config",
    "LLaDA2ModelLM": "fdpp.models.llada2",
    "LLaDAConfig": "fdpp.models.llada_config",
    "LLaDAModelLM": "fdpp.models.llada",
    "SDARConfig": "fdpp.models.sdar_config",
    "SDARModelLM": "fdpp.models.sdar",
    "patch": "fdpp.patching",
    "unpatch": "fdpp.patching",
}
"""What is imported when it is first asked for, since transformers takes seconds to import, and where it is."""

__all__ = [
    "Budget",
    "CanvasStep",
    "Credit",
    "Dawn",
    "DenoisingStep",
    "DiffusionGenerationConfig",
    "DiffusionGenerationOutput",
    "Drawn",
    "DreamConfig",
    "DreamModelLM",
    "Editing",
    "EntropyBound",
    "EntropySum",
    "Factor",
    "FastDLLMConfig",
    "FastDLLMModelLM",
    "Frechet",
    "Hierarchy",
    "Klass",
    "LLaDA2Config",
    "LLaDA2ModelLM",
    "LLaDAConfig",
    "LLaDAModelLM",
    "LeastEntropy",
    "Leftmost",
    "LeftmostRun",
    "LocalLeap",
    "MaskgitPlus",
    "Origin",
    "Prophet",
    "Quota",
    "Revocable",
    "Rule",
    "SDARConfig",
    "SDARModelLM",
    "Saber",
    "Selection",
    "Threshold",
    "ThresholdLeftmost",
    "ThresholdQuota",
    "TopkMargin",
    "Wino",
    "__version__",
    "denoise_canvas",
    "patch",
    "select",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in WITH_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(WITH_TRANSFORMERS[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
