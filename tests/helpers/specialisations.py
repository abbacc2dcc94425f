"""Which kernels the GPU tests would compile.

`python tests/helpers/specialisations.py [pytest arguments]` prints them as JSON.

A process of its own, like `aot.py`. The tests marked `gpu` run on tensors without memory that claim to be on a GPU.
Triton is told of a GPU that is not there: it gives the key of every launch, and compiles and launches nothing. So a key
is Triton's own: constants, types, arguments that are 1 or multiples of 16, alignment of pointers, warps and stages.

On such a GPU:

- What a test reads is zeros. Its assertions are evaluated for the launches in them, and may fail.
- A decode takes three forwards of its first and of its last block, with all sequences and with one.
- Graphs replay nothing.
- A test that the GPU cannot serve ends early, and is listed.

Not counted:

- what inductor generates and PyTorch compiles (`torch.compile` and `opcheck` call the function once, as it is);
- kernels of batch sizes and draft counts between a decode's least and most;
- slow tests.

Hypothesis's examples that values would reject are counted.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import aot
import pytest
import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fdpp.step.gpu
from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.runners import EagerRunner, StaticRunner

TESTS = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
READ = {"item": 0, "equal": True, "__bool__": False, "__int__": 0, "__index__": 0, "__float__": 0.0}
"""What reading a value gives, by the name of the method."""


def names(value: Any, kind: str) -> bool:
    """Whether an argument is a device of this kind."""
    return str(value).split(":")[0] == kind if isinstance(value, (str, torch.device)) else False


class AbsentGPU(TorchFunctionMode):
    """Tensors on `cuda` lie on `meta`, and answer as if they did not."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        x, name = args[0] if args else None, function.__name__
        if isinstance(x, Tensor) and x.is_meta:
            attribute = getattr(function, "__self__", None)
            if attribute is Tensor.device:
                return GPU
            if attribute in (Tensor.is_cuda, Tensor.is_meta):
                return attribute is Tensor.is_cuda
            if name == "data_ptr":
                return x.storage_offset() * x.element_size()
            if name == "cpu" or (name == "to" and any(names(value, "cpu") for value in (*args[1:], *kwargs.values()))):
                return torch.zeros(x.shape, dtype=x.dtype)
            if name == "tolist":
                return torch.zeros(x.shape, dtype=x.dtype).tolist()
            if name == "nonzero":
                return x.new_empty((0, x.dim()), dtype=torch.int64)
            if name in READ:
                return READ[name]
        if name == "copy_" and args[1].is_meta and not x.is_meta:
            return x
        if name == "cuda":
            return x.to("meta")
        args = tuple("meta" if names(value, "cuda") else value for value in args)
        kwargs = {key: "meta" if names(value, "cuda") else value for key, value in kwargs.items()}
        # Pinned memory needs a GPU.
        return function(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})


class Nothing:
    """A stream or a graph that accepts every call and does nothing."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: []


def three_forwards(runner: Any) -> None:
    """A block's first forward, one of those that follow, and one of a single sequence."""
    step, go_on_with = runner.step, runner.go_on_with
    runner.taken = 0

    def counted(self: Any, window: Any, drafts: int) -> Any:
        outcome, _ = step(self, window, drafts)
        self.taken += 1
        return outcome, [0, 0, self.taken // 2, window.block_width(), drafts]

    def shrunk(self: Any, sequences: Tensor) -> None:
        kept = sequences.new_zeros(int(self.taken == 2))
        if getattr(self, "cache", None) is not None:
            self.cache.resize(len(kept))
        go_on_with(self, kept)

    runner.step, runner.go_on_with = counted, shrunk


def first_and_last_block(loop: Any) -> None:
    steps = loop.steps

    def some(self: Any, block: int, watch: bool = False) -> Any:
        return steps(self, block, watch) if block in (0, len(self.config.blocks()) - 1) else iter(())

    loop.steps = some


def seated(self: Any, sequences: Tensor) -> Tensor:
    """All sequences: which of them stay depends on values."""
    if self.cache is not None:
        self.cache.resize(len(sequences))
    return sequences


def stand_in() -> None:
    """Replace what needs a GPU."""
    triton.runtime.driver.set_active(aot.TargetDriver("sm_90"))
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)
    torch.library.opcheck = lambda operator, args, **_: operator._backend_fns["cuda"](*args)
    torch.testing.assert_close = lambda *_, **__: None
    fdpp.step.gpu.kept_zeros = lambda n, device: torch.zeros(n, dtype=torch.int32, device=device)
    three_forwards(EagerRunner)
    three_forwards(StaticRunner)
    first_and_last_block(BlockLoop)
    BlockLoop.seated = seated
    cuda: Any = torch.cuda
    cuda.is_current_stream_capturing = lambda: False
    for name in ("device", "device_of", "stream", "graph"):
        setattr(cuda, name, lambda *_, **__: contextlib.nullcontext())
    for name in ("CUDAGraph", "Stream", "current_stream"):
        setattr(cuda, name, Nothing)
    torch.profiler.profile = lambda **_: contextlib.nullcontext(Nothing())
    for name in ("synchronize", "set_sync_debug_mode", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("current_device", "memory_allocated", "max_memory_allocated"):
        setattr(cuda, name, lambda *_, **__: 0)


class Tolerant(ast.NodeTransformer):
    """`assert x` becomes `x`, and what that raises is ignored."""

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
        return ast.Try([ast.Expr(node.test)], [handler], [], [])


class TestModules(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Loads the modules of this folder with tolerant assertions."""

    __test__ = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        file = self.get_filename(fullname)
        known = fullname != "conftest" and Path(file).exists()
        return importlib.util.spec_from_file_location(fullname, file, loader=self) if known else None

    def get_filename(self, fullname: str) -> str:
        path = TESTS / f"{fullname}.py"
        return str(path if path.exists() else TESTS / "helpers" / f"{fullname}.py")

    def get_data(self, path: Any) -> bytes:
        return Path(path).read_bytes()

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = Tolerant().visit(ast.parse(self.get_data(path)))
        return compile(ast.fix_missing_locations(tree), path, "exec")


class Recorder:
    """A pytest plugin, and Triton's hook for a launch that needs a kernel."""

    def __init__(self) -> None:
        self.tests: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.stopped: dict[str, str] = {}
        self.test = ""

    def launched(self, *, key: str, fn: Any, **_: Any) -> bool:
        self.tests[fn.name, key].add(self.test.split("[")[0])
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config) -> None:
        """Before `conftest.py` looks for a GPU."""
        for plugin in config.pluginmanager.get_plugins():
            if getattr(plugin, "__file__", None) == str(TESTS / "conftest.py"):
                plugin.GPU = True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.test = item.nodeid
        with AbsentGPU():
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Such a GPU refuses nothing.
        if report.failed and "DID NOT RAISE" not in report.longreprtext:
            self.stopped[report.nodeid] = report.longreprtext.splitlines()[-1]

    def report(self) -> dict[str, Any]:
        """Counts by kernel and by test: all kernels that a test takes, and those that no other test does."""
        kernels: dict[str, int] = defaultdict(int)
        asked: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for (kernel, _), tests in self.tests.items():
            kernels[kernel] += 1
            for test in tests:
                asked[test][0] += 1
                asked[test][1] += len(tests) == 1
        order = sorted(asked, key=lambda test: (-asked[test][1], -asked[test][0], test))
        return {"kernels": kernels, "tests": {test: asked[test] for test in order}, "stopped": self.stopped}


def main(*arguments: str) -> dict[str, Any]:
    recorder = Recorder()
    sys.meta_path.insert(0, TestModules())
    stand_in()
    triton.knobs.runtime.jit_cache_hook = recorder.launched
    options = ["-m", "gpu and not slow", "-p", "no:cacheprovider", "--assert=plain", "--tb=short", "-qq"]
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main([*options, *arguments], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(int(code))
    return recorder.report()


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout, indent=1)
