"""CUDA graphs of one set of steps. They share a stream and a memory pool with each other and with nothing else.

PyTorch keeps a cuBLAS workspace for every handle and stream. It allocates it where the first product runs and may free
it at any time: with a graph of that stream, with the thread, with another library's call. Graphs go on using its
address. So a capture stream runs nothing but captures. Its workspace is then allocated within a capture, from the
graphs' own pool: whoever frees it, its memory goes to nobody else while one of the graphs lives.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

CAPTURING = threading.RLock()
"""Held during a capture: the allocator and the generators allow one at a time."""

MOST_STREAMS = 24
"""Capture streams of a device. PyTorch has 32 streams of each priority and hands them out in turns. Ours have the high
one, which others seldom ask for: their products on one of ours would share its workspace with the graphs."""

ABANDONED: list[Any] = []
"""Graphs whose capture broke off, never freed: PyTorch may still refer to them."""


class Streams:
    """The capture streams of one device, each lent to one borrower at a time."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.lock = make, threading.Lock()
        self.known: list[Any] = []
        self.free: list[Any] = []

    def lend(self, borrower: object) -> tuple[Any, bool]:
        """A stream until `borrower` is gone, and whether it has served another before.

        Raises:
            RuntimeError: all are lent.
        """
        with self.lock:
            fresh = None
            for _ in range(2 * MOST_STREAMS if len(self.known) < MOST_STREAMS else 0):
                stream = self.make()
                if all(stream.cuda_stream != other.cuda_stream for other in self.known):
                    fresh = stream
                    break
            if fresh is None and not self.free:
                raise RuntimeError(f"expected one of {MOST_STREAMS} capture streams to be free, all are in use")
            stream = self.free.pop(0) if fresh is None else fresh
            if fresh is not None:
                self.known.append(fresh)
        weakref.finalize(borrower, self.take_back, stream).atexit = False
        return stream, fresh is None

    def take_back(self, stream: Any) -> None:
        # No lock: the garbage collector may call this in the midst of `lend`. To append is one operation.
        self.free.append(stream)


streams: dict[torch.device, Streams] = {}


class Graphs:
    """Captures on a stream and in a pool of their own.

    Raises:
        RuntimeError: no stream is free.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        lender = streams.setdefault(device, Streams(lambda: torch.cuda.Stream(device, priority=-1)))
        self.stream, self.used = lender.lend(self)
        self.pool = torch.cuda.graph_pool_handle()
        self.threads: set[int] = set()

    def capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of what `run` does, which must have run before, on the very same tensors.

        Other threads may work meanwhile. An error leaves PyTorch as it was before.
        """
        with CAPTURING, garbage_kept(), torch.cuda.device(self.device):
            self.forget_workspace()
            before, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    run()
            except BaseException:
                # Here `torch.cuda.graph` gives back neither the stream nor the allocator nor the generators.
                self.abandon(graph)
                raise
            finally:
                torch.cuda.set_stream(before)
        return graph

    def forget_workspace(self) -> None:
        """Make this thread's first product allocate a workspace: it may have one in the pool of an earlier borrower."""
        thread = threading.get_ident()
        if self.used and thread not in self.threads:
            torch._C._cuda_clearCublasWorkspaces()
        self.threads.add(thread)

    def abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell PyTorch that a capture has ended after CUDA broke it off. If only `run` raised, it ended in order."""
        try:
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        except RuntimeError:  # it allocates to no pool any more
            return
        ABANDONED.append(graph)
        with suppress(Exception):
            torch._C._cuda_releasePool(self.device.index, self.pool)
        # A generator that was registered for a capture refuses to draw until a capture has ended in order.
        with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
            torch.zeros(1, dtype=torch.float32, device=self.device)


def graphs_on(device: torch.device) -> Graphs | None:
    """What captures steps on `device`; None where there are no CUDA graphs."""
    return Graphs(device) if device.type == "cuda" else None


class Collector:
    """The garbage collector, switched off by the first `hold` and on again by the last `release`."""

    def __init__(self) -> None:
        self.lock, self.held, self.collects = threading.Lock(), 0, False

    def hold(self) -> None:
        with self.lock:
            if self.held == 0:
                self.collects = gc.isenabled()
                gc.disable()
            self.held += 1

    def release(self) -> None:
        with self.lock:
            self.held -= 1
            if self.held == 0 and self.collects:
                gc.enable()


collector = Collector()


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Cycles may hold graphs and pinned memory, which must not be freed amid a capture."""
    collector.hold()
    try:
        yield
    finally:
        collector.release()
