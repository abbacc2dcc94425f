"""A recorded decode as one self-contained page."""

from __future__ import annotations

import json
from dataclasses import fields
from html import escape
from math import isnan
from pathlib import Path
from typing import Any

from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.rules import EntropyBound, Rule
from fdpp.trace import criteria
from fdpp.trace.record import Step, Trace

FOLDER = Path(__file__).parent

MAIN = ("cache", "block_length", "drafts")
UNTOLD = ("rule", "engine", "return_dict_in_generate", "mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id")


class Pieces:
    """The texts of the tokens that a trace holds, each kept once; a call returns a token's index among them.

    Attributes:
        rows: `[id, text, whether it is a special token]`. A text begins with a space where the tokenizer puts one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.special = tokenizer, set(tokenizer.all_special_ids)
        self.special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.rows: list[list[Any]] = []
        self.index: dict[int, int] = {}

    def __call__(self, token: int) -> int:
        if token not in self.index:
            # Decoding leaves out a space in front of the first token; the second of two shows it.
            alone, twice = (self.tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
            text = twice[len(alone) :] if twice.startswith(alone) else alone
            self.index[token] = len(self.rows)
            self.rows.append([token, text, token in self.special])
        return self.index[token]


def step_data(step: Step, rule: Rule, pieces: Pieces) -> dict[str, Any]:
    data: dict[str, Any] = {
        "forward": step.forward,
        "positions": step.positions,
        "proposals": [pieces(token) for token in step.proposals],
        "missing": [float(f"{d:.4g}") for d in step.missing],
        "committed": [int(committed) for committed in step.committed],
        "curves": [[round(score, 4) for score in curve.scores] for curve in criteria.curves(rule, step.missing)],
        "would": [criteria.would_commit(other, step.missing) for other in criteria.others(rule)],
    }
    if step.entropies:
        data["entropies"] = [float(f"{h:.4g}") for h in step.entropies]
    if step.settled:
        data["settled"] = True
    if shown := tellable(step.shown):
        data["shown"] = shown
    if step.taken:
        data["taken"] = [(position, pieces(token)) for position, token in step.taken]
    if step.edited:
        data["edited"] = [(position, pieces(old), pieces(new)) for position, old, new in step.edited]
    if verdicts := tellable(step.verdicts):
        rounded = {name: [v if v is None else float(f"{v:.4g}") for v in values] for name, values in verdicts.items()}
        data |= {"decided": step.decided, "verdicts": rounded}
    return data


def tellable(shown: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """`shown` for JSON: None for NaN, and without the names that have nothing else."""
    told = {name: [None if isnan(value) else value for value in values] for name, values in shown.items()}
    return {name: values for name, values in told.items() if any(value is not None for value in values)}


def settings_of(config: DiffusionGenerationConfig) -> dict[str, Any]:
    """The settings to show, by name: the main ones, and others that are not at their defaults."""
    settings = {"rule": repr(config.rule)}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in MAIN or (field.name not in UNTOLD and value != field.default):
            settings[field.name.replace("_", " ")] = str(value) if field.name == "refresh" else value
    return settings


def data_of(trace: Trace, tokenizer: Any, model: str) -> dict[str, Any]:
    """All that the page shows; `model` is the model's name. Positions and steps count from 0."""
    config, output, pieces = trace.config, trace.output, Pieces(tokenizer)
    assert output.nfe is not None and output.tokens_per_forward is not None
    rule, nfe = config.rule, int(output.nfe)
    response = trace.response
    ends = [position for position, token in enumerate(response) if token in config.eos_ids]
    return {
        "settings": {"model": model, **settings_of(config)},
        "prompt": tokenizer.decode(trace.prompt[0].tolist(), clean_up_tokenization_spaces=False),
        "nfe": nfe,
        "tokens": round(float(output.tokens_per_forward) * nfe),
        "response": [pieces(token) for token in (*response, *(token for token, _ in trace.behind))],
        "commit": [*trace.commit_step, *(step for _, step in trace.behind)],
        "length": len(response),
        "end": ends[0] if ends and config.stop_at_eos else None,
        "blocks": trace.blocks,
        "rule": rule.label(config.steps),
        "others": [other.label() for other in criteria.others(rule)],
        "curves": [{"name": curve.name, "limit": curve.limit} for curve in criteria.curves(rule, [])],
        "lines": criteria.confidence_lines(rule),
        "gamma": rule.gamma if isinstance(rule, EntropyBound) else None,
        "steps": [step_data(step, rule, pieces) for step in trace.steps],
        "pieces": pieces.rows,
    }


def embed(data: dict[str, Any]) -> str:
    """JSON for a script element: ASCII without "<", so no text can end the element or be misread."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def render(data: dict[str, Any]) -> str:
    """The page that replays `data`, HTML text to be written as UTF-8."""
    stop = data["length"] if data["end"] is None else data["end"]
    text = "".join(data["pieces"][piece][1] for piece in data["response"][:stop])
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    for mark, content in (
        ("/*style*/", (FOLDER / "page.css").read_text(encoding="utf-8")),
        ("/*script*/", (FOLDER / "page.js").read_text(encoding="utf-8")),
        ("/*data*/", embed(data)),
        # Last: a response may contain any of the marks; the data has no "<".
        ("<!--response-->", escape(text)),
    ):
        page = page.replace(mark, content, 1)
    return page
