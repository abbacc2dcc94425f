"""Mixture of experts: a router that is limited to groups of experts, and the products of the experts it names."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdpp.models.joined import Joined, Stacked
from fdpp.models.launches import route_gpu, routes
from fdpp.models.layers import swiglu
from fdpp.models.linear import apply, linear

ROWS = 512
"""Rows up to which every expert runs on every row, on GPUs without a grouped product that needs no host.

That reads all weights, of which the 32 rows of a block, with 8 of 256 experts each, need 64% anyway. It computes 32
times too much: counted for LLaDA2.0-mini on an A100 (250 TFLOP/s) 63 ms at 512 rows, as much as the launches of a loop
over experts, 3 x 256 in each of 19 layers at 5 us."""


class Routing(NamedTuple):
    """How experts are chosen.

    Attributes:
        k: experts per row.
        groups, kept: the experts are in so many consecutive groups, of which so many are kept.
        scale: of the weights.
    """

    k: int
    groups: int
    kept: int
    scale: float


class MLP(nn.Module):
    """SwiGLU under the published names."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.down_proj, swiglu(apply(self.gate_proj, x), apply(self.up_proj, x)))


class Router(nn.Module):
    """Holds the router's weight `[E, d]` and the experts' bias `[E]`; `route` computes."""

    expert_bias: Tensor

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        # A buffer, as published: training balances it without gradients.
        dtype, device = self.weight.dtype, self.weight.device
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=dtype, device=device))


class MoE(nn.Module):
    """The sum of the routed experts, weighted, and of the shared ones; the published names.

    Attributes:
        gate_up, down: the experts' weights as one matrix each, see `fdpp.models.joined`.
    """

    shared_experts: nn.Module | None

    def __init__(self, hidden_size: int, width: int, experts: int, shared: int, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.gate: Any = Router(hidden_size, experts)
        self.experts = nn.ModuleList(MLP(hidden_size, width) for _ in range(experts))
        self.shared_experts = MLP(hidden_size, shared * width) if shared else None
        table: Any = self.experts._modules
        self.gate_up, self.down = Stacked(table, "gate_proj", "up_proj"), Stacked(table, "down_proj")

    def joins(self) -> list[Joined]:
        """What is joined, see `fdpp.models.block.Block.joins`."""
        return [self.gate_up, self.down]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` of `x` `[..., d]`."""
        rows = x.reshape(-1, x.shape[-1])
        index, weights = route(rows, self.gate.weight, self.gate.expert_bias, self.routing)
        outputs = self.run(rows, index)
        # The products with float32 weights are float32; a row's experts are added in the row's own order.
        y = (outputs * weights[..., None]).sum(1).to(x.dtype).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    def run(self, rows: Tensor, index: Tensor) -> Tensor:
        """Outputs `[N, k, d]` of the experts `index` `[N, k]` for `rows` `[N, d]`.

        A loop over the experts that are named reads no other weights, but the host has to know them. That costs nothing
        on a CPU, while a GPU waits, and a step that does so cannot be captured.
        """
        gate_up, down = self.gate_up.stack(), self.down.stack()
        if gate_up is None or down is None:
            return one_by_one(rows, index, len(self.experts), lambda e, x: self.experts[e](x))
        if groups_products(rows, gate_up):
            return grouped(rows, index, gate_up, down)
        if rows.is_cuda and len(rows) <= ROWS:
            return every(rows, index, gate_up, down)
        return one_by_one(rows, index, len(self.experts), lambda e, x: feed_forward(x, gate_up[e], down[e]))


def route(x: Tensor, weight: Tensor, bias: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts of every row and their weights: int64 and float32 `[N, k]`, of `x` `[N, d]`.

    With s = sigmoid(x W^T) and r = s + bias, a group scores the sum of its two largest r. The k largest r in the groups
    that score most are chosen; their weights are s over the sum of the chosen s, times `scale`. Of equals the lower
    index counts as the larger. All in float32, or in float64 where `x` is; a score that is no number ranks anywhere. As
    published for LLaDA2.0, after DeepSeek-V3 (arXiv 2412.19437, eq. 12 to 16).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = linear(x.to(wide), weight.to(wide))
    if routes(logits, routing.groups):
        return route_gpu(logits, bias, *routing)
    scores = logits.sigmoid()
    ranked = (scores + bias).unflatten(1, (routing.groups, -1))
    if routing.kept < routing.groups:
        kept = largest(ranked.topk(2, dim=2).values.sum(2), routing.kept)
        shut = torch.ones_like(ranked[..., 0], dtype=torch.bool).scatter_(1, kept, False)
        ranked = ranked.masked_fill(shut[..., None], -torch.inf)
    index = largest(ranked.flatten(1), routing.k)
    weights = scores.gather(1, index)
    if routing.k > 1:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return index, weights * routing.scale


def largest(x: Tensor, k: int) -> Tensor:
    """Indices `[N, k]` of the k largest of each row of `x`, descending, of equals the lower first. `topk` takes any."""
    return x.sort(dim=1, descending=True, stable=True).indices[:, :k]


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return linear(swiglu(*linear(x, gate_up).chunk(2, dim=-1)), down)


def one_by_one(rows: Tensor, index: Tensor, experts: int, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """See `MoE.run`; `expert(e, x)` computes the output of one for its rows."""
    named, order = index.flatten().sort(stable=True)
    ends = ends_of(named, experts).tolist()
    of_row, outputs = order // index.shape[1], []
    for e, (start, end) in enumerate(pairwise([0, *ends])):
        if start < end:
            outputs.append(expert(e, rows[of_row[start:end]]))
    return in_place_of(index, order, torch.cat(outputs) if outputs else rows.new_empty(0, rows.shape[1]))


def grouped(rows: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `MoE.run`, by products that read the weights of the experts that have rows, once, and know them on the GPU.

    Gathering the weights of every row (`batched_mm` of transformers) would read them once for each, write them and read
    them again: 5 times the bytes for the 32 rows of a block, with 8 of 256 experts each.
    """
    named, order = index.flatten().sort(stable=True)
    ends = ends_of(named, len(down))
    hidden = F.grouped_mm(rows[order // index.shape[1]], gate_up.transpose(1, 2), offs=ends)
    outputs = F.grouped_mm(swiglu(*hidden.chunk(2, dim=-1)), down.transpose(1, 2), offs=ends)
    return in_place_of(index, order, outputs)


def every(rows: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `MoE.run`, by every expert on every row: no shape depends on which are chosen, and nothing waits."""
    hidden = torch.bmm(rows.expand(len(down), -1, -1), gate_up.transpose(1, 2))
    outputs = torch.bmm(swiglu(*hidden.chunk(2, dim=-1)), down.transpose(1, 2))
    return outputs[index, torch.arange(len(rows), device=rows.device)[:, None]]


def ends_of(named: Tensor, experts: int) -> Tensor:
    """Where the rows of each expert end, int32 `[experts]`, in their sorted numbers `named`."""
    return torch.searchsorted(named, torch.arange(experts, device=named.device), right=True, out_int32=True)


def in_place_of(index: Tensor, order: Tensor, outputs: Tensor) -> Tensor:
    """`outputs` `[N k, d]`, which are in `order`, where `index` `[N, k]` has their experts: `[N, k, d]`."""
    return torch.empty_like(outputs).index_copy_(0, order, outputs).view(*index.shape, outputs.shape[1])


def groups_products(rows: Tensor, weights: Tensor) -> bool:
    """Whether PyTorch's grouped product of `rows` with stacks like `weights` `[E, 2 m, d]` runs without the host.

    It does so for bfloat16 on GPUs of compute capability 9 and 10; elsewhere it copies the offsets to the host and
    loops. It takes rows of a multiple of 16 bytes.
    """
    if not rows.is_cuda or torch.version.hip is not None or not rows.dtype == weights.dtype == torch.bfloat16:
        return False
    aligned = weights.shape[1] % 16 == 0 and weights.shape[2] % 8 == 0
    return aligned and torch.cuda.get_device_capability(rows.device)[0] in (9, 10)
