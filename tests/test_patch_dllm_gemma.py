"""dllm's sampler for DiffusionGemma, a stand-in with its names and parameters, through fdpp's step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gemma import CANVAS, V, prompt, replayed, tiny_gemma
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList
from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

import fdpp
from fdpp.patching import diffusion_gemma


@dataclass
class DiffusionGemmaSampler:
    model: Any
    steps: int = 8

    def _denoising_step(
        self,
        current_canvas: Tensor,
        argmax_canvas: Tensor,
        input_ids: Tensor,
        decoder_position_ids: Tensor,
        self_conditioning_logits: Tensor | None,
        mask_mapping: Any,
        past_key_values: Any,
        finished_denoising: Tensor,
        cur_step: int,
        vocab_size: int,
        entropy_bound: float,
        min_temperature: float | None,
        max_temperature: float | None,
        max_denoising_steps: int,
        stability_threshold: int | None,
        confidence_threshold: float | None,
        argmax_canvas_history: Tensor | None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """By transformers' own step, of which it is a copy with its settings as arguments."""
        processors = LogitsProcessorList()
        if min_temperature is not None:
            processors.append(
                theirs.LinearTemperatureScheduleLogitsProcessor(min_temperature, max_temperature, max_denoising_steps)
            )
        criterion = None
        if stability_threshold is not None:
            criterion = theirs.StableAndConfidentStoppingCriteria(stability_threshold, confidence_threshold)
            criterion.argmax_canvas_history = argmax_canvas_history
        config = theirs.EntropyBoundSamplerConfig(entropy_bound)
        canvas, argmax, logits, finished = type(self.model)._denoising_step(
            self.model,
            self.model.forward,
            current_canvas,
            argmax_canvas,
            input_ids,
            decoder_position_ids,
            self_conditioning_logits,
            mask_mapping,
            past_key_values,
            finished_denoising,
            cur_step,
            theirs.EntropyBoundSampler(config, CANVAS, vocab_size, max_denoising_steps),
            processors,
            criterion,
            **model_kwargs,
        )
        return canvas, argmax, logits, finished, None if criterion is None else criterion.argmax_canvas_history

    @torch.no_grad()
    def sample(self, ids: Tensor, seed: int = 0, **settings: Any) -> list[tuple[Tensor, ...]]:
        """Canvas, argmax and finished sequences of every step."""
        torch.manual_seed(seed)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.model.model.encoder(input_ids=ids, past_key_values=cache)
        canvas = argmax = torch.randint(V, (ids.shape[0], CANVAS))
        finished, logits, history, states = torch.zeros(ids.shape[0], dtype=torch.bool), None, None, []
        for cur_step in range(self.steps, 0, -1):
            canvas, argmax, logits, finished, history = self._denoising_step(
                current_canvas=canvas,
                argmax_canvas=argmax,
                input_ids=ids,
                decoder_position_ids=torch.arange(ids.shape[1], ids.shape[1] + CANVAS)[None],
                self_conditioning_logits=logits,
                mask_mapping=None,
                past_key_values=cache,
                finished_denoising=finished,
                cur_step=cur_step,
                vocab_size=V,
                max_denoising_steps=self.steps,
                argmax_canvas_history=history,
                **settings,
            )
            states.append((canvas, argmax, finished.clone()))
        return states


SETTINGS = {
    "entropy_bound": 0.5,
    "min_temperature": 0.1,
    "max_temperature": 0.6,
    "stability_threshold": 1,
    "confidence_threshold": 2.0,
}
OTHERS: dict[str, dict[str, Any]] = {
    "as published": {},
    "no temperature": {"min_temperature": None, "max_temperature": None},
    "no stop": {"stability_threshold": None, "confidence_threshold": None},
    "stops at once": {"stability_threshold": 0, "confidence_threshold": 3.0},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_steps_are_the_samplers_own(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its draws replaced by ours: canvas, argmax and finished sequences of every step."""
    sampler, calls = DiffusionGemmaSampler(tiny_gemma()), []
    step = diffusion_gemma.step
    monkeypatch.setattr(diffusion_gemma, "step", lambda *args: calls.append(1) or step(*args))
    settings = SETTINGS | other
    with replayed():
        wanted = sampler.sample(prompt(3), **settings)
    with fdpp.patch(sampler) as patched:
        assert patched is sampler
        came = sampler.sample(prompt(3), **settings)
    assert len(calls) == sampler.steps
    if settings["stability_threshold"] == 0:
        assert any(finished.any() for *_, finished in wanted[:-1])
    for a, b in zip(came, wanted, strict=True):
        assert all(x.equal(y) for x, y in zip(a, b, strict=True))


def test_unpatched_it_is_what_it_was() -> None:
    sampler = DiffusionGemmaSampler(tiny_gemma())
    before = dict(vars(sampler))
    patched = fdpp.patch(sampler)
    assert "_denoising_step -> fdpp's canvas step" in str(patched)
    other = copy.deepcopy(sampler)
    assert vars(other)["_denoising_step"].sampler is other
    fdpp.unpatch(sampler)
    assert vars(sampler) == before


def test_another_model_goes_to_the_samplers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = DiffusionGemmaSampler(tiny_gemma())
    wanted = sampler.sample(prompt(2), **SETTINGS)
    monkeypatch.setattr(diffusion_gemma, "is_one", lambda model: False)
    with fdpp.patch(sampler):
        came = sampler.sample(prompt(2), **SETTINGS)
    for a, b in zip(came, wanted, strict=True):
        assert all(x.equal(y) for x, y in zip(a, b, strict=True))


def test_refusals() -> None:
    class Inline(DiffusionGemmaSampler):
        _denoising_step = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="_denoising_step: expected DiffusionGemmaSampler"):
        fdpp.patch(Inline(None))

    def step(self: Any, current_canvas: Tensor) -> None: ...

    step.__qualname__ = "DiffusionGemmaSampler._denoising_step"
    Changed = type("DiffusionGemmaSampler", (), {"_denoising_step": step})
    with pytest.raises(ValueError, match="expected the parameters"):
        fdpp.patch(Changed())
