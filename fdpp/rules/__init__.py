"""Rules, one file each: which proposals of a step may be committed together. `fdpp.rules.rule` says what a rule is."""

from fdpp.rules.budget import Budget
from fdpp.rules.dawn import Dawn
from fdpp.rules.dream import Drawn, LeastEntropy, MaskgitPlus, Origin, TopkMargin
from fdpp.rules.entropy_bound import EntropyBound
from fdpp.rules.factor import Factor
from fdpp.rules.frechet import Frechet
from fdpp.rules.klass import Klass
from fdpp.rules.local_leap import LocalLeap
from fdpp.rules.presets import PRESETS
from fdpp.rules.quota import MostConfident, Quota
from fdpp.rules.rule import Needs, Proposed, Rows, Rule, Sight, number, whole
from fdpp.rules.threshold import Threshold

__all__ = [
    "PRESETS",
    "Budget",
    "Dawn",
    "Drawn",
    "EntropyBound",
    "Factor",
    "Frechet",
    "Klass",
    "LeastEntropy",
    "LocalLeap",
    "MaskgitPlus",
    "MostConfident",
    "Needs",
    "Origin",
    "Proposed",
    "Quota",
    "Rows",
    "Rule",
    "Sight",
    "Threshold",
    "TopkMargin",
    "number",
    "whole",
]
