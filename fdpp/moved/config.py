"""What `fdpp.decoding.config` held."""

from fdpp.decoding.output import DiffusionGenerationOutput
from fdpp.decoding.settings import (
    BRANCHES,
    CACHES,
    ENGINES,
    HEADS,
    MAX_DRAFTS,
    REMASKINGS,
    DiffusionGenerationConfig,
)

__all__ = [
    "BRANCHES",
    "CACHES",
    "ENGINES",
    "HEADS",
    "MAX_DRAFTS",
    "REMASKINGS",
    "DiffusionGenerationConfig",
    "DiffusionGenerationOutput",
]
