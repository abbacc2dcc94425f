"""`denoise_canvas` on a GPU: outputs and scratch around the one kernel launch."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.kernels.canvas import canvas_kernel
from fdpp.kernels.decide import Partial
from fdpp.kernels.launch import canvas_launch
from fdpp.rules import EntropyBound
from fdpp.step.canvas.outcome import CanvasStep
from fdpp.step.gpu import ticket_for


def empty_outputs(canvas: Tensor) -> CanvasStep:
    """Room for what a step of `canvas` `[B, T]` gives."""
    B, T = canvas.shape
    return CanvasStep(
        canvas=canvas.new_empty((B, T)),
        sample=canvas.new_empty((B, T)),
        argmax=canvas.new_empty((B, T)),
        entropy=canvas.new_empty((B, T), dtype=torch.float32),
        lse=canvas.new_empty((B, T), dtype=torch.float32),
        accepted=canvas.new_empty((B, T), dtype=torch.bool),
        mean_entropy=canvas.new_empty((B,), dtype=torch.float32),
    )


def denoise_canvas(
    logits: Tensor,
    canvas: Tensor,
    argmax: Tensor,
    finished: Tensor | None,
    numbers: Tensor,
    seeds: Tensor,
    softcap: float,
) -> CanvasStep:
    """See `fdpp.step.canvas.operator.denoise_op`."""
    B, T, V = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    canvas, argmax = canvas.contiguous(), argmax.contiguous()
    outputs = empty_outputs(canvas)
    if B == 0:
        return outputs
    config = canvas_launch(B, T, V)
    planes = torch.empty(4, B, T, config.splits, dtype=torch.float32, device=canvas.device)
    tokens = torch.empty(2, B, T, config.splits, dtype=torch.int32, device=canvas.device)
    with torch.cuda.device_of(logits):
        canvas_kernel[(B * T * config.splits,)](
            logits,
            canvas,
            argmax,
            canvas if finished is None else finished.contiguous(),
            numbers.contiguous(),
            seeds.contiguous(),
            outputs,
            Partial(planes, tokens),
            ticket_for(canvas.device, B),
            B,
            T,
            V,
            logits.stride(0),
            logits.stride(1),
            2 if numbers.shape[0] > 1 else 0,
            config.split_len,
            softcap or 1.0,
            ACCEPTS=EntropyBound.predicate,
            CAPPED=softcap > 0.0,
            HAS_FINISHED=finished is not None,
            SPLITS=config.splits,
            BLOCK_V=config.block_v,
            TILES=config.tiles,
            BLOCK_T=config.block_t,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return outputs
