"""fdpp's fused step in dllm's sampler for DiffusionGemma (ZHZisZZ/dllm).

A `DiffusionGemmaSampler` with a method `_denoising_step` of the known parameters gets one of its own, on that instance
alone: transformers' step as `fdpp.patching.diffusion_gemma` takes it. A version that has its step inside of `sample` is
refused. What is drawn, and what reproduces it, is said there, too.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fdpp.patching import diffusion_gemma
from fdpp.patching.diffusion_gemma import DenoisingStep
from fdpp.selection import MAX_POSITIONS

PUBLISHED = "DiffusionGemmaSampler"
METHOD = f"{PUBLISHED}._denoising_step"
SUPPORTED = f"a {PUBLISHED} of dllm with a method _denoising_step"
BECOMES = "fdpp's canvas step"


def is_one(target: Any) -> bool:
    """Whether `target` is dllm's sampler, by the name of its class or of a base."""
    return PUBLISHED in {kind.__name__ for kind in type(target).__mro__}


def replacements(sampler: Any) -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    method: Any = getattr(type(sampler), "_denoising_step", None)
    if "_denoising_step" in vars(sampler) or getattr(method, "__qualname__", None) != METHOD:
        raise ValueError(f"_denoising_step: expected {METHOD}, got {getattr(sampler, '_denoising_step', None)!r}")
    expected, came = (sorted(inspect.signature(call).parameters) for call in (SamplerStep.__call__, method))
    if expected != came:
        raise ValueError(f"_denoising_step: expected the parameters ({', '.join(expected)}), got ({', '.join(came)})")
    return [("", "_denoising_step", SamplerStep(sampler))]


class SamplerStep:
    """The `_denoising_step` of a patched sampler."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.step = sampler, DenoisingStep(None, False)

    def __call__(
        self,
        *,
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
        model = self.sampler.model
        common = {
            "current_canvas": current_canvas,
            "argmax_canvas": argmax_canvas,
            "input_ids": input_ids,
            "decoder_position_ids": decoder_position_ids,
            "self_conditioning_logits": self_conditioning_logits,
            "mask_mapping": mask_mapping,
            "past_key_values": past_key_values,
            "finished_denoising": finished_denoising,
            "cur_step": cur_step,
            **model_kwargs,
        }
        on_ours = current_canvas.shape[1] <= MAX_POSITIONS and current_canvas.device.type in ("cpu", "cuda")
        if not (on_ours and diffusion_gemma.is_one(model)):
            return type(self.sampler)._denoising_step(
                self.sampler,
                vocab_size=vocab_size,
                entropy_bound=entropy_bound,
                min_temperature=min_temperature,
                max_temperature=max_temperature,
                max_denoising_steps=max_denoising_steps,
                stability_threshold=stability_threshold,
                confidence_threshold=confidence_threshold,
                argmax_canvas_history=argmax_canvas_history,
                **common,
            )
        from transformers import LogitsProcessorList
        from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

        processors = LogitsProcessorList()
        if min_temperature is not None and max_temperature is not None:
            processors.append(
                theirs.LinearTemperatureScheduleLogitsProcessor(min_temperature, max_temperature, max_denoising_steps)
            )
        criterion = None
        if stability_threshold is not None and confidence_threshold is not None:
            criterion = theirs.StableAndConfidentStoppingCriteria(stability_threshold, confidence_threshold)
            criterion.argmax_canvas_history = argmax_canvas_history
        canvas, argmax, conditioning, finished = self.step.take(
            model,
            decoder_forward=model.forward,
            sampler=SimpleNamespace(entropy_bound=entropy_bound),
            logits_processor=processors,
            diffusion_stopping_criteria=criterion,
            **common,
        )
        history = argmax_canvas_history if criterion is None else criterion.argmax_canvas_history
        return canvas, argmax, conditioning, finished, history
