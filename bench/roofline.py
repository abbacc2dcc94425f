"""What a launch takes: predicted from its bytes and operations and a device's rates. Nothing here is a measurement.

A launch takes its latency and the longer of two times: its bytes at the device's bandwidth, its operations at the
device's rate. The figures of a device are in `devices/<name>.json`, each with its source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from nodes import Launch

DEVICES = Path(__file__).parent / "devices"

TILE_ROWS = 128
"""Rows of a product's tile: the last tile of 1,056 rows has 32, and takes as long as a whole one."""

TILE_COLUMNS = (64, 128, 192, 256)
"""Columns of a tile; a library takes the width that leaves the fewest multiprocessors idle."""

SELECT_SLOTS = {"select_kernel": 91, "select_kernel_before": 2 * 213}
"""Issue slots of a warp for 256 logits, counted in the SASS for sm_90 (tests/helpers/aot.py). Before, 213 of the 363
instructions went to pipes of half the rate and took two slots each, beside which the others issued."""

CANVAS_SLOTS = {"canvas_kernel": 419, "weights_kernel": 328, "process_kernel": 312}
"""The same of a canvas's kernels with a softcap: its tanh is 22 of the 41 instructions that a probability takes. Of the
last two all is counted, for they have no loop."""

SELECT_SHARE = 0.6
"""Share of the slots that `select_kernel` and a canvas's kernels use. Assumed."""

SELECT_DECIDES_US = {"select_kernel": 4.0, "select_kernel_before": 0.0, "canvas_kernel": 4.0}
"""Microseconds until the first logits are there, and after the last ones: ticket, merge, ranks, rule. Assumed; of the
kernel before they were taken to be part of its slots' share."""

ATTENTION = {"attend_kernel", "combine_kernel", "scaled_dot_product_attention"}
OWN_PRODUCTS = {"product_kernel", "project_kernel"}
"""Products by our kernels, whose tiles have no more rows than they need, up to 64."""

OWN_RATE = 0.5
"""Share of a library's rate of products that ours reach where they are bound by it. Assumed."""

FLOAT8 = {"_scaled_mm", "_int_mm"}
"""Products at the rate of float8, which is also that of int8."""


@dataclass(frozen=True)
class Device:
    """A device's figures; how each was found is beside it in its file.

    Attributes:
        multiprocessors: how many there are, each with four schedulers.
        clock_ghz: of the multiprocessors.
        bandwidth_tb_s: TB/s of memory that a product bound by its weight reaches.
        l2_mb, l2_tb_s: size of the L2 cache and what it delivers.
        bf16_tflop_s, float8_tflop_s: TFLOP/s that a large product reaches; None: the device has no float8 products.
        attention_tflop_s: TFLOP/s that attention reaches.
        launch_us: microseconds of a small operator in a CUDA graph that depends on the one before.
        host_us: microseconds between two steps, while the host reads one's summary and launches the next.
    """

    name: str
    multiprocessors: float
    clock_ghz: float
    bandwidth_tb_s: float
    l2_mb: float
    l2_tb_s: float
    bf16_tflop_s: float
    float8_tflop_s: float | None
    attention_tflop_s: float
    launch_us: float
    host_us: float


def device(name: str) -> Device:
    """The device of the file `name`, or of the one of that name in `devices`.

    Raises:
        ValueError: no such file, a figure that is missing, unknown or without a source.
    """
    path = Path(name) if name.endswith(".json") else DEVICES / f"{name}.json"
    if not path.exists():
        known = sorted(each.stem for each in DEVICES.glob("*.json"))
        raise ValueError(f"device: expected one of {known} or the path of a file like theirs, got {name!r}")
    found = json.loads(path.read_text())
    expected = {field.name for field in fields(Device)}
    if set(found) != expected:
        raise ValueError(f"{path}: expected {sorted(expected)}, got {sorted(found)}")
    for key, figure in found.items():
        if key != "name" and not ({"value", "source"} == set(figure) and figure["source"]):
            raise ValueError(f"{path}: {key}: expected a value and its source, got {figure}")
    return Device(**{key: figure if key == "name" else figure["value"] for key, figure in found.items()})


def product_flops(launch: Launch, multiprocessors: float) -> float:
    """FLOPs that a device is busy for: of whole tiles, in whole waves over the multiprocessors.

    A product with fewer tiles than multiprocessors is taken to be cut along the summed dimension until it fills them.
    Of a grouped one every expert has as many rows as the mean.
    """
    if launch.name in OWN_PRODUCTS:
        tile = min(max(1 << (launch.rows - 1).bit_length(), 16), 64)
        return launch.flops / launch.rows * math.ceil(launch.rows / tile) * tile / OWN_RATE
    depth = launch.flops / (2 * launch.rows * launch.columns)
    groups = launch.groups or 1
    strips = groups * math.ceil(launch.rows / groups / TILE_ROWS)

    def columns(width: int) -> float:
        tiles = strips * math.ceil(launch.columns / width)
        waves = tiles / multiprocessors
        return width * (math.ceil(waves) if waves > 1 else waves)

    return 2 * depth * TILE_ROWS * multiprocessors * min(columns(width) for width in TILE_COLUMNS)


def seconds(launch: Launch, device: Device) -> float:
    """Predicted seconds of a launch.

    - Products: bytes from memory, or the operations of whole tiles and waves (`product_flops`).
    - Attention: bytes from memory, or its operations.
    - `select_kernel`: logits from L2, where the head has left them, or issue slots (`SELECT_SLOTS`), and its decision.
      A canvas's kernels: the same, but their logits fill more than L2.
    - All others: their bytes, from L2 where they fill no more than half of it, as a launch before has left them there.
    """
    memory = launch.bytes / (device.bandwidth_tb_s * 1e12)
    l2 = launch.bytes / (device.l2_tb_s * 1e12) if launch.bytes <= device.l2_mb * 1e6 / 2 else memory
    work = 0.0
    if launch.flops and launch.name not in ATTENTION:
        rate = device.float8_tflop_s if launch.name in FLOAT8 else device.bf16_tflop_s
        if rate is None:
            raise ValueError(f"{launch.name}: expected a device with float8 products, got {device.name}")
        moved, work = memory, product_flops(launch, device.multiprocessors) / (rate * 1e12)
    elif launch.name in ATTENTION:
        # What `combine_kernel` reads was written just before.
        moved = l2 if launch.name == "combine_kernel" else memory
        work = launch.flops / (device.attention_tflop_s * 1e12)
    elif slots := (SELECT_SLOTS | CANVAS_SLOTS).get(launch.name):
        slots = launch.rows * launch.columns / 256 * slots / SELECT_SHARE
        issued = slots / (device.multiprocessors * 4) / (device.clock_ghz * 1e9)
        moved, work = 0.0, SELECT_DECIDES_US.get(launch.name, 0.0) * 1e-6 + max(l2, issued)
    else:
        moved = l2
    return device.launch_us * 1e-6 + max(moved, work)


PARTS = ("products", "small operators", "attention", "head", "selection", "outside the layers")


def part(launch: Launch) -> str:
    """Which of `PARTS` a launch belongs to."""
    if not launch.where.startswith("layer"):
        return "outside the layers" if launch.where == "rest" else launch.where
    if launch.name in ATTENTION:
        return "attention"
    return "products" if launch.flops else "small operators"


def by_part(launches: Iterable[tuple[float, Launch]], device: Device) -> dict[str, float]:
    """Predicted seconds of each part of a step; `launches` are launches and how often each comes."""
    found = dict.fromkeys(PARTS, 0.0)
    for count, launch in launches:
        found[part(launch)] += count * seconds(launch, device)
    return found
