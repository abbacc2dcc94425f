"""Rules by what one wants of them; docs/rules.md says what each was measured at."""

from __future__ import annotations

from fdpp.rules.budget import Budget
from fdpp.rules.rule import Rule

PRESETS: dict[str, Rule] = {"careful": Budget(0.02), "balanced": Budget(), "fast": Budget(sure=0.8, rise=1.0)}

Rule.presets.update(PRESETS)
