"""SGLang plugin: rules as dLLM algorithms, `--dllm-algorithm FrechetProfile --dllm-algorithm-config settings.yaml`.

SGLang finds `register` through the entry point group `sglang.srt.plugins` and calls it in every process it starts.
Written against the `DllmAlgorithm` of SGLang 0.5.23, whose loops (synchronous and first-done-first-out) run unchanged.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdpp.integrations.extras import install
from fdpp.rules import (
    EntropyBound,
    EntropySum,
    Factor,
    Frechet,
    Leftmost,
    LeftmostRun,
    LocalLeap,
    Quota,
    Rule,
    Threshold,
    ThresholdLeftmost,
    ThresholdQuota,
)
from fdpp.step.module import DenoisingStep

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
    *(Frechet, Threshold, Factor, EntropyBound, LocalLeap, Quota),
    *(ThresholdQuota, ThresholdLeftmost, EntropySum, Leftmost, LeftmostRun),
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
        algo_name_to_cls[name] = type(name, (RuleAlgorithm,), {"rule": rule, "__doc__": rule.__doc__})
