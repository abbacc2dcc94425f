"""What every rule is tested with, whoever wrote it: settings drawn from its own limits, and its specification."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

import fdpp
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.shaping import uniform
from fdpp.rules.rule import Number, Proposed
from fdpp.step import reference
from fdpp.step.terms import Terms

SETTINGS = 2
"""Settings drawn for every rule that remembers something, besides its defaults; one for others, to which all steps of a
decode are the same."""


def value(number: Number, default: Any, draw: random.Random) -> Any:
    """A value within the field's limits, at most 2 above the lower one."""
    if number.whole:
        return int(number.interval) + draw.randrange(2)
    low, high = (float(bound) for bound in number.interval[1:-1].split(","))
    return low + (min(high, low + 2.0) - low) * draw.uniform(0.01, 0.99)


def settings_of(kind: type[fdpp.Rule]) -> list[fdpp.Rule]:
    """The rule's defaults and some other settings, the same in every run; fewer where few are to be had."""
    draw, found = random.Random(kind.name), [kind()]
    wanted = 1 + (1 if kind.observe is fdpp.Rule.observe else SETTINGS)
    for _ in range(20):
        numbers = {field: value(number, getattr(kind, field), draw) for field, number in kind.numbers.items()}
        with contextlib.suppress(ValueError):  # two fields that do not go together
            found += [rule for rule in [kind(**numbers)] if rule not in found and len(found) < wanted]
    return found


def specified(
    rule: fdpp.Rule,
    evidence: Evidence,
    states: Tensor,
    terms: Terms,
    block: slice | Tensor,
    streams: Tensor | None = None,
    given: Tensor | None = None,
) -> fdpp.Selection:
    """The step from each of the `states` `[b, D, T]` as the rule specifies it, greedily; fields `[b * D, ...]`."""
    tokens = states.flatten(0, 1)
    candidate = tokens == terms.mask_id
    if evidence.logits.dim() == 2:
        # The rows of masked positions alone.
        logits = torch.zeros(*tokens.shape, evidence.logits.shape[1], dtype=torch.float64)
        logits[candidate] = evidence.logits.double()
        memory = None
    else:
        flat = evidence.each(lambda part: part.flatten(0, 1))
        memory = flat.memory
        logits = flat.logits.double() if memory is None else rule.weigh(flat.logits, memory).double()
    asked = torch.full_like(tokens, terms.mask_id) if rule.needs.block else tokens
    steps = []
    for n in range(tokens.shape[0]):
        params = terms.params[min(n, terms.params.shape[0] - 1)]
        scheduled = "k" in rule.numbers and rule.takes_steps()
        own = dataclasses.replace(rule, k=int(params[0])) if scheduled else rule  # type: ignore[type-var]
        steps.append(reference.prefix_step(logits[n : n + 1], asked[n : n + 1], own, terms.mask_id))
    step = fdpp.Selection(*map(torch.cat, zip(*steps, strict=True)))
    seeds = (streams, terms.seeds) if rule.draws else (None, None)
    fixed, fresh = (None if of_row is None else uniform(of_row, tokens.shape[1]) for of_row in seeds)
    if given is not None:
        given = given.repeat_interleave(states.shape[1], dim=0)
    return rule.reference(
        Proposed(step, tokens, candidate, terms.mask_id, memory, block, terms.params, fixed, fresh, given)
    )
