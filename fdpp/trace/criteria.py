"""Rules on a recorded profile: their criteria, and how many of its positions they would commit."""

from __future__ import annotations

from fdpp.rules import Factor, Frechet, Rule, Threshold
from fdpp.rules.rule import Curve
from fdpp.step import reference

COMPARED: tuple[Rule, ...] = (Threshold(0.9), Factor(0.75), Frechet(0.25))


def others(rule: Rule) -> list[Rule]:
    """The rules to compare `rule` with: those of `COMPARED` of another kind."""
    return [other for other in COMPARED if type(other) is not type(rule)]


def would_commit(rule: Rule, missing: list[float]) -> int:
    """How many positions `rule`, one of `COMPARED`, would commit of a sorted profile; `missing` are its 1 - c."""
    residuals = [d / (1.0 - d) if d < 1.0 else float("inf") for d in missing]
    return max(reference.accepted(rule, residuals, []), min(1, len(missing)))


def curves(rule: Rule, missing: list[float]) -> list[Curve]:
    """The Fréchet bound G_n of a sorted profile, and the rule's own criterion where it has another.

    G_n is that of the rule where it is a `Frechet`, else that of `Frechet(0.25)`.
    """
    own, bound = rule.curve(missing), Frechet(0.25).curve(missing)
    if own is None:
        return [bound]
    return [own] if own.name == bound.name else [bound, own]


def confidence_lines(rule: Rule) -> list[tuple[str, float]]:
    """The fields of `rule` that confidences are compared with: names and values."""
    return [(name, getattr(rule, name)) for name, number in rule.numbers.items() if number.line]
