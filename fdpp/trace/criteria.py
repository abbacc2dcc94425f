"""What rules ask of a recorded profile, and how many of its positions they would commit."""

from __future__ import annotations

from typing import NamedTuple

from fdpp import reference
from fdpp.dawn import Dawn
from fdpp.klass import Klass
from fdpp.rules import EntropyBound, Factor, Frechet, LocalLeap, Quota, Rule, Threshold

COMPARED: tuple[Rule, ...] = (Threshold(0.9), Factor(0.75), Frechet(0.25))


def name(rule: Rule, steps: int | None = None) -> str:
    """The rule with its main number, in a few words; `steps` are those of a step schedule."""
    match rule:
        case Quota(k):
            return f"quota {k}" if k is not None else "one per step" if steps is None else f"schedule of {steps} steps"
        case Threshold(tau):
            return f"threshold {tau:g}"
        case Factor(f):
            return f"factor {f:g}"
        case Frechet(margin, calibration):
            return f"Fréchet {margin:g}" + (f", calibration {calibration:g}" if calibration else "")
        case EntropyBound(gamma):
            return f"entropy {gamma:g}"
        case LocalLeap(threshold):
            return f"LocalLeap {threshold:g}"
        case Klass(confidence):
            return f"KLASS {confidence:g}"
        case Dawn():
            return f"DAWN {rule.tau_high:g}"
    return type(rule).__name__


def others(rule: Rule) -> list[Rule]:
    """The rules to compare `rule` with: those of `COMPARED` of another kind."""
    return [other for other in COMPARED if type(other) is not type(rule)]


def would_commit(rule: Rule, missing: list[float]) -> int:
    """How many positions `rule`, one of `COMPARED`, would commit of a sorted profile; `missing` are its 1 - c."""
    residuals = [d / (1.0 - d) if d < 1.0 else float("inf") for d in missing]
    return max(reference.accepted(rule, residuals, []), min(1, len(missing)))


class Curve(NamedTuple):
    """A score of every prefix length that falls as the prefix grows, and the limit that it must stay above."""

    name: str
    limit: float
    scores: list[float]


def curves(rule: Rule, missing: list[float]) -> list[Curve]:
    """The Fréchet bound G_n of a sorted profile, and for `Factor` its own criterion on the same scale.

    G_n is that of `rule` where it is a `Frechet`, else that of `Frechet(0.25)`. (n + 1)(1 - c_(n)) < f is written as
    1 - (n + 1)(1 - c_(n)) > 1 - f, which is G_n where all n confidences are equal.
    """
    frechet = rule if isinstance(rule, Frechet) else Frechet(0.25)
    bounds, total = [], 0.0
    for d in missing:
        cost = min(1.0, d + frechet.calibration)
        total += cost
        bounds.append(1.0 - total - cost)
    found = [Curve("Fréchet bound", frechet.margin, bounds)]
    if isinstance(rule, Factor):
        scores = [1.0 - (n + 1) * d for n, d in enumerate(missing, start=1)]
        found.append(Curve("factor score", 1.0 - rule.f, scores))
    return found


def confidence_lines(rule: Rule) -> list[tuple[str, float]]:
    """Confidences that `rule` compares with, by the name of its field."""
    match rule:
        case Threshold(tau):
            return [("tau", tau)]
        case LocalLeap(threshold, relaxed):
            return [("threshold", threshold), ("relaxed", relaxed)]
        case Klass(confidence):
            return [("confidence", confidence)]
        case Dawn():
            return [("tau_high", rule.tau_high), ("tau_low", rule.tau_low), ("tau_induce", rule.tau_induce)]
    return []
