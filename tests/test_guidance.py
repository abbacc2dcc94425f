"""Classifier-free guidance: what is fed, what is made of it, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from golden import DATA, selector_case, selector_index, stored_logits
from plain import SIZES, ragged
from small import EOS, MASK, exact_model, prompts
from torch import Tensor

import fdpp
from fdpp import LLaDAModelLM, Quota, Threshold
from fdpp.decoding.guidance import guided
from fdpp.rules import Needs, Sight


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return exact_model()


GUIDED = [entry["id"] for entry in selector_index() if "cfg" in entry["tags"]]


@pytest.mark.parametrize("case_id", GUIDED)
def test_guided_logits_are_the_recorded_ones(case_id: str) -> None:
    """`golden` has the logits of both passes and forms the published sum; the recorded argmax is of that sum."""
    case = selector_case(case_id)
    with np.load(DATA / f"selectors/{case_id}.npz") as stored:
        passes = stored_logits(stored, "logits"), stored_logits(stored, "logits_uncond")
    scale = case.runs[0]["params"]["cfg_scale"]
    logits = guided(torch.stack(passes, dim=1).flatten(0, 1), scale)
    assert torch.equal(logits.argmax(-1), case.argmax)


def test_a_guided_forward_feeds_twice_the_rows_and_counts_once(llada: LLaDAModelLM) -> None:
    fed: list[Tensor] = []
    inner = llada.model.forward
    llada.model.forward = lambda ids, **kwargs: fed.append(ids.clone()) or inner(ids, **kwargs)
    try:
        out = llada.generate(prompts(2, 5), rule=Quota(4), cfg_scale=1.0, stop_at_eos=False, **SIZES)
    finally:
        del llada.model.forward
    assert [tuple(ids.shape) for ids in fed] == [(4, n) for n in (25, 8, 25, 8, 25)]
    assert out.nfe.tolist() == [5, 5]
    assert out.query_tokens.sum() == sum(ids.numel() for ids in fed)
    for ids in (ids for ids in fed if ids.shape[1] == 25):
        assert torch.equal(ids[::2, :5], prompts(2, 5))
        assert bool((ids[1::2, :5] == MASK).all())
        assert torch.equal(ids[::2, 5:], ids[1::2, 5:])


def test_masks_of_a_prompt_and_zero_scale(llada: LLaDAModelLM) -> None:
    prompt = torch.tensor([[3, MASK, 5, EOS]])
    plain = llada.generate(prompt, **SIZES)
    assert torch.equal(llada.generate(prompt, cfg_scale=0.0, **SIZES).sequences, plain.sequences)
    assert torch.equal(llada.generate(prompt, cfg_scale=1.0, **SIZES).sequences[:, :4], prompt)


@pytest.mark.parametrize("rule", [Threshold(0.5), fdpp.Klass(0.3, 0.5, 1), fdpp.LocalLeap(0.6, 0.3)], ids=str)
def test_guidance_with_other_rules(llada: LLaDAModelLM, rule: fdpp.Rule) -> None:
    ids, mask = ragged()
    settings = {"rule": rule, "cfg_scale": 1.0, "stop_at_eos": False, **SIZES}
    plain = llada.generate(ids, mask, **settings)
    assert not bool((plain.sequences[:, -20:] == MASK).any())
    assert torch.equal(llada.generate(ids, mask, drafts=2, **settings).sequences, plain.sequences)


class Seen(NamedTuple):
    sure: Tensor


@dataclass(frozen=True)
class Watchful(fdpp.Rule):
    """`Quota(2)`, and a look at how sure the model is of all that is fed."""

    predicate: ClassVar = fdpp.Quota.predicate
    needs: ClassVar = Needs(logits=True, fed=True)

    def params(self) -> tuple[float, float]:
        return 2.0, 0.0

    def observe(self, sight: Sight, before: Any) -> Seen:
        sure = sight.fed_confidence()
        assert sure.shape == sight.tokens.shape
        b, D, T = sight.states.shape
        everywhere = torch.full((b * D, T), MASK)
        step = fdpp.select(sight.logits.flatten(0, 1), everywhere, rule=Quota(1), mask_id=MASK)
        at = sight.block.start - sight.fed.start
        torch.testing.assert_close(sure[..., at : at + T], step.confidence.view(b, D, T))
        return Seen(sure[..., :1])


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_confidence_of_all_that_is_fed(llada: LLaDAModelLM, cache: str, cfg_scale: float) -> None:
    """In the block it is that of the logits that decide: with guidance, of the guided ones."""
    settings = {"cache": cache, "cfg_scale": cfg_scale, "stop_at_eos": False, **SIZES}
    plain = llada.generate(*ragged(), **{**settings, "rule": Quota(2)})
    for drafts in (1, 3):
        out = llada.generate(*ragged(), **{**settings, "rule": Watchful(), "drafts": drafts})
        assert torch.equal(out.sequences, plain.sequences)


@dataclass(frozen=True)
class Careless(Watchful):
    needs: ClassVar = Needs(logits=True)


def test_what_was_not_asked_for_is_refused(llada: LLaDAModelLM) -> None:
    with pytest.raises(ValueError, match=r"Careless: fed_confidence expected needs = Needs\(fed=True"):
        llada.generate(prompts(1, 5), rule=Careless(), **SIZES)
