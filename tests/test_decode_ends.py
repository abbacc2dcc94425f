"""Every decode of the block loop ends, whatever the model says."""

from __future__ import annotations

import itertools

import pytest
import torch
from decoding import CACHES, RULES, SIZES, Recorder, Scripted, check, no_prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import MASK, PAD, V, prompts, small_model

import fdpp
from fdpp import EntropyBound, Factor, Frechet, LLaDAModelLM, Quota, Threshold


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return small_model()


# Every decode ends


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_no_mask_is_left(llada: LLaDAModelLM, cache: str, rule: fdpp.Rule) -> None:
    prompt = prompts(1, 4)
    for new, block in SIZES:
        for stop_at_eos in (True, False):
            settings = {"max_new_tokens": new, "block_length": block, "stop_at_eos": stop_at_eos}
            out = llada.generate(prompt, rule=rule, cache=cache, **settings)
            check(out, prompt, new, block)
            if not stop_at_eos:
                assert out.nfe >= -(-new // block)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 13, 40, 1000])
@pytest.mark.parametrize("cache", CACHES)
def test_any_number_of_steps(llada: LLaDAModelLM, cache: str, steps: int) -> None:
    prompt = prompts(2, 4)
    for new, block in SIZES:
        settings = {"max_new_tokens": new, "block_length": block, "steps": steps, "stop_at_eos": False}
        out = llada.generate(prompt, rule=Quota(), cache=cache, **settings)
        check(out, prompt, new, block)
        blocks = -(-new // block)
        assert bool((out.nfe <= max(steps, blocks)).all())
        if steps >= new:
            assert out.nfe.tolist() == [new, new]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_argmax_at_the_mask_id(rule: fdpp.Rule, cache: str) -> None:
    """The published loops never end here: the mask token would be committed and still be masked."""
    model = small_model()
    project = model.project
    model.project = lambda hidden: project(hidden) + 50.0 * (torch.arange(V) == MASK)
    prompt = prompts(2, 3)
    out = model.generate(prompt, max_new_tokens=12, block_length=5, rule=rule, cache=cache)
    check(out, prompt, 12, 5)


# Quota's schedule


def published_schedule(new: int, block: int, steps: int) -> list[list[int]]:
    """LLaDA's commits per block and step; both divisions must come out even."""
    assert new % block == 0 and steps % (new // block) == 0
    per_block = steps // (new // block)
    commits = [block // per_block + (step < block % per_block) for step in range(per_block)]
    return [[n for n in commits if n]] * (new // block)


@pytest.mark.parametrize(
    ("new", "block", "steps"),
    [(64, 16, 64), (64, 16, 20), (64, 32, 32), (64, 64, 20), (12, 4, 6), (30, 10, 9), (16, 16, 1), (8, 2, 16)],
)
def test_quota_schedule_is_lladas(llada: LLaDAModelLM, new: int, block: int, steps: int) -> None:
    recorder = Recorder()
    settings = {"max_new_tokens": new, "block_length": block, "steps": steps, "stop_at_eos": False}
    out = llada.generate(prompts(1, 4), rule=Quota(), streamer=recorder, **settings)
    committed = []
    for drafts in recorder.blocks():
        masks = [block, *(int((draft == MASK).sum()) for draft in drafts[:-1])]
        committed.append([before - after for before, after in itertools.pairwise(masks)])
    assert committed == published_schedule(new, block, steps)
    assert out.nfe.item() == min(steps, new)


@pytest.mark.parametrize(("new", "block"), SIZES)
def test_quota_without_steps_commits_one_at_a_time(llada: LLaDAModelLM, new: int, block: int) -> None:
    out = llada.generate(prompts(1, 4), max_new_tokens=new, block_length=block, rule=Quota(), stop_at_eos=False)
    assert out.nfe.item() == new


def test_quota_of_k(llada: LLaDAModelLM) -> None:
    settings = {"max_new_tokens": 20, "block_length": 8, "stop_at_eos": False}
    assert llada.generate(prompts(1, 4), rule=Quota(3), **settings).nfe.item() == 3 + 3 + 2


# Logits that cannot be used


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_unusable_logits_raise(rule: fdpp.Rule, bad: float) -> None:
    model = Scripted([5, 6, 7, 8, 9, 10], [0.9] * 6)
    if bad < 0:
        model.logits[4] = bad
    else:
        model.logits[4, 20] = bad
    with pytest.raises(FloatingPointError, match=r"sequences \[0\]"):
        model.generate(no_prompt(), max_new_tokens=6, block_length=3, rule=rule)
    # Its first block is sound, and so is a decode that never reads the row.
    assert model.generate(no_prompt(), max_new_tokens=3, rule=rule).sequences.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("cache", CACHES)
def test_unusable_sequences_are_named(cache: str) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    prompt = prompts(4, 6).clamp(min=8)
    prompt[1, 2] = prompt[3, 0] = 7
    with pytest.raises(FloatingPointError, match=r"sequences \[1, 3\]"):
        model.generate(prompt, max_new_tokens=8, block_length=4, cache=cache)


def test_minus_infinity_is_a_usable_logit() -> None:
    """How callers ban tokens."""
    model = small_model()
    project = model.project
    banned = torch.arange(V) % 2 == 0
    model.project = lambda hidden: project(hidden).masked_fill(banned, -torch.inf)
    out = model.generate(prompts(2, 4), max_new_tokens=16, stop_at_eos=False)
    assert bool((out.sequences[:, 4:] % 2 == 1).all())


# Any configuration


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_decode_ends(data: st.DataObject) -> None:
    draw = data.draw
    model = small_model(
        seed=draw(st.integers(0, 3)),
        d_model=16,
        n_layers=draw(st.integers(1, 2)),
        n_kv_heads=draw(st.sampled_from([1, 2, 4])),
        weight_tying=draw(st.booleans()),
        init_std=draw(st.sampled_from([0.0, 0.02, 0.5, 2.0])),
    )
    B, P = draw(st.integers(1, 4)), draw(st.integers(0, 9))
    ids = st.lists(st.integers(0, V - 1), min_size=P, max_size=P)
    prompt = torch.tensor([draw(ids) for _ in range(B)], dtype=torch.int64).reshape(B, P)
    padding = torch.tensor([draw(st.integers(0, P)) for _ in range(B)])
    attention_mask = (torch.arange(P)[None] >= padding[:, None]).long()
    if not bool((prompt[:, -1:] == PAD).any()) and draw(st.booleans()):
        attention_mask = None  # a prompt that ends with padding is refused then
    new, block = draw(st.integers(1, 20)), draw(st.integers(1, 24))
    steps = draw(st.none() | st.integers(1, 30))
    rules = [
        Quota(draw(st.integers(1, 9))),
        Threshold(draw(st.floats(0, 1))),
        Factor(draw(st.floats(0.01, 5))),
        Frechet(draw(st.floats(0, 2)), draw(st.floats(0, 0.99))),
        EntropyBound(draw(st.floats(0, 10))),
    ]
    out = model.generate(
        prompt,
        attention_mask,
        max_new_tokens=new,
        block_length=block,
        rule=Quota() if steps else draw(st.sampled_from(rules)),
        steps=steps,
        cache=draw(st.sampled_from(CACHES)),
        stop_at_eos=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.0, 0.3, 5.0])),
        seed=draw(st.integers(0, 2**40)),
    )
    check(out, prompt, new, block)
