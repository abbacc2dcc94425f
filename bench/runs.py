"""An experiment: a Fréchet bound that charges positions more beside a surer one, swept against other rules.

`python bench/runs.py --problems 200` decodes held-out problems of the embedded models and prints a table for each of
`SCENES`. bench/README.md says what came out, and why the rule is not one of the library.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from quality_report import nfe, right, table
from quality_runs import Setting, run

import fdpp
from fdpp.rules import MostConfident, Proposed, number
from fdpp.selection import Selection

SCENES = {
    "Sudoku, dual": ("sudoku", "dual", "plain"),
    "Sudoku, in one block": ("sudoku", "none", "undivided"),
    "stories, dual": ("stories", "dual", "plain"),
    "sums, dual": ("sums", "dual", "plain"),
}
"""Task, cache and `Setting.how`."""


@dataclass(frozen=True)
class FrechetRuns(MostConfident, fdpp.Rule):
    """The longest prefix with 1 - sum_{j<=n} d_(j) - d_(n) > margin, in the order of d, smallest first.

    A run is a maximal set of adjacent masks of the block. Its most confident position, the leftmost of equals, has
    d = 1 - c, the others d = beside (1 - c). With `beside=1` and a margin of 0 or more this is `Frechet(margin)`. A
    margin below 0 bounds nothing.
    """

    margin: float = number(0.0, "[-2, 1]", "lead over any other reading, below 1; less is faster")
    beside: float = number(4.0, "[1, 1000]", "how many times as much a position costs beside a surer one")

    def decide(self, proposed: Proposed) -> Selection:
        step, candidate = proposed.step, proposed.candidate
        confidence = step.confidence.double()
        cost = 1.0 - confidence
        cost = torch.where(best_of_runs(confidence, candidate), cost, self.beside * cost)
        cost = cost.masked_fill(~candidate | (confidence <= 0.0), torch.inf)
        sorted_cost, order = cost.sort(dim=1, stable=True)
        accepted = 1.0 - sorted_cost.cumsum(1) - sorted_cost > self.margin
        return proposed.commit(step.committed | torch.zeros_like(accepted).scatter(1, order, accepted))

    def reference(self, proposed: Proposed) -> Selection:
        committed = proposed.step.committed.clone()
        for b, row in enumerate(proposed.step.confidence.tolist()):
            runs: list[list[int]] = [[]]
            for t, masked in enumerate(proposed.candidate[b].tolist()):
                runs[-1].append(t) if masked else runs.append([])
            bests = [max(run, key=lambda t: (row[t], -t)) for run in runs if run]
            costs = {t: (1.0 if t in bests else self.beside) * (1.0 - row[t]) for run in runs for t in run if row[t]}
            total = 0.0
            for t in sorted(costs, key=lambda t: (costs[t], t)):
                total += costs[t]
                committed[b, t] |= 1.0 - total - costs[t] > self.margin
        return proposed.commit(committed)


def best_of_runs(confidence: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """The most confident `candidate` of every run `[N, T]`, the leftmost of equals."""
    N, T = candidate.shape
    run, masked = (~candidate).cumsum(1), confidence.masked_fill(~candidate, -1.0)
    highest = masked.new_full((N, T + 1), -1.0).scatter_reduce(1, run, masked, "amax").gather(1, run)
    at = torch.arange(T, device=candidate.device).expand(N, T).masked_fill(~candidate | (masked < highest), T)
    first = at.new_full((N, T + 1), T).scatter_reduce(1, run, at, "amin").gather(1, run)
    return candidate & (at == first)


RULES: dict[str, tuple[fdpp.Rule, ...]] = {
    "Threshold": (fdpp.Threshold(),),
    "Frechet": tuple(fdpp.Frechet(margin) for margin in (0.0, 0.25, 0.5, 0.75)),
    "Hierarchy": tuple(fdpp.Hierarchy(low) for low in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
    "Budget": (fdpp.Budget(), fdpp.Budget(rise=1.0)),
    "EntropyBound": (fdpp.EntropyBound(0.05), fdpp.EntropyBound()),
    "FrechetRuns": (
        *(FrechetRuns(margin) for margin in (-1.0, -0.5, 0.0, 0.25, 0.5)),
        *(FrechetRuns(margin, beside=8.0) for margin in (-0.5, 0.0)),
    ),
}


def line_of(row: dict[str, Any], careful: dict[str, Any]) -> list[str]:
    pairs = list(zip(careful["right"], row["right"], strict=True))
    lost, won = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return [f"`{row['rule']}`", right(row), nfe(row), f"{row['query_tokens']:.0f}", f"{lost}, {won}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--scenes", nargs="+", choices=tuple(SCENES), default=tuple(SCENES))
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=tuple(RULES))
    arguments = parser.parse_args()
    for scene in arguments.scenes:
        task, cache, how = SCENES[scene]
        asked = dict.fromkeys([fdpp.Threshold(), *(rule for family in arguments.rules for rule in RULES[family])])
        rows = [run(Setting(task, rule, cache, how=how, problems=arguments.problems)) for rule in asked]
        lines = [line_of(row, rows[0]) for row in sorted(rows, key=lambda row: row["nfe"])]
        head = f"rule | right, % | NFE | positions fed | lost, won against `{rows[0]['rule']}`"
        print(f"## {scene}\n\n{table(head, lines)}\n", flush=True)


if __name__ == "__main__":
    main()
