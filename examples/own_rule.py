"""A rule of your own in one file, beside two of fdpp's on the embedded model's problems.

python examples/own_rule.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)

import fdpp
from fdpp import tiny

PROBLEMS = 20


@triton.jit
def within_budget(n, last, total, p0, p1):
    """The prefix test: arithmetic alone, for it becomes part of the kernel on a GPU and runs on tensors on a CPU.

    `n` is the length of a prefix of the profile, sorted by confidence; `last` is 1 - c of its last position, `total`
    the sum of 1 - c over the prefix; `p0` and `p1` come from `params`.
    """
    return total <= p0


@dataclass(frozen=True)
class ErrorBudget(fdpp.Rule):
    """As many of the most confident positions as hold, by their own confidences, at most `budget` errors on average.

    The sum of 1 - c is also an upper bound on the probability that any of them is wrong, however they depend on each
    other. At least one position is committed in every step, whatever the rule says.
    """

    budget: float = 0.25
    predicate: ClassVar[Callable[..., Any]] = within_budget

    def __post_init__(self) -> None:
        if not 0.0 <= self.budget < float("inf"):
            raise ValueError(f"ErrorBudget: expected budget in [0, inf), got {self.budget!r}")

    def params(self) -> tuple[float, float]:
        return float(self.budget), 0.0


def main() -> None:
    model, tokenizer = tiny.load()
    problems = tiny.generate("held-out", PROBLEMS)
    prompts = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt")
    print(f"{'rule':<18}  {'exact':>8}  {'forwards':>8}  {'tokens per forward':>18}")
    for rule in (fdpp.Threshold(0.9), fdpp.Frechet(0.25), ErrorBudget(0.25), ErrorBudget(1.0)):
        out = model.generate(**prompts, max_new_tokens=128, rule=rule, cache="none")
        texts = tokenizer.batch_decode(out.sequences[:, prompts["input_ids"].shape[1] :])
        exact = sum(map(tiny.is_right, texts, problems))
        nfe = out.nfe.double()
        tokens = (out.tokens_per_forward * nfe).sum() / nfe.sum()
        name = str(rule).split("(")[0] + f"({next(iter(vars(rule).values()))})"
        print(f"{name:<18}  {exact:>2} of {PROBLEMS}  {nfe.mean():>8.2f}  {tokens:>18.2f}")


if __name__ == "__main__":
    main()
