"""The performance model: launches counted without a GPU, the times they are given, a decode made of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nodes
import predict
import pytest
import roofline
import torch
from bench_decode import SHAPES
from nodes import GPU, Launch
from roofline import Device
from small import BLOCK_CAUSAL
from transformers import PretrainedConfig

import fdpp
from fdpp import DreamConfig, LLaDAConfig
from fdpp.attention import block_attention, split_keys
from fdpp.decoding.generate import loop_of, with_blocks, with_token_ids
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models.block import Block
from fdpp.step import gpu


def small(**sizes: Any) -> LLaDAConfig:
    return LLaDAConfig(**{"d_model": 64, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 96} | sizes)


def small_dream(**sizes: Any) -> DreamConfig:
    """Seven heads share one of keys, and a block step feeds the column before its block."""
    sizes = {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2} | sizes
    return DreamConfig(**{"vocab_size": 152064, "num_hidden_layers": 3, "intermediate_size": 96} | sizes)


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
        torch.argsort(x[0])
    names = ["clone", "add", "add_", "arange", "index_put_", "gt", *["masked_fill"] * 2, *["sort"] * 4]
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
        block_attention(q, k, k, tickets=split_keys.new_tickets(GPU))
        torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert [(launch.name, launch.flops, launch.rows, launch.columns) for launch in record.launches] == [
        ("zeros", 0, 0, 0),
        ("attend_kernel", 4 * 4 * 32 * 64 * 512, 64, 512),
        ("zeros", 0, 0, 0),
        ("attend_kernel", 4 * 4 * 32 * 64 * 512, 64, 512),
        ("scaled_dot_product_attention", 4 * 4 * 32 * 64 * 512, 64, 512),
    ]


def test_of_a_cache_a_kernel_may_touch_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend() -> int:
        with nodes.recorded() as record:
            q = torch.empty(1, 4, 32, 64, dtype=torch.bfloat16, device=GPU)
            k, v = torch.empty(2, 1, 4, 128, 64, dtype=torch.bfloat16, device=GPU)
            block_attention(q, k, v)
        return record.launches[0].bytes

    assert attend() == 2 * 64 * 4 * (32 + 2 * 128 + 32)
    monkeypatch.setitem(nodes.PARTLY, "attend_kernel", {"k": "q", "v": "q"})
    assert attend() == 2 * 64 * 4 * (32 + 2 * 32 + 32)


def test_the_machine_is_as_it_was_afterwards() -> None:
    def state() -> tuple[Any, ...]:
        patched = torch.cuda.device_of, torch.cuda.current_stream, Block.forward, torch.get_default_dtype()
        return *patched, list(gpu.spare)

    before = state()
    with pytest.raises(ZeroDivisionError), nodes.recorded():
        torch.empty(1, device=GPU)
        _ = 1 / 0
    assert before == state()
    assert not torch.empty(1).is_cuda


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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"full": True},
        {"batch": 5},
        {"full": True, "batch": 5},
        {"cache": "prefix", "prompt": 801},
        {"cache": "none"},
        {"drafts": 4},
        {"drafts": 3, "branches": "tree"},
        {"drafts": 3, "branches": "batch", "cache": "prefix"},
        {"cfg_scale": 1.0},
    ],
    ids=str,
)
def test_a_layer_launches_nine_kernels(settings: dict[str, Any]) -> None:
    """Norm, product, rotation and write, attention, product; norm, product, SwiGLU, product. Also in drafts."""
    launches = nodes.launches(LLaDAConfig(mlp_hidden_size=12288, n_layers=3), **settings)
    assert nodes.per_layer(launches) == 9
    kernels = [launch.name for launch in launches if launch.where == "layer 1"]
    assert [name for name in kernels if "kernel" in name or "attention" in name] == [
        *("rms_norm_kernel", "rotate_kernel", kernels[3], "rms_norm_kernel", "swiglu_kernel"),
    ]
    assert [name for name in kernels if "mm" in name] == ["mm", "addmm_", "mm", "addmm_"]


def test_what_a_block_step_launches() -> None:
    """Graph nodes of LLaDA-8B's shape: these stand in bench/README.md."""
    config = LLaDAConfig(mlp_hidden_size=12288)
    step = nodes.launches(config)
    assert nodes.by_place(step) == {"layers": 288, "head": 1, "selection": 1, "rest": 52}
    weights = sum(launch.bytes for launch in step if launch.name in ("mm", "addmm_"))
    assert 15e9 < weights < 15.3e9


def test_what_a_block_step_of_dream_launches() -> None:
    """33 rows for a block of 32, the head on 32 of them; four heads of keys and values, read once for 28 of queries."""
    config = SHAPES["dream-7b"]().config
    assert config is not None
    step = predict.counts(config, prompt=800)
    assert sum(n for n, _ in step) == 306
    of_layers = [(n, x) for n, x in step if x.flops and x.where == "layers"]
    fed = {(x.name, x.columns, x.flops // (2 * 33 * x.columns)): n for n, x in of_layers if x.rows == 33}
    # The last layer's queries are those that are read.
    products = {("addmm", 4608, 3584): 28, ("addmm_", 3584, 3584): 27}
    assert fed == products | {("mm", 2 * 18944, 3584): 27, ("addmm_", 3584, 18944): 27}
    [head] = [x for _, x in step if x.where == "head"]
    assert (head.rows, head.columns) == (32, 152064) and 1.09e9 < head.bytes < 1.11e9
    weights = sum(n * x.bytes for n, x in of_layers if x.name != "attend_kernel")
    assert 13.05e9 < weights < 13.4e9
    [attention] = [x for _, x in of_layers if x.name == "attend_kernel" and x.rows == 7 * 33]
    keys, queries, parts = 2 * 4 * 1056 * 128 * 2, 33 * 28 * 128 * 2, 8 * 33 * 28 * (128 + 2) * 4
    assert attention.flops == 4 * 33 * 28 * 128 * 1056
    assert keys + 2 * queries + parts <= attention.bytes < keys + 2 * queries + parts + 8192


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 33),
        ({"batch": 4}, 132),
        ({"drafts": 2}, 66),
        ({"drafts": 3, "branches": "tree"}, 99),
        ({"cache": "prefix"}, 257),
        ({"full": True, "at": 1}, 1056),
        ({"full": True, "at": 1, "refresh": "recent"}, 65),
    ],
    ids=str,
)
def test_what_a_step_of_dream_feeds(settings: dict[str, Any], rows: int) -> None:
    """Beside what a block feeds, one column before it, in every branch of it; as many launches a layer as LLaDA's."""
    layer = [launch for launch in nodes.launches(small_dream(), **settings) if launch.where == "layer 1"]
    assert len(layer) == 9
    assert {launch.rows for launch in layer if "mm" in launch.name} == {rows}
    # Drafts go to the kernel however many queries they are: a branch is a launch's row, and has a group's own.
    [attention] = [launch for launch in layer if "attend" in launch.name or "attention" in launch.name]
    many = settings.get("full") or settings.get("cache") == "prefix"
    assert attention.name == ("scaled_dot_product_attention" if many else "attend_kernel")
    assert attention.rows == 7 * (rows if many else 33)


@pytest.mark.parametrize(
    ("family", "fed"),
    [("SDAR", (48, 16, 8)), ("Fast-dLLM v2", (40, 8, 5)), ("LLaDA2", (48, 16, 8))],
)
def test_what_forwards_of_a_block_causal_model_feed(family: str, fed: tuple[int, ...]) -> None:
    """Where a block begins, also the one before it, or the prompt; a layer without experts has 9 launches in all.

    Fast-dLLM v2 decides the first token of a block by the block before alone, then sub-blocks of 4 tokens, which are
    fed with the column before them.
    """
    config, anchored = BLOCK_CAUSAL[family](num_hidden_layers=3).config, family == "Fast-dLLM v2"
    settings: dict[str, Any] = {"block": 8, "sub_block_length": 4} if anchored else {"block": 8}
    parts = predict.parts_of(config, **settings)
    assert parts == ([1, 3, 4] if anchored else [8])
    last = len(parts) - 1
    for (full, at), rows in zip([(True, 0), (True, len(parts)), (False, last)], fed, strict=True):
        launches = nodes.launches(config, prompt=40, new=32, full=full, at=at, **settings)
        first = [launch for launch in launches if launch.where == "layer 0"]
        assert len(first) == 9 and [x.rows for x in first if x.name in ("mm", "addmm")] == [rows, rows]
        assert family == "LLaDA2" or nodes.per_layer(launches) == 9
        [selection] = [launch for launch in launches if launch.name == "select_kernel"]
        assert selection.rows == (1 if anchored and full else parts[last])


def test_a_layer_with_experts_launches_33_kernels() -> None:
    """The weights of those experts alone are read that rows name: expected 163 of 256, of 32 rows with 8 each."""
    config = SHAPES["llada2-mini"]().config
    assert config is not None
    step = predict.counts(config, prompt=800)
    assert sum(n for n, _ in step) == 9 + 19 * 33 + 60
    grouped = [(n, x) for n, x in step if x.groups]
    named = 256 * (1 - (31 / 32) ** 32)
    assert [(n, x.rows, x.columns) for n, x in grouped] == [(19, 256, 1024), (19, 256, 2048)]
    for (_, launch), depth in zip(grouped, (2048, 512), strict=True):
        assert launch.groups == pytest.approx(named, rel=1e-12) and 163 < named < 164
        weights = named * launch.columns * depth * 2
        assert launch.bytes == pytest.approx(weights + 2 * 256 * (launch.columns + depth), abs=1)
        assert launch.flops == 2 * 256 * launch.columns * depth


def test_what_a_block_step_of_sdar_launches() -> None:
    config = SHAPES["sdar-4b"]().config
    assert config is not None
    step = predict.counts(config, prompt=800, block=4)
    assert sum(n for n, _ in step) == 36 * 9 + 60
    products = [(n, x) for n, x in step if x.name in ("mm", "addmm_") and x.where == "layers"]
    assert {x.rows for _, x in products} == {4} and 7.2e9 < sum(n * x.bytes for n, x in products) < 7.4e9


@pytest.mark.parametrize(("family", "sub_block"), [("SDAR", None), ("Fast-dLLM v2", 3), ("Fast-dLLM v2", 1)])
def test_parts_of_a_block_are_the_loops(family: str, sub_block: int | None) -> None:
    model = BLOCK_CAUSAL[family]()
    settings = with_blocks(DiffusionGenerationConfig(16, 8, sub_block_length=sub_block), model)
    loop = loop_of(model)(model, torch.zeros(1, 8, dtype=torch.int64), None, with_token_ids(settings, model.config))
    assert [stop - start for start, stop in loop.blocks] == 2 * predict.parts_of(model.config, 8, sub_block)


def test_layers_that_differ_are_named() -> None:
    launches = [Launch("mm", f"layer {layer}") for layer in (0, 0, 1, 2)]
    with pytest.raises(ValueError, match=r"in every layer but the last, got \[2, 1, 1\]"):
        nodes.per_layer(launches)


# What a launch takes


DEVICE = Device("NVIDIA Test", 4, 1.0, 1.0, 20.0, 2.0, 1.0, 2.0, 0.5, 3.0, 7.0)
LATENCY = 3e-6


def product(rows: int, columns: int, depth: int, bytes: int = 0, name: str = "mm") -> Launch:
    return Launch(name, "layers", bytes, 2 * rows * columns * depth, rows, columns)


@pytest.mark.parametrize(
    ("rows", "strips"), [(1, 1), (32, 1), (127, 1), (128, 1), (129, 2), (256, 2), (257, 3), (1056, 9)]
)
def test_a_product_takes_whole_tiles_of_128_rows(rows: int, strips: int) -> None:
    # Four tiles of 256 columns a strip: as many waves as strips.
    flops = roofline.product_flops(product(rows, 1024, 64), 4)
    assert flops == 2 * strips * 128 * 1024 * 64


def test_a_product_takes_whole_waves_of_the_best_width() -> None:
    # Tiles of 64 columns: 5 in 2 waves of 4. Of 128: 3, cut until they fill the device, in three quarters of one.
    assert roofline.product_flops(product(128, 320, 64), 4) == 2 * 128 * 64 * 4 * min(2 * 64, 128 * 3 / 4)
    # 9 tiles of 64 in 3 waves, 5 of 128 in 2, 3 of 192 in three quarters of one.
    assert roofline.product_flops(product(128, 576, 64), 4) == 2 * 128 * 64 * 4 * (192 * 3 / 4)


def test_experts_have_tiles_of_their_own() -> None:
    # 256 rows on 163 experts: a strip each, of four tiles of 256 columns. On 1: two.
    grouped = replace(product(256, 1024, 64), groups=163.0)
    assert roofline.product_flops(grouped, 4) == pytest.approx(2 * 163 * 128 * 1024 * 64, rel=1e-12)
    assert roofline.product_flops(replace(grouped, groups=1.0), 4) == roofline.product_flops(product(256, 1024, 64), 4)


def test_a_launch_takes_its_latency_and_the_longer_of_bytes_and_operations() -> None:
    bound_by_weight = product(32, 1024, 64, bytes=50_000_000)
    assert roofline.seconds(bound_by_weight, DEVICE) == pytest.approx(LATENCY + 50e-6, rel=1e-12)
    bound_by_work = product(128, 1024, 4096, bytes=1000)
    assert roofline.seconds(bound_by_work, DEVICE) == pytest.approx(LATENCY + 2 * 128 * 1024 * 4096 / 1e12, rel=1e-12)
    float8 = replace(bound_by_work, name="_scaled_mm")
    assert roofline.seconds(float8, DEVICE) == pytest.approx(LATENCY + 128 * 1024 * 4096 / 1e12, rel=1e-12)
    with pytest.raises(ValueError, match="_scaled_mm: expected a device with float8 products, got NVIDIA Test"):
        roofline.seconds(float8, replace(DEVICE, float8_tflop_s=None))
    assert roofline.seconds(Launch("isin", "rest"), DEVICE) == LATENCY


@pytest.mark.parametrize(("bytes", "rate"), [(10_000_000, 2e12), (10_000_001, 1e12)], ids=["half L2", "more"])
def test_small_operators_find_half_an_l2_of_bytes_there(bytes: int, rate: float) -> None:
    launch = Launch("add_", "layers", bytes)
    assert roofline.seconds(launch, DEVICE) == pytest.approx(LATENCY + bytes / rate, rel=1e-12)


def test_attention_and_selection_have_their_own_formulas() -> None:
    attention = Launch("attend_kernel", "layers", 1000, 10**9, 32, 1056)
    assert roofline.seconds(attention, DEVICE) == pytest.approx(LATENCY + 1e9 / 0.5e12, rel=1e-12)
    keys = replace(attention, bytes=10_000_000, flops=1)
    assert roofline.seconds(keys, DEVICE) == pytest.approx(LATENCY + 10e-6, rel=1e-12)
    # 64 warps of 256 logits on 16 schedulers: four in turn, 426 slots each, at 60% of one a nanosecond.
    selection = Launch("select_kernel_before", "selection", 1000, 0, 2, 8192)
    assert roofline.seconds(selection, DEVICE) == pytest.approx(LATENCY + 4 * 426 / 0.6 * 1e-9, rel=1e-12)
    selection = Launch("select_kernel", "selection", 1000, 0, 2, 8192)
    assert roofline.seconds(selection, DEVICE) == pytest.approx(LATENCY + 4e-6 + 4 * 91 / 0.6 * 1e-9, rel=1e-12)


@pytest.mark.parametrize(("rows", "tiles"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (256, 256)])
def test_a_product_of_ours_takes_tiles_of_what_it_needs(rows: int, tiles: int) -> None:
    launch = product(rows, 1024, 64, name="product_kernel")
    assert roofline.product_flops(launch, 4) == 2 * tiles * 1024 * 64 / roofline.OWN_RATE


def test_parts_hold_every_launch() -> None:
    counted = predict.counts(small(), prompt=300)
    parts = roofline.by_part(counted, DEVICE)
    assert tuple(parts) == roofline.PARTS and all(value > 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(sum(n * roofline.seconds(x, DEVICE) for n, x in counted), rel=1e-12)
    zero = replace(DEVICE, launch_us=0.0)
    nodes_of = sum(n for n, _ in counted)
    assert sum(parts.values()) - sum(roofline.by_part(counted, zero).values()) == pytest.approx(nodes_of * LATENCY)


@pytest.mark.parametrize("deep", [small(n_layers=6), small_dream(num_hidden_layers=6)], ids=["llada", "dream"])
def test_three_layers_stand_for_all(deep: PretrainedConfig) -> None:
    for full in (False, True):
        counted = predict.counts(deep, prompt=300, full=full)
        listed = [
            replace(x, where="layers") if "layer" in x.where else x for x in nodes.launches(deep, prompt=300, full=full)
        ]
        assert sum(n for n, _ in counted) == len(listed)
        assert sum(n * x.bytes for n, x in counted) == sum(x.bytes for x in listed)
        assert {x: n for n, x in counted} == {x: listed.count(x) for x in listed}


# Devices


@pytest.mark.parametrize("path", sorted(roofline.DEVICES.glob("*.json")), ids=lambda path: path.stem)
def test_every_figure_of_a_device_says_where_it_is_from(path: Path) -> None:
    found = json.loads(path.read_text())
    assert roofline.device(path.stem) == roofline.device(str(path))
    for key, figure in found.items():
        if key != "name":
            # None was measured yet; one that is says on what, and when.
            assert figure["source"].split(":")[0] in ("published", "assumed", "measured", "it has no such instruction")
    assert sorted(each.stem for each in roofline.DEVICES.glob("*.json")) == ["a100", "b200", "h100", "h200"]


def test_a_device_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device: expected one of \['a100', .*got 'h1000'"):
        roofline.device("h1000")
    found = json.loads((roofline.DEVICES / "h100.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(found | {"launch_us": {"value": 1.0, "source": ""}}))
    with pytest.raises(ValueError, match="launch_us: expected a value and its source"):
        roofline.device(str(path))
    found.pop("l2_mb")
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"expected .*l2_mb"):
        roofline.device(str(path))


# A decode


def took(batch: int, full: bool, at: int) -> float:
    """A step of a batch, that can be told from every other by its digits."""
    return (1000.0 if full else 1.0) * batch


def test_one_sequence_takes_the_closed_form() -> None:
    forwards = [[8, 1, 5, 32]]
    assert predict.decode_seconds(forwards, took) == 4 * 1000 + (46 - 4) * 1


def test_sequences_leave_a_block_and_the_batch() -> None:
    # Block 0: 3 sequences, then 2 twice, then 1. Block 1: the first has ended; 2, then 1 twice.
    assert predict.decode_seconds([[3], [1, 3], [4, 1]], took) == 3000 + 2 + 2 + 1 + 2000 + 1 + 1
    equal = predict.decode_seconds([[4, 4]] * 5, took)
    assert equal == 2 * (5000 + 3 * 5)


def test_a_batch_runs_at_its_graph_size() -> None:
    asked: list[tuple[int, bool, int]] = []

    def counted(batch: int, full: bool, at: int) -> predict.Counts:
        asked.append((batch, full, at))
        return [(batch, Launch("add", "rest"))]

    taken = predict.step_seconds(counted, DEVICE)
    assert taken(5, True, 3) == pytest.approx(6 * LATENCY + 7e-6) and asked == [(6, True, 3)]
    assert predict.sizes([5, 9]) == [1, 2, 3, 4, 6, 8, 12]


def test_what_is_drawn_has_the_mean_and_the_range_that_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(predict.draw(400, 8, 7.5, 32, generator)).double()
    assert drawn.shape == (400, 8) and drawn.min() >= 1 and drawn.max() <= 32
    error = math.sqrt(31 * (6.5 / 31) * (1 - 6.5 / 31) / drawn.numel())
    assert abs(float(drawn.mean()) - 7.5) < 4 * error
    assert predict.draw(2, 3, 1.0, 32, generator) == [[1] * 3] * 2
    assert predict.draw(2, 3, 32.0, 32, generator) == [[32] * 3] * 2
    assert predict.draw(1, 2, 1.0, 1, generator) == [[1, 1]]


@pytest.mark.parametrize("ends", [False, True])
def test_one_sequence_at_a_time_gives_the_mean_of_the_closed_form(ends: bool) -> None:
    # One forward a block, whatever is drawn.
    assert predict.tokens_per_second(1, [32] * 8, 256, 32.0, took, ends) == pytest.approx(32 / 1000)
    rate = predict.tokens_per_second(1, [32] * 8, 256, 4.0, took, ends)
    assert rate == predict.tokens_per_second(1, [32] * 8, 256, 4.0, took, ends)
    assert rate == pytest.approx(32 / (1000 + 7), rel=1e-3)


# What is printed


def test_the_stored_counts_are_a_decodes() -> None:
    before, about = predict.stored(predict.BEFORE)
    assert (about["shape"], about["prompt"], about["new"], about["block"], about["cache"]) == (
        "8b",
        800,
        256,
        32,
        "dual",
    )
    for batch in predict.sizes([128]):
        for full in (False, True):
            assert sum(n for n, _ in before(batch, full, 0)) > 100
    assert sum(n for n, _ in before(1, False, 0)) == 901
    with pytest.raises(ValueError, match=r"expected one of .* sequences, got 5"):
        before(5, False, 0)


def test_counts_survive_a_file(tmp_path: Path) -> None:
    counted = predict.counter(small(), prompt=300, cache="dual")
    predict.store(tmp_path / "counts.json", counted, [2], {"shape": "small"})
    again, about = predict.stored(tmp_path / "counts.json")
    assert about.pop("commit") and about == {"shape": "small"}
    for batch in (1, 2):
        for full in (False, True):
            assert again(batch, full, 3) == counted(batch, full, 0)


def test_only_counts_that_are_the_same_in_every_block_are_stored(tmp_path: Path) -> None:
    counted = predict.counter(small(), prompt=300, cache="prefix")
    with pytest.raises(ValueError, match="the same in every block"):
        predict.store(tmp_path / "counts.json", counted, [1], {})


def test_steps_of_a_prefix_cache_become_narrower() -> None:
    prefix = predict.counter(small(), prompt=300, cache="prefix")
    widths = [{x.rows for _, x in prefix(1, False, at) if x.name == "mm" and x.where == "layers"} for at in (0, 3, 7)]
    assert [max(rows) for rows in widths] == [256, 160, 32]
    dual = predict.counter(small(), prompt=300, cache="dual")
    assert dual(1, False, 5) is dual(1, False, 0) and dual(1, True, 5) is dual(1, True, 1)


def test_the_command_prints_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["--device", "h200", "--batch", "1", "2", "--before"])
    out = capsys.readouterr().out
    assert out.startswith("Predicted from counts, not measured.") and out.count("predicted, NVIDIA H200 SXM") == 2
    assert "Before, at " in out and "Now:" in out
    assert "block step: products, ms" in out and "refresh: all, ms" in out and "tok/s, responses that end" in out
    assert out.count("times as many tokens per second") == 2
    with pytest.raises(SystemExit, match="expected the counts of"):
        predict.main(["--batch", "1", "--before", "--new", "64"])
    predict.main(["--batch", "1", "--new", "64", "--cache", "prefix", "--settings", '{"head": "fused"}'])
    out = capsys.readouterr().out
    assert "LLaDA-8B's shape" in out and "head=fused." in out and "| block step: head, ms | 0 |" in out


def test_the_command_predicts_dream(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["--model", "dream-7b", "--batch", "1"])
    out = capsys.readouterr().out
    assert "Dream-7B's shape in bf16" in out and "| block step: graph nodes | 306 |" in out
    with pytest.raises(SystemExit, match=r"expected the counts of .*'dream-7b'"):
        predict.main(["--model", "dream-7b", "--batch", "1", "--before"])


@pytest.mark.parametrize("model", ["sdar-4b", "fast-dllm-v2-7b"])
def test_the_command_predicts_block_causal_models(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["--model", model, "--batch", "1", "--new", "64"])
    out = capsys.readouterr().out
    sdar = model == "sdar-4b"
    name, block = ("SDAR-4B", 4) if sdar else ("Fast-dLLM v2-7B", 32)
    assert f"{name}'s shape in bf16, dual cache, 800 + 64 tokens, blocks of {block}, 1, 2, 4 tokens" in out
    assert "(assumed)" in out and out.count("tok/s, commits by themselves") == 3 * sdar
    titles = ("block and the one before", "prefill and a block") if sdar else ("the block before", "whole block")
    assert all(f"| {title}: all, ms |" in out for title in ("block step", *titles))
    for wrong in (["--prompt", "801"], ["--prompt", "1056"], ["--cache", "none"]):
        with pytest.raises(ValueError, match="expected a cache and a prompt of whole blocks, up to 1024 tokens"):
            predict.main(["--model", model, *wrong])


def test_commits_by_themselves_are_forwards_of_a_block() -> None:
    # A prefill and a block, then a block; a block for the commit before the next one.
    taken = predict.separate(took)
    assert predict.decode_seconds([[2, 2, 1]], taken) == (1000 + 1) + 1 + (1 + 1) + 1 + (1 + 1)


def test_measured_beside_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"shape": "100m", "batch": 1, "prompt": 96, "new": 64, "block": 32, "tokens_per_forward": "4.00, set"}
    fdpp_way = {"nfe": 16, "tokens_per_second": 1000.0, "steps": {"ms_step": 1.0, "ms_refresh": 2.0}}
    rows = [row | {"cache": cache, "fdpp": fdpp_way} for cache in ("dual", "prefix", "none")]
    sdar = {"shape": "sdar-100m", "block": 4, "cache": "dual", "fdpp": fdpp_way | {"nfe": 32}}
    rows += [row | sdar, row | {"cache": "dual", "fdpp": {"error": "out of memory"}}]
    rows += [row | {"cache": "dual", "shape": "tiny"}]
    path = tmp_path / "decode-h100.json"
    results = {"environment": {"device": "NVIDIA H100 80GB HBM3"}, "rows": rows}
    path.write_text(json.dumps(results))
    predict.main(["--device", "h100", "--against", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("| measured on NVIDIA H100 80GB HBM3, predicted for NVIDIA H100 SXM |") and len(lines) == 6
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    on, config = roofline.device("h100"), SHAPES["100m"]().config
    assert config is not None
    step, refresh = (
        1e3 * sum(roofline.by_part(predict.counts(config, prompt=96, new=64, full=full), on).values())
        for full in (False, True)
    )
    seconds = (2 * refresh + 14 * step + 16 * 0.09) / 1e3
    assert cells[0][1:] == [
        *("16", f"{step:.3g}", "1", f"{1 / step:.2f}", f"{refresh:.3g}", "2", f"{2 / refresh:.2f}"),
        *(f"{64 / seconds:,.0f}", "1,000", f"{1000 * seconds / 64:.2f}"),
    ]
    assert cells[2][2:5] == ["-", "1", "-"]
    # Of SDAR a prefill and a block, 15 times a block and the one before, 16 blocks.
    config = SHAPES["sdar-100m"]().config
    assert config is not None
    counted = predict.counter(config, prompt=96, new=64, block=4, cache="dual")
    prefill, merged, block = (
        sum(roofline.by_part(counted(1, *step), on).values()) for step in ((True, 0), (True, 1), (False, 0))
    )
    seconds = prefill + 15 * merged + 16 * block + 32 * 0.09e-3
    assert cells[3][2:8] == ["-", "1", "-", "-", "2", "-"] and cells[3][8] == f"{64 / seconds:,.0f}"
    # Of another device nothing is compared.
    path.write_text(json.dumps(results | {"environment": {"device": "CPU, AMD EPYC"}, "rows": rows[:1]}))
    predict.main(["--device", "h100", "--against", str(path)])
    last = capsys.readouterr().out.splitlines()[-1].split("|")
    assert last[5].strip() == last[8].strip() == last[11].strip() == "-"
    path.write_text(json.dumps(results | {"rows": rows[-1:]}))
    with pytest.raises(SystemExit, match="nothing to compare"):
        predict.main(["--against", str(path)])


def test_rows_beside_a_block_launch_nothing_of_their_own() -> None:
    """Twice the positions in as many launches of a layer; a full forward attends twice and joins the two."""
    config = LLaDAConfig(n_layers=3)
    plain, beside = (nodes.launches(config, rule=rule) for rule in (fdpp.Threshold(0.6), fdpp.Wino()))
    assert nodes.per_layer(beside) == nodes.per_layer(plain) == 9
    assert nodes.by_place(beside)["head"] == nodes.by_place(plain)["head"] == 1
    rows = [{launch.rows for launch in step if launch.name == "mm"} for step in (plain, beside)]
    assert 32 in rows[0] and 64 in rows[1] and 32 not in rows[1]
    assert nodes.per_layer(nodes.launches(config, rule=fdpp.Wino(), full=True)) == 11


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_quantised_layers_launch_as_many(weights: str) -> None:
    """Of few rows; a full forward's products are the library's."""
    pytest.importorskip("torchao")
    config = LLaDAConfig(mlp_hidden_size=12288, n_layers=3)
    step = nodes.launches(config, weights=weights)
    assert nodes.per_layer(step) == 9
    products = [launch for launch in step if launch.name == "product_kernel"]
    whole = [launch for launch in nodes.launches(config) if launch.name in ("mm", "addmm_") and "layer" in launch.where]
    assert [p.flops for p in products] == [p.flops for p in whole]
    assert 0.5 < sum(p.bytes for p in products) / sum(p.bytes for p in whole) < 0.55
    full = nodes.launches(config, weights=weights, full=True)
    assert nodes.per_layer(full) == 9 + 4 + 4, "four weights widened, four products scaled"
    recent = nodes.launches(config, weights=weights, full=True, at=1, refresh="recent")
    assert nodes.per_layer(recent) == 9
    assert nodes.per_layer(nodes.launches(small_dream(), weights=weights)) == 10, "biases are added by themselves"
