"""fdpp: fused denoising steps and block-wise decoding for masked-diffusion language models."""

from fdpp import moved
from fdpp.decoding.output import DiffusionGenerationOutput
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models.configuration import LLaDAConfig
from fdpp.models.llada import LLaDAModelLM
from fdpp.patching import patch, unpatch
from fdpp.rules import Budget, Dawn, EntropyBound, Factor, Frechet, Klass, LocalLeap, Quota, Rule, Threshold
from fdpp.selection import Selection
from fdpp.step import DenoisingStep, select
from fdpp.version import __version__

moved.install()

__all__ = [
    "Budget",
    "Dawn",
    "DenoisingStep",
    "DiffusionGenerationConfig",
    "DiffusionGenerationOutput",
    "EntropyBound",
    "Factor",
    "Frechet",
    "Klass",
    "LLaDAConfig",
    "LLaDAModelLM",
    "LocalLeap",
    "Quota",
    "Rule",
    "Selection",
    "Threshold",
    "__version__",
    "patch",
    "select",
    "unpatch",
]
