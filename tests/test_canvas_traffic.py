"""What a step of DiffusionGemma is predicted to move and to hold on a GPU: transformers' lines and ours, counted."""

from __future__ import annotations

import canvas_traffic
import nodes
import predict
import pytest
import roofline
import torch
from canvas_traffic import count, logsumexp, multinomial
from nodes import GPU, Launch

CANVAS = 256 * 262144
"""Logits of one."""


def moved(launches: list[Launch], *names: str) -> float:
    """In float32 canvases."""
    return sum(x.bytes for x in launches if not names or x.name in names) / (4 * CANVAS)


def test_what_pytorch_composes_gives_what_it_gives() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 9
    torch.testing.assert_close(logsumexp(x, -1, keepdim=True), x.logsumexp(-1, keepdim=True))
    torch.testing.assert_close(logsumexp(x, -1), x.logsumexp(-1))
    chosen = torch.tensor([3, 0, 39])
    assert multinomial(torch.eye(40)[chosen], 1)[:, 0].equal(chosen)


@pytest.mark.parametrize("compiled", [False, True])
def test_transformers_step_passes_over_57_canvases(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not something was compiled in the process before."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", not compiled)
    launches, held = count(1, "transformers, step")
    assert moved(launches) == pytest.approx(57, abs=0.1)
    # Softcap, temperature, softmax, sample, argmax, entropy for acceptance and again for the stop, and the cast.
    parts = [9.5, 2.0, 2.0, 3 + 1 + 3 + 1, 1.0, 16.5, 16.5, 1.5]
    assert sum(parts) == 57
    assert moved(launches, "exponential_") == pytest.approx(1) and moved(launches, "clamp") == pytest.approx(4)
    assert held == pytest.approx(7 * 4 * CANVAS, rel=0.01), "measured on a CPU: 1,879 MB"


def test_ours_reads_the_outputs_once() -> None:
    launches, held = count(1, "fdpp, step")
    assert [x.name for x in launches if x.bytes > 1e6] == ["canvas_kernel"]
    assert moved(launches) == pytest.approx(0.5, rel=0.01) and held < 1 << 20
    launches, held = count(1, "fdpp, step and logits")
    assert moved(launches) == pytest.approx(1.5, rel=0.01) and held == pytest.approx(2 * CANVAS, rel=0.01)


def test_a_step_of_32_canvases_holds_less_than_half_a_gib() -> None:
    """Whose outputs are 4.3 GB, and 8.6 in float32. What the step gives stays while embeddings are made."""
    _, step = count(32, "fdpp, step")
    launches, embeddings = count(32, "fdpp, embeddings")
    assert step + embeddings <= 1 << 29
    assert moved(launches, "weights_kernel") == pytest.approx(32, rel=0.01)
    _, theirs = count(32, "transformers, step")
    assert theirs > 100 * (step + embeddings)


def test_no_time_is_below_what_arithmetic_takes() -> None:
    device = roofline.device("h200")
    for way, kernel in (("fdpp, step", "canvas_kernel"), ("fdpp, step and logits", "process_kernel")):
        [launch] = [x for x in count(1, way)[0] if x.name == kernel]
        assert (launch.rows, launch.columns) == (256, 262144)
        slots = CANVAS / 256 * roofline.CANVAS_SLOTS[kernel] / roofline.SELECT_SHARE
        assert roofline.seconds(launch, device) >= slots / (132 * 4 * device.clock_ghz * 1e9)


def test_held_is_what_is_alive_at_once() -> None:
    with nodes.recorded():
        given = torch.empty(1000, dtype=torch.float32, device=GPU)
        with nodes.Held() as held:
            x = given + 1
            y = x[10:].view(-1)
            del x
            y.mul_(2)  # 4,000 bytes, kept by the view
            z = y + 1  # 3,960 beside them
            del y, z
            given.add_(given * 2)
        assert held.most == 4000 + 3960


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["--canvas", "--device", "h200", "--batch", "1", "2"])
    out = capsys.readouterr().out
    assert out.startswith("Predicted from counts, not measured. DiffusionGemma's shape")
    lines = out.splitlines()[1:]
    assert lines[0] == "| predicted, NVIDIA H200 SXM | 1 canvas | 2 canvases |"
    assert len(lines) == 2 + 4 * 5 and "| transformers, step: GB moved | 15.3 | 30.6 |" in lines
    assert canvas_traffic.T * canvas_traffic.V == CANVAS
