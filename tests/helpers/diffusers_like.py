"""Stand-ins for diffusers' schedulers and pipelines for text, where that is not installed.

They have the names, arguments and returned values of diffusers 0.42, and its formulas written anew: position by
position, in float64. The released package itself is tested against by `make diffusers-check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def values(output: Any, return_dict: bool) -> Any:
    return output if return_dict else tuple(vars(output).values())


class Scheduler:
    """What both have of diffusers' mixins."""

    config: Any

    @classmethod
    def from_config(cls, config: Any) -> Any:
        return cls(**vars(config))

    def distribution(self, logits: Tensor) -> Tensor:
        return logits.double().softmax(-1)

    def drawn(self, p: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.multinomial(p.flatten(0, -2), num_samples=1, generator=generator).view(p.shape[:-1])


@dataclass
class EntropyBoundSchedulerOutput:
    prev_sample: Tensor
    accepted_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    pred_logits: Tensor


class EntropyBoundScheduler(Scheduler):
    def __init__(
        self, entropy_bound: float = 0.1, t_max: float = 0.8, t_min: float = 0.4, num_inference_steps: int = 32
    ) -> None:
        self.config = SimpleNamespace(
            entropy_bound=entropy_bound, t_max=t_max, t_min=t_min, num_inference_steps=num_inference_steps
        )
        self.set_timesteps(num_inference_steps)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, device=device)

    def _sample_from_logits(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        p = self.distribution(logits)
        tokens = self.drawn(p, generator)
        return tokens, p.gather(-1, tokens[..., None])[..., 0].float()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        entropy_bound: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        bound = self.config.entropy_bound if entropy_bound is None else entropy_bound
        fraction = (self.num_inference_steps - int(timestep)) / self.num_inference_steps
        x = model_output / (self.config.t_min + (self.config.t_max - self.config.t_min) * fraction)
        tokens, probs = self._sample_from_logits(x, generator)
        p = self.distribution(x)
        accepted = torch.zeros(sample.shape, dtype=torch.bool)
        for b, row in enumerate((-torch.special.xlogy(p, p).sum(-1)).tolist()):
            total = 0.0
            for t in sorted(range(len(row)), key=row.__getitem__):
                accepted[b, t] = total <= bound
                total += row[t]
        noise = torch.randint(x.shape[-1], sample.shape, generator=generator)
        out = EntropyBoundSchedulerOutput(torch.where(accepted, tokens, noise), accepted, tokens, probs, x)
        return values(out, return_dict)


@dataclass
class BlockRefinementSchedulerOutput:
    prev_sample: Tensor
    transfer_index: Tensor
    editing_transfer_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    pred_logits: Tensor


class BlockRefinementScheduler(Scheduler):
    def __init__(
        self,
        block_length: int = 32,
        num_inference_steps: int = 32,
        threshold: float = 0.95,
        editing_threshold: float | None = None,
        minimal_topk: int = 1,
    ) -> None:
        self.config = SimpleNamespace(
            block_length=block_length,
            num_inference_steps=num_inference_steps,
            threshold=threshold,
            editing_threshold=editing_threshold,
            minimal_topk=minimal_topk,
        )
        self.num_inference_steps = num_inference_steps
        self._transfer_schedule: Tensor | None = None
        self._committed: Tensor | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None, block_length: int | None = None) -> None:
        T, self.num_inference_steps = block_length or self.config.block_length, num_inference_steps
        base, larger = divmod(T, num_inference_steps)
        self._transfer_schedule = torch.tensor([base + (i < larger) for i in range(num_inference_steps)])
        self._committed = None

    def _sample_from_logits(
        self, logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        if temperature:
            logits = logits if temperature == 1.0 else logits / temperature
            if top_k:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
            p = self.distribution(logits)
            tokens = self.drawn(p, generator)
        else:
            p, tokens = self.distribution(logits), logits.argmax(-1)
        return tokens, p.gather(-1, tokens[..., None])[..., 0].float()

    def step(
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
        assert top_p is None
        tau = self.config.threshold if threshold is None else threshold
        edit = self.config.editing_threshold if editing_threshold is None else editing_threshold
        t = temperature if sampling_method in ("auto", "multinomial") else 0.0
        tokens, c = self._sample_from_logits(model_output, t, top_k, generator)
        (B, T), step = sample.shape, int(timestep)
        chosen, edited = torch.zeros(2, B, T, dtype=torch.bool)
        if mask_token_id is None:
            if step == 0 or self._committed is None or self._committed.shape != sample.shape:
                self._committed = torch.zeros_like(chosen)
            due = -(-(step + 1) * T // self.num_inference_steps)
            quota = [max(due - int(done), 0) for done in self._committed.sum(1)]
            masked, fixed = ~self._committed, torch.zeros(T, dtype=torch.bool)
        else:
            schedule = self._transfer_schedule
            quota = None if schedule is None else [int(schedule[min(step, len(schedule) - 1)])] * B
            masked, fixed = sample == mask_token_id, torch.zeros(T, dtype=torch.bool)
            fixed = fixed if prompt_mask is None else prompt_mask
            edit = edit if edit and edit > 0 else None
        for b in range(B):
            open_ = masked[b].nonzero().flatten().tolist()
            for place, position in enumerate(sorted(open_, key=lambda i: -float(c[b, i]))):
                chosen[b, position] = quota is not None and (place < quota[b] or bool(c[b, position] > tau))
            for position in range(T):
                other = bool(tokens[b, position] != sample[b, position]) and not masked[b, position]
                edited[b, position] = edit is not None and other and not fixed[position] and c[b, position] > edit
        tokens_after = torch.where(chosen | edited, tokens, sample)
        if mask_token_id is None:
            self._committed = self._committed | chosen
            noise = torch.randint(model_output.shape[-1], sample.shape, generator=generator)
            tokens_after = torch.where(self._committed, tokens_after, noise)
        return values(
            BlockRefinementSchedulerOutput(tokens_after, chosen, edited, tokens, c, model_output), return_dict
        )


class DiscreteDDIMScheduler(Scheduler):
    def step(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        raise NotImplementedError


class LLaDA2Pipeline:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


class DiffusionGemmaPipeline(LLaDA2Pipeline):
    pass
