"""Settings that a task brings (`generation_kwargs`, `--gen_kwargs`), onto those of a decode, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from fdpp.decoding import arguments
from fdpp.rules import Rule

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "gen_length")
"""Names of a response's length; of several the first counts, as in lm-evaluation-harness."""

STOPS = ("until", "stop", "stop_strings", "stop_sequences")

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"}
"""Change nothing without sampling."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **{name: (value,) for name, value in arguments.NEUTRAL.items()},
    "num_return_sequences": (1,),
    "n": (1,),
    "best_of": (1,),
    "top_k": (0, -1),
    "top_p": (1,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
}
"""Values of other libraries' settings that change nothing. None never does."""

WITHOUT_MEANING = {
    "bos_token_id",
    "early_stopping",
    "length_penalty",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "spaces_between_special_tokens",
}
"""Settings of beams and of what another library returns."""

OTHER_NAMES = {
    "max_length": "max_gen_toks, the length of the response alone",
    "threshold": "rule=threshold with tau",
    "factor": "rule=factor with f",
    "use_cache": "cache=none, prefix or dual",
    "dual_cache": "cache=dual",
    "ignore_eos": "stop_at_eos=False",
}
"""What a task or `--gen_kwargs` calls otherwise than `generate` would (`fdpp.decoding.arguments.ELSEWHERE`)."""


class Asked(NamedTuple):
    """What a task asks for: fields of `DiffusionGenerationConfig`, and strings that end a response."""

    fields: dict[str, Any]
    stops: tuple[str, ...]


def same_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the harness's own names for length and stop strings, so that they replace a task's."""
    renamed = dict(settings)
    for names in (LENGTHS, STOPS):
        given = [renamed.pop(name) for name in names if name in renamed]
        if given:
            renamed[names[0]] = given[0]
    return renamed


def asked_by(settings: Mapping[str, Any], rule: Rule) -> Asked:
    """What `settings` ask for beside a decode with `rule`.

    `do_sample=False` and `temperature=0` ask for nothing: responses are greedy unless the evaluation samples.
    `do_sample=True` without a temperature is a temperature of 1.

    Raises:
        ValueError: a setting that has no meaning here, by its name; a value that cannot be read.
    """
    left = {name: value for name, value in same_names(settings).items() if value is not None}
    until = left.pop(STOPS[0], ())
    stops = [until] if isinstance(until, str) else list(until)
    for stop in stops:
        if not isinstance(stop, str):
            raise ValueError(f"{STOPS[0]}: expected strings, got {stop!r}")
    found: dict[str, Any] = {}
    if LENGTHS[0] in left:
        length = left.pop(LENGTHS[0])
        if not str(length).isdecimal() or int(length) < 1:
            raise ValueError(f"{LENGTHS[0]}: expected an int of at least 1, got {length!r}")
        found["max_new_tokens"] = int(length)
    heat = left.pop("temperature", None)
    try:
        temperature = float(1.0 if heat is None and left.get("do_sample") else heat or 0.0)
    except (TypeError, ValueError):
        raise ValueError(f"temperature: expected a number, got {heat!r}") from None
    if left.pop("do_sample", True) and temperature:
        found["temperature"] = temperature
    else:
        left = {name: value for name, value in left.items() if name not in SAMPLING}
    left = {
        name: value
        for name, value in left.items()
        if name not in WITHOUT_MEANING and not (name in NEUTRAL and value in NEUTRAL[name])
    }
    own = set(arguments.SETTINGS) - {"rule"}
    found |= {name: left.pop(name) for name in own & left.keys()}
    numbers = {number for kind in Rule.named().values() for number in kind.numbers}
    of_rule = {name: left.pop(name) for name in numbers & left.keys()}
    if "rule" in left or of_rule:
        found["rule"] = rule_asked_for(left.pop("rule", rule), of_rule)
    for name, value in left.items():
        raise ValueError(meaning(name, value))
    return Asked(found, tuple(sorted(set(stops))))


def rule_asked_for(given: Any, numbers: dict[str, Any]) -> Rule:
    """The rule that `given` names, with `numbers`."""
    rule: Any = Rule.of(given)
    for name in sorted(numbers.keys() - rule.numbers.keys()):
        what = meaning(name, numbers[name]) if name in OTHER_NAMES else f"{name}={numbers[name]!r}"
        raise ValueError(f"{what}; it is no number of {rule}")
    return replace(rule, **numbers)


def meaning(name: str, value: Any) -> str:
    """What to say of a setting that is not taken."""
    if name in OTHER_NAMES:
        return f"{name}={value!r} has another name here, {OTHER_NAMES[name]}"
    return arguments.meaning(name, value)
