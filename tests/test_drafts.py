"""Draft and verify: the undrafted decode, state by state, in fewer forwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EOS, RULES, exact_model, left_pad, prompts

import fdpp


def same_decode(out: fdpp.DiffusionGenerationOutput, base: fdpp.DiffusionGenerationOutput) -> bool:
    return torch.equal(out.sequences, base.sequences) and torch.equal(out.commit_step, base.commit_step)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("branches", ["batch", "tree"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tokens_and_order_of_commits_are_the_undrafted_ones(rule: fdpp.Rule, branches: str, cache: str) -> None:
    model, ids = exact_model(), prompts(3, 7)
    settings = {"rule": rule, "cache": cache, "max_new_tokens": 21, "block_length": 8, "stop_at_eos": False}
    base = model.generate(ids, **settings)
    for drafts in (2, 5, "auto"):
        out = model.generate(ids, drafts=drafts, branches=branches, **settings)
        assert same_decode(out, base)
        assert (out.nfe <= base.nfe).all()
        assert (out.query_tokens >= base.query_tokens - (base.nfe - out.nfe) * 28).all()


@pytest.mark.parametrize("branches", ["batch", "tree"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", [fdpp.Quota(1), *RULES[-3:]], ids=str)
def test_every_row_of_a_ragged_batch_accepts_its_own_length(rule: fdpp.Rule, cache: str, branches: str) -> None:
    model = exact_model(1)
    rows = [prompts(1, length, seed=length)[0] for length in (3, 9, 6)]
    ids, mask = left_pad(rows)
    settings = {"cache": cache, "branches": branches, "drafts": 4, "max_new_tokens": 18, "block_length": 6}
    settings |= {"rule": rule, "stop_at_eos": False}
    together = model.generate(ids, mask, **settings)
    for b, row in enumerate(rows):
        alone = model.generate(row[None], **settings)
        assert torch.equal(together.sequences[b, ids.shape[1] :], alone.sequences[0, len(row) :])
        assert torch.equal(together.commit_step[b], alone.commit_step[0])
        assert together.nfe[b] == alone.nfe[0]


def test_sampling_draws_by_step_so_that_drafts_see_the_noise_of_their_own_step() -> None:
    model, ids = exact_model(2), prompts(2, 5)
    settings = {"rule": fdpp.Quota(1), "temperature": 0.7, "seed": 11, "max_new_tokens": 16, "block_length": 8}
    base = model.generate(ids, stop_at_eos=False, **settings)
    assert same_decode(model.generate(ids, stop_at_eos=False, drafts=4, **settings), base)


def test_grouped_queries_share_the_cached_keys() -> None:
    model, ids = exact_model(3, n_heads=4, n_kv_heads=2), prompts(2, 6)
    settings = {"rule": fdpp.Quota(1), "max_new_tokens": 16, "block_length": 8, "stop_at_eos": False}
    base = model.generate(ids, **settings)
    for branches in ("batch", "tree"):
        assert same_decode(model.generate(ids, drafts=3, branches=branches, **settings), base)


def test_drafts_save_forwards_where_predictions_hold() -> None:
    """A model whose output ignores what is committed predicts every next state: a block takes T / drafts forwards."""
    model = exact_model()
    for block in model.model.transformer["blocks"]:
        torch.nn.init.zeros_(block.attn_out.weight)
    ids = prompts(1, 4)
    settings = {"rule": fdpp.Quota(1), "max_new_tokens": 16, "block_length": 16, "stop_at_eos": False}
    base = model.generate(ids, **settings)
    out = model.generate(ids, drafts=5, **settings)
    assert same_decode(out, base)
    assert base.nfe.tolist() == [16]
    assert out.nfe.tolist() == [1 + 3], "the full forward, then 15 states in chains of 5"
    assert out.acceptance is not None
    assert out.acceptance.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert base.acceptance is None


def test_eos_inside_a_chain_ends_the_sequence_as_without_drafts() -> None:
    model = exact_model(4)
    with torch.no_grad():
        model.model.transformer["ff_out"].weight[EOS] *= 2.0
    ids = prompts(4, 5)
    base = model.generate(ids, rule=fdpp.Quota(1), max_new_tokens=24, block_length=8)
    out = model.generate(ids, rule=fdpp.Quota(1), max_new_tokens=24, block_length=8, drafts=6)
    assert (base.sequences == EOS).any(), "the case needs a sequence that ends"
    assert same_decode(out, base)


def test_a_wrong_draft_with_unusable_logits_is_no_error() -> None:
    """Only states that the decode reaches may end it."""
    model, ids = exact_model(), prompts(1, 4)
    settings = {"rule": fdpp.Quota(1), "max_new_tokens": 8, "block_length": 8, "stop_at_eos": False, "cache": "dual"}
    base = model.generate(ids, **settings)
    project = model.project

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        logits = project(hidden)
        if logits.shape[1] > 2:
            logits[:, -1] = torch.nan
        return logits

    drafted = model.generate(ids, drafts=3, **settings)
    assert drafted.acceptance is not None
    model.project = poisoned
    if drafted.acceptance[0, 1] == 0:
        assert same_decode(model.generate(ids, drafts=3, **settings), base)
    else:
        with pytest.raises(FloatingPointError, match="masked positions"):
            model.generate(ids, drafts=3, **settings)


@given(
    seed=st.integers(0, 5),
    length=st.integers(1, 20),
    block=st.integers(1, 9),
    drafts=st.integers(2, 9),
    rule=st.sampled_from(RULES),
    cache=st.sampled_from(["none", "prefix", "dual"]),
    branches=st.sampled_from(["batch", "tree"]),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(seed: int, length: int, block: int, drafts: int, rule: fdpp.Rule, cache: str, branches: str) -> None:
    model, ids = exact_model(seed), prompts(2, 3, seed)
    settings = {"rule": rule, "cache": cache, "max_new_tokens": length, "block_length": block}
    base = model.generate(ids, **settings)
    out = model.generate(ids, drafts=drafts, branches=branches, **settings)
    assert torch.equal(out.sequences, base.sequences)
    assert (out.nfe <= base.nfe).all()


@pytest.mark.parametrize("setting", [{"drafts": 0}, {"drafts": 65}, {"drafts": "many"}, {"branches": "forest"}])
def test_bad_settings_are_named(setting: dict) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}: expected"):
        fdpp.DiffusionGenerationConfig(**setting)
