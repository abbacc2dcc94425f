"""SGLang plugin: rules as dLLM algorithms, `--dllm-algorithm FrechetProfile --dllm-algorithm-config settings.yaml`.

SGLang finds `register` through the entry point group `sglang.srt.plugins` and calls it in every process it starts.
Written against the `DllmAlgorithm` of SGLang 0.5.23, whose loops (synchronous and first-done-first-out) run unchanged.
What a rule remembers of a block is in the state that they carry for every request.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdpp.decoding.choice import everywhere
from fdpp.integrations.extras import install
from fdpp.rules import (
    Editing,
    EntropyBound,
    EntropySum,
    Factor,
    Frechet,
    Hierarchy,
    Leftmost,
    LeftmostRun,
    LocalLeap,
    Proposed,
    Quota,
    Rule,
    Threshold,
    ThresholdLeftmost,
    ThresholdQuota,
)
from fdpp.rules.editing import Looks
from fdpp.selection import candidates
from fdpp.step.module import DenoisingStep
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms

try:
    from sglang.srt.dllm.algorithm import algo_name_to_cls
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm
    from sglang.srt.dllm.config import DllmConfig
    from sglang.srt.environ import envs
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"this needs SGLang (module {error.name}), which is not installed: {install('sglang')}"
    ) from error

logger = logging.getLogger(__name__)

SERVED = (
    *(Frechet, Threshold, Factor, EntropyBound, LocalLeap, Hierarchy, Quota),
    *(ThresholdQuota, ThresholdLeftmost, EntropySum, Leftmost, LeftmostRun, Editing),
)
READ_BY_SGLANG = {"block_size"}
"""Settings of `--dllm-algorithm-config` that `DllmConfig` reads for every algorithm."""


def rule_from(rule: type[Rule], settings: dict[str, Any]) -> Rule:
    """`rule` with the fields that `settings`, the YAML mapping, names.

    Raises:
        ValueError: a setting that is no field of the rule, or a value out of its range.
    """
    known = [field.name for field in dataclasses.fields(rule)]  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in settings if name not in READ_BY_SGLANG.union(known))
    if unknown:
        raise ValueError(f"{rule.__name__}: unknown settings {unknown}, expected some of {known} or block_size")
    return rule(**{name: settings[name] for name in known if name in settings})


class RuleAlgorithm(DllmAlgorithm):
    """A rule as SGLang runs it: one `DenoisingStep` per forward pass, nothing carried from step to step.

    Every rank of a tensor-parallel group decides for itself; the step is deterministic, so that the same gathered
    logits lead all of them to the same tokens.
    """

    rule: ClassVar[type[Rule]]

    def __init__(self, config: DllmConfig) -> None:
        super().__init__(config)
        self.denoise = DenoisingStep(rule_from(self.rule, config.algorithm_config), config.mask_id)
        self.warned = False

    @classmethod
    def configure_server_args(cls, server_args: Any) -> None:
        """Refuse wrong settings at launch, before the model is loaded."""
        cls(DllmConfig.from_server_args(server_args))

    def step(self, forward_batch: Any, full_logits: Tensor, states: list[Any]) -> list[bool]:
        """One denoising step of every request's block, in place in `forward_batch.input_ids` `[B * block_size]`.

        `full_logits` is `[B * block_size, V]`, the blocks one after the other. A block is done when it came in without
        a mask: the forward pass before has then written the keys and values of its final tokens. Only the result is
        read back from the device.
        """
        B, T = forward_batch.batch_size, self.block_size
        prompt = forward_batch.dllm_prompt_mask
        self.denoise.to(full_logits.device)
        out = self.denoise(
            full_logits.view(B, T, full_logits.shape[-1]),
            forward_batch.input_ids.view(B, T),
            None if prompt is None else ~prompt,
        )
        # In place: the loop reads the same tensor, and a captured graph is fed from it.
        forward_batch.input_ids.copy_(out.tokens.view(-1))
        masked = out.remaining + out.committed.sum(1, dtype=torch.int32)
        masks, unusable = torch.stack((masked, out.nonfinite)).tolist()
        if any(unusable):
            self.report(unusable, forward_batch.rids)
        return [count == 0 for count in masks]

    def report(self, unusable: list[int], rids: list[str] | None) -> None:
        """Report the requests whose logits give no token; other requests are not affected.

        As in SGLang's own NaN check: an error if one of its switches is on, else one line in the log.
        """
        hit = [rids[i] if rids else i for i, count in enumerate(unusable) if count]
        message = f"NaN, +inf or nothing but -inf in the logits at {sum(unusable)} masked positions of requests {hit}"
        if envs.SGLANG_ENABLE_NAN_LOGITS_CHECK.get() or envs.SGLANG_ENABLE_ASYNC_ASSERT.get():
            raise RuntimeError(message)
        if not self.warned:
            logger.error("%s. Their tokens are arbitrary. Logged once.", message)
            self.warned = True


class EditingAlgorithm(RuleAlgorithm):
    """`Editing` as SGLang runs it. Of every request's block its state knows

    - `given` `[block_size]` bool, the tokens that it came in with, which never change;
    - `clean`, how many forwards found no mask in it;
    - `over`, whether it has changed for the last time, and the next forward writes the keys and values of its tokens.
    """

    def max_steps(self, block_size: int) -> int:
        rule: Any = self.denoise.rule
        return block_size + rule.post + 1

    def init_step_state(self, forward_batch: Any) -> list[Any]:
        given = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size) != self.mask_id
        if forward_batch.dllm_prompt_mask is not None:
            given = given | forward_batch.dllm_prompt_mask
        return [{"given": row, "clean": 0, "over": False} for row in given]

    def step(self, forward_batch: Any, full_logits: Tensor, states: list[Any]) -> list[bool]:
        """As `RuleAlgorithm.step`. A block is done when the forward changed nothing in it and it has no mask left, or
        after the forward that follows its last change.
        """
        B, T, device = forward_batch.batch_size, self.block_size, full_logits.device
        if not B:
            return []
        self.denoise.to(device)
        rule, before = self.denoise.rule, forward_batch.input_ids.view(B, T)
        given = torch.stack([state["given"] for state in states])
        known = [[state["clean"], state["over"]] for state in states]
        counts = torch.tensor(known, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
        clean, over = counts[:, 0], counts[:, 1:].bool()
        # A mask id inside the prompt is a token like any other.
        tokens = torch.where(given & (before == self.mask_id), int(self.mask_id == 0), before)
        candidate = candidates(tokens, self.mask_id)
        clean = torch.where(candidate.any(1), 0, clean + 1)
        terms = Terms(self.denoise.bits.view(torch.float64), rule.tested(), self.mask_id)
        step = everywhere(prefix_step, full_logits.view(B, T, -1), tokens, terms)
        proposed = Proposed(step, tokens, candidate, self.mask_id, Looks(clean), numbers=terms.params, given=given)
        out = rule.decide(proposed)
        changed = out.committed & ~given & ~over
        forward_batch.input_ids.copy_(torch.where(changed, out.tokens, before).view(-1))
        told = torch.stack((out.remaining.long(), changed.sum(1), clean, out.nonfinite.long()))
        remaining, changes, looks, unusable = told.tolist()
        if any(unusable):
            self.report(unusable, forward_batch.rids)
        done = []
        for state, left, changed_now, found in zip(states, remaining, changes, looks, strict=True):
            done.append(state["over"] or (left == 0 and changed_now == 0))
            state["clean"], state["over"] = found, state["over"] or left == 0
        return done


def register(*rules: type[Rule]) -> None:
    """Add an algorithm for each rule, by default `SERVED`, to SGLang's registry, named as the rule plus "Profile".

    The plugin's entry point calls it without arguments. To serve a rule of your own, a dataclass, add an entry point
    that calls it with the rule's class.

    Raises:
        ValueError: SGLang already has another algorithm of that name.
    """
    for rule in rules or SERVED:
        name = f"{rule.__name__}Profile"
        present = algo_name_to_cls.get(name)
        if present is not None and getattr(present, "rule", None) is not rule:
            raise ValueError(f"{name}: SGLang already has an algorithm of this name, {present.__module__}.{name}")
        base = EditingAlgorithm if issubclass(rule, Editing) else RuleAlgorithm
        algo_name_to_cls[name] = type(name, (base,), {"rule": rule, "__doc__": rule.__doc__})
