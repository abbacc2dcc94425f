"""What holds of every rule in the registry, those in `rules_of_others` included, each a module of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from captures import captured_on_cpu
from contract import settings_of, specified
from rules_of_others.credit import DenseCredit
from small import EOS, MASK, PAD, SMALL, exact, exact_model, left_pad, prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fdpp
from fdpp import tiny
from fdpp.attention import cache as attention_cache
from fdpp.cli.options import Parser, add_rule_options, rule_of
from fdpp.decoding.arena import Step, uncaptured
from fdpp.decoding.choice import Choice
from fdpp.decoding.forwards import Forwards
from fdpp.models.language_model import DiffusionLM
from fdpp.step import operators
from fdpp.trace.page import data_of, render
from fdpp.trace.record import record

KINDS = list(fdpp.Rule.named().values())
RULES = [*(rule for kind in KINDS for rule in settings_of(kind)), DenseCredit()]
"""Those that commands offer, and one that they do not."""

SIZES: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8, "stop_at_eos": True}
CACHES = ("none", "prefix", "dual")


IN_FAMILIES = pytest.mark.parametrize(
    ("family", "rule"),
    [*(("LLaDA", rule) for rule in RULES), *(("Dream", kind()) for kind in KINDS if not kind.needs.rows)],
    ids=str,
)


@pytest.fixture(scope="module")
def llada() -> fdpp.LLaDAModelLM:
    return exact_model()


@pytest.fixture(scope="module")
def models() -> dict[str, DiffusionLM]:
    return {family: exact(family) for family in SMALL}


@functools.cache
def decoded(family: str, rule: fdpp.Rule, cache: str) -> Any:
    """The decode that the others are compared with: a ragged batch, eager, without drafts."""
    return decode(exact(family), *ragged(), rule=rule, cache=cache)


def fond_of_eos(seed: int) -> fdpp.LLaDAModelLM:
    """A model that often says EOS, and takes it back."""
    model = exact_model(seed)
    plain, lift = model.project, torch.zeros(64)
    lift[EOS] = 4.0
    model.project = lambda hidden: plain(hidden) + lift
    return model


def ragged(B: int = 3) -> tuple[Tensor, Tensor]:
    return left_pad([prompts(1, 4 + 3 * b, seed=b)[0] for b in range(B)])


def decode(model: DiffusionLM, *prompt: Tensor, rule: fdpp.Rule, **settings: Any) -> Any:
    return model.generate(*prompt, **{"cache": "dual", **SIZES, "rule": rule, "seed": 0, **settings})


def assert_same(a: Any, b: Any) -> None:
    assert a.sequences.equal(b.sequences) and a.commit_step.equal(b.commit_step) and a.nfe.equal(b.nfe)


def test_the_registry_has_ours_and_theirs() -> None:
    assert {kind for kind in fdpp.Rule.registry.values() if kind.__module__.startswith("fdpp.")} == set(KINDS)
    assert {fdpp.Wino, fdpp.Quota, fdpp.Frechet, fdpp.LocalLeap, fdpp.Budget, fdpp.Klass, fdpp.Dawn} < set(KINDS)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_ends(rule: fdpp.Rule, cache: str) -> None:
    """No mask is left, no prompt is written, no forward is without a gain.

    An EOS changes nothing before it and nothing comes after it, so one that can still be taken back ends no sequence.
    """
    prompt, mask = ragged()
    # `Editing` looks again at a block without masks.
    most = SIZES["max_new_tokens"] + 3 * getattr(rule, "post", 0)
    for seed in range(2):
        whole, stopped = (
            decode(fond_of_eos(seed), prompt, mask, rule=rule, cache=cache, stop_at_eos=stop) for stop in (False, True)
        )
        for out in (whole, stopped):
            assert not (out.sequences == MASK).any() and int(out.nfe.max()) <= most
            assert out.sequences[:, : prompt.shape[1]].equal(prompt)
        assert (whole.sequences == EOS).any()
        after = (whole.sequences[:, prompt.shape[1] :] == EOS).cumsum(1).cumsum(1) > 1
        expected = whole.sequences[:, prompt.shape[1] :].masked_fill(after, PAD)
        assert stopped.sequences[:, prompt.shape[1] :].equal(expected)


@pytest.mark.parametrize("drafts", [(2, "batch"), (4, "tree"), ("auto", "batch")], ids=str)
@IN_FAMILIES
def test_drafts_change_nothing(
    models: dict[str, DiffusionLM], family: str, rule: fdpp.Rule, drafts: tuple[int | str, str]
) -> None:
    settings, model = {"drafts": drafts[0], "branches": drafts[1]}, models[family]
    if rule.needs.rows and settings["branches"] == "tree":
        with pytest.raises(ValueError, match=r"branches='tree' has no columns for the rows"):
            decode(model, *ragged(), rule=rule, **settings)
        return
    for cache in CACHES:
        plain = decoded(family, rule, cache)
        drafted = decode(model, *ragged(), rule=rule, cache=cache, **settings)
        assert drafted.sequences.equal(plain.sequences) and drafted.commit_step.equal(plain.commit_step)
        assert (drafted.nfe <= plain.nfe).all()


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_static_equals_eager(llada: fdpp.LLaDAModelLM, rule: fdpp.Rule, drafts: int) -> None:
    if rule.needs.attention:
        with pytest.raises(ValueError, match=r"engine='static': .*reads attention"):
            decode(llada, *ragged(), rule=rule, drafts=drafts, engine="static")
        return
    for cache in ("none", "dual"):
        for prompt in (ragged(), (prompts(2, 11),)):
            settings = {"rule": rule, "cache": cache, "drafts": drafts}
            eager = decode(llada, *prompt, **settings, engine="eager")
            with uncaptured():
                assert_same(decode(llada, *prompt, **settings, engine="static"), eager)
    llada.forget_captures()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_in_a_batch_is_the_row_alone(llada: fdpp.LLaDAModelLM, rule: fdpp.Rule, cache: str) -> None:
    prompt, mask = ragged()
    together = decoded("LLaDA", rule, cache)
    for b in range(prompt.shape[0]):
        own = prompt[b : b + 1, mask[b] == 1]
        alone = decode(llada, own, rule=rule, cache=cache, seed=b)
        assert together.sequences[b, prompt.shape[1] :].equal(alone.sequences[0, own.shape[1] :])
        assert together.commit_step[b].equal(alone.commit_step[0]) and together.nfe[b] == alone.nfe[0]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compares every step of a decode with the rule's specification; lists how many positions each committed."""
    commits: list[int] = []
    take = Choice.__call__

    def step(choice: Choice, evidence: Any, states: Tensor, terms: Any, *more: Any) -> fdpp.Selection:
        chosen = take(choice, evidence, states, terms, *more)
        truth = specified(choice.rule, evidence, states, terms, *more)
        for name in ("tokens", "committed", "remaining", "proposal"):
            ours, theirs = getattr(chosen, name).flatten(0, 1), getattr(truth, name)
            if name == "proposal":  # a rule may propose anything at committed positions
                masked = states.flatten(0, 1) == terms.mask_id
                ours, theirs = ours[masked], theirs[masked]
            assert ours.equal(theirs), name
        commits.extend(chosen.committed.sum(2).flatten().tolist())
        return chosen

    monkeypatch.setattr(Choice, "__call__", step)
    yield commits


@IN_FAMILIES
def test_every_step_is_as_specified(
    models: dict[str, DiffusionLM], family: str, rule: fdpp.Rule, checked: list[int]
) -> None:
    kind = type(rule)
    if kind.decide is not fdpp.Rule.decide:
        assert kind.reference is not fdpp.Rule.reference, "a rule that decides says in `reference` what it means"
    for cache in CACHES:
        decode(models[family], *ragged(), rule=rule, cache=cache)
    assert len(checked) > 3


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_by_itself_is_as_specified(rule: fdpp.Rule) -> None:
    if rule.takes_steps():
        pytest.skip("a schedule has no step of its own")
    g = torch.Generator().manual_seed(0)
    logits, tokens = 6 * torch.randn(4, 9, 40, generator=g), torch.randint(0, 40, (4, 9), generator=g)
    tokens[torch.rand(4, 9, generator=g) < 0.7] = 39
    active = torch.rand(4, 9, generator=g) < 0.8
    for where in (None, active):
        ours = fdpp.select(logits, tokens, rule=rule, mask_id=39, active=where)
        truth = fdpp.step.reference.select(logits, tokens, rule, 39, where)
        assert ours.tokens.equal(truth.tokens) and ours.committed.equal(truth.committed)
        assert ours.remaining.equal(truth.remaining)
    empty = fdpp.select(logits[:, :0], tokens[:, :0], rule=rule, mask_id=39)
    assert empty.tokens.shape == (4, 0) and not empty.remaining.any()


REFUSED = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
"""Operators that wait for the device, or whose result's shape depends on data."""


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in REFUSED, func
        if func is torch.ops.aten.index.Tensor:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "indexed by a mask"
        return func(*args, **(kwargs or {}))


def exempt(function: Any) -> Any:
    """An operator's CPU implementation; a capture holds a kernel in its place."""

    def run(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return run


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_operator_that_a_capture_refuses(
    llada: fdpp.LLaDAModelLM, rule: fdpp.Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule.needs.attention:
        pytest.skip("not captured")
    monkeypatch.setattr(Forwards, "only_masked", property(lambda self: False, lambda self, value: None), raising=False)
    monkeypatch.setattr(operators.cpu, "select", exempt(operators.cpu.select))
    # A CPU's attention alone reads it.
    monkeypatch.setattr(attention_cache, "left_padding", exempt(attention_cache.left_padding))
    run, steps = Step.run, []

    def watched(step: Step, *args: Any) -> None:
        steps.append(step)
        with Refusing():
            run(step, *args)

    monkeypatch.setattr(Step, "run", watched)
    with captured_on_cpu():
        for settings in ({}, {"temperature": 0.7, "seed": 1}, {"drafts": 2}):
            decode(llada, *ragged(), rule=rule, engine="static", **settings)
    llada.forget_captures()
    assert steps
    with pytest.raises(AssertionError), Refusing():
        torch.ones(3).sum().item()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_fused_head_decodes_the_same_or_is_refused(llada: fdpp.LLaDAModelLM, rule: fdpp.Rule) -> None:
    if rule.needs.logits or rule.needs.rows:
        with pytest.raises(ValueError, match="keeps no logits"):
            decode(llada, *ragged(), rule=rule, head="fused")
        return
    model = exact_model().float()
    del model.project
    a, b = (decode(model, prompts(1, 7), rule=rule, head=head) for head in ("fused", "library"))
    assert a.sequences.equal(b.sequences)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_is_saved_and_read_again(rule: fdpp.Rule) -> None:
    config = fdpp.DiffusionGenerationConfig(rule=rule, cache="dual")
    assert fdpp.DiffusionGenerationConfig.from_dict(config.to_dict()).rule == rule


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.name is not None], ids=str)
def test_the_command_line_takes_its_numbers(rule: fdpp.Rule) -> None:
    parser = Parser()
    add_rule_options(parser)
    arguments = ["--rule", str(rule.name)]
    for field, number in rule.numbers.items():
        if getattr(rule, field) is not None:
            arguments += [f"--{(number.option or field).replace('_', '-')}", repr(getattr(rule, field))]
    assert rule_of(parser.parse_args(arguments)) == rule
    assert rule.label().lower() in parser.format_help().lower() or str(rule.name) in parser.format_help()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_shows_it(llada: fdpp.LLaDAModelLM, kind: type[fdpp.Rule]) -> None:
    rule = kind()
    config = fdpp.DiffusionGenerationConfig(rule=rule, cache="dual", seed=0, **SIZES)
    trace = record(llada, prompts(1, 6), config)
    assert trace.output.sequences.equal(decode(llada, prompts(1, 6), rule=rule).sequences)
    data = data_of(trace, tiny.load()[1], "small")
    assert data["rule"] == rule.label() and render(data)
