"""Classifier-free guidance: what is fed, what is made of it, and what it costs."""

from __future__ import annotations

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
