"""The router against its definition, the experts' products against each other, and shapes that no routing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import INTERPRETED, on_gpu
from plain_experts import plain_mixture, plain_mlp, plain_route
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fdpp.models.experts import MoE, Routing, every, feed_forward, grouped, one_by_one, route
from fdpp.models.launches import route_gpu

D, WIDTH, E = 16, 8, 12
ROUTINGS = {
    "groups": Routing(3, 4, 2, 2.5),
    "one group": Routing(4, 1, 1, 1.0),
    "all groups": Routing(2, 3, 3, 2.0),
    "one expert": Routing(1, 3, 1, 2.5),
    "all of the kept": Routing(6, 4, 2, 1.5),
    "every expert": Routing(12, 2, 2, 1.0),
}
EACH = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


def problem(
    seed: int, rows: int = 9, dtype: torch.dtype = torch.float32, experts: int = E
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((rows, D), (experts, D), (experts,)))
    return x.to(dtype), (weight / 4).to(dtype), (bias / 10).to(dtype)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_router_is_its_definition(routing: Routing, dtype: torch.dtype) -> None:
    for seed in range(4):
        given = problem(seed, dtype=dtype)
        index, weights = route(*given, routing)
        expected, of_weights = plain_route(*given, routing)
        assert torch.equal(index, expected)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(weights.double(), of_weights, atol=1e-6, rtol=1e-6)


@EACH
def test_of_equals_the_lower_index(routing: Routing) -> None:
    x = torch.ones(2, D)
    weight = torch.zeros(E, D)
    bias = torch.tensor([0.0, 0.25] * (E // 2))
    for given in ((x, weight, torch.zeros(E)), (x, weight, bias), (x, weight, bias.flip(0))):
        assert torch.equal(route(*given, routing)[0], plain_route(*given, routing)[0])


def test_the_bias_selects_and_does_not_weigh() -> None:
    x, weight, _ = problem(0)
    bias = torch.zeros(E)
    bias[[5, 6]] = 10.0
    index, weights = route(x, weight, bias, Routing(2, 1, 1, 1.0))
    assert {*index.flatten().tolist()} == {5, 6}
    s = (x @ weight.T).sigmoid().gather(1, index)
    torch.testing.assert_close(weights, s / s.sum(1, keepdim=True))


def test_scores_that_vanish_weigh_nothing() -> None:
    x, weight = torch.full((1, D), 100.0), torch.full((E, D), -100.0)
    index, weights = route(x, weight, torch.zeros(E), Routing(3, 4, 2, 2.5))
    assert index.tolist() == [[0, 1, 2]]
    assert weights.tolist() == [[0.0, 0.0, 0.0]]


DEVICES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
MINI = Routing(8, 8, 4, 2.5)


@on_each_device
@pytest.mark.parametrize("routing", [*ROUTINGS.values(), MINI], ids=[*ROUTINGS, "LLaDA2.0-mini"])
@on_gpu(lambda routing: routing in (ROUTINGS["groups"], MINI))
def test_the_kernel_is_the_definition(routing: Routing, device: str) -> None:
    experts = 256 if routing is MINI else E
    x, weight, bias = problem(1, rows=5, experts=experts)
    for ties in (False, True):
        if ties:
            x, bias = torch.zeros_like(x), torch.arange(experts) // 2 % 3 / 4.0
        index, weights = route_gpu((x @ weight.T).to(device), bias.to(device), *routing)
        expected, of_weights = plain_route(x, weight, bias, routing)
        assert index.dtype == torch.int64 and index.cpu().equal(expected)
        torch.testing.assert_close(weights.cpu().double(), of_weights, atol=2e-6, rtol=2e-6)


@on_each_device
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_the_kernel_of_nothing_and_of_extremes(device: str) -> None:
    assert [len(part) for part in route_gpu(torch.zeros(0, E, device=device), torch.zeros(E), 3, 4, 2, 2.5)] == [0, 0]
    logits = torch.zeros(4, E)
    logits[0] = float("nan")
    logits[1, :10] = float("nan")
    logits[2] = -float("inf")
    logits[3, 5], logits[3, 6] = float("inf"), -1000.0
    index, weights = (part.cpu() for part in route_gpu(logits.to(device), torch.zeros(E, device=device), 3, 4, 2, 2.5))
    assert ((index >= 0) & (index < E)).all()
    assert index[1, :2].tolist() == [10, 11] and weights[0].isnan().all()
    assert index[2].tolist() == [0, 1, 2] and weights[2].tolist() == [0.0, 0.0, 0.0]
    assert index[3].tolist() == [5, 0, 1]
    torch.testing.assert_close(weights[3], torch.tensor([1.0, 0.5, 0.5]) / 2 * 2.5)


def moe(seed: int = 0, shared: int = 1) -> MoE:
    made = MoE(D, WIDTH, E, shared, Routing(3, 4, 2, 2.5)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*made.parameters(), made.gate.expert_bias):
            value.copy_(torch.randn(value.shape, generator=generator) / 3)
    return made


def looped(rows: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return one_by_one(rows, index, E, lambda e, x: feed_forward(x, gate_up[e], down[e]))


WAYS = {"looped": looped, "grouped": grouped, "every": every}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_computes_the_same(way: Any, dtype: torch.dtype) -> None:
    made, tolerance = moe().to(dtype), 1e-5 if dtype == torch.float32 else 0.02
    for seed, rows in ((0, 9), (1, 1), (2, 0)):
        x = problem(seed, rows, dtype)[0]
        index = torch.rand(rows, E, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :3]
        index[: rows // 2] = torch.tensor([E - 1, 0, 4])  # experts without rows, and with many
        out = way(x, index, made.gate_up.stack(), made.down.stack())
        assert out.dtype == dtype and out.shape == (rows, 3, D)
        for n, chosen in enumerate(index.tolist()):
            expected = torch.stack([plain_mlp(x[n].double(), made.experts[e]) for e in chosen])
            torch.testing.assert_close(out[n].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("way", [grouped, every], ids=lambda way: way.__name__)
def test_no_shape_depends_on_the_routing(way: Any) -> None:
    """Tensors without data cannot be looked at."""
    with FakeTensorMode():
        sizes = (9, D), (E, D), (E,), (E, 2 * WIDTH, D), (E, D, WIDTH)
        x, weight, bias, gate_up, down = (torch.empty(*size, dtype=torch.bfloat16) for size in sizes)
        index, weights = route(x, weight, bias, Routing(3, 4, 2, 2.5))
        out = way(x, index, gate_up, down)
        assert (index.shape, weights.shape, out.shape) == ((9, 3), (9, 3), (9, 3, D))


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_block_adds_routed_and_shared_experts(shared: int) -> None:
    made, x = moe(shared=shared).double(), problem(0)[0].double().view(3, 3, D)
    expected = plain_mixture(x.flatten(0, 1), made).view_as(x)
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)
    assert made.gate_up.stack() is None, "with gradients the experts' own weights are used"
    torch.testing.assert_close(made(x).detach(), expected)


@pytest.mark.parametrize("way", ["grouped", "every"])
def test_a_row_does_not_depend_on_others(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = moe(), problem(0, 24)[0]

    def run(self: MoE, rows: Tensor, index: Tensor) -> Tensor:
        return WAYS[way](rows, index, self.gate_up.stack(), self.down.stack())

    with torch.no_grad():
        expected = torch.cat([made(row) for row in x.split(1)])
        monkeypatch.setattr(MoE, "run", run)
        torch.testing.assert_close(made(x), expected)
        torch.testing.assert_close(made(x.flip(0)).flip(0), expected)


def test_weights_are_stacked_in_place_and_keep_their_names() -> None:
    made, x = moe(), problem(0)[0]
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert {"gate.weight", "gate.expert_bias", "experts.11.down_proj.weight", "shared_experts.up_proj.weight"} <= {
        *before
    }
    with torch.no_grad():
        expected, held = made(x), made.gate_up.stack()
        assert held is not None
        assert torch.equal(held[7, :WIDTH], made.experts[7].gate_proj.weight)
        assert held[7, :WIDTH].data_ptr() == made.experts[7].gate_proj.weight.data_ptr()
        assert made.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
        made.experts[7] = moe(1).experts[7]
        assert not torch.equal(made(x), expected), "an expert that is replaced is used"
        other = made.gate_up.stack()
        assert other is not None and torch.equal(other[7, :WIDTH], made.experts[7].gate_proj.weight)


@pytest.mark.parametrize("change", ["value", "data", "parameter", "dtype", "bias", "expert"])
def test_changes_of_an_expert_are_seen(change: str) -> None:
    made, other, x = moe(), moe(1), problem(0)[0]
    with torch.no_grad():
        for _ in range(2):  # the second time by what the first one saw
            made(x)
        layer: Any = made.experts[4].up_proj
        for again in range(2):
            if change == "value":
                layer.weight.mul_(2)
            elif change == "data":
                layer.weight.data = other.experts[4].up_proj.weight.data * (again + 1)
            elif change == "parameter":
                layer.weight = nn.Parameter(other.experts[4].up_proj.weight * (again + 1))
            elif change == "dtype":
                made.to(torch.float64 if again else torch.bfloat16)
            elif change == "bias":
                layer.bias = nn.Parameter(torch.full((WIDTH,), again + 1.0))
            else:
                made.experts[4] = moe(again + 2).experts[4]
            given = x.to(made.gate.weight.dtype)
            index, weights = route(given, made.gate.weight, made.gate.expert_bias, made.routing)
            outputs = one_by_one(given, index, E, lambda e, rows: made.experts[e](rows))
            expected = (outputs * weights[..., None]).sum(1).to(given.dtype) + made.shared_experts(given)
            for _ in range(2):
                torch.testing.assert_close(made(given), expected)


def test_a_hooked_expert_is_called() -> None:
    made, x, calls = moe(), problem(0)[0], []
    with torch.no_grad():
        index, _ = route(x, made.gate.weight, made.gate.expert_bias, made.routing)
        expected, named = made(x), int(index[0, 0])
        layer: Any = made.experts[named].up_proj
        layer.register_forward_hook(lambda *of_call: calls.append(len(of_call[2])))
        torch.testing.assert_close(made(x), expected)
    assert calls == [int((index == named).sum())]


def test_gradients_reach_the_experts_of_the_rows_and_the_router() -> None:
    made, x = moe(), problem(0, 2)[0]
    made(x).square().sum().backward()
    named = {*route(x, made.gate.weight, made.gate.expert_bias, made.routing)[0].flatten().tolist()}
    assert {e for e, expert in enumerate(made.experts) if expert.down_proj.weight.grad is not None} == named
    assert made.gate.weight.grad is not None and made.gate.weight.grad.abs().sum() > 0
