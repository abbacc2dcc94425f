"""What forwards cost, what noise they draw, and what drafts change."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from captures import Operators
from decoding import CACHES, EOS_SCRIPT, RULES, Recorder, Scripted, check, forwards, no_prompt, ragged
from small import MASK, PAD, V, exact_model, left_pad, prompts, small_model

import fdpp
from fdpp import Frechet, LLaDAModelLM, Quota
from fdpp.decoding.runners import EagerRunner


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return small_model()


@pytest.fixture(scope="module")
def exact() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return exact_model(seed=1)


# Sampling


@pytest.mark.parametrize("cache", CACHES)
def test_samples_are_reproducible(llada: LLaDAModelLM, cache: str) -> None:
    settings = {"max_new_tokens": 16, "block_length": 8, "temperature": 1.0, "stop_at_eos": False, "cache": cache}
    samples = [llada.generate(prompts(1, 4), seed=seed, **settings).sequences for seed in (1, 2, 3, 1)]
    assert torch.equal(samples[0], samples[3])
    assert len({tuple(sample[0].tolist()) for sample in samples}) == 3


def test_equal_rows_sample_differently(llada: LLaDAModelLM) -> None:
    prompt = prompts(1, 4).repeat(3, 1)
    settings = {"max_new_tokens": 16, "stop_at_eos": False}
    sampled = llada.generate(prompt, temperature=1.0, seed=5, **settings).sequences
    assert len({tuple(row.tolist()) for row in sampled}) == 3
    greedy = llada.generate(prompt, seed=5, **settings).sequences
    assert torch.equal(greedy[0], greedy[1])


def test_blocks_and_steps_draw_fresh_noise() -> None:
    """With flat logits a token is its noise: no two commits may share it."""
    model = Scripted([5] * 64, [1 / V] * 64)
    out = model.generate(
        no_prompt(), max_new_tokens=64, block_length=8, rule=Quota(1), temperature=1.0, seed=0, stop_at_eos=False
    )
    counts = out.sequences.flatten().bincount(minlength=V)
    assert 30 <= (counts > 0).sum() <= 55
    assert counts.max() <= 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_global_generator_is_not_touched(llada: LLaDAModelLM, temperature: float) -> None:
    before = torch.random.get_rng_state()
    first = llada.generate(prompts(1, 4), max_new_tokens=8, temperature=temperature, seed=3).sequences
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = llada.generate(prompts(1, 4), max_new_tokens=8, temperature=temperature, seed=3).sequences
    assert torch.equal(first, again)


# What a forward costs


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nfe_counts_every_forward(llada: LLaDAModelLM, rule: fdpp.Rule, cache: str) -> None:
    calls = []
    handle = llada.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        out = llada.generate(prompts(1, 5), max_new_tokens=21, block_length=8, rule=rule, cache=cache)
    finally:
        handle.remove()
    assert out.nfe.tolist() == [len(calls)]


@pytest.mark.parametrize(("cache", "later"), [("none", (26, 26, 26)), ("prefix", (21, 13, 5)), ("dual", (8, 8, 5))])
def test_what_each_cache_feeds(llada: LLaDAModelLM, cache: str, later: tuple[int, ...]) -> None:
    """A block's first forward is a full one; then everything, everything from the block on, or the block."""
    settings = {"max_new_tokens": 21, "block_length": 8, "rule": Quota(4), "stop_at_eos": False}
    with forwards(llada) as seen:
        llada.generate(prompts(2, 5), cache=cache, **settings)
    assert seen == [(2, length) for rest in later for length in (26, rest)]


@pytest.mark.parametrize("cache", CACHES)
def test_the_head_sees_masked_positions_of_the_block_alone(cache: str) -> None:
    model = small_model()
    project, rows = model.project, []
    model.project = lambda hidden: rows.append(hidden.shape[:-1].numel()) or project(hidden)
    settings = {"max_new_tokens": 21, "block_length": 8, "rule": Quota(4), "stop_at_eos": False}
    out = model.generate(prompts(2, 5), cache=cache, **settings)
    assert rows == [2 * masks for masks in (8, 4, 8, 4, 5, 1)]
    assert out.nfe.tolist() == [6, 6]
    rows.clear()
    model.generate(prompts(2, 5), cache=cache, drafts=2, **settings)
    assert rows[0] == 2 * 8 and set(rows) <= {2 * T * D for T in (8, 5) for D in (1, 2)}


class Outside(Operators):
    """Counts the operators of every eager step that run outside of the model and its head."""

    def __init__(self, model: LLaDAModelLM, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.steps: list[int] = []
        forward, project, step = model.model.forward, model.project, EagerRunner.step
        monkeypatch.setattr(model.model, "forward", partial(self.left_out, forward))
        monkeypatch.setattr(model, "project", partial(self.left_out, project))
        monkeypatch.setattr(EagerRunner, "step", lambda *arguments: self.counted(step, *arguments))

    def left_out(self, call: Any, *arguments: Any, **named: Any) -> Any:
        before = len(self.log)
        result = call(*arguments, **named)
        del self.log[before:]
        return result

    def counted(self, step: Any, *arguments: Any) -> Any:
        self.log = []
        with self:
            result = step(*arguments)
        self.steps.append(len(self.log))
        return result


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize(
    ("rule", "drafts", "most"),
    [
        (Quota(1), 1, 106),
        (Quota(), 1, 106),
        (Frechet(0.25), 1, 108),
        (fdpp.Threshold(0.9), 1, 107),
        (Quota(1), 2, 246),
        (Quota(1), 4, 393),
    ],
    ids=str,
)
def test_operators_of_a_step_outside_the_model(
    rule: fdpp.Rule, drafts: int, most: int, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU each costs microseconds, and so does a step of a small model: more of them must have a reason."""
    model = small_model()
    outside = Outside(model, monkeypatch)
    model.generate(prompts(B, 5), max_new_tokens=16, block_length=8, rule=rule, cache="dual", drafts=drafts)
    assert outside.steps and most - 12 <= max(outside.steps) <= most


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = small_model().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = model.generate(prompts(2, 4), max_new_tokens=8)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
    assert not out.sequences.requires_grad
    # Decoding left no inference tensors behind in the model.
    model(out.sequences).logits.sum().backward()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, cache: str) -> None:
    model = small_model().to(dtype)
    input_ids, attention_mask = left_pad(ragged())
    for rule in RULES:
        out = model.generate(input_ids, attention_mask, max_new_tokens=12, block_length=8, rule=rule, cache=cache)
        check(out, input_ids, 12, 8)


# Drafts and the record of steps


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("branches", ["batch", "tree"])
def test_drafts_change_nothing_but_the_cost(exact: LLaDAModelLM, branches: str, cache: str, rule: fdpp.Rule) -> None:
    input_ids, attention_mask = left_pad(ragged())
    for temperature, stop_at_eos, drafts in ((0.0, True, 3), (0.7, False, 2), (0.0, False, "auto")):
        settings = {"temperature": temperature, "seed": 11, "stop_at_eos": stop_at_eos, "rule": rule, "cache": cache}
        settings |= {"max_new_tokens": 22, "block_length": 8}
        plain = exact.generate(input_ids, attention_mask, **settings)
        with forwards(exact) as seen:
            out = exact.generate(input_ids, attention_mask, drafts=drafts, branches=branches, **settings)
        assert torch.equal(out.sequences, plain.sequences)
        assert bool((out.nfe <= plain.nfe).all())
        assert out.query_tokens.sum() == sum(size * length for size, length in seen)
        decoded = plain.sequences[:, -22:] != PAD
        assert torch.equal(out.commit_step[decoded], plain.commit_step[decoded])


def test_commit_steps_are_those_of_the_drafts(llada: LLaDAModelLM) -> None:
    recorder = Recorder()
    settings = {"max_new_tokens": 20, "block_length": 8, "stop_at_eos": False, "rule": Frechet(0.1)}
    out = llada.generate(prompts(1, 5), streamer=recorder, **settings)
    step, expected = 0, []
    for drafts in recorder.blocks():
        masked = torch.stack([draft[0] == MASK for draft in drafts[:-1]])
        expected += (step + masked.sum(0)).tolist()
        step += len(masked)
    assert out.commit_step.tolist() == [expected]
    assert out.nfe.tolist() == [step]


def test_what_is_not_computed_has_no_commit_step() -> None:
    out = Scripted(*EOS_SCRIPT).generate(no_prompt(), max_new_tokens=8, rule=Quota(1))
    assert out.commit_step.tolist() == [[3, 4, 2, 0, 1, -1, -1, -1]]
