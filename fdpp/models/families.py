"""The families of this package, by the `model_type` of their configurations, and those that others add.

Nothing here imports transformers before somebody asks for a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdpp.models.language_model import DiffusionLM

CONFIGURATIONS = (
    "fdpp.models.llada_config",
    "fdpp.models.dream_config",
    "fdpp.models.sdar_config",
    "fdpp.models.fast_dllm_config",
    "fdpp.models.llada2_config",
)
"""Modules that register a configuration with `AutoConfig` when they are imported. They are apart from the models, since
`AutoConfig` may be imported amid the import of what a model needs."""

MODELS = (
    "fdpp.models.llada",
    "fdpp.models.dream",
    "fdpp.models.sdar",
    "fdpp.models.fast_dllm",
    "fdpp.models.llada2",
)
"""Modules that register a family."""

TOKENIZERS = ("fdpp.models.dream_tokenizer",)
"""Modules that register a tokenizer in the place of the code that published repositories bring for it."""

REGISTERED: dict[str, type[DiffusionLM]] = {}
"""The model classes that exist, by `model_type`."""


def families() -> dict[str, type[DiffusionLM]]:
    """The model classes by `model_type`, those of other packages that were imported included."""
    for module in MODELS:
        import_module(module)
    return REGISTERED


def family_of(config: dict[str, Any]) -> type[DiffusionLM]:
    """The model class for the contents of a `config.json`.

    Raises:
        ValueError: no family has its `model_type`.
    """
    kind, known = config.get("model_type"), families()
    if kind not in known:
        raise ValueError(f"expected a config.json with model_type {' or '.join(known)}, got {kind or 'none'}")
    return known[kind]


def load(path: str, **kwargs: Any) -> Any:
    """The model of any family in the folder, or of the Hugging Face id, `path`, as its `from_pretrained` loads it.

    Raises:
        ValueError: as `family_of` and `DiffusionLM.from_pretrained`.
    """
    from transformers import PretrainedConfig

    return family_of(PretrainedConfig.get_config_dict(path)[0]).from_pretrained(path, **kwargs)
