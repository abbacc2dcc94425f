"""`select` on a GPU: outputs and scratch around the one kernel launch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fdpp.kernels.decide import Partial
from fdpp.kernels.launch import select_launch
from fdpp.kernels.select import select_kernel
from fdpp.selection import Selection
from fdpp.step.terms import Terms

TICKETS = 4096
"""Tickets of a stream, one for each sequence of a launch: 16 kB, made once."""

FOR_GRAPHS = 16 * TICKETS
"""Tickets made at a time for captured launches, each of which keeps its own: 256 kB."""

tickets: dict[tuple[torch.device, int], Tensor] = {}
slabs: list[Tensor] = []
spare: dict[torch.device, Tensor] = {}
"""What captures have left of a device's latest slab. Slabs are kept for good, since graphs know their addresses."""

lock = threading.Lock()
"""Held while tickets are made or given to a graph: two graphs must not have the same."""


def ticket_for(device: torch.device, B: int) -> Tensor:
    """Zeroed arrival counters `[>= B]` int32 of the current stream. Kernels on one stream never overlap, and the last
    program of a launch leaves its counter at zero, so one set serves every launch of the stream."""
    if device.type != "cuda":
        return torch.zeros(B, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return ticket_of_graph(device, B)
    if device not in spare or spare[device].numel() < TICKETS:
        with lock:
            spare[device] = kept_zeros(FOR_GRAPHS, device)
            slabs.append(spare[device])
    if B > TICKETS:
        return torch.zeros(B, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in tickets:
        # If two threads get here on one stream, the first one's stay: launches may already use them.
        tickets.setdefault(key, kept_zeros(TICKETS, device))
    return tickets[key]


def kept_zeros(n: int, device: torch.device) -> Tensor:
    """Counters `[n]` that are never freed, allocated by another thread. In the calling thread `torch.compile` may be
    warming up a graph: allocations then go to the graph's pool, and it fails if one of them outlives the call."""
    stream = torch.cuda.current_stream(device)

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(n, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()


def ticket_of_graph(device: torch.device, B: int) -> Tensor:
    """Counters for one captured launch alone: graphs may be replayed side by side. The launch before the capture, which
    compiles the kernel, has made them; without that launch a fill is captured as well."""
    with lock:
        left = spare.get(device)
        if left is None or left.numel() < B:
            return torch.zeros(B, dtype=torch.int32, device=device)
        # Multiples of 16 bytes: for another alignment Triton would compile the kernel anew, amid the capture.
        spare[device] = left[-(-B // 4) * 4 :]
        return left[:B]


def reset_tickets() -> None:
    """Forget all arrival counters. Call it after a launch was aborted half-way, which leaves them above zero."""
    tickets.clear()
    for slab in slabs:
        slab.zero_()


def empty_outputs(tokens: Tensor) -> Selection:
    """Room for what a step from `tokens` `[B, T]` decides."""
    B, T = tokens.shape
    return Selection(
        tokens=tokens.new_empty((B, T)),
        proposal=tokens.new_empty((B, T)),
        confidence=tokens.new_empty((B, T), dtype=torch.float32),
        committed=tokens.new_empty((B, T), dtype=torch.bool),
        remaining=tokens.new_empty((B,), dtype=torch.int32),
        nonfinite=tokens.new_empty((B,), dtype=torch.int32),
    )


def select(logits: Tensor, tokens: Tensor, active: Tensor | None, terms: Terms) -> Selection:
    """See `fdpp.step.operators.select_op`; one launch, no host synchronisation, no allocation that depends on data."""
    B, T, V = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    tokens = tokens.contiguous()
    outputs = empty_outputs(tokens)
    if B == 0 or T == 0:
        outputs.remaining.zero_()
        outputs.nonfinite.zero_()
        return outputs
    config = select_launch(B, T, V, terms.sampled)
    partial = torch.empty(5, B, T, config.splits, dtype=torch.float32, device=tokens.device)
    partial_token = torch.empty(B, T, config.splits, dtype=torch.int32, device=tokens.device)
    with torch.cuda.device_of(logits):
        select_kernel[(B * T * config.splits,)](
            logits,
            tokens,
            tokens if active is None else active.contiguous(),
            terms.params,
            tokens if terms.seeds is None else terms.seeds.contiguous(),
            outputs,
            Partial(partial, partial_token),
            ticket_for(tokens.device, B),
            B,
            T,
            V,
            logits.stride(0),
            logits.stride(1),
            terms.params.stride(0) if terms.params.shape[0] > 1 else 0,
            config.split_len,
            terms.mask_id,
            float(terms.temperature),
            ACCEPTS=terms.kind.predicate,
            ORDER=terms.order,
            SAMPLED=terms.sampled,
            TEMPERED=terms.tempered,
            HAS_ACTIVE=active is not None,
            SPLITS=config.splits,
            BLOCK_V=config.block_v,
            BLOCK_T=config.block_t,
            COUNT_RANKS=config.count_ranks,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return outputs
