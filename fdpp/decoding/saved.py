"""`generation_config.json`: settings of a decode beside a checkpoint, as transformers keeps them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from fdpp.rules import Rule

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="SavedSettings")

METADATA = {
    "transformers_version",
    "_from_model_config",
    "_commit_hash",
    "bos_token_id",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
}
"""Keys of other writers of the file that say nothing about a diffusion decode."""


def rule_name(kind: type[Rule]) -> str:
    """The name of a rule in the file: the class for a rule of this package, module and class for others."""
    return kind.__name__ if kind.__module__.split(".")[0] == "fdpp" else kind.key()


class SavedSettings:
    """Base of a dataclass of settings with a `rule`; adds what transformers asks of a model's `generation_config`."""

    def to_dict(self) -> dict[str, Any]:
        """All settings that are not None; the rule by its name and numbers, `{"name": "Frechet", "margin": 0.25}`."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        settings = {name: value for name, value in settings.items() if value is not None}
        rule = settings["rule"]
        return settings | {"rule": {"name": rule_name(type(rule)), **dataclasses.asdict(rule)}}

    @classmethod
    def from_dict(cls: type[Self], settings: dict[str, Any]) -> Self:
        """The settings of `to_dict`; what is left out has its default.

        Settings of autoregressive generation, which a checkpoint may hold as well, are left out with a warning.

        Raises:
            ValueError: a rule, a number of a rule or a setting that does not exist, or a value that does not fit.
        """
        if not isinstance(settings, dict):
            raise ValueError(f"expected a JSON object, got {type(settings).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        others = settings.keys() - names - METADATA
        foreign = others & GenerationConfig().to_dict().keys()
        if others - foreign:
            raise ValueError(f"unknown settings {sorted(others - foreign)}; known are {', '.join(sorted(names))}")
        if foreign:
            logger.warning("settings of autoregressive generation have no effect: %s", ", ".join(sorted(foreign)))
        own = {name: value for name, value in settings.items() if name in names}
        if "rule" in own:
            own["rule"] = rule_from(own["rule"])
        return cls(**own)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Write `generation_config.json` into a folder, made if need be; saving a model does it as well."""
        saved = self.to_dict() | {"transformers_version": transformers.__version__}
        text = json.dumps(saved, indent=2, sort_keys=True) + "\n"
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls: type[Self], pretrained_model_name: str | os.PathLike[str], **hub: Any) -> Self:
        """Read the `generation_config.json` of a folder or of a repository of the Hugging Face Hub.

        `hub` goes to `transformers.utils.cached_file`: `revision`, `token`, `cache_dir`, ...

        Raises:
            OSError: there is no such file.
            ValueError: its contents do not fit; the error names the file.
        """
        file = cached_file(pretrained_model_name, GENERATION_CONFIG_NAME, **hub)
        assert file is not None
        try:
            return cls.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_model_config(cls: type[Self], model_config: Any) -> Self:
        """What a new model starts with: the defaults. Token ids are looked up in `model_config` by every decode."""
        return cls()


def rule_from(saved: Any) -> Rule:
    """The rule of its saved form, `{"name": ..., <number>: ...}`."""
    kinds = {rule_name(kind): kind for kind in Rule.registry.values()}
    name = saved.get("name") if isinstance(saved, dict) else saved
    if not isinstance(saved, dict) or name not in kinds:
        raise ValueError(
            f'rule: expected {{"name": ..., <its numbers>}} with a name of {", ".join(sorted(kinds))}, got {saved!r}'
        )
    try:
        return kinds[name](**{key: value for key, value in saved.items() if key != "name"})
    except TypeError as error:
        raise ValueError(f"rule {name}: {error}") from error
