"""On a GPU: eager launches and graph replays of several streams in flight at once, thousands of them."""

from __future__ import annotations

import pytest
import torch
from test_gpu import DEVICE, call, captured, on_device, problems, step_for

from fdpp.step import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

STREAMS, BURSTS, BURST = 4, 100, 12


def test_streams_of_launches_and_replays_at_once() -> None:
    """Every stream has a problem of its own, captured, and all tickets are at zero in the end.

    A burst is enqueued on all streams before any result is looked at, so the device always holds work of all of them;
    the last launch and the last replay of every burst are compared with the first result.
    """
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    work = [on_device(problem) for problem in problems()[:STREAMS]]
    steps = [step_for(problem) for problem in work]
    first = [call(step, problem) for step, problem in zip(steps, work, strict=True)]
    graphs = [captured(step, problem) for step, problem in zip(steps, work, strict=True)]
    differing = torch.zeros(STREAMS, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(BURSTS):
        last = list(first)
        for _ in range(BURST):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    graphs[i][0].replay()
                    last[i] = call(steps[i], work[i])
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                for expected, launched, replayed in zip(first[i], last[i], graphs[i][1], strict=True):
                    differing[i] += (expected != launched).sum() + (expected != replayed).sum()
    torch.cuda.synchronize()
    assert differing.tolist() == [0] * STREAMS
    assert all(not tickets.any() for tickets in (*gpu.tickets.values(), *gpu.slabs))
