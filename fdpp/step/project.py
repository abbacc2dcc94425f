"""The head and the step in one operator: hidden states and the head's weight in, tokens out, no logits in memory.

At LLaDA's vocabulary the logits of 1024 positions take 259 MB in bfloat16, and the step reads them back; here a program
keeps a tile of them in registers and writes a summary of some 20 bytes. Which way is faster has not been measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fdpp.kernels.decide import Partial
from fdpp.kernels.launch import project_launch
from fdpp.kernels.project import decide_kernel, project_kernel
from fdpp.rules import Rule
from fdpp.selection import DTYPES, MAX_POSITIONS, Selection, candidates
from fdpp.selection import check as check_rows
from fdpp.step import cpu, gpu
from fdpp.step.operators import check_seeds, decided
from fdpp.step.terms import Terms, terms_of

ROWS = 64
"""Rows that the CPU multiplies at a time: 32 MB of float32 logits at LLaDA's vocabulary for a pass over the weight."""


def check(hidden: Tensor, weight: Tensor, tokens: Tensor, active: Tensor | None, seeds: Tensor | None) -> None:
    """Raise `ValueError` that names the argument, what was expected and what came."""
    if hidden.dim() != 3 or hidden.dtype not in DTYPES or hidden.shape[2] == 0:
        raise ValueError(
            f"hidden: expected [B, T, D] in bfloat16, float16 or float32, got {list(hidden.shape)} in {hidden.dtype}"
        )
    if hidden.shape[1] > MAX_POSITIONS:
        raise ValueError(f"hidden: expected at most {MAX_POSITIONS} positions, got T={hidden.shape[1]}")
    D = hidden.shape[2]
    fits = weight.dim() == 2 and weight.shape[1] == D and weight.shape[0] > 0
    if not fits or weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"weight: expected [V, {D}] {hidden.dtype} on {hidden.device}, "
            f"got {list(weight.shape)} {weight.dtype} on {weight.device}"
        )
    # The other arguments have a value per position, whether hidden states or logits stand there.
    check_rows(hidden, tokens, active, seeds)


def project_cpu(hidden: Tensor, weight: Tensor, tokens: Tensor, active: Tensor | None, terms: Terms) -> Selection:
    """`fdpp::project_select` in PyTorch, `ROWS` masked positions at a time; logits are rounded to `hidden`'s dtype."""
    tokens = tokens.contiguous()
    candidate = candidates(tokens, terms.mask_id, active)
    at_once = max(cpu.CHUNK // weight.shape[0], 1)

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for where in candidate.nonzero().split(ROWS):
            b, t = where.unbind(1)
            logits = F.linear(hidden[b, t], weight)
            rows = (part.float() for part in logits.split(at_once))
            yield from zip(b.split(at_once), t.split(at_once), rows, strict=True)

    return cpu.select_parts(parts(), tokens, candidate, terms)


def project_gpu(hidden: Tensor, weight: Tensor, tokens: Tensor, active: Tensor | None, terms: Terms) -> Selection:
    """`fdpp::project_select` in two launches (see `fdpp.kernels.project`), after PyTorch listed the masked rows.

    No host synchronisation, no allocation that depends on data.
    """
    (B, T, D), V, device = hidden.shape, weight.shape[0], hidden.device
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tokens = tokens.contiguous()
    outputs = gpu.empty_outputs(tokens)
    if B == 0 or T == 0:
        outputs.remaining.zero_()
        outputs.nonfinite.zero_()
        return outputs
    candidate = candidates(tokens, terms.mask_id, active).flatten()
    order, count = torch.argsort(~candidate, stable=True), candidate.sum()
    exact = hidden.dtype == torch.float32
    config = project_launch(B, T, V, exact, terms.sampled)
    partial = torch.empty(5, B, T, config.splits, dtype=torch.float32, device=device)
    partial_token = torch.empty(B, T, config.splits, dtype=torch.int32, device=device)
    mask_logit = torch.empty(B, T, dtype=torch.float32, device=device)
    kinds = {"ORDER": terms.order, "SAMPLED": terms.sampled, "SPLITS": config.splits}
    with torch.cuda.device_of(hidden):
        project_kernel[(triton.cdiv(B * T, config.block_r), config.splits)](
            hidden,
            weight,
            order,
            count,
            tokens if terms.seeds is None else terms.seeds.contiguous(),
            Partial(partial, partial_token),
            mask_logit,
            B,
            T,
            V,
            D,
            hidden.stride(0),
            hidden.stride(1),
            weight.stride(0),
            config.split_len,
            terms.mask_id,
            float(terms.temperature),
            **kinds,
            TEMPERED=terms.tempered,
            BLOCK_R=config.block_r,
            BLOCK_V=config.block_v,
            BLOCK_D=config.block_d,
            # Three products of TF32 are as good as one of float32, for which NVIDIA has no matrix instruction.
            PRECISION="tf32x3" if exact and torch.version.hip is None else "ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        decide_kernel[(B,)](
            tokens,
            tokens if active is None else active.contiguous(),
            terms.params,
            outputs,
            Partial(partial, partial_token),
            mask_logit,
            B,
            T,
            V,
            terms.params.stride(0) if terms.params.shape[0] > 1 else 0,
            terms.mask_id,
            ACCEPTS=terms.kind.predicate,
            **kinds,
            HAS_ACTIVE=active is not None,
            BLOCK_T=config.block_t,
            COUNT_RANKS=config.count_ranks,
            num_warps=config.decide_warps,
            enable_fp_fusion=True,
        )
    return outputs


@torch.library.custom_op("fdpp::project_select", mutates_args=(), device_types="cpu")
def project_op(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    active: Tensor | None,
    params: Tensor,
    rule: str,
    mask_id: int,
    temperature: float,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`fdpp::project_select`; the last five arguments are the fields of `Terms`."""
    return project_cpu(hidden, weight, tokens, active, Terms(params, rule, mask_id, temperature, seeds))


@project_op.register_kernel("cuda")
def _(hidden, weight, tokens, active, params, rule, mask_id, temperature, seeds):  # type: ignore[no-untyped-def]
    return project_gpu(hidden, weight, tokens, active, Terms(params, rule, mask_id, temperature, seeds))


@project_op.register_fake
def _(hidden, weight, tokens, active, params, rule, mask_id, temperature, seeds):  # type: ignore[no-untyped-def]
    return gpu.empty_outputs(tokens)


def prefix_step(hidden: Tensor, weight: Tensor, tokens: Tensor, active: Tensor | None, terms: Terms) -> Selection:
    """`fdpp.step.operators.prefix_step` of the logits `hidden @ weight.T`."""
    check(hidden, weight, tokens, active, terms.seeds)
    check_seeds(terms)
    if hidden.device.type not in ("cpu", "cuda"):
        raise ValueError(f"hidden: expected a CPU or CUDA tensor, got {hidden.device}")
    # A head is a parameter, and a choice has no gradient.
    hidden, weight = hidden.detach(), weight.detach()
    if torch.compiler.is_compiling():
        return Selection(*project_op(hidden, weight, tokens, active, *terms))
    implementation = project_cpu if hidden.device.type == "cpu" else project_gpu
    return implementation(hidden, weight, tokens, active, terms)


def project_select(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    rule: Rule,
    mask_id: int,
    active: Tensor | None = None,
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
) -> Selection:
    """`fdpp.select` of the logits `hidden @ weight.T`, which are not kept: a step's memory does not grow with T * V.

    On a GPU the logits are never rounded: they are sums in float32, of which `select` would see the nearest bfloat16.

    Args:
        hidden: `[B, T, D]` bfloat16, float16 or float32, T at most 1024. Rows of positions that are not masked and
            active are never read.
        weight: `[V, D]` of the same dtype, the head.
        tokens, rule, mask_id, active, temperature, seed: as `fdpp.select` takes them.

    Returns:
        `Selection`: tokens, proposal, confidence, committed, remaining, nonfinite.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a negative temperature.
    """
    step = prefix_step(hidden, weight, tokens, active, terms_of(rule, mask_id, temperature, seed, hidden))
    return decided(step, tokens, active, rule, mask_id)
