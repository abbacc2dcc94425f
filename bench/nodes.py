"""What a captured step would launch on a GPU, counted on a machine without one.

The step of an arena runs on tensors without memory. They say that they are on a GPU, so the code takes the branches it
takes there; every ATen operator and every Triton launch is recorded in place of being run. A launch is a node of the
step's CUDA graph.

Views and what only allocates or asks for a shape launch nothing. All other operators launch one kernel, copy or fill,
except those in `SEVERAL`. Splits that cuBLAS may choose for a product are not known here, and not counted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import fdpp
from fdpp.attention import Beside, BlockCache
from fdpp.decoding.choice import Choice
from fdpp.decoding.generate import loop_of, with_blocks, with_token_ids
from fdpp.decoding.layout import Layout
from fdpp.decoding.runners import StaticRunner
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.static import StaticSteps
from fdpp.models.block import Block
from fdpp.models.families import families
from fdpp.models.language_model import DiffusionLM
from fdpp.models.quantised import torchao_config
from fdpp.step import gpu

GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Launch:
    """One node of a step's CUDA graph.

    Attributes:
        name: of the ATen operator or of the Triton kernel.
        where: `"layer 3"`, `"head"` (its product), `"selection"` (the rule's step on the logits) or `"rest"`.
        bytes: what it reads and writes at least: each tensor once, however often a kernel comes back to it.
        flops: floating point operations of products and attention, 0 for others.
        rows, columns: of a product's result; of attention, queries and keys of one key head; of a step's logits. 0 for
            others.
        groups: of a grouped product, how many experts have rows; 0 for others.
    """

    name: str
    where: str
    bytes: int = 0
    flops: int = 0
    rows: int = 0
    columns: int = 0
    groups: float = 0.0


FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"),
    *("resize_", "set_", "is_pinned", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset"),
}
"""Operators beside views that launch nothing."""

SEVERAL = {
    "masked_fill": 2,  # a copy, filled in place
    "index_fill": 2,  # as well
    "index_copy": 2,  # as well
    "index_put": 2,  # as well; in place it is one kernel over values and indices unless it accumulates
    "scatter": 2,  # as well
    "isin": 4,  # a fill, all pairs compared, any of each row, a copy
    "sort": 4,  # a range, copied as positions, the keys copied, both sorted in place: up to some thousand keys a row
    "topk": 2,  # the largest are gathered, then sorted
    "_grouped_mm": 2,  # addresses of all groups, their products
}
"""Operators of more than one launch, as PyTorch's sources (`ATen/native`) have them."""

OVERWRITTEN = {"copy_", "fill_", "zero_", "index_put_", "arange", "exponential_"}
"""Operators that do not read what they write to."""

GATHERED = {"embedding": "weight", "index": "self", "index_select": "self", "gather": "self"}
"""Operators that read as much of an argument as their result holds."""

SCATTERED = {"index_put_": "values", "index_copy_": "source"}
"""Operators that write as much to their first argument as another one holds."""


def size(tensor: Tensor) -> int:
    """Bytes of what a tensor shows, repetitions by a stride of 0 once."""
    held = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(held) * tensor.element_size() if tensor.numel() else 0


def place(tensor: Tensor) -> tuple[Any, ...]:
    """What is the same for two tensors that show the same memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def total(tensors: Any) -> int:
    """Bytes of the distinct tensors among the leaves of `tensors`."""
    return sum({place(leaf): size(leaf) for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)}.values())


def traffic(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operator reads and writes."""
    name = func._schema.name.split("::")[1]
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    mutated = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    read = {key: value for key, value in named.items() if not (key in mutated and name in OVERWRITTEN)}
    if name in GATHERED:
        read.pop(GATHERED[name])
    written = [named[key] for key in mutated if key in named] or out
    if name in SCATTERED:
        return total(read) + total(named[SCATTERED[name]])
    return total(read) + total(written) * (2 if name in GATHERED else 1)


def product(func: Any, args: Any, out: Any) -> tuple[int, int, int]:
    """FLOPs, rows and columns of a matrix product; zeros for another operator."""
    name = func._schema.name.removesuffix("_")
    if name not in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_int_mm"):
        return 0, 0, 0
    left = args[1] if "add" in name else args[0]
    return 2 * out.numel() * left.shape[-1], out.shape[-2], out.shape[-1]


def named(rows: int, experts: int, k: int) -> float:
    """How many of `experts` have a row, where each of `rows` names `k`: expected, of independent and uniform names."""
    return experts * (1.0 - (1.0 - k / experts) ** rows)


def attended(q: Tensor, k: Tensor, **_: Any) -> tuple[int, int, int]:
    """FLOPs, queries of a key head and keys of attention by `q` `[rows, H, n, d]` over `k` `[B, kv_heads, S, d]`."""
    return 4 * q.numel() * k.shape[2], q.shape[1] // k.shape[1] * q.shape[2], k.shape[2]


def projected(hidden: Tensor, weight: Tensor, **_: Any) -> tuple[int, int, int]:
    """FLOPs, rows and columns of the fused head's product."""
    rows = hidden.numel() // hidden.shape[-1]
    return 2 * hidden.numel() * weight.shape[0], rows, weight.shape[0]


def selected(logits: Tensor, **_: Any) -> tuple[int, int, int]:
    """Positions and vocabulary of a step on `logits` `[B, T, V]`."""
    return 0, logits.shape[0] * logits.shape[1], logits.shape[2]


def multiplied(x: Tensor, weight: Tensor, **_: Any) -> tuple[int, int, int]:
    """FLOPs, rows and columns of a product by rows `x` `[M, K]` and `weight` `[N, K]`."""
    return 2 * x.numel() * weight.shape[0], x.shape[0], weight.shape[0]


KERNELS: dict[str, Callable[..., tuple[int, int, int]]] = {
    "attend_kernel": attended,
    "canvas_kernel": selected,
    "process_kernel": selected,
    "product_kernel": multiplied,
    "project_kernel": projected,
    "select_kernel": selected,
    "weights_kernel": selected,
}
"""FLOPs, rows and columns of Triton kernels, by their arguments' names."""

PARTLY: dict[str, dict[str, str]] = {"rotate_kernel": {"stored": "heads"}}
"""Of which Triton kernels an argument, by its name, is touched no more than as much as another one holds."""


class Record:
    """The launches so far, and where the next one belongs."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.where = "rest"
        self.experts_per_row = 1

    def add(self, name: str, bytes: int, flops: int = 0, rows: int = 0, columns: int = 0, groups: float = 0.0) -> None:
        """Note an operator; what it computes and moves stands at the first of its launches."""
        self.launches.append(Launch(name, self.where, bytes, flops, rows, columns, groups))
        self.launches += [Launch(name, self.where)] * (SEVERAL.get(name, 1) - 1)

    def grouped(self, x: Tensor, weights: Tensor, out: Tensor) -> None:
        """Note a product of rows `x` `[M, K]`, sorted by their experts, with `weights` `[E, K, N]`."""
        E, k = len(weights), self.experts_per_row
        groups = named(len(x) // k, E, k)
        bytes = total((x, out)) + round(size(weights) * groups / E)
        self.add("_grouped_mm", bytes, 2 * out.numel() * x.shape[1], *out.shape, groups)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        before, self.where = self.where, where
        try:
            yield
        finally:
            self.where = before

    def kernel(self, kernel: Any, args: Any, kwargs: Any) -> None:
        """Note a launch of a Triton `kernel`."""
        name = kernel.__name__
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        part = {key: total(named[other]) for key, other in PARTLY.get(name, {}).items()}
        moved = total({key: value for key, value in named.items() if key not in part}) + sum(part.values())
        self.add(name, moved, *KERNELS.get(name, lambda **_: (0, 0, 0))(**named))


class Operators(TorchDispatchMode):
    """Records the operators of tensors without memory."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, returns = func._schema.name.split("::")[1], func._schema.returns
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if name == "_grouped_mm":
            self.record.grouped(*args[:2], out)
        elif not view and name not in FREE and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self.record.add(name, traffic(func, args, kwargs, out), *product(func, args, out))
        return out


class Held(TorchDispatchMode):
    """Within it `most` becomes the most bytes that operators' results hold at once, their arguments' own aside.

    What an operator holds while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs), given=True)
        out = func(*args, **(kwargs or {}))
        self.note(out, given=False)
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out

    def note(self, tensors: Any, given: bool) -> None:
        """Forget what is gone, and take in what is new: memory that was there before counts as none."""
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                ref = StorageWeakRef(storage)
                self.held.setdefault(ref.cdata, (ref, 0 if given else storage.nbytes()))


def on_meta(value: Any) -> Any:
    """A device argument with the stand-in for a GPU in its place."""
    if isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda":
        return torch.device("meta")
    return value


class StandIn(TorchFunctionMode):
    """Tensors without memory say that they are on a GPU, and what asks for one there gets such a tensor.

    Two operators are recorded here, since without a GPU PyTorch would decompose them.
    """

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.answers: dict[Any, Callable[..., Any]] = {
            torch.Tensor.device.__get__: lambda x: GPU if x.device.type == "meta" else x.device,
            torch.Tensor.is_cuda.__get__: lambda x: x.device.type == "meta",
            torch.Tensor.is_meta.__get__: lambda x: False,
            torch.Tensor.is_cpu.__get__: lambda x: x.device.type == "cpu",
            torch.Tensor.get_device: lambda x: 0,
            # `Joined` tells by addresses whether weights lie beside each other.
            torch.Tensor.data_ptr: lambda x: (x.untyped_storage()._cdata << 40) + x.storage_offset() * x.element_size(),
            F.rms_norm: self.rms_norm,
            torch.rms_norm: self.rms_norm,
            F.scaled_dot_product_attention: self.attention,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.answers:
            return self.answers[func](*args, **kwargs)
        if func is torch.Tensor.to:
            args = (args[0], *map(on_meta, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta") if kwargs.pop("pin_memory", False) else on_meta(kwargs["device"])
        return func(*args, **kwargs)

    def rms_norm(
        self, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """One kernel of PyTorch's, with its weight or without."""
        out = torch.empty_like(x)
        self.record.add("rms_norm", total((x, weight, out)))
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        """One kernel, which lays the heads of a query beside each other as the flash kernel does."""
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        self.record.add("scaled_dot_product_attention", total((q, k, v, attn_mask, out)), *attended(q, k))
        return out


def marked(record: Record, function: Callable[..., Any], where: Callable[[Any], str]) -> Callable[..., Any]:
    """The method `function`, whose launches belong to `where` of its object."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with record.at(where(self)):
            return function(self, *args, **kwargs)

    return method


@contextmanager
def recorded() -> Iterator[Record]:
    """Within it tensors on `GPU` exist without one, and what is done with them is recorded, in place of being done."""
    record = Record()
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20
    )
    places: list[tuple[type, str, Callable[[Any], str]]] = [
        (Block, "forward", lambda block: f"layer {block.layer}"),
        (DiffusionLM, "project_slice", lambda _: "head"),
        (Choice, "__call__", lambda _: "selection"),
        # Made in the first layer, for all.
        (BlockCache, "stops", lambda _: "rest"),
        (Beside, "columns_of", lambda _: "rest"),
        (Beside, "for_all", lambda _: "rest"),
    ]

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        record.kernel(kernel, args, kwargs)

    with ExitStack() as stack:
        enter = stack.enter_context
        for owner, name, where in places:
            enter(patch.object(owner, name, marked(record, getattr(owner, name), where)))
        for kind in (JITFunction, InterpretedFunction):
            enter(patch.object(kind, "run", run))
        enter(patch("torch.cuda.device_of", lambda *_: contextlib.nullcontext()))
        enter(patch("torch.cuda.current_stream", lambda *_: stream))
        enter(patch("torch.cuda.is_current_stream_capturing", lambda: True))
        enter(patch("torch.cuda.get_device_properties", lambda *_: properties))
        enter(patch("torch.cuda.get_device_capability", lambda *_: (properties.major, properties.minor)))
        enter(torch.no_grad())
        enter(Operators(record))
        enter(StandIn(record))
        # What the launch before a capture leaves for it.
        enter(patch.dict(gpu.spare, {GPU: torch.empty(gpu.FOR_GRAPHS, dtype=torch.int32, device=GPU)}))
        yield record


def launches(
    config: PretrainedConfig,
    *,
    batch: int = 1,
    prompt: int = 800,
    new: int = 256,
    block: int = 32,
    cache: str = "dual",
    drafts: int = 1,
    full: bool = False,
    at: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
    **settings: Any,
) -> list[Launch]:
    """What one captured step of a decode launches, in order.

    Args:
        config: the shape of a model of any family.
        batch: sequences, all of them with a prompt of `prompt` tokens; at a `graph_size`.
        new, block, cache, drafts, settings: of `DiffusionGenerationConfig`; the rule is `Frechet(0.25)` unless given.
        full: the full forward that begins a block, else one of the steps after it.
        at: the block's number, on which the width of a prefix cache's steps depends.
        dtype: of the weights.
        weights: `"int8"` or `"float8"`, as `--quantize` makes the projections of the blocks; None: all as they are.
    """
    settings = {"rule": fdpp.Frechet(0.25), "engine": "static"} | settings
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = families()[config.model_type](config).eval()
    finally:
        torch.set_default_dtype(before)
    if weights is not None:
        quantize_blocks(model, weights)
    with recorded() as record, patch.object(Layout, "of", equally_long(prompt)):
        record.experts_per_row = getattr(config, "num_experts_per_tok", 1)
        asked = DiffusionGenerationConfig(new, block, cache=cache, drafts=drafts, **settings)
        ids = torch.empty(batch, prompt, dtype=torch.int64, device=GPU)
        asked = with_token_ids(with_blocks(asked, model), config)
        loop = loop_of(model)(model, ids, None, asked, static=StaticSteps())
        runner = loop.runner(loop.whole, at)
        assert isinstance(runner, StaticRunner)
        # The decode's first forward allocates, and leaves what drafts are drawn from, before anything is captured.
        (very_first, _), (first, others) = (loop.windows(number, loop.usual(number)[0]) for number in (0, at))
        for window, states, fresh in ((very_first, 1, True), (first, 1, True) if full else (others, drafts, False)):
            step, _ = runner.arena.step(window, states, fresh)
            record.launches.clear()
            step.run(runner.arena, loop.advance)
        return list(record.launches)


def equally_long(prompt: int) -> Callable[..., Layout]:
    """`Layout.of` for rows that all have `prompt` tokens: what it reads of them, tensors without memory do not say."""
    of = Layout.of

    def laid(text: Tensor, response: int, real: Tensor, first: Tensor, grid: int, mask_id: int, pad_id: int) -> Layout:
        tokens = torch.full(text.shape, mask_id)
        tokens[:, :prompt] = pad_id
        real, start = torch.ones_like(tokens, dtype=torch.bool), tokens.new_full(first.shape, prompt)
        found = of(tokens, response, real, start, grid, mask_id, pad_id)
        # The loop reads the padding, too.
        return Layout(*(x.to(GPU) if isinstance(x, Tensor) else x for x in found))._replace(padding=found.padding)

    return laid


def quantize_blocks(model: DiffusionLM, kind: str) -> None:
    """`fdpp.models.quantised.quantise` for a model without memory."""
    from torchao.quantization import quantize_

    for block in model.model.blocks:
        quantize_(block, torchao_config(kind, on_gpu=True, group=0))


def by_place(launches: list[Launch]) -> dict[str, int]:
    """How many launches each place has; all layers together are `"layers"`."""
    found: dict[str, int] = {}
    for launch in launches:
        where = "layers" if launch.where.startswith("layer ") else launch.where
        found[where] = found.get(where, 0) + 1
    return found


def per_layer(launches: list[Launch]) -> int:
    """The launches of one layer.

    Raises:
        ValueError: layers differ, the last one aside, which drops what is not wanted of the fed columns.
    """
    counts: dict[str, int] = {}
    for launch in launches:
        if launch.where.startswith("layer "):
            counts[launch.where] = counts.get(launch.where, 0) + 1
    of_layers = list(counts.values())
    if len(set(of_layers[:-1] or of_layers)) != 1:
        raise ValueError(f"expected as many launches in every layer but the last, got {of_layers}")
    return of_layers[0]
