"""Dream's schedules as rules, against a plain float64 decode that takes every published step, idle ones too."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from decoding import CACHES
from golden import DATA
from small import MASK, exact_model, left_pad, prompts
from torch import Tensor

import fdpp
from fdpp import DiffusionGenerationConfig, Drawn, LeastEntropy, LLaDAModelLM, MaskgitPlus, Origin, TopkMargin
from fdpp.decoding.advance import STEP_STRIDE
from fdpp.decoding.arena import uncaptured
from fdpp.decoding.shaping import uniform
from fdpp.rules import Proposed, Rule, Sight
from fdpp.rules.dream import rule_of, schedule
from fdpp.selection import Selection

TABLES = json.loads((DATA / "dream/trajectories/schedule.json").read_text())["tables"]
RANKED = (MaskgitPlus, TopkMargin, LeastEntropy)
SIZES: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8, "stop_at_eos": False}


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return exact_model(seed=1)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table['masks']}-{table['steps']}-{table['eps']}")
def test_schedules_are_the_published_ones(table: dict[str, Any]) -> None:
    assert list(schedule(table["masks"], table["steps"], table["eps"])) == table["counts"]


def test_steps_that_decide_nothing_are_left_out() -> None:
    assert 0 in schedule(16, 64, 1e-3)
    rules = MaskgitPlus().successive(0, 16, 16, 64)
    counts = [rule.k for rule in rules if isinstance(rule, MaskgitPlus)]
    assert len(counts) == len(rules) and counts == [*[1] * 14, 2]
    for kind in RANKED:
        for start, stop, steps in ((0, 32, 8), (64, 96, 256), (0, 5, None), (96, 97, 3)):
            rules = kind(eps=0.01).successive(start, stop, 128, steps)
            assert all(isinstance(rule, kind) and rule.eps == 0.01 for rule in rules)
            counts = [int(rule.params()[0]) for rule in rules]
            block = steps_of(start, stop, 128, steps)
            published = [k for k in schedule(stop - start, block, 0.01) if k]
            repeated = counts + [counts[-1]] * (len(published) - len(counts))
            assert repeated == published and sum(repeated) == stop - start
        assert kind(3).successive(0, 16, 16, None) == [kind(3)]


def steps_of(start: int, stop: int, length: int, steps: int | None) -> int:
    total = length if steps is None else steps
    return max(total * stop // length - total * start // length, 1)


def scores_of(rule: Rule, logits: Tensor) -> Tensor:
    """What Dream ranks by, float64 `[T]`."""
    p = logits.double().softmax(-1)
    if isinstance(rule, LeastEntropy):
        return torch.special.xlogy(p, p).sum(-1)
    p[:, MASK] = 0.0
    best = p.topk(2).values
    return best[:, 0] - best[:, 1] if isinstance(rule, TopkMargin) else best[:, 0]


@torch.no_grad()
def plain(
    model: LLaDAModelLM, prompt: Tensor, rule: Rule, steps: int | None, seed: int = 0, text: Tensor | None = None
) -> tuple[Tensor, int]:
    """The response of one prompt `[P]`, and the forwards that decided something: all steps, a full forward for each."""
    new, width = (SIZES["max_new_tokens"], SIZES["block_length"])
    x = torch.cat((prompt, torch.full((new,), MASK) if text is None else text))
    deciding = 0
    for start in range(0, new, width):
        stop = min(start + width, new)
        S = steps_of(start, stop, new, steps)
        t = torch.linspace(1, rule.eps, S + 1)
        block = slice(len(prompt) + start, len(prompt) + stop)
        u = uniform(seed + torch.tensor([deciding]) * STEP_STRIDE, stop - start)[0]
        for i in range(S):
            logits = model(x[None]).logits[0, block].double()
            masked = (x[block] == MASK).nonzero().flatten().tolist()
            if isinstance(rule, Origin):
                chosen = [j for j in masked if i == S - 1 or u[j] >= t[i + 1].double()]
            else:
                k = len(masked) if i == S - 1 else int(torch.tensor(float(len(masked))) * (1 - t[i + 1] / t[i]))
                score = scores_of(rule, logits).tolist()
                chosen = sorted(masked, key=lambda j: (-score[j], j))[:k]
            logits[:, MASK] = -torch.inf
            for j in chosen:
                x[block][j] = logits[j].argmax()
            deciding += bool(chosen)
    return x[len(prompt) :], deciding


WAYS: list[dict[str, Any]] = [
    {"steps": None},
    {"steps": 6},
    {"steps": 60},
    {"steps": 11, "drafts": 3},
    {"steps": 60, "drafts": "auto"},
    {"steps": 11, "engine": "static"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("rule", [*(kind() for kind in RANKED), TopkMargin(eps=0.2), Origin(), Origin(0.3)], ids=str)
def test_against_a_plain_decode(llada: LLaDAModelLM, rule: Rule, way: dict[str, Any]) -> None:
    """A left-padded batch: every row is what the row alone is, with the seed of its stream."""
    rows = [prompts(1, P, seed=P)[0] for P in (3, 9, 1)]
    with uncaptured():
        out = llada.generate(*left_pad(rows), **SIZES, rule=rule, cache="none", seed=7, **way)
    for b, row in enumerate(rows):
        response, deciding = plain(llada, row, rule, way["steps"], seed=7 + b)
        assert out.sequences[b, -SIZES["max_new_tokens"] :].equal(response)
        steps = int(out.commit_step[b].max()) + 1
        assert steps == deciding and (way.get("drafts", 1) != 1 or out.nfe[b] == deciding)
    llada.forget_captures()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", [*(kind() for kind in RANKED), Origin(), Drawn("entropy")], ids=str)
def test_no_forward_is_idle(llada: LLaDAModelLM, rule: Rule, cache: str) -> None:
    """Under every cache, and for rows of an infill with fewer masks, which end earlier."""
    out = llada.generate(prompts(2, 5), **SIZES, rule=rule, cache=cache, seed=1, steps=64)
    for row, nfe in zip(out.commit_step, out.nfe, strict=True):
        assert row.unique().tolist() == list(range(int(nfe)))
    text = prompts(2, 20, seed=4)
    text[0, 2:18], text[1, 3] = MASK, MASK
    filled = llada.infill(text, block_length=8, rule=rule, cache=cache, seed=1, steps=8)
    assert not (filled.sequences == MASK).any()
    for row, nfe, given in zip(filled.commit_step, filled.nfe, text != MASK, strict=True):
        assert row[~given].unique().tolist() == list(range(int(nfe)))


def test_the_same_infill_alone(llada: LLaDAModelLM) -> None:
    """The schedule is that of a full block: a row with few masks takes its first counts."""
    text = prompts(1, 20, seed=4)
    text[0, [9, 11, 12]] = MASK
    rule = MaskgitPlus()
    counts = [int(one.params()[0]) for one in rule.successive(0, 8, 8, 3)]
    out = llada.infill(text, block_length=8, rule=rule, cache="none", steps=4)
    assert counts[0] == 2 and int(out.nfe) <= 3


def proposed(fixed: Tensor | None, fresh: Tensor | None, numbers: list[float], confidence: Tensor) -> Proposed:
    """N blocks of masks, of which all propose 5."""
    N, T = confidence.shape
    masks = torch.full((N, T), MASK)
    first = torch.zeros(N, T, dtype=torch.bool)
    first[:, 0] = True
    step = Selection(masks, torch.full((N, T), 5), confidence, first, torch.full((N,), T - 1), torch.zeros(N))
    params = torch.tensor([numbers], dtype=torch.float64)
    return Proposed(step, masks, masks == MASK, MASK, None, slice(0, T), params, fixed, fresh)


N = 20_000


@pytest.mark.parametrize(("steps", "eps"), [(1, 1e-3), (4, 1e-3), (7, 0.3)])
def test_origins_steps_have_the_published_distribution(steps: int, eps: float) -> None:
    """How often two positions share a step, and how many forwards decide something: exact, from the probabilities of
    the published steps, and counted with a fixed seed. Four standard errors."""
    T = 6
    q = [(1 - eps) / steps] * steps
    q[-1] += eps
    rule, numbers = Origin(eps, steps), [1.0, float(steps), 0.0]
    given = proposed(uniform(torch.arange(N) * 7919, T), None, numbers, torch.full((N, T), 0.5))
    left, forwards, together = given.candidate, torch.zeros(N, dtype=torch.int64), None
    while left.any():
        step = rule.decide(given._replace(candidate=left))
        forwards += step.committed.any(1)
        if together is None:
            together = torch.zeros(N, dtype=torch.bool)
        together |= step.committed[:, 0] & step.committed[:, 1]
        assert (step.committed & ~left).sum() == 0 and step.committed.any(1).equal(left.any(1))
        left = left & ~step.committed
    p = sum(x * x for x in q)
    assert abs(together.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / N)
    expected = sum(1 - (1 - x) ** T for x in q)
    counts = forwards.double()
    assert abs(counts.mean() - expected) <= 4 * counts.std() / math.sqrt(N) + 1e-9


def test_an_alg_temp_draws_as_published() -> None:
    """Every pair of four as often as by two draws without replacement, with a fixed seed; five standard errors."""
    confidence = torch.tensor([0.9, 0.6, 0.55, 0.2])
    p = (confidence.double() / 0.4).softmax(0).tolist()
    given = proposed(None, uniform(torch.arange(N) * 7919, 4), [2.0, 0.0, 0.0], confidence.expand(N, 4))
    committed = Drawn(alg_temp=0.4).decide(given).committed
    assert committed.sum(1).eq(2).all()
    for a, b in itertools.combinations(range(4), 2):
        exact = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        found = (committed[:, a] & committed[:, b]).double().mean()
        assert abs(found - exact) <= 5 * math.sqrt(exact * (1 - exact) / N)


def test_drawn_positions_are_usable_ones() -> None:
    confidence = torch.tensor([[0.0, 0.4, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0]])
    given = proposed(None, torch.full((2, 4), 0.5, dtype=torch.float64), [3.0, 0.0, 0.0], confidence)
    committed = Drawn().decide(given).committed
    assert committed.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert Drawn().reference(given).committed.equal(committed)


@pytest.mark.parametrize("alg", ["topk_margin", "entropy"])
def test_scores_are_the_published_ones(alg: str) -> None:
    logits = 4 * torch.randn(1, 2, 5, 64, generator=torch.Generator().manual_seed(0))
    nothing: Any = None
    sight = Sight(*[nothing] * 1, logits, *[nothing] * 6, MASK, *[nothing] * 3)
    memory = Drawn(alg).observe(sight, None)
    kind = TopkMargin() if alg == "topk_margin" else LeastEntropy()
    truth = scores_of(kind, logits.flatten(0, 2)).view(1, 2, 5)
    torch.testing.assert_close(memory.score.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_a_cold_draw_is_the_ranked_rule(llada: LLaDAModelLM, alg: str, cache: str) -> None:
    cold, ranked = (
        llada.generate(prompts(2, 6), **SIZES, rule=rule_of(alg, alg_temp=alg_temp), cache=cache, steps=9, seed=3)
        for alg_temp in (1e-9, None)
    )
    assert cold.sequences.equal(ranked.sequences) and cold.commit_step.equal(ranked.commit_step)


@pytest.mark.parametrize("rule", [Origin(), Drawn(alg_temp=5.0)], ids=str)
def test_draws_are_reproducible(llada: LLaDAModelLM, rule: Rule) -> None:
    def decode(**settings: Any) -> Tensor:
        return llada.generate(prompts(1, 6), **SIZES, rule=rule, **settings).commit_step

    assert decode(seed=1).equal(decode(seed=1)) and not decode(seed=1).equal(decode(seed=2))
    torch.manual_seed(5)
    first = decode()
    assert not first.equal(decode())
    torch.manual_seed(5)
    assert first.equal(decode())
    copies = decode(seed=1, num_return_sequences=2)
    assert not copies[0].equal(copies[1])
    blocks = decode(seed=1, steps=200)[0]
    assert not (blocks[:8] - blocks[:8].min()).equal(blocks[8:16] - blocks[8:16].min()), "blocks draw for themselves"


def test_outside_of_a_decode_they_fall_back() -> None:
    logits, tokens = torch.randn(2, 6, 64), torch.full((2, 6), MASK)
    for rule, same in ((Origin(), fdpp.Quota(1)), (Drawn(k=2), fdpp.Quota(2)), (MaskgitPlus(2), fdpp.Quota(2))):
        ours, theirs = (fdpp.select(logits, tokens, rule=one, mask_id=MASK) for one in (rule, same))
        assert ours.committed.equal(theirs.committed)
    for kind in (*RANKED, Drawn):
        with pytest.raises(ValueError, match=f"{kind.__name__}: k is None"):
            fdpp.select(logits, tokens, rule=kind(), mask_id=MASK)


def test_rules_by_dreams_names() -> None:
    assert rule_of("maskgit_plus") == MaskgitPlus() and rule_of("topk_margin", 0.01) == TopkMargin(eps=0.01)
    assert rule_of("entropy", alg_temp=0.0) == LeastEntropy() and rule_of("origin", 0.1, 0.5) == Origin(0.1)
    assert rule_of("entropy", 0.1, 0.5) == Drawn("entropy", None, 0.1, 0.5)
    with pytest.raises(
        ValueError, match="alg: expected one of origin, maskgit_plus, topk_margin, entropy, got 'random'"
    ):
        rule_of("random")
    with pytest.raises(ValueError, match="alg_temp"):
        rule_of("entropy", alg_temp=-1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskgitPlus(0), "MaskgitPlus: expected k"),
        (lambda: TopkMargin(eps=0.0), "TopkMargin: expected eps"),
        (lambda: LeastEntropy(eps=1.0), "LeastEntropy: expected eps"),
        (lambda: Origin(eps=1.5), "Origin: expected eps"),
        (lambda: Origin(steps=0), "Origin: expected steps"),
        (lambda: Origin(steps=True), "Origin: expected steps"),
        (lambda: Drawn("origin"), "Drawn: expected alg"),
        (lambda: Drawn(alg_temp=0.0), "Drawn: expected alg_temp"),
        (lambda: DiffusionGenerationConfig(rule=Origin(), confidence_eos_eot_inf=True), "draws positions"),
        (lambda: DiffusionGenerationConfig(rule=TopkMargin(), confidence_eos_eot_inf=True), "by margin"),
        (lambda: DiffusionGenerationConfig(rule=MaskgitPlus(2), steps=5), "steps=5 is a schedule"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_labels() -> None:
    assert [rule.label(64) for rule in (MaskgitPlus(), TopkMargin(2), Origin(), Drawn("entropy", alg_temp=0.5))] == [
        "maskgit_plus, 64 steps",
        "topk_margin 2",
        "origin, 64 steps",
        "drawn, 64 steps, entropy at 0.5",
    ]
    assert LeastEntropy().label() == "least_entropy" and Origin(steps=3).label() == "origin, 3 steps"
