"""fdpp's fused steps in diffusers' schedulers for text.

`EntropyBoundScheduler` and `BlockRefinementScheduler` (diffusers 0.42) are recognised by the name of the class and by
the parameters of its `step`. The instance gets a `step` of its own; of a `DiffusionGemmaPipeline` or a `LLaDA2Pipeline`
it is the instance that the pipeline has then. A scheduler that the pipeline is given later has its original.

A patched `step` takes and returns what the original does, from one read of the logits. Nothing is read on the
host, which the original does for every sequence where there is a mask id.

- `EntropyBoundScheduler`: `fdpp.denoise_canvas` on x = logits / temperature, which `pred_logits` is as well.
- `BlockRefinementScheduler`, without a mask id too: proposals and confidences of all positions by the step of
  `fdpp.select`, the mask id like any other, as the original has it. The scheduler's `_committed` stays its own.

It differs where the original leaves the choice open, or by rounding:

- What is drawn. Every step takes its seeds from the `generator`, or from torch's own, so the same seed gives the same
  tokens; they are others than those of `torch.multinomial`, of the same distribution. Greedy tokens are equal, and so
  are the ids that take the place of uncommitted ones beside greedy tokens.
- Equal confidences, or equal entropies: the lower position first. Equal logits: the lower id.
- Confidences and entropies are float32 sums of the logits as given. The original computes the entropies of bfloat16
  logits in bfloat16. One as close to a bound as that may be decided otherwise.
- The `sampled_probs` of `EntropyBoundScheduler` are exp(x - lse), whose relative error grows with |lse|: 4e-6 at 75.
- NaN and +inf in a position's logits: its confidence is 0. Under `EntropyBoundScheduler` it is never accepted, and its
  `sampled_probs` is NaN. The original raises where it draws.

Calls that the fused step cannot reproduce go to the original:

- active `top_k` or `top_p` of `BlockRefinementScheduler` where it samples;
- logits that record a gradient, since `sampled_probs` has one there;
- logits in float64, more than 1024 positions, a device that is neither a CPU nor CUDA, and numbers or tensors of other
  kinds than the documented ones.

A deep copy or a pickled scheduler is patched as well, on its own; one from `from_config` is not. A shallow copy has the
`step` of the scheduler that it was made of, with that one's state.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdpp.rules import Threshold
from fdpp.selection import DTYPES, MAX_POSITIONS, is_int, is_number, rank
from fdpp.step.canvas.operator import denoise_canvas
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms

PIPELINES = ("DiffusionGemmaPipeline", "LLaDA2Pipeline")

BECOMES = "fdpp's fused step"


class Step:
    """The `step` of a patched scheduler. `__call__` has the parameters and the defaults of the original."""

    published: ClassVar[str]
    """The name of the scheduler's class."""
    own: ClassVar[tuple[str, ...]] = ("step", "_sample_from_logits")
    """Its methods that this stands for."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __repr__(self) -> str:
        return f"<{BECOMES} for a {type(self.scheduler).__name__}>"

    def output(self, values: tuple[Any, ...], return_dict: bool) -> Any:
        """`values` as the original returns them."""
        if not return_dict:
            return values
        return output_of(published_class(type(self.scheduler), self.published))(*values)


class EntropyBoundStep(Step):
    published = "EntropyBoundScheduler"

    def __call__(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        entropy_bound: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        scheduler = self.scheduler
        bound = scheduler.config.entropy_bound if entropy_bound is None else entropy_bound
        low, high, steps = scheduler.config.t_min, scheduler.config.t_max, scheduler.num_inference_steps
        temperature = low + (high - low) * ((steps - int(timestep)) / steps)
        if not (fits(model_output, sample) and in_range(bound, 0.0) and in_range(temperature, 0.0) and temperature > 0):
            return type(scheduler).step(
                scheduler,
                model_output,
                timestep,
                sample,
                entropy_bound=entropy_bound,
                generator=generator,
                return_dict=return_dict,
            )
        x = model_output / temperature
        out = denoise_canvas(x, sample, bound=bound, temperature=1.0, seed=seeds_of(sample, generator))
        probability = (x.gather(2, out.sample[..., None])[..., 0].float() - out.lse).exp()
        return self.output((out.canvas, out.accepted, out.sample, probability, x), return_dict)


class BlockRefinementStep(Step):
    published = "BlockRefinementScheduler"

    def __call__(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        config = self.scheduler.config
        tau = config.threshold if threshold is None else threshold
        edit = config.editing_threshold if editing_threshold is None else editing_threshold
        sampled = sampling_method == "multinomial" or (sampling_method == "auto" and temperature != 0.0)
        sampled = sampled and temperature != 0.0
        known = (
            fits(model_output, sample)
            and in_range(temperature, 0.0)
            and not (sampled and filters(top_p, top_k, model_output.shape[2]))
            and is_number(tau)
            and (edit is None or is_number(edit))
            and (mask_token_id is None or is_int(mask_token_id))
            and (prompt_mask is None or (prompt_mask.dtype, prompt_mask.shape) == (torch.bool, sample.shape[1:]))
        )
        if not known:
            return type(self.scheduler).step(
                self.scheduler,
                model_output,
                timestep,
                sample,
                mask_token_id=mask_token_id,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                sampling_method=sampling_method,
                threshold=threshold,
                editing_threshold=editing_threshold,
                minimal_topk=minimal_topk,
                prompt_mask=prompt_mask,
                generator=generator,
                return_dict=return_dict,
            )
        # The confidence, too, is that at the temperature.
        logits = model_output / temperature if sampled and temperature != 1.0 else model_output
        proposal, c = proposed(logits, seeds_of(sample, generator) if sampled else None)
        if mask_token_id is None:
            chosen, edited = self.of_noise(c, proposal != sample, int(timestep), tau, edit)
            random = torch.randint(
                model_output.shape[2], sample.shape, generator=generator, dtype=torch.int64, device=sample.device
            )
            kept = torch.where(self.scheduler._committed, sample, random)
        else:
            masked = sample == mask_token_id
            chosen, edited = self.of_masks(c, proposal != sample, int(timestep), tau, edit, masked, prompt_mask)
            kept = sample
        tokens = torch.where(chosen | edited, proposal, kept)
        return self.output((tokens, chosen, edited, proposal, c, model_output), return_dict)

    def of_masks(
        self,
        c: Tensor,
        other: Tensor,
        step: int,
        tau: float,
        edit: float | None,
        masked: Tensor,
        prompt_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Which masks commit, and which tokens change, `[B, T]`, by confidences and whether the proposal is `other`."""
        schedule = self.scheduler._transfer_schedule
        chosen = torch.zeros_like(masked)
        if schedule is not None:
            quota = schedule[min(step, len(schedule) - 1)].to(c.device)
            best = rank(c.masked_fill(~masked, -torch.inf), descending=True) < quota
            chosen = masked & (best | (c > tau))
        if edit is None or edit <= 0.0:
            return chosen, torch.zeros_like(masked)
        edited = ~masked & other & (c > edit)
        return chosen, edited if prompt_mask is None else edited & ~prompt_mask

    def of_noise(self, c: Tensor, other: Tensor, step: int, tau: float, edit: float | None) -> tuple[Tensor, Tensor]:
        """As `of_masks`, without a mask id: the scheduler remembers what it has committed, and then these as well."""
        scheduler, T = self.scheduler, c.shape[1]
        before = scheduler._committed
        if step == 0 or before is None or before.shape != c.shape:
            before = torch.zeros_like(other)
        # What is owed of a block whose positions are shared out evenly, rounded up.
        due = ((step + 1) * T + scheduler.num_inference_steps - 1) // scheduler.num_inference_steps
        best = rank(c.masked_fill(before, -torch.inf), descending=True) < due - before.sum(1, keepdim=True)
        chosen = ~before & (best | (c > tau))
        scheduler._committed = before | chosen
        edited = torch.zeros_like(before) if edit is None else before & other & (c > edit)
        return chosen, edited


STEPS: tuple[type[Step], ...] = (EntropyBoundStep, BlockRefinementStep)

SUPPORTED = f"a {' or '.join(step.published for step in STEPS)} of diffusers, or a {' or '.join(PIPELINES)} with one"


def fits(logits: Tensor, sample: Tensor) -> bool:
    """Whether fdpp's steps take these logits `[B, T, V]` and tokens `[B, T]`."""
    return (
        logits.dim() == 3
        and logits.dtype in DTYPES
        and logits.numel() > 0
        and sample.dtype == torch.int64
        and sample.shape == logits.shape[:2]
        and sample.shape[1] <= MAX_POSITIONS
        and sample.device == logits.device
        and logits.device.type in ("cpu", "cuda")
        and not (logits.requires_grad and torch.is_grad_enabled())
    )


def in_range(value: Any, least: float) -> bool:
    """Whether `value` is a finite number of at least `least`."""
    return is_number(value) and least <= value < float("inf")


def filters(top_p: float | None, top_k: int | None, V: int) -> bool:
    """Whether these leave out any of V ids. What the original refuses counts."""
    return (top_p is not None and not top_p >= 1.0) or (top_k is not None and 0 < top_k < V)


def seeds_of(sample: Tensor, generator: torch.Generator | None) -> Tensor:
    """A stream for every sequence of `sample`, `[B]`."""
    return torch.randint(2**63 - 1, sample.shape[:1], generator=generator, dtype=torch.int64, device=sample.device)


def proposed(logits: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
    """A token of every position, the most likely one without `seeds`, and its probability, both `[B, T]`."""
    B, T, _ = logits.shape
    # Every position is a mask of an id that the vocabulary does not have, so that none is left out.
    masks = torch.full((B, T), -1, dtype=torch.int64, device=logits.device)
    # Any rule that ranks by confidence: what it commits is not read, nor are its numbers.
    params = torch.zeros(1, 3, dtype=torch.float64, device=logits.device)
    step = prefix_step(logits, masks, None, Terms(params, Threshold.key(), -1, float(seeds is not None), seeds))
    return step.proposal, step.confidence


def names_of(target: Any) -> set[str]:
    return {kind.__name__ for kind in type(target).__mro__}


def scheduler_of(target: Any) -> Any:
    """The scheduler that `target` is, or that it has as a pipeline; None where it is neither."""
    names = names_of(target)
    if not names.isdisjoint(PIPELINES):
        return target.scheduler
    return None if names.isdisjoint(step.published for step in STEPS) else target


def published_class(kind: type, name: str) -> type:
    """The class of that name which `kind` is or derives from."""
    return next(base for base in kind.__mro__ if base.__name__ == name)


def output_of(published: type) -> Any:
    """The class of what its `step` returns; None where it is not found."""
    return getattr(sys.modules.get(published.__module__), f"{published.__name__}Output", None)


def replacements(scheduler: Any) -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    names = names_of(scheduler)
    ours = next((step for step in STEPS if step.published in names), None)
    if ours is None:
        raise ValueError(f"expected {' or '.join(step.published for step in STEPS)}")
    check(scheduler, ours)
    return [("", "step", ours(scheduler))]


def check(scheduler: Any, ours: Any) -> None:
    """Raise `ValueError` unless what `ours` stands for is, in this instance, the published class's."""
    published: Any = published_class(type(scheduler), ours.published)
    for name in ours.own:
        holder = next((kind for kind in type(scheduler).__mro__ if name in vars(kind)), None)
        if name in vars(scheduler) or holder is not published:
            raise ValueError(f"{name}: expected that of {ours.published}, got {getattr(scheduler, name, None)!r}")
    expected, came = ([*inspect.signature(call).parameters.values()][1:] for call in (ours.__call__, published.step))
    if [(p.name, p.kind, p.default) for p in expected] != [(p.name, p.kind, p.default) for p in came]:
        shown = (", ".join(str(p.replace(annotation=p.empty)) for p in parameters) for parameters in (expected, came))
        raise ValueError("step: expected the parameters ({}), got ({})".format(*shown))
    if output_of(published) is None:
        raise ValueError(f"expected {ours.published}Output in {published.__module__}, found none")
