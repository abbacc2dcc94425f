"""Prompts that come as embeddings: `inputs_embeds` of a model and of `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import Recorder
from plain import ragged
from small import MASK, SMALL, exact, prompts, small_model
from torch import Tensor

import fdpp

SIZES: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"cache": "prefix"},
    {"cache": "dual", "drafts": 3},
    {"cache": "prefix", "drafts": 2, "branches": "tree"},
    {"cache": "dual", "engine": "static"},
    {"cache": "dual", "engine": "static", "drafts": "auto"},
    {"cache": "dual", "cfg_scale": 1.0},
    {"cache": "prefix", "cfg_scale": 1.0, "engine": "static", "drafts": 2},
    {"cache": "dual", "refresh": "recent", "rule": fdpp.Threshold(0.5)},
    {"cache": "dual", "rule": fdpp.Dawn(tau_sink=0.1, tau_edge=0.05, tau_low=0.3, tau_high=0.6, tau_induce=0.4)},
    {"temperature": 0.7, "seed": 3, "top_k": 9, "repetition_penalty": 1.3},
]


def embedded(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", SMALL)
def test_embeddings_of_ids_give_the_tokens_of_the_ids(family: str, settings: dict[str, Any]) -> None:
    """In batches with padding and an empty prompt."""
    model, (ids, mask) = exact(family), ragged()
    expected = model.generate(ids, mask, **SIZES, **settings)
    both = model.generate(ids, mask, inputs_embeds=embedded(model, ids), **SIZES, **settings)
    assert torch.equal(both.sequences, expected.sequences) and torch.equal(both.nfe, expected.nfe)
    if "repetition_penalty" in settings:  # of unknown ids there is nothing to penalise
        expected = model.generate(ids, mask, **SIZES, **settings | {"repetition_penalty": None})
        settings = settings | {"repetition_penalty": None}
    alone = model.generate(inputs_embeds=embedded(model, ids), attention_mask=mask, **SIZES, **settings)
    assert torch.equal(alone.sequences, expected.sequences[:, ids.shape[1] :])
    assert torch.equal(alone.commit_step, expected.commit_step) and torch.equal(alone.confidence, expected.confidence)


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("family", SMALL)
def test_embeddings_are_what_is_fed(family: str, engine: str) -> None:
    """Made-up ones, of no token: a plain loop over full forwards decodes the same."""
    model, P, new = exact(family), 5, 6
    made_up = torch.randn(1, P, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = torch.full((1, new), MASK)
    while (tokens == MASK).any():
        x = torch.cat((made_up, embedded(model, tokens)), dim=1)
        with torch.no_grad():
            logits = model.aligned(model(inputs_embeds=x).logits)[:, P:]
        tokens = fdpp.select(logits, tokens, rule=fdpp.Frechet(0.1), mask_id=MASK).tokens
    settings = {"max_new_tokens": new, "block_length": 8, "rule": fdpp.Frechet(0.1), "engine": engine}
    out = model.generate(inputs_embeds=made_up, cache="none", stop_at_eos=False, **settings)
    assert torch.equal(out.sequences, tokens)
    # In another dtype, as the embeddings of another library may be.
    half = model.generate(inputs_embeds=made_up.half(), **settings).sequences
    assert torch.equal(half, model.generate(inputs_embeds=made_up.half().double(), **settings).sequences)


def test_static_steps_serve_prompts_of_either_kind_and_any_length() -> None:
    """Sequences of one length share their static tensors, whatever their prompts are."""
    model = exact("Dream")
    for P, new in ((12, 20), (20, 12), (12, 20)):
        ids = prompts(2, P, seed=P)
        settings = {"max_new_tokens": new, "block_length": 4, "cache": "dual"}
        expected = model.generate(ids, **settings).sequences
        assert torch.equal(model.generate(ids, engine="static", **settings).sequences, expected)
        again = model.generate(ids, inputs_embeds=embedded(model, ids), engine="static", **settings).sequences
        assert torch.equal(again, expected)


@pytest.mark.parametrize("family", SMALL)
def test_a_forward_of_embeddings(family: str) -> None:
    model, ids = SMALL[family](), prompts(2, 7)
    x = embedded(model, ids)
    before = x.clone()
    out = model(inputs_embeds=x, output_hidden_states=True)
    assert torch.equal(out.logits, model(ids).logits) and torch.equal(out.hidden_states[0], before)
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="expected input_ids or inputs_embeds, got both"):
        model(ids, inputs_embeds=x)
    with pytest.raises(TypeError, match="expected input_ids"):
        model()


def test_what_a_streamer_and_copies_get() -> None:
    model, ids = small_model(), prompts(2, 5)
    recorder = Recorder()
    out = model.generate(inputs_embeds=embedded(model, ids), streamer=recorder, **SIZES)
    assert recorder.events[0][1].shape == (2, 0) and out.sequences.shape == (2, 20)
    settings = {**SIZES, "temperature": 0.5, "seed": 1, "num_return_sequences": 3}
    expected = model.generate(ids, **settings).sequences[:, 5:]
    assert torch.equal(model.generate(inputs_embeds=embedded(model, ids), **settings).sequences, expected)
    tokens = model.generate(inputs_embeds=embedded(model, ids), return_dict_in_generate=False, **SIZES)
    assert torch.equal(tokens, out.sequences)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "ids": ({"inputs_embeds": prompts(1, 3)[..., None]}, r"expected \[B, P, 32\] of floating point, got \[1, 3, 1\]"),
    "lists": ({"inputs_embeds": [[0.0]]}, r"expected \[B, P, 32\] of floating point, got list"),
    "width": ({"inputs_embeds": torch.zeros(1, 3, 16)}, "expected 32 channels on cpu, got 16 on cpu"),
    "columns": (
        {"inputs_embeds": torch.zeros(1, 3, 32), "input_ids": prompts(1, 4)},
        r"expected those of input_ids \[1, 4\], got \[1, 3\]",
    ),
    "blanks": ({"inputs_embeds": torch.zeros(1, 4, 32), "max_new_tokens": 0}, "fills the masks of a prompt"),
    "mask": (
        {"inputs_embeds": torch.zeros(1, 4, 32), "attention_mask": torch.ones(1, 5)},
        r"attention_mask: expected \[1, 4\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        small_model().generate(**{**SIZES, **given})
