"""The performance model: launches counted without a GPU, the times they are given, a decode made of them."""

from __future__ import annotations

from typing import Any

import nodes
import pytest
import torch
from nodes import GPU, Launch

import fdpp
from fdpp import LLaDAConfig
from fdpp.attention import block_attention


def small(**sizes: Any) -> LLaDAConfig:
    return LLaDAConfig(**{"d_model": 64, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 96} | sizes)


# What is counted


def test_views_are_free_and_operators_are_not() -> None:
    with nodes.recorded() as record:
        x = torch.empty(4, 6, dtype=torch.bfloat16, device=GPU)
        assert x.is_cuda and x.device == GPU and not x.is_meta
        x.view(6, 4).transpose(0, 1)[:, 1:].unflatten(1, (1, 5)).expand(4, 3, 5)
        assert record.launches == []
        x.transpose(0, 1).reshape(24)  # copies
        (x + 1).add_(x)
        x[torch.arange(2, device=GPU)] = x[:2]
        x.masked_fill(x > 0, 0.0)
    names = ["clone", "add", "add_", "arange", "index_put_", "gt", "masked_fill", "masked_fill"]
    assert [launch.name for launch in record.launches] == names


def test_bytes_are_what_is_read_and_written() -> None:
    with nodes.recorded() as record:
        table = torch.empty(1000, 8, dtype=torch.float32, device=GPU)
        at = torch.empty(3, dtype=torch.int64, device=GPU)
        rows = torch.nn.functional.embedding(at, table)
        table[at] = rows
        rows.add_(rows)
        rows.copy_(table[:3])
        torch.empty(1, 8, dtype=torch.float32, device=GPU).expand(3, 8) + rows
    assert [launch.bytes for launch in record.launches] == [
        3 * 8 + 2 * 96,  # the ids, the rows of the table that they name, the result
        3 * 8 + 96 + 96,  # the ids, the values, what they are written to
        96 + 96,
        96 + 96,
        32 + 96 + 96,  # what is repeated is read once
    ]


def test_a_product_has_flops_and_rows() -> None:
    with nodes.recorded() as record:
        x = torch.empty(2, 5, 8, dtype=torch.bfloat16, device=GPU)
        torch.nn.functional.linear(x, torch.empty(16, 8, dtype=torch.bfloat16, device=GPU))
    assert record.launches == [Launch("mm", "rest", 2 * (80 + 128 + 160), 2 * 10 * 8 * 16, 10, 16)]


def test_attention_is_a_launch_of_each_of_its_kernels() -> None:
    with nodes.recorded() as record:
        q = torch.empty(1, 4, 32, 64, dtype=torch.bfloat16, device=GPU)
        k = torch.empty(1, 2, 512, 64, dtype=torch.bfloat16, device=GPU)
        block_attention(q, k, k)
        torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert [(launch.name, launch.flops, launch.rows, launch.columns) for launch in record.launches] == [
        ("attend_kernel", 4 * 4 * 32 * 64 * 512, 64, 512),
        ("combine_kernel", 0, 0, 0),
        ("scaled_dot_product_attention", 4 * 4 * 32 * 64 * 512, 64, 512),
    ]


STEPS: list[dict[str, Any]] = [
    *({"cache": cache, "full": full} for cache in ("dual", "prefix", "none") for full in (False, True)),
    {"batch": 4},
    {"drafts": 3},
    {"head": "fused"},
    {"rule": fdpp.Klass(0.3, 0.5, 1)},
    {"temperature": 0.7, "seed": 3},
]


@pytest.mark.parametrize("settings", STEPS, ids=str)
def test_every_layer_launches_the_same_and_a_step_the_same_again(settings: dict[str, Any]) -> None:
    counted = [nodes.launches(small(), prompt=300, **settings) for _ in range(2)]
    assert counted[0] == counted[1]
    assert nodes.per_layer(counted[0]) > 0
    places = nodes.by_place(counted[0])
    assert sum(places.values()) == len(counted[0]) and places["selection"] > 0
    # The depth changes nothing else.
    deeper = nodes.launches(small(n_layers=5), prompt=300, **settings)
    assert len(deeper) - len(counted[0]) == 2 * nodes.per_layer(counted[0])


def test_what_a_block_step_launches() -> None:
    """Graph nodes of LLaDA-8B's shape: these stand in bench/README.md."""
    config = LLaDAConfig(mlp_hidden_size=12288)
    step = nodes.launches(config)
    assert nodes.per_layer(step) == 26
    assert nodes.by_place(step) == {"layers": 832, "head": 1, "selection": 1, "rest": 67}
    weights = sum(launch.bytes for launch in step if launch.name == "mm")
    assert 15e9 < weights < 15.3e9


def test_layers_that_differ_are_named() -> None:
    launches = [Launch("mm", f"layer {layer}") for layer in (0, 0, 1, 2)]
    with pytest.raises(ValueError, match=r"in every layer but the last, got \[2, 1, 1\]"):
        nodes.per_layer(launches)
