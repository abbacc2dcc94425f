"""`generation_config.json`: settings of a decode beside a checkpoint, as transformers keeps them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

from fdpp.decoding.refresh import Refresh
from fdpp.rules import Rule

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="SavedSettings")

GENERATION_CONFIG_NAME = "generation_config.json"
"""As transformers has it, which is imported where it is needed alone: it takes seconds."""

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

SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "min_p"}
"""Settings that a file of autoregressive generation has for another way of drawing tokens."""

SCHEDULE = {"alg", "alg_temp", "eps", "output_history"}
"""Settings of Dream's own sampler, in the files of its checkpoints; `steps` then counts times from 1 down to `eps`."""


class SavedSettings:
    """Base of a dataclass of settings with a `rule`; adds what transformers asks of a model's `generation_config`."""

    def validate(self) -> None:
        """Raise `ValueError` if a setting does not fit."""

    def to_dict(self) -> dict[str, Any]:
        """All settings that are not None; the rule by its name and numbers, `{"name": "Frechet", "margin": 0.25}`,
        the refresh as its text."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        settings = {name: value for name, value in settings.items() if value is not None}
        return settings | {"rule": Rule.of(settings["rule"]).saved(), "refresh": str(Refresh.of(settings["refresh"]))}

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings of `to_dict` that are not the default, and whether the decode samples as `do_sample`.

        A pipeline of transformers reads it, and would sample where it finds no `do_sample`.
        """
        defaults = type(self)().to_dict()
        changed = {name: value for name, value in self.to_dict().items() if value != defaults.get(name)}
        return changed | {"do_sample": bool(changed.get("temperature"))}

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_diff_dict()` as JSON, or `to_dict()` with `use_diff=False`."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def update(self, **changes: Any) -> dict[str, Any]:
        """Set the settings among `changes` and return the others; values are checked when a decode uses them."""
        names = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name in changes.keys() & names:
            setattr(self, name, changes[name])
        return {name: value for name, value in changes.items() if name not in names}

    @classmethod
    def from_dict(cls: type[Self], settings: dict[str, Any]) -> Self:
        """The settings of `to_dict`; what is left out has its default.

        Settings of autoregressive generation or of another sampler (`SCHEDULE`), which a checkpoint may hold as well,
        are left out with a warning. Where there are none but autoregressive ones, so are the temperature and its like
        (`SAMPLING`); `steps` without a `rule` is, where the sampler is another one.

        Raises:
            ValueError: a rule, a number of a rule or a setting that does not exist, or a value that does not fit.
        """
        if not isinstance(settings, dict):
            raise ValueError(f"expected a JSON object, got {type(settings).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        others = settings.keys() - names - METADATA
        from transformers import GenerationConfig

        autoregressive = GenerationConfig().to_dict().keys()
        foreign = others & (autoregressive | SCHEDULE)
        if settings.keys() <= autoregressive:
            foreign |= {name for name in settings.keys() & SAMPLING if settings[name]}
        if settings.keys() & SCHEDULE and "rule" not in settings:
            foreign |= settings.keys() & {"steps"}
        if others - foreign:
            raise ValueError(f"unknown settings {sorted(others - foreign)}; known are {', '.join(sorted(names))}")
        if foreign:
            logger.warning("settings of another way to generate have no effect: %s", ", ".join(sorted(foreign)))
        return cls(**{name: value for name, value in settings.items() if name in names - foreign})

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Write `generation_config.json` into a folder, made if need be; saving a model does it as well.

        Raises:
            ValueError: settings that do not fit.
        """
        import transformers

        self.validate()
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
        from transformers.utils import cached_file

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
