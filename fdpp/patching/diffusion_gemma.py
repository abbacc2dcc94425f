"""fdpp's fused step in transformers' DiffusionGemma.

A patched `DiffusionGemmaForBlockDiffusion` has a `_denoising_step` of its own, which its `generate` calls after that.
What one step does after the forward, from the softcap to the next canvas, is one read of the head's outputs
(`fdpp.denoise_canvas`). Nothing else of the model or of `generate` changes: settings, caches, images, streamers and
stopping criteria work as before. With a static cache the forward is compiled, as it was.

As transformers has it:

- a user's logits processors run first, on the float32 logits; of the list only a linear temperature schedule at its end
  becomes part of the step;
- a sequence has finished once its argmax is that of the last steps and its mean entropy is below the threshold; the
  criterion's history is kept, so that its `reset` works;
- `torch.manual_seed` reproduces: every step takes its seeds from the device's generator. The draws are others than
  those of `torch.multinomial`, so the tokens differ from an unpatched model's with the same seed, and have the same
  distribution.

Where transformers departs from its own description, the description holds. With a static cache it keeps the compiled
`accept_canvas` of the first call, and with it the first `entropy_bound`; here the bound is that of the call. And the
compiled stopping criterion is never called, since Python looks `__call__` up in the class; here nothing of it is
compiled.

What the step does not know goes to the model's own: another sampler, another stopping criterion, another list of
processors, a canvas of more than 1024 positions, a device that is neither a CPU nor CUDA.

With `conditioning="streamed"` the self-conditioning of the next forward is sum over v of p_v E_v, summed over slabs of
the vocabulary (`fdpp.step.canvas.conditioning`), where the model rounds the logits to bfloat16 and makes a matrix of
probabilities. It is closer to float64 than the model's own, so decodes are not those of `conditioning="logits"` token
by token. Logits are then made only for a streamer that asks for them. Logits that a user gives as
`self_conditioning_logits`, a `self_conditioning_mask`, and embeddings that are no plain matrix keep the model's way.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdpp.patching.models import Owner
from fdpp.selection import DTYPES, MAX_POSITIONS
from fdpp.step.canvas.conditioning import processed_logits, soft_embeddings
from fdpp.step.canvas.operator import step
from fdpp.step.canvas.outcome import CanvasStep

PUBLISHED = "DiffusionGemmaForBlockDiffusion"
METHOD = "DiffusionGemmaGenerationMixin._denoising_step"
CACHES = ("past_key_values", "cache")
"""The cache's name up to transformers 5.23, and from 5.24 on."""
PARAMETERS = (
    *("self", "decoder_forward", "current_canvas", "argmax_canvas", "input_ids", "decoder_position_ids"),
    *("self_conditioning_logits", "mask_mapping", "finished_denoising", "cur_step", "sampler", "logits_processor"),
    *("diffusion_stopping_criteria", "model_kwargs"),
)
CONDITIONING = ("logits", "streamed")

SUPPORTED = f"a {PUBLISHED} of transformers"
BECOMES = "fdpp's canvas step"


def is_one(module: nn.Module) -> bool:
    """Whether `module` is transformers' DiffusionGemma with a canvas, by the name of its class or of a base."""
    return PUBLISHED in {kind.__name__ for kind in type(module).__mro__}


def replacements(model: nn.Module, conditioning: str = "logits") -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    if conditioning not in CONDITIONING:
        raise ValueError(f"conditioning: expected one of {', '.join(CONDITIONING)}, got {conditioning!r}")
    check(model)
    found: list[tuple[str, str, Any]] = [("", "_denoising_step", DenoisingStep(model, conditioning == "streamed"))]
    if conditioning == "streamed":
        path = "model.decoder.self_conditioning"
        found.append((path, "forward", Signal(model.get_submodule(path))))
    return found


def check(model: nn.Module) -> None:
    """Raise `ValueError` unless the model's own `_denoising_step` is the one that is known."""
    method: Any = getattr(type(model), "_denoising_step", None)
    if "_denoising_step" in vars(model) or getattr(method, "__qualname__", None) != METHOD:
        raise ValueError(f"_denoising_step: expected {METHOD}, got {getattr(model, '_denoising_step', None)!r}")
    came = tuple(inspect.signature(method).parameters)
    if sorted(name for name in came if name not in CACHES) != sorted(PARAMETERS) or len(came) != len(PARAMETERS) + 1:
        raise ValueError(f"_denoising_step: expected the parameters ({', '.join(PARAMETERS)}) and a cache, got {came}")


def knows(model: Any, given: dict[str, Any]) -> bool:
    """Whether a step with the arguments `given` is one that fdpp takes."""
    theirs = sys.modules[type(model)._denoising_step.__module__]
    canvas, sampler, criterion = (given[name] for name in ("current_canvas", "sampler", "diffusion_stopping_criteria"))
    # With a static cache `generate` puts what it compiled on the sampler.
    replaced = (name for name in ("initialize_canvas", "accept_canvas", "renoise_canvas") if name in vars(sampler))
    return (
        type(sampler) is theirs.EntropyBoundSampler
        and all(vars(sampler)[name] is vars(model).get(f"_compiled_{name}") for name in replaced)
        and type(given["logits_processor"]) is theirs.LogitsProcessorList
        and (criterion is None or type(criterion) is theirs.StableAndConfidentStoppingCriteria)
        and canvas.shape[1] <= MAX_POSITIONS
        and canvas.device.type in ("cpu", "cuda")
    )


def folded(processors: Any) -> tuple[Any, Any]:
    """The linear temperature schedule at the list's end, or None, and a list of the others."""
    last = type(processors[-1]).__qualname__ if processors else ""
    if last == "LinearTemperatureScheduleLogitsProcessor":
        return processors[-1], type(processors)(processors[:-1])
    return None, processors


def readable(logits: Tensor) -> Tensor:
    """`logits` in a dtype that a step reads."""
    return logits if logits.dtype in DTYPES else logits.float()


def stops(out: CanvasStep, k: int, threshold: float, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Which sequences stop after `out`, bool `[B]`, and the `history` `[k, B, T]` with its argmax.

    Those whose argmax was the same in the last k steps, and whose mean entropy is below the threshold.
    """
    confident = out.mean_entropy < threshold
    if k == 0:
        return confident, history
    if history is None:
        history = out.argmax.new_full((k, *out.argmax.shape), -1)
    stable = (history == out.argmax).all(2).all(0)
    return stable & confident, torch.cat((history[1:], out.argmax[None]))


class Pending(threading.local):
    """The signal that a forward in this thread takes in the place of one made of logits."""

    signal: Tensor | None = None


PENDING = Pending()


class Signal:
    """The `forward` of a patched model's `self_conditioning`."""

    def __init__(self, module: nn.Module | None) -> None:
        self.owner = Owner(module)

    def __reduce__(self) -> Any:
        return Signal, (self.owner(),)

    def __call__(self, inputs_embeds: Tensor, self_conditioning_signal: Tensor) -> Tensor:
        module: Any = self.owner()
        signal = self_conditioning_signal if PENDING.signal is None else PENDING.signal
        return type(module).forward(module, inputs_embeds, signal)


class Conditioning:
    """What a step hands to the next one through `generate` in the place of logits: the signal itself.

    A streamer that takes logits asks for them after every step, by `cpu`, so that what it was told of sequences that
    have finished since is at hand.
    """

    def __init__(
        self, signal: Tensor, logits: Callable[[], Tensor], finished: Tensor, before: Conditioning | None
    ) -> None:
        self.signal, self.logits, self.finished = signal, logits, finished
        self.before = None if before is None else before.told
        self.told: Tensor | None = None

    def cpu(self) -> Tensor:
        """The logits `[B, T, V]` that the model's own way would hand on."""
        if self.told is None:
            logits = self.logits().cpu()
            kept = self.finished.cpu()[:, None, None]
            self.told = logits if self.before is None else torch.where(kept, self.before, logits)
        return self.told


def head_outputs(model: Any, inputs: dict[str, Any], signal: Tensor | None) -> Tensor:
    """`[B, T, V]`, what the head gives before the softcap, for a forward conditioned on `signal` `[B, T, D]`."""
    PENDING.signal = signal
    try:
        hidden = model.model(**inputs).last_hidden_state
    finally:
        PENDING.signal = None
    return model.lm_head(hidden)


class DenoisingStep:
    """The `_denoising_step` of a patched model."""

    def __init__(self, model: nn.Module | None, streamed: bool) -> None:
        self.owner, self.streamed = Owner(model), streamed
        self.tables: dict[tuple[Any, ...], Tensor] = {}
        self.compiled: Callable[..., Tensor] | None = None

    def __reduce__(self) -> Any:
        return DenoisingStep, (self.owner(), self.streamed)

    def __call__(self, **given: Any) -> tuple[Tensor, Tensor, Any, Tensor]:
        """As transformers' own, which `generate` calls with all arguments by name."""
        model: Any = self.owner()
        return self.take(model, **given) if knows(model, given) else type(model)._denoising_step(model, **given)

    def take(
        self,
        model: Any,
        *,
        decoder_forward: Callable[..., Any],
        current_canvas: Tensor,
        argmax_canvas: Tensor,
        input_ids: Tensor,
        decoder_position_ids: Tensor,
        self_conditioning_logits: Any,
        mask_mapping: Any,
        finished_denoising: Tensor,
        cur_step: int,
        sampler: Any,
        logits_processor: Any,
        diffusion_stopping_criteria: Any,
        **passed: Any,
    ) -> tuple[Tensor, Tensor, Any, Tensor]:
        """One step; `passed` are the cache, by whatever name, and what a user gave for the forward."""
        inputs = {
            "decoder_input_ids": current_canvas,
            "decoder_attention_mask": mask_mapping,
            "decoder_position_ids": decoder_position_ids,
            **passed,
        }
        before = self_conditioning_logits
        outputs, softcap = self.forward(model, decoder_forward, inputs, before)
        outputs = readable(outputs)
        schedule, processors = folded(logits_processor)
        if processors:
            untempered = self.numbers(sampler.entropy_bound, None, cur_step, outputs.device)
            logits = processed_logits(outputs, untempered, softcap, torch.float32)
            at = torch.tensor(cur_step, dtype=torch.int32, device=logits.device)
            outputs, softcap = readable(processors(input_ids, logits, cur_step=at)), 0.0
        numbers = self.numbers(sampler.entropy_bound, schedule, cur_step, outputs.device)
        seeds = torch.randint(2**63 - 1, current_canvas.shape[:1], dtype=torch.int64, device=outputs.device)
        out = step(outputs, current_canvas.long(), argmax_canvas, finished_denoising, numbers, seeds, softcap)
        sampler.accepted_token_mask = out.accepted

        conditioning = self.conditioning(model, outputs, softcap, numbers, out.lse, finished_denoising, before, passed)
        finished = finished_denoising
        criterion = diffusion_stopping_criteria
        if criterion is not None:
            stopped, criterion.argmax_canvas_history = stops(
                out, criterion.stability_threshold, criterion.confidence_threshold, criterion.argmax_canvas_history
            )
            finished = finished | stopped
        return out.canvas, out.argmax, conditioning, finished

    def conditioning(
        self,
        model: Any,
        outputs: Tensor,
        softcap: float,
        numbers: Tensor,
        lse: Tensor,
        finished: Tensor,
        before: Any,
        passed: dict[str, Any],
    ) -> Any:
        """What the next forward is conditioned on; that of sequences that had `finished` is the one of `before`."""
        embedding = model.model.decoder.embed_tokens
        weight, dtype = embedding.weight, embedding.weight.dtype
        logits_of = partial(processed_logits, outputs, numbers, softcap, dtype, finished)
        plain = type(weight) is nn.Parameter and dtype in DTYPES and weight.device == outputs.device
        if not (self.streamed and plain and passed.get("self_conditioning_mask") is None):
            return logits_of(before if isinstance(before, Tensor) and before.dtype == dtype else None)
        earlier = before if isinstance(before, Conditioning) else None
        # As the model has it, in its dtype.
        scale = torch.tensor(embedding.scalar_embed_scale, dtype=dtype, device="cpu").item()
        kept = None if earlier is None else earlier.signal
        signal = soft_embeddings(outputs, lse, numbers, weight, softcap, scale, finished, kept)
        return Conditioning(signal, partial(logits_of, None), finished, earlier)

    def forward(
        self, model: Any, decoder_forward: Callable[..., Any], inputs: dict[str, Any], conditioning: Any
    ) -> tuple[Tensor, float]:
        """The head's outputs `[B, T, V]`, and the softcap that they have still to get, 0 for none."""
        torch.compiler.cudagraph_mark_step_begin()
        signal = conditioning.signal if isinstance(conditioning, Conditioning) else None
        inputs["self_conditioning_logits"] = None if isinstance(conditioning, Conditioning) else conditioning
        own = "forward" not in vars(model) and type(model).forward.__qualname__ == f"{PUBLISHED}.forward"
        if own and decoder_forward == model.forward:
            return head_outputs(model, inputs, signal), model.final_logit_softcapping
        if own and decoder_forward is vars(model).get("_compiled_decoder_forward"):
            if self.compiled is None:
                self.compiled = torch.compile(head_outputs, mode="reduce-overhead", fullgraph=True)
            return self.compiled(model, inputs, signal), model.final_logit_softcapping
        # Somebody's own forward, accelerate's for one, has the cap inside.
        PENDING.signal = signal
        try:
            return decoder_forward(**inputs).logits, 0.0
        finally:
            PENDING.signal = None

    def numbers(self, bound: float, schedule: Any, cur_step: int, device: torch.device) -> Tensor:
        """`[1, 2]` float64, the bound and the temperature of a step; made for all steps at once, and kept."""
        at, steps, low, high = 0, 1, 1.0, 1.0
        if schedule is not None:
            at, steps, low, high = cur_step, schedule.max_denoising_steps, schedule.t_min, schedule.t_max
        key = (bound, device, steps, low, high)
        table = self.tables.get(key)
        if table is None or at >= len(table):
            # In float32, as the schedule computes it.
            t = low + (high - low) * (torch.arange(max(steps, at) + 1, dtype=torch.int32, device="cpu") / steps)
            table = torch.stack((torch.full_like(t, bound, dtype=torch.float64), t.double()), dim=1).to(device)
            self.tables[key] = table
        return table[at : at + 1]
