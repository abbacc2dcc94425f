"""Rules, one file each: which proposals of a step may be committed together. `fdpp.rules.rule` says what a rule is."""

from fdpp.rules.budget import Budget
from fdpp.rules.credit import Credit
from fdpp.rules.dawn import Dawn
from fdpp.rules.dream import Drawn, LeastEntropy, MaskgitPlus, Origin, TopkMargin
from fdpp.rules.editing import Editing
from fdpp.rules.entropy_bound import EntropyBound
from fdpp.rules.entropy_sum import EntropySum
from fdpp.rules.factor import Factor
from fdpp.rules.frechet import Frechet
from fdpp.rules.hierarchy import Hierarchy
from fdpp.rules.klass import Klass
from fdpp.rules.leftmost import Leftmost, ThresholdLeftmost
from fdpp.rules.leftmost_run import LeftmostRun
from fdpp.rules.local_leap import LocalLeap
from fdpp.rules.presets import PRESETS
from fdpp.rules.prophet import Prophet
from fdpp.rules.quota import MostConfident, Quota
from fdpp.rules.revocable import Revocable
from fdpp.rules.rule import Needs, Proposed, Rows, Rule, Sight, number, whole
from fdpp.rules.saber import Saber
from fdpp.rules.threshold import Threshold
from fdpp.rules.threshold_quota import ThresholdQuota
from fdpp.rules.wino import Wino

__all__ = [
    "PRESETS",
    "Budget",
    "Credit",
    "Dawn",
    "Drawn",
    "Editing",
    "EntropyBound",
    "EntropySum",
    "Factor",
    "Frechet",
    "Hierarchy",
    "Klass",
    "LeastEntropy",
    "Leftmost",
    "LeftmostRun",
    "LocalLeap",
    "MaskgitPlus",
    "MostConfident",
    "Needs",
    "Origin",
    "Prophet",
    "Proposed",
    "Quota",
    "Revocable",
    "Rows",
    "Rule",
    "Saber",
    "Sight",
    "Threshold",
    "ThresholdLeftmost",
    "ThresholdQuota",
    "TopkMargin",
    "Wino",
    "number",
    "whole",
]
