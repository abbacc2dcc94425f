"""Rules: what they refuse to be built from, and what the papers say about the prefixes they accept."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import IMPLEMENTATIONS, Problem, assert_as_specified, on_gpu, random_problem, run

import fdpp
from fdpp import Budget, EntropyBound, Factor, Frechet, Quota, Rule, Threshold
from fdpp.rules import PRESETS, Needs
from fdpp.step.reference import accepted

NAN, INF = math.nan, math.inf
NO_NUMBERS: list[Any] = [NAN, INF, -INF, None, "0.5", True, False, [0.5], 1j, torch.tensor(0.5)]

few = settings(deadline=None, max_examples=60, derandomize=True)
confidences = st.lists(st.floats(0.01, 0.9999), min_size=1, max_size=12).map(lambda c: sorted(c, reverse=True))
margins = st.floats(0.01, 0.9)


def commits(rule: Rule, c: list[float]) -> int:
    """How many positions a step commits of a profile with these confidences, descending."""
    return max(accepted(rule, [(1.0 - x) / x for x in c], [0.0] * len(c)), 1)


def accepts(predicate: Any, n: int, costs: list[float], p0: float) -> bool:
    return bool(getattr(predicate, "fn", predicate)(n, costs[n - 1], sum(costs[:n]), p0, 0.0))


def scores(c: list[float], calibration: float = 0.0) -> list[float]:
    """G_n = L_n - U_n as the papers write it."""
    c = [max(0.0, x - calibration) for x in c]
    return [sum(c[:n]) - (n - 1) - (1.0 - c[n - 1]) for n in range(1, len(c) + 1)]


BAD = [
    *((Quota, {"k": k}) for k in [0, -1, 1.0, 2.5, NAN, INF, True, False, "3", [3], torch.tensor(3)]),
    *((Threshold, {"tau": x}) for x in [*NO_NUMBERS, -1e-9, 1.0000001, 90]),
    *((Factor, {"f": x}) for x in [*NO_NUMBERS, 0, 0.0, -0.75]),
    *((Frechet, {"margin": x}) for x in [*NO_NUMBERS, -1e-9, -1]),
    *((Frechet, {"calibration": x}) for x in [*NO_NUMBERS, -1e-9, 1, 1.0, 2]),
    *((EntropyBound, {"gamma": x}) for x in [*NO_NUMBERS, -1e-9, -1]),
    *((fdpp.ThresholdQuota, {"tau": x}) for x in [*NO_NUMBERS, -1e-9, 1.0000001]),
    *((fdpp.EntropySum, {"bound": x}) for x in [*NO_NUMBERS, -1e-9]),
    *((fdpp.Leftmost, {"k": k}) for k in [0, 1.0, True]),
    *((fdpp.Editing, arguments) for arguments in [{"post": -1}, {"post": None}, {"edit": 1.1}, {"k": 0}]),
    *((Budget, {"budget": x}) for x in [*NO_NUMBERS, -1e-9, -1]),
    *((Budget, {name: x}) for name in ("sure", "floor", "rise") for x in [*NO_NUMBERS, -1e-9, 1.0000001]),
]


@pytest.mark.parametrize(("kind", "arguments"), BAD, ids=str)
def test_bad_numbers_are_refused_by_name(kind: type[Rule], arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"{kind.__name__}.*\b{name}\b") as error:
        kind(**arguments)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "rule",
    [
        Quota(1), Quota(10**9), Threshold(0), Threshold(1), Threshold(0.0), Factor(1e-300), Factor(1e300), Factor(1),
        Frechet(0), Frechet(7), Frechet(0.25, 0), Frechet(0.25, calibration=0.999), EntropyBound(0), EntropyBound(1e9),
        Budget(0, 0, 0, 0), Budget(1e9, 1, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(rule: Rule) -> None:
    assert all(isinstance(number, float) for number in rule.params())


def test_rules_are_values() -> None:
    assert Frechet(0.25) == Frechet(0.25, 0.0) == Frechet() != Frechet(0.3)
    assert {Threshold(0.9), Threshold(), Threshold(0.5)} == {Threshold(0.9), Threshold(0.5)}
    assert repr(Factor(0.75)) == "Factor(f=0.75)"
    assert dataclasses.replace(Quota(2), k=3) == Quota(3)
    for rule in (Quota(2), Threshold(), Factor(), Frechet(), EntropyBound(), Budget()):
        name = dataclasses.fields(rule)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, name, 0.5)


def test_presets_are_rules_by_what_one_wants() -> None:
    assert list(PRESETS) == ["careful", "balanced", "fast"] and PRESETS.items() <= Rule.presets.items()
    for name, rule in PRESETS.items():
        assert Rule.of(name) is rule is fdpp.DiffusionGenerationConfig(rule=name).rule
        assert Rule.of(rule.saved()) == rule, "a file holds the rule, not the preset's name"
        assert name not in Rule.named()
    assert [rule.label() for rule in PRESETS.values()] == [
        "budget 0.02",
        "budget 0.05",
        "budget 0.05, sure 0.8, rise 1",
    ]
    with pytest.raises(ValueError, match=r"with a name of careful, balanced, fast, .*; got 'bold'"):
        Rule.of("bold")
    with pytest.raises(ValueError, match=r"got \{'name': 'fast', 'budget': 0.3\}"):
        Rule.of({"name": "fast", "budget": 0.3})


def test_an_open_quota_has_no_numbers() -> None:
    with pytest.raises(ValueError, match="k is None"):
        Quota().params()
    with pytest.raises(ValueError, match="k is None"):
        fdpp.select(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64), rule=Quota(), mask_id=0)


@triton.jit
def steady(n, last, total, p0, p1):
    return (total <= n * p0) & (last <= p1)


@dataclass(frozen=True)
class Steady(Rule):
    """A rule of one's own: mean confidence of the prefix at least `mean`, and none below `least`."""

    mean: float
    least: float
    predicate = steady

    def params(self) -> tuple[float, float]:
        return 1.0 - self.mean, 1.0 - self.least


@dataclass(frozen=True)
class CalmestFirst(Rule):
    """One ordered by entropy: at most `count` positions, each below `most` nats."""

    order = "entropy"
    count: int
    most: float

    @triton.jit
    def predicate(n, last, total, p0, p1):  # noqa: N805
        return (n <= p0) & (last < p1)

    def params(self) -> tuple[float, float]:
        return float(self.count), self.most


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
@on_gpu(lambda rule, T: (rule.order == "entropy") == (T == 9))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", [Steady(0.8, 0.5), Steady(0.5, 0.0), CalmestFirst(3, 1.0)], ids=str)
@pytest.mark.parametrize("T", [9, 40])
def test_a_rule_of_ones_own(implementation: str, rule: Rule, T: int) -> None:
    problem = random_problem(T, 2, T, 20, rule, masked=0.9)
    out = run(implementation, problem)
    assert out.committed.sum() > 2
    assert_as_specified(out, problem)


def test_a_rule_of_ones_own_through_the_front_door() -> None:
    problem = random_problem(1, 2, 9, 20, Steady(0.8, 0.5))
    out = fdpp.select(problem.logits, problem.tokens, rule=problem.rules[0], mask_id=problem.mask_id)
    assert_as_specified(out, problem)


def test_what_a_rule_says_of_itself_must_fit() -> None:
    def rule(**attributes: Any) -> type[Rule]:
        return type("Odd", (Rule,), {"predicate": Quota.predicate, "__module__": __name__, **attributes})

    with pytest.raises(TypeError, match=r"Odd.observe sees logits, expected needs = Needs\(logits=True"):
        rule(observe=lambda self, sight, before: None)
    with pytest.raises(TypeError, match="Odd needs the block's committed positions"):
        rule(needs=Needs(logits=True, block=True))
    with pytest.raises(TypeError, match=r"Odd.extend: expected `decide`"):
        rule(extend=lambda self, confidence, candidate, committed: committed)
    with pytest.raises(
        ValueError, match=r"Odd.name: expected one that is free, got 'frechet' of fdpp.rules.frechet.Frechet"
    ):
        rule(name="frechet")
    assert rule(name="odd").name == "odd" and rule(name="odd").name == "odd", "a module may be read again"
    assert Rule.named()["odd"] is Rule.registry[f"{__name__}.Odd"]
    del Rule.registry[f"{__name__}.Odd"]

    class Bolder(Frechet):
        pass

    assert Bolder.name is None and Rule.named()["frechet"] is Frechet
    assert Bolder(0.5).label() == "Fréchet 0.5" and list(Bolder.numbers) == ["margin", "calibration"]
    with pytest.raises(ValueError, match="Bolder: expected margin in"):
        Bolder(-1.0)


def test_a_rule_must_have_a_predicate_and_a_known_order() -> None:
    with pytest.raises(TypeError, match="Nameless must name a @triton"):

        class Nameless(Rule):
            pass

    with pytest.raises(ValueError, match=r"Backwards.*'backwards'"):

        class Backwards(Rule):
            predicate = steady
            order = "backwards"


def test_the_worked_example_of_the_paper() -> None:
    """arXiv 2606.02955, figure 1."""
    c = [0.99, 0.95, 0.82, 0.78, 0.74]
    assert [round(g, 2) for g in scores(c)] == [0.98, 0.89, 0.58, 0.32, 0.02]
    assert commits(Frechet(0.30), c) == 4
    assert commits(Factor(0.70), c) == 2


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (Quota(3), 3), (Quota(9), 5), (Threshold(0.8), 3), (Threshold(0.8199), 3), (Threshold(0.999), 1),
        (Factor(0.75), 3), (Factor(3.0), 5), (Frechet(0.0), 5), (Frechet(0.1), 4), (Frechet(0.6), 2),
        (Frechet(0.3, calibration=0.05), 3), (Frechet(0.99), 1), (Budget(0.0, 0.0), 1), (Budget(0.02, 0.0), 2),
        (Budget(0.1, 0.8), 3), (Budget(0.3, 0.8), 3), (Budget(0.3, 0.75), 4), (Budget(0.5, 0.0), 5),
    ],
    ids=str,
)  # fmt: skip
def test_counts_by_hand(rule: Rule, count: int) -> None:
    """(n+1)(1-c_n) is .02 .15 .72 1.1 1.56; a calibration of .05 takes .10 .15 .20 .25 .30 off the scores."""
    assert commits(rule, [0.99, 0.95, 0.82, 0.78, 0.74]) == count


def test_entropy_bound_leaves_the_last_position_out_of_the_sum() -> None:
    for gamma, count in ((0.0, 1), (0.2, 2), (0.69, 2), (0.71, 3), (1.7, 4), (99.0, 4)):
        assert accepted(EntropyBound(gamma), [1.0] * 4, [0.2, 0.5, 0.9, 2.0]) == count


@few
@given(confidences, st.floats(0.0, 2.0), st.floats(0.0, 1.0))
def test_budget_leaves_the_last_position_out_of_the_sum(c: list[float], budget: float, sure: float) -> None:
    spent = [sum(1.0 - x for x in c[:n]) for n in range(len(c))]
    assume(all(abs(x - budget) > 1e-9 for x in spent) and all(abs(x - sure) > 1e-9 for x in c))
    expected = sum(s <= budget and x >= sure for s, x in zip(spent, c, strict=True))
    assert accepted(Budget(budget, sure), [(1 - x) / x for x in c], []) == expected
    # What a margin certifies, a budget of the rest and a number below its last confidence accept too.
    certified = commits(Frechet(0.25), c)
    assert commits(Budget(0.75, min(c[:certified]) - 1e-9), c) >= certified


@few
@given(confidences, margins, st.sampled_from([0.0, 0.001, 0.1]))
def test_frechet_accepts_by_the_papers_score(c: list[float], margin: float, eta: float) -> None:
    g = scores(c, eta)
    assume(all(abs(x - margin) > 1e-9 for x in g))
    assert accepted(Frechet(margin, eta), [(1 - x) / x for x in c], []) == sum(x > margin for x in g)


@few
@given(confidences)
def test_the_score_never_rises(c: list[float]) -> None:
    """G_(n+1) - G_n = 2 c_(n+1) - c_(n) - 1 <= 0, so that the accepted prefixes are the short ones."""
    g = scores(c)
    assert all(b - a <= 1e-12 for a, b in itertools.pairwise(g))
    assert all(abs(b - a - (2 * c[n + 1] - c[n] - 1)) < 1e-12 for n, (a, b) in enumerate(itertools.pairwise(g)))


@few
@given(st.floats(0.01, 0.9999), st.integers(1, 12), margins)
def test_equal_confidences_make_frechet_the_factor_rule(c: float, n: int, margin: float) -> None:
    """Corollary 4.2."""
    assume(all(abs((k + 1) * (1 - c) - (1 - margin)) > 1e-9 for k in range(1, n + 1)))
    assert commits(Frechet(margin), [c] * n) == commits(Factor(1 - margin), [c] * n)


@few
@given(confidences, margins)
def test_frechet_accepts_whatever_the_matched_factor_accepts(c: list[float], margin: float) -> None:
    """Corollary 4.4; the margin is lowered by what rounding may cost."""
    assert commits(Frechet(margin - 1e-12), c) >= commits(Factor(1 - margin), c)


@few
@given(confidences, margins)
def test_frechet_is_a_factor_with_a_heterogeneity_bonus(c: list[float], margin: float) -> None:
    """Proposition 4.3 and remark 4.5: the factor 1 - d + B_n, B_n = sum_{j<n} (c_(j) - c_(n)) >= 0."""
    costs = [1 - x for x in c]
    for n in range(1, len(c) + 1):
        bonus = sum(c[j] - c[n - 1] for j in range(n - 1))
        score = (n + 1) * c[n - 1] - n + bonus
        assert bonus >= 0 and abs(score - scores(c)[n - 1]) < 1e-12
        if abs(score - margin) > 1e-9:
            by_factor = accepts(fdpp.Factor.predicate, n, costs, 1 - margin + bonus)
            assert accepts(fdpp.Frechet.predicate, n, costs, margin) == by_factor


@few
@given(st.lists(st.floats(0.6, 0.9999), min_size=1, max_size=8), st.floats(0.0, 0.5))
def test_calibration_lowers_the_score_by_n_plus_one(c: list[float], eta: float) -> None:
    """Appendix C, away from clipping; there it lowers it by less."""
    c.sort(reverse=True)
    costs = [min(1.0, 1.0 - x + eta) for x in c]
    for n, score in enumerate(scores(c), start=1):
        assert accepts(fdpp.Frechet.predicate, n, costs, score - (n + 1) * eta - 1e-9)
        assert not accepts(fdpp.Frechet.predicate, n, costs, score - (n + 1) * eta + 1e-9)
    assert scores([0.9, 0.2], 0.5)[1] > scores([0.9, 0.2])[1] - 3 * 0.5


def tables(sizes: tuple[int, ...], total: int) -> Any:
    """All joint distributions over variables of these sizes whose probabilities are multiples of 1 / total."""
    cells = list(itertools.product(*map(range, sizes)))
    for bars in itertools.combinations(range(total + len(cells) - 1), len(cells) - 1):
        edges = (-1, *bars, total + len(cells) - 1)
        yield dict(zip(cells, (b - a - 1 for a, b in itertools.pairwise(edges)), strict=True))


@pytest.mark.parametrize(("sizes", "total"), [((2, 2), 12), ((2, 3), 7), ((4, 2), 6), ((3, 3), 5), ((2, 2, 2), 7)])
def test_certified_modes_are_the_joint_mode(sizes: tuple[int, ...], total: int) -> None:
    """Theorem 4.1 on every such table, in integers: L_n > U_n makes the tuple of marginal modes the only joint mode."""
    certified = 0
    for table in tables(sizes, total):
        modes, tops = [], []
        for i, size in enumerate(sizes):
            marginal = [sum(p for cell, p in table.items() if cell[i] == v) for v in range(size)]
            modes.append(marginal.index(max(marginal)))
            tops.append(max(marginal))
        lower = sum(tops) - (len(sizes) - 1) * total
        upper = total - min(tops)
        if lower > upper:
            certified += 1
            best = table[tuple(modes)]
            assert all(p < best for cell, p in table.items() if cell != tuple(modes)), table
        if lower != upper:
            c = sorted((top / total for top in tops), reverse=True)
            full = accepted(Frechet(0.0), [(1 - x) / x for x in c], []) == len(sizes)
            assert full == (lower > upper)
    assert certified > 10


@pytest.mark.parametrize(("sizes", "total"), [((2, 2), 12), ((2, 3), 8), ((4, 2), 6), ((2, 2, 2), 8)])
def test_a_budget_bounds_what_waiting_could_change(sizes: tuple[int, ...], total: int) -> None:
    """`Budget`'s claim on every such table, in integers: had the others come first, the last proposal would be the
    same."""
    held, tight = 0, 0
    for table in tables(sizes, total):
        marginals = [
            [sum(p for cell, p in table.items() if cell[i] == v) for v in range(size)] for i, size in enumerate(sizes)
        ]
        order = sorted(range(len(sizes)), key=lambda i: (-max(marginals[i]), i))
        modes = [marginal.index(max(marginal)) for marginal in marginals]
        *others, last = order
        spent = sum(total - max(marginals[i]) for i in others)
        given_others = {cell: p for cell, p in table.items() if all(cell[i] == modes[i] for i in others)}
        right = sum(given_others.values())
        assert right >= total - spent
        c, now = (
            max(marginals[last]),
            [sum(p for cell, p in given_others.items() if cell[last] == v) for v in range(sizes[last])],
        )
        assert now[modes[last]] >= c - spent
        # c > spent + (1 - c) / (1 - spent), in units of 1 / total.
        if spent < total and (c - spent) * (total - spent) > (total - c) * total:
            held += 1
            assert all(p < now[modes[last]] for v, p in enumerate(now) if v != modes[last]), table
        tight += right > 0 and any(p >= now[modes[last]] for v, p in enumerate(now) if v != modes[last])
    assert held > 10 and tight > 10


def test_certified_modes_of_random_joints() -> None:
    """The same for 3,000 random tables of two and three variables with up to four values, by what a step commits."""
    g = torch.Generator().manual_seed(0)
    committed = 0
    for trial in range(3000):
        sizes = torch.randint(2, 5, (2 + trial % 2,), generator=g).tolist()
        joint = torch.rand(*sizes, generator=g, dtype=torch.float64).pow(4)
        joint.view(-1)[int(torch.randint(0, joint.numel(), (), generator=g))] += 8 * torch.rand((), generator=g)
        joint /= joint.sum()
        marginals = [joint.sum([j for j in range(len(sizes)) if j != i]) for i in range(len(sizes))]
        logits = torch.full((1, len(sizes), 5), -INF, dtype=torch.float32)
        for i, marginal in enumerate(marginals):
            logits[0, i, : len(marginal)] = marginal.log()
        problem = Problem(logits, torch.full(logits.shape[:2], 4), (Frechet(1e-5),), 4)
        out = run("cpu", problem)
        if out.remaining.any():
            continue
        committed += 1
        best = joint[tuple(out.tokens[0].tolist())]
        assert int((joint >= best).sum()) == 1
    assert committed > 500
