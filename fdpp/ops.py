"""Operators: tensors in, tensors out, the same call on CPU and GPU.

`select` is registered with PyTorch as `fdpp::select`, so `torch.compile(fullgraph=True)` and CUDA graphs hold it;
outside of compilation its implementation is called directly, since the dispatcher costs more than the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp import cpu, gpu
from fdpp.reference import Selection
from fdpp.rules import Rule

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_POSITIONS = 1024


def pack(rule: Rule, device: torch.device | str | None = None) -> Tensor:
    """The rule's numbers as the operators take them: `[1, 3]` float64, `(p0, p1, calibration)`.

    Float64 and a tensor, because a scalar argument of a kernel would be rounded to float32.
    """
    return torch.tensor([[*rule.params(), rule.calibration]], dtype=torch.float64, device=device)


def check(logits: Tensor, tokens: Tensor, active: Tensor | None, seeds: Tensor | None) -> None:
    """Raise `ValueError` that names the argument, what was expected and what came."""
    if logits.dim() != 3 or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits: expected [B, T, V] in bfloat16, float16 or float32, got {list(logits.shape)} in {logits.dtype}"
        )
    B, T, V = logits.shape
    if T > MAX_POSITIONS or V == 0:
        raise ValueError(f"logits: expected at most {MAX_POSITIONS} positions and a vocabulary, got T={T}, V={V}")
    expect("tokens", tokens, (B, T), torch.int64, logits.device)
    if active is not None:
        expect("active", active, (B, T), torch.bool, logits.device)
    if seeds is not None:
        expect("seeds", seeds, (B,), torch.int64, logits.device)


def expect(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise `ValueError` unless the argument `name` has this shape, dtype and device."""
    if tuple(value.shape) != shape or value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{name}: expected {list(shape)} {dtype} on {device}, "
            f"got {list(value.shape)} {value.dtype} on {value.device}"
        )


def check_temperature(temperature: float) -> None:
    """Raise `ValueError` unless `temperature` is a finite number of at least 0."""
    if not isinstance(temperature, (int, float)) or not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature!r}")


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
    """`fdpp::select`. `params` is `pack(rule)`, or one such row per sequence `[B, 3]`; `rule` is `Rule.key()`."""
    return cpu.select(logits, tokens, active, params, rule, mask_id, temperature, seeds)


@select_op.register_kernel("cuda")
def _(logits, tokens, active, params, rule, mask_id, temperature, seeds):  # type: ignore[no-untyped-def]
    return gpu.select(logits, tokens, active, params, rule, mask_id, temperature, seeds)


@select_op.register_fake
def _(logits, tokens, active, params, rule, mask_id, temperature, seeds):  # type: ignore[no-untyped-def]
    return gpu.empty_outputs(tokens)


def select_packed(
    logits: Tensor,
    tokens: Tensor,
    active: Tensor | None,
    params: Tensor,
    rule: Rule,
    mask_id: int,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
) -> Selection:
    """`select` with the rule's numbers already packed: no tensor is made but the outputs."""
    check(logits, tokens, active, seeds)
    if temperature > 0.0 and seeds is None:
        raise ValueError(f"temperature={temperature} needs seeds, an int64 tensor [B]")
    if logits.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits: expected a CPU or CUDA tensor, got {logits.device}")
    implementation = cpu.select if logits.device.type == "cpu" else gpu.select
    run = select_op if torch.compiler.is_compiling() else implementation
    # A choice has no gradient, and logits of a model that is not run under no_grad record one.
    selection = Selection(*run(logits.detach(), tokens, active, params, rule.key(), mask_id, temperature, seeds))
    return extended(selection, tokens, active, rule, mask_id)


def select_rows(
    rows: Tensor, tokens: Tensor, params: Tensor, rule: Rule, mask_id: int, temperature: float, seeds: Tensor | None
) -> Selection:
    """`select_packed` on a CPU, given the logits of the masked positions alone, `rows` `[m, V]` in their order."""
    selection = Selection(*cpu.select(rows, tokens, None, params, rule.key(), mask_id, temperature, seeds))
    return extended(selection, tokens, None, rule, mask_id)


def extended(selection: Selection, tokens: Tensor, active: Tensor | None, rule: Rule, mask_id: int) -> Selection:
    """`selection` with what the rule's `extend` adds."""
    if type(rule).extend is Rule.extend or not tokens.shape[1]:
        return selection
    candidate = cpu.candidates(tokens, mask_id, active)
    committed = rule.extend(selection.confidence, candidate, selection.committed)
    return recommit(selection, tokens, committed, mask_id, active)


def recommit(
    selection: Selection, tokens: Tensor, committed: Tensor, mask_id: int, active: Tensor | None = None
) -> Selection:
    """`selection` of the step from `tokens`, with another commit mask `[B, T]`."""
    candidate = cpu.candidates(tokens, mask_id, active)
    # Not by `_replace`, which PyTorch 2.11's compiler cannot follow.
    return Selection(
        tokens=torch.where(committed, selection.proposal, tokens),
        proposal=selection.proposal,
        confidence=selection.confidence,
        committed=committed,
        remaining=(candidate & ~committed).sum(1, dtype=torch.int32),
        nonfinite=selection.nonfinite,
    )


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

    Proposal: argmax of the logits, the mask id left out; with `temperature` T > 0 argmax(l + T * Gumbel). Confidence:
    softmax(l) at the proposal, the mask id in the normaliser. Sorted profile and rule: see `fdpp.rules`. Equal
    confidences: the lower position first; equal logits: the lower id. Rows with NaN, +inf or nothing but -inf come last
    and commit only where no other masked position is left, so that a loop over steps always ends.

    Args:
        logits: `[B, T, V]` bfloat16, float16 or float32, T at most 1024, rows of any stride. Rows of positions that
            are not masked and active are never read.
        tokens: `[B, T]` int64.
        rule: a `fdpp.rules.Rule`.
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
    params, seeds = packed(rule, temperature, seed, logits)
    return select_packed(logits, tokens, active, params, rule, mask_id, temperature, seeds)


def packed(rule: Rule, temperature: float, seed: int | Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """`pack(rule)` and the noise streams for `rows` `[B, ...]` on their device; raises what `select` does."""
    if not isinstance(rule, Rule):
        raise ValueError(f"rule: expected a fdpp.Rule such as fdpp.Frechet(0.25), got {rule!r}")
    check_temperature(temperature)
    if temperature > 0.0 and seed is None:
        raise ValueError(f"temperature={temperature} samples: expected a seed")
    seeds = None
    if temperature > 0.0:
        seeds = seed if isinstance(seed, Tensor) else streams(seed or 0, rows.shape[0], rows.device)
    return pack(rule, rows.device), seeds


def streams(seed: int, B: int, device: torch.device) -> Tensor:
    """The noise streams of B sequences, `[B]` int64: seed, seed + 1, ..."""
    return seed + torch.arange(B, dtype=torch.int64, device=device)
