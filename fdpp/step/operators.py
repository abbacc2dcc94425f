"""Operators: tensors in, tensors out, the same call on CPU and GPU.

`select` is registered with PyTorch as `fdpp::select`, so `torch.compile(fullgraph=True)` and CUDA graphs hold it;
outside of compilation its implementation is called directly, since the dispatcher costs more than the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.rules import Proposed, Rule, Threshold
from fdpp.selection import MAX_POSITIONS, Selection, candidates, check
from fdpp.step import cpu, gpu
from fdpp.step.terms import Terms, terms_of


@torch.library.custom_op("fdpp::select", mutates_args=(), device_types="cpu")
def select_op(
    logits: Tensor,
    tokens: Tensor,
    active: Tensor | None,
    params: Tensor,
    rule: str,
    mask_id: int,
    temperature: float,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`fdpp::select`; the last five arguments are the fields of `Terms`."""
    return cpu.select(logits, tokens, active, Terms(params, rule, mask_id, temperature, seeds))


@select_op.register_kernel("cuda")
def _(logits, tokens, active, params, rule, mask_id, temperature, seeds):  # type: ignore[no-untyped-def]
    return gpu.select(logits, tokens, active, Terms(params, rule, mask_id, temperature, seeds))


@select_op.register_fake
def _(logits, tokens, active, params, rule, mask_id, temperature, seeds):  # type: ignore[no-untyped-def]
    return gpu.empty_outputs(tokens)


def prefix_step(logits: Tensor, tokens: Tensor, active: Tensor | None, terms: Terms) -> Selection:
    """The step that the rule's prefix test decides; no tensor is made but the outputs."""
    check(logits, tokens, active, terms.seeds)
    check_seeds(terms)
    if logits.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits: expected a CPU or CUDA tensor, got {logits.device}")
    # A choice has no gradient, and logits of a model that is not run under no_grad record one.
    logits = logits.detach()
    if torch.compiler.is_compiling():
        return Selection(*select_op(logits, tokens, active, *terms))
    implementation = cpu.select if logits.device.type == "cpu" else gpu.select
    return implementation(logits, tokens, active, terms)


def check_seeds(terms: Terms) -> None:
    if terms.temperature > 0.0 and terms.seeds is None:
        raise ValueError(f"temperature={terms.temperature} samples: expected seeds, an int64 tensor [B]")


def confidence(logits: Tensor, mask_id: int) -> Tensor:
    """The confidence a masked position with these `logits` `[N, n, V]` would have: float32 `[N, n]`, n of any size."""
    tokens = torch.full(logits.shape[:2], mask_id, dtype=torch.int64, device=logits.device)
    # Any rule that ranks by confidence: what it commits is not read, nor are its numbers.
    params = torch.zeros(1, 3, dtype=torch.float64, device=logits.device)
    terms = Terms(params, Threshold.key(), mask_id)
    parts = zip(logits.split(MAX_POSITIONS, 1), tokens.split(MAX_POSITIONS, 1), strict=True)
    return torch.cat([prefix_step(rows, masks, None, terms).confidence for rows, masks in parts], dim=1)


def decided(step: Selection, tokens: Tensor, active: Tensor | None, rule: Rule, mask_id: int) -> Selection:
    """The decision of `rule` after the prefix test's `step`, outside of a decode: it has no memory and no block."""
    if type(rule).decide is Rule.decide or not tokens.shape[1]:
        return step
    return rule.decide(Proposed(step, tokens, candidates(tokens, mask_id, active), mask_id))


def select(
    logits: Tensor,
    tokens: Tensor,
    *,
    rule: Rule,
    mask_id: int,
    active: Tensor | None = None,
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
) -> Selection:
    """One denoising step: propose a token for every masked position and commit those that `rule` allows together.

    Proposal: argmax of the logits, the mask id left out; with `temperature` T > 0 drawn from softmax(l / T), the mask
    id left out (`fdpp.step.draw`). Confidence: softmax(l) at the proposal, the mask id in the normaliser. Profile and
    rule: see `fdpp.rules.rule`. Equal confidences: the lower position first; equal logits: the lower id. Rows with NaN,
    +inf or nothing but -inf come last and commit only where no other masked position is left, so that a loop over steps
    always ends.

    Args:
        logits: `[B, T, V]` bfloat16, float16 or float32, T at most 1024, rows of any stride. Rows of positions that
            are not masked and active are never read.
        tokens: `[B, T]` int64.
        rule: a `fdpp.Rule`. One that needs earlier forwards or attention falls back to what it sees here.
        mask_id: the id that marks a masked position.
        active: `[B, T]` bool, the masked positions that may commit; None: all of them.
        temperature: 0 for greedy proposals.
        seed: an int (sequence b draws from the stream seed + b) or an int64 tensor `[B]` of streams; required with a
            temperature.

    Returns:
        `Selection`: tokens, proposal, confidence, committed, remaining, nonfinite.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a negative temperature.
    """
    step = prefix_step(logits, tokens, active, terms_of(rule, mask_id, temperature, seed, logits))
    return decided(step, tokens, active, rule, mask_id)
