"""fdpp: fused denoising steps and block-wise decoding for masked-diffusion language models."""

from fdpp.dawn import Dawn
from fdpp.decoding.config import DiffusionGenerationConfig, DiffusionGenerationOutput
from fdpp.klass import Klass
from fdpp.models.configuration import LLaDAConfig
from fdpp.models.llada import LLaDAModelLM
from fdpp.ops import select
from fdpp.patching import patch, unpatch
from fdpp.reference import Selection
from fdpp.rules import EntropyBound, Factor, Frechet, LocalLeap, Quota, Rule, Threshold
from fdpp.step import DenoisingStep

__version__ = "0.1.0"

__all__ = [
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
    "patch",
    "select",
    "unpatch",
]
