"""`head="fused"`: the tokens of the library's head, from hidden states alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from family_of_others import FAMILIES
from inputs import on_gpu
from small import left_pad, prompts, small_model
from torch import Tensor
from transformers import SuppressTokensLogitsProcessor

import fdpp
from fdpp import LLaDAModelLM
from fdpp.decoding import forwards, head
from fdpp.models.language_model import DiffusionLM

RULES = [fdpp.Quota(), fdpp.Threshold(0.5), fdpp.Frechet(0.1), fdpp.EntropyBound(1.0), fdpp.LocalLeap(0.6, 0.3)]
SIZES: dict[str, Any] = {"max_new_tokens": 27, "block_length": 8}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def with_exact_products(model: DiffusionLM) -> DiffusionLM:
    """Logits that are exact in any order of sums: hidden states and head are multiples of 1/64, of at most 10 bits."""
    norm = model.model.final_norm
    norm.forward = lambda x: (type(norm).forward(norm, x).clamp(-8.0, 8.0) * 64).round() / 64
    head = model.get_output_embeddings().weight
    head.data = (head.data.clamp(-4.0, 4.0) * 64).round() / 64
    return model


@pytest.fixture(scope="module", params=DEVICES)
def llada(request: pytest.FixtureRequest) -> LLaDAModelLM:
    """On a GPU the library and the kernel may round differently, so what is compared bit for bit must be exact."""
    model = small_model().to(request.param)
    return model if request.param == "cpu" else with_exact_products(model)


def test_products_that_are_exact() -> None:
    model = with_exact_products(small_model())
    hidden = model.model(prompts(1, 9))
    head = model.head_weight()
    assert hidden.double().matmul(head.double().T).equal(model.project(hidden).double())
    assert hidden.flip(-1).matmul(head.flip(-1).T).equal(model.project(hidden))
    assert_fused_is_the_same(model, pytest.MonkeyPatch(), rule=fdpp.Frechet(0.1))


def ragged(llada: LLaDAModelLM) -> tuple[Tensor, Tensor]:
    ids, mask = left_pad([prompts(1, 3 + 4 * b, seed=b)[0] for b in range(3)])
    return ids.to(llada.device), mask.to(llada.device)


def assert_fused_is_the_same(llada: DiffusionLM, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    ids, mask = ragged(llada)
    library = llada.generate(ids, mask, **SIZES, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionLM, "project_slice", None)  # no logits are made
        fused = llada.generate(ids, mask, head="fused", **SIZES, **settings)
    assert library.keys() == fused.keys()
    for name in library:
        rounding = {"rtol": 1e-5, "atol": 1e-6} if name in ("confidence", "log_prob") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(fused[name], library[name], **rounding, equal_nan=True, msg=name)


@on_gpu(lambda rule: rule == RULES[2])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_same_decode(llada, monkeypatch, rule, cache, drafts):
    assert_fused_is_the_same(llada, monkeypatch, rule=rule, cache=cache, drafts=drafts)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(("family", "drafts"), [("Dream", 1), ("Dream", 3), ("Gist", 1)])
def test_same_decode_where_the_row_before_predicts(monkeypatch, family, cache, drafts):
    """Gist's head is its embedding."""
    assert_fused_is_the_same(FAMILIES[family](), monkeypatch, rule=fdpp.Frechet(0.1), cache=cache, drafts=drafts)


@pytest.mark.parametrize("engine", ["eager", "static"])
def test_on_either_engine_and_sampled(llada, monkeypatch, engine):
    assert_fused_is_the_same(llada, monkeypatch, rule=fdpp.Frechet(0.1), engine=engine, temperature=0.7, seed=5)


def test_random_remasking(llada, monkeypatch):
    assert_fused_is_the_same(llada, monkeypatch, rule=fdpp.Quota(2), remasking="random", seed=1)


def test_a_tied_head_and_one_with_padded_rows(monkeypatch):
    tied = small_model(seed=2, weight_tying=True)
    assert_fused_is_the_same(tied, monkeypatch, rule=fdpp.Threshold(0.5))
    padded = small_model(seed=2, embedding_size=80)
    assert padded.head_weight().shape[0] == 64 < padded.head.shape[0]
    assert_fused_is_the_same(padded, monkeypatch, rule=fdpp.Threshold(0.5))


@pytest.mark.parametrize(
    ("settings", "reader"),
    [
        ({"rule": fdpp.Dawn()}, "Dawn"),
        ({"rule": fdpp.Klass()}, "Klass"),
        ({"cfg_scale": 1.0}, "cfg_scale"),
        ({"logits_eos_inf": True}, "logits_eos_inf"),
        ({"confidence_eos_eot_inf": True}, "confidence_eos_eot_inf"),
    ],
)
def test_what_reads_logits_is_refused(settings, reader):
    with pytest.raises(ValueError, match=f"head='fused' keeps no logits, which {reader}"):
        fdpp.DiffusionGenerationConfig(head="fused", **settings)


def test_other_refusals(llada):
    ids, mask = ragged(llada)
    with pytest.raises(ValueError, match="head: expected one of library, fused, auto, got 'mine'"):
        llada.generate(ids, mask, head="mine")
    never = SuppressTokensLogitsProcessor([1], device=llada.device)
    with pytest.raises(ValueError, match="which logits_processor reads"):
        llada.generate(ids, mask, head="fused", logits_processor=[never], **SIZES)


def test_a_head_that_is_more_than_its_weight_is_refused():
    model = small_model()
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="head: expected a plain weight"):
        model.generate(prompts(1, 4), head="fused", **SIZES)


def test_a_head_of_another_linear_class_will_do():
    """As in a model that was loaded with remote code."""
    model = small_model(seed=3)
    theirs = torch.nn.Linear(32, 64, bias=False)
    theirs.weight = model.get_output_embeddings().weight
    expected = model.generate(prompts(1, 4), **SIZES).sequences
    model.model.transformer["ff_out"] = theirs
    assert model.generate(prompts(1, 4), head="fused", **SIZES).sequences.equal(expected)


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("settings", [{"drafts": "auto"}, {"drafts": 3, "branches": "tree"}], ids=str)
def test_with_drafts_in_every_form(monkeypatch, engine, settings):
    assert_fused_is_the_same(small_model(), monkeypatch, rule=fdpp.Quota(1), engine=engine, **settings)


def test_a_head_that_is_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(LLaDAModelLM, "vocabulary_slice", lambda self: object())
    with pytest.raises(ValueError, match="takes a whole head"):
        small_model().generate(prompts(1, 4), head="fused", **SIZES)


@pytest.fixture
def heads_taken(monkeypatch) -> list[bool]:
    """Whether each decode took the fused head."""
    taken: list[bool] = []
    head_of = forwards.head_of

    def noted(model, rule, fused):
        taken.append(fused)
        return head_of(model, rule, fused)

    monkeypatch.setattr(forwards, "head_of", noted)
    return taken


@pytest.mark.parametrize(("limit", "fused"), [(None, False), (0, False), (23, False), (24, True), (999, True)])
def test_auto_goes_by_the_rows_of_a_forward(monkeypatch, heads_taken, limit, fused):
    """Three sequences of blocks of 8: 24 rows."""
    model, table = small_model(), {} if limit is None else {"cpu": limit}
    monkeypatch.setattr(head, "FUSED_UP_TO", table)
    assert_same_as_library(model, heads_taken, head="auto")
    assert heads_taken == [False, fused]


def assert_same_as_library(model, heads_taken, **settings):
    ids, mask = ragged(model)
    library = model.generate(ids, mask, **SIZES, **settings | {"head": "library"})
    assert model.generate(ids, mask, **SIZES, **settings).sequences.equal(library.sequences)


@pytest.mark.parametrize(("drafts", "fused"), [(1, True), (3, True), (4, False), ("auto", False)])
def test_auto_counts_drafted_rows(monkeypatch, heads_taken, drafts, fused):
    monkeypatch.setattr(head, "FUSED_UP_TO", {"cpu": 72})
    assert_same_as_library(small_model(), heads_taken, head="auto", drafts=drafts)
    assert heads_taken == [False, fused]


@pytest.mark.parametrize(
    "settings",
    [{"rule": fdpp.Dawn()}, {"rule": fdpp.Klass()}, {"cfg_scale": 1.0}, {"logits_eos_inf": True}, {"top_k": 3}],
    ids=str,
)
def test_auto_is_the_library_where_fused_is_refused(monkeypatch, heads_taken, settings):
    monkeypatch.setattr(head, "FUSED_UP_TO", {"cpu": 10**6})
    assert_same_as_library(small_model(), heads_taken, head="auto", **settings)
    assert heads_taken == [False, False]


def test_auto_is_the_library_with_a_processor_and_with_a_head_that_is_more_than_a_weight(monkeypatch, heads_taken):
    monkeypatch.setattr(head, "FUSED_UP_TO", {"cpu": 10**6})
    model = small_model()
    never = SuppressTokensLogitsProcessor([1], device=model.device)
    assert_same_as_library(model, heads_taken, head="auto", logits_processor=[never])
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    assert_same_as_library(model, heads_taken, head="auto")
    assert heads_taken == [False] * 4


def test_auto_is_the_library_on_a_gpu_that_nobody_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a new one")
    assert head.device_kind(torch.device("cuda", 0)) == "a new one" not in head.FUSED_UP_TO


def test_a_rule_that_can_change_is_refused():
    @dataclass
    class Loose(fdpp.Rule):
        predicate = fdpp.Threshold.predicate

        def params(self):
            return 0.5, 0.0

    with pytest.raises(ValueError, match="frozen=True, Loose can change"):
        fdpp.DiffusionGenerationConfig(rule=Loose())
