"""The benchmarks: they compare equal steps, they run, and their results become tables and plots."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import bench_canvas
import bench_decode
import bench_gate
import bench_kernels
import bench_select
import gate
import measure
import picture
import published
import published_decode
import pytest
import report
import torch
import two_launch
from inputs import INTERPRETED, on_gpu, random_problem
from small import MASK, prompts, small_dream, small_model, small_sdar
from torch import Tensor

import fdpp
from fdpp import tiny
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.static import steps_of

SETTINGS: list[dict[str, Any]] = [
    {"rule": fdpp.Quota(), "steps": 7},
    {"rule": fdpp.Threshold(0.3)},
    {"rule": fdpp.Frechet(0.05)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_published_decode_gives_our_tokens(cache: str, settings: dict[str, Any]) -> None:
    agrees(small_model(n_kv_heads=2), cache, settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_published_decode_of_dream_without_a_cache_gives_our_tokens(settings: dict[str, Any]) -> None:
    agrees(small_dream(), "none", settings)


@pytest.mark.parametrize(
    "settings", [{"rule": fdpp.Quota(), "steps": 13}, {"rule": fdpp.ThresholdQuota(0.3)}], ids=["quota", "threshold"]
)
@pytest.mark.parametrize("length", [1, 8, 13])
def test_the_published_decode_of_sdar_gives_our_tokens(length: int, settings: dict[str, Any]) -> None:
    """As many forwards decide. Beside them one stores a prompt's whole blocks, and one every block that is finished."""
    model, prompt = small_sdar(), prompts(1, length)
    model.get_output_embeddings().weight.data[MASK] = 0.0  # else they never end
    config = DiffusionGenerationConfig(20, 8, stop_at_eos=False, **settings)
    ours, calls = model.generate(prompt, generation_config=config), []
    run = bench_decode.Run(model, prompt, config)
    forward = run.published_model()

    def watched(tokens: Tensor, past: Any, replace: Any) -> Any:
        calls.append((tokens.shape[1], 0 if past is None else past[0][0].shape[2], bool((tokens == MASK).any())))
        return forward(tokens, past, replace)

    sequences, nfe = run.published(watched, run.settings)
    assert sequences.equal(ours.sequences) and nfe == len(calls)
    whole, decided = length // 8, [call for call in calls if call[2]]
    blocks = -(-(length + 20) // 8) - whole
    assert nfe == len(decided) + blocks + (whole > 0) and len(decided) == int(ours.nfe)
    assert calls[0] == (8 * whole, 0, False) if whole else calls[0] == (8, 0, True)
    for block in range(whole, whole + blocks):
        of_block = [masks for n, past, masks in calls if (n, past) == (8, 8 * block)]
        assert of_block == [True] * (len(of_block) - 1) + [False] and len(of_block) > 1


def test_the_published_forward_of_sdar_is_ours() -> None:
    model, tokens = small_sdar(), prompts(2, 16)
    forward = published_decode.PublishedBlockModel(model, 4)
    logits, past = forward(tokens[:, :12])
    last, _ = forward(tokens[:, 12:], past)
    torch.testing.assert_close(torch.cat((logits, last), dim=1), model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_steps_and_decodes_without_a_model_are_timed_for_sdar() -> None:
    model = small_sdar()
    config = DiffusionGenerationConfig(8, 4, rule=fdpp.Quota(), steps=4, stop_at_eos=False, engine="static")
    run = bench_decode.Run(model, prompts(1, 4), config)
    out = model.generate(run.prompt, generation_config=run.settings)
    # The first step feeds all, two others a block, with the one before it or without.
    assert len(steps_of(model)) == 3 and int(out.nfe) == 4
    assert bench_decode.captured_steps(model, run.settings).keys() == {"ms_refresh", "ms_step"}
    for way in (run.without_model, run.published_without_model):
        way(run.settings)()


def agrees(model: Any, cache: str, settings: dict[str, Any]) -> None:
    prompt = prompts(3, 9)
    model.get_output_embeddings().weight.data[MASK] = 0.0  # else they never end
    config = DiffusionGenerationConfig(20, 8, cache=cache, stop_at_eos=False, **settings)
    ours = model.generate(prompt, generation_config=config)
    run = bench_decode.Run(model, prompt, config)
    sequences, nfe = run.published(published_decode.PublishedModel(model), run.settings)
    assert sequences.equal(ours.sequences)
    # The published code decodes each block until the batch's slowest row is done.
    assert nfe == (7 if "steps" in settings else nfe) and nfe >= ours.nfe.max()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_the_published_decode_of_dream_begins_a_block_by_its_first_token(cache: str) -> None:
    """What a forward is fed and gives, and what is committed between two: as their programs have it, step by step."""
    model, prompt = small_dream(), prompts(1, 5)
    model.get_output_embeddings().weight.data[MASK] = 0.0
    forward, calls = published_decode.PublishedModel(model), []

    def watched(tokens: Tensor, past: Any, replace: Any) -> Any:
        logits, present = forward(tokens, past, replace)
        calls.append((tokens.clone(), logits.clone(), past is None))
        return logits, present

    config = DiffusionGenerationConfig(24, 8, cache=cache, rule=fdpp.Quota(), steps=9, stop_at_eos=False)
    run = bench_decode.Run(model, prompt, config)
    sequences, nfe = run.published(watched, run.settings)
    assert nfe == 9 and [full for *_, full in calls] == 3 * [True, False, False]
    assert not (sequences == MASK).any()
    calls.append((sequences, sequences, True))
    for i, ((tokens, logits, full), (after, _, next_full)) in enumerate(itertools.pairwise(calls)):
        s = 5 + i // 3 * 8
        assert tokens.shape[1] == (29 if full else 29 - s if cache == "prefix" else 8)
        block, then = (x[:, s:][:, :8] if whole else x[:, :8] for x, whole in ((tokens, full), (after, next_full)))
        changed = (block != then).nonzero()[:, 1].tolist()
        assert changed == [0] if full else len(changed) in (3, 4)
        if full:
            torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
        # A position takes its token from the row before it.
        assert all(then[0, c] == logits[0, c - 1 + (s if full else 0)].argmax() for c in changed)


def test_a_published_decode_without_end_is_given_up() -> None:
    def forward(tokens: Tensor, past: Any, replace: Any) -> tuple[Tensor, list[Any]]:
        return torch.nn.functional.one_hot(torch.full_like(tokens, MASK), 64).float(), []

    with pytest.raises(RuntimeError, match="proposal is the mask"):
        published_decode.decode(
            forward, prompts(1, 3), blocks=[(0, 4)], rules=[[fdpp.Quota(1)]], cache="none", mask_id=MASK
        )
    with pytest.raises(RuntimeError, match="proposal is the mask"):
        published_decode.decode_blocks(forward, prompts(1, 3), new=4, block=4, rules=[fdpp.Quota(1)], mask_id=MASK)


@pytest.mark.parametrize(
    "rule", [fdpp.Quota(3), fdpp.Threshold(0.2), fdpp.ThresholdQuota(0.2, 2), fdpp.Frechet(0.1)], ids=str
)
def test_the_published_selection_is_ours(rule: fdpp.Rule) -> None:
    problem = random_problem(3, 4, 9, 40, rule)
    problem.logits[..., problem.mask_id] = -100.0  # which it would propose
    tokens, committed = published.select(problem.logits, problem.tokens, problem.tokens == problem.mask_id, rule)
    ours = fdpp.select(problem.logits, problem.tokens, rule=rule, mask_id=problem.mask_id)
    assert committed.equal(ours.committed) and tokens.equal(ours.tokens)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("B", "T", "V"), [(3, 1, 20), (2, 7, 5000), (1, 32, 4096)])
@on_gpu(lambda T: T == 32)
def test_the_two_launch_selection_is_a_threshold(device: str, B: int, T: int, V: int) -> None:
    if device == "cpu" and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    problem = random_problem(B, B, T, V, fdpp.Threshold(0.4), dtype=torch.bfloat16)
    logits, tokens = problem.logits.to(device), problem.tokens.to(device)
    logits[..., problem.mask_id] = -100.0  # which it would propose
    ours = fdpp.select(logits, tokens, rule=fdpp.Threshold(0.4), mask_id=problem.mask_id)
    assert two_launch.select(logits, tokens, problem.mask_id, 0.4).equal(ours.tokens)


@pytest.mark.parametrize("masked", [0.6, 1.0])
def test_the_plain_softmax_is_a_threshold(masked: float) -> None:
    problem = random_problem(3, 4, 9, 40, fdpp.Threshold(0.9), masked=masked, dtype=torch.bfloat16)
    problem.logits[..., problem.mask_id] = -100.0  # which it would propose
    problem.logits[0] = problem.logits[0] / 100.0  # no position of this one reaches the threshold
    ours = fdpp.select(problem.logits, problem.tokens, rule=fdpp.Threshold(0.9), mask_id=problem.mask_id)
    assert published.plain(problem.logits, problem.tokens, problem.mask_id, 0.9).equal(ours.tokens)
    assert ours.committed[0].sum() == 1 and ours.committed.sum() > 8


def test_a_step_is_checked_before_it_is_timed() -> None:
    problem = bench_select.make_problem(1, 4, 4, 50, 49)
    ways = bench_select.ways(49)
    bench_select.check(problem, ways, 49)
    for way in ("published", "plain"):
        with pytest.raises(AssertionError, match="commit differently"):
            bench_select.check(problem, ways | {way: lambda logits, tokens: tokens}, 49)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    bench_select.main(["--smoke", "--out", str(folder)])
    bench_kernels.main(["--smoke", "--out", str(folder)])
    bench_canvas.main(["--smoke", "--out", str(folder)])
    bench_decode.main(["--smoke", "--repeats", "1", "--batches", "2", "--caches", "none", "dual", "--out", str(folder)])
    return folder


def test_results_say_what_was_measured_and_on_what(results: Path) -> None:
    select, decode = (report.load(results, kind)[0] for kind in ("select", "decode"))
    for result in (select, decode):
        assert {"device", "torch", "triton", "transformers", "commit"} <= set(result["environment"])
        assert result["copy_gb_s"] > 0
    for row in select["rows"]:
        assert row["published"]["us"] > 0 and row["fdpp"]["gb_s"] > 0
        assert row["fdpp"]["us_warm"] > 0 and row["fdpp"]["us_cold"] > 0 and row["fdpp"]["launches"] > 0
        assert ("two launches" in row) == INTERPRETED
    assert {row["cache"] for row in decode["rows"]} == {"none", "dual"}
    for row in decode["rows"]:
        assert row["same_tokens"] == 1.0
        for way in (row["published"], row["fdpp"]):
            assert way["tokens"] == 32 and way["nfe"] == round(16 / float(row["tokens_per_forward"].split(",")[0]))
            assert way["tokens_per_second"] == pytest.approx(32 / way["seconds"])
            total = way["nfe"] * (way["ms_per_forward"] + way["ms_outside_model"])
            assert total == pytest.approx(1e3 * way["seconds"])
            kinds = {"ms_refresh", "ms_step"} if row["cache"] == "dual" else {"ms_refresh"}
            assert way["steps"].keys() == kinds and all(ms > 0 for ms in way["steps"].values())


def test_pairs_give_a_ratio_of_both_ways_in_turn(tmp_path: Path) -> None:
    options = ["--smoke", "--headline", "--repeats", "1", "--pairs", "3", "--caches", "dual", "--prompts", "8"]
    bench_decode.main([*options, "--out", str(tmp_path)])
    [row] = report.load(tmp_path, "decode")[0]["rows"]
    assert len(row["ratios"]) == 3 and row["speedup"] == sorted(row["ratios"])[1]
    for way in (row["published"], row["fdpp"]):
        assert way["tokens_per_second"] == pytest.approx(way["tokens"] / way["seconds"])


def test_kernels_are_compared_on_the_same_problem(results: Path) -> None:
    [result] = report.load(results, "kernels")
    for row in result["head"] + result["attention"] + result["branches"]:
        assert all(way["us"] > 0 and way["peak_mb"] >= 0 for way in row.values() if isinstance(way, dict))
    problem = torch.randn(1, 8, 16), torch.randn(50, 16), torch.full((1, 8), 49)
    assert bench_kernels.library_head(*problem, 49).equal(bench_kernels.fused_head(*problem, 49))
    shared, ours = (way() for way in bench_kernels.branch_ways(3, 2, 5, 40, 2, 16).values())
    torch.testing.assert_close(ours, shared, rtol=1e-2, atol=1e-2)


def test_a_canvas_is_compared_with_transformers_own_step(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [result] = report.load(results, "canvas")
    timed = [row[way] for row in result["steps"] + result["embeddings"] for way in row if way.startswith(("t", "fdpp"))]
    assert len(timed) == 8 and all(way["ms"] > 0 and way["peak_mb"] >= 0 for way in timed)
    [row] = result["embeddings"]
    assert row["fdpp"]["distance"] < row["transformers"]["distance"] / 1.5
    [row] = result["batch"]
    assert row["fdpp"]["peak_mb"] >= 0 and row["sequences"] == 3
    table = report.canvas_table(result)
    assert len(table.splitlines()) == 2 + 6 + 2 + 1 and {line.count("|") for line in table.splitlines()} == {8}
    # Not timed where the two disagree.
    monkeypatch.setattr(bench_canvas, "CAP", 20.0)
    monkeypatch.setattr(bench_canvas, "capped", lambda outputs: 19.0 * (outputs.float() / 20.0).tanh())
    with pytest.raises(AssertionError, match="other logits"):
        bench_canvas.steps(1, 8, 1000, torch.bfloat16, 1)


def test_tables_and_plot(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    report.main([str(results), "--plot"])
    text = capsys.readouterr().out
    sizes = ("| 8 (2 x 32) |", "smoke, dual, 2, 8", "256 masked rows of 8 x 32", "over 1056 columns")
    for size in (*sizes, "4 branches, 8 x 32"):
        assert size in text
    assert text.count("float32 softmax, us") == 1
    device = report.load(results, "decode")[0]["environment"]["device"]
    name = "cpu" if device.startswith("CPU") else measure.slug(device)
    assert "<svg" in (results / f"roofline-{name}.svg").read_text()
    rows = report.load(results, "decode")[0]["rows"]
    drawn = (results / f"decode-{name}.svg").read_text()
    assert all(f"<!-- smoke, {row['cache']}, 2: {row['tokens_per_forward']} -->" in drawn for row in rows)


def test_the_plot_of_decodes_has_the_names_of_the_documents_table() -> None:
    """On a logarithmic axis, with both ways and the speed-up of every row, and as wide as a page on GitHub."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    plots = importlib.import_module("plots")
    folder = Path(bench_decode.__file__).parent
    [table] = re.findall(r"^\| model, cache, batch \|.*?\n\n", (folder / "README.md").read_text(), re.M | re.S)
    cells = [[cell.strip(" `") for cell in line.split("|")] for line in table.strip().splitlines()[2:]]
    figure, axes = pyplot.subplots()
    plots.rates(axes, json.loads((folder / "results/decode-cpu.json").read_text()))
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{row[1]}: {row[2]}" for row in cells]
    assert [text.get_text() for text in axes.texts] == [row[5] for row in cells]
    assert axes.get_xscale() == "log" and axes.get_legend() is not None
    pyplot.close(figure)
    width = re.search(r'width="([\d.]+)pt"', (folder / "results/decode-cpu.svg").read_text())
    assert width is not None and 800 < float(width[1]) * 96 / 72 < 850


def test_a_prompts_length_is_named_where_it_tells_settings_apart(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, decode = on_an_h200(8.0, 4.0)
    decode["rows"] = [row | {"prompt": length} for row in decode["rows"] for length in (128, 800)]
    figure, axes = pyplot.subplots()
    importlib.import_module("plots").rates(axes, decode)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["8b, dual, 1, 128: 4.20, set", "8b, dual, 1, 800: 4.20, set"]
    pyplot.close(figure)


# The README's picture

SVG = "{http://www.w3.org/2000/svg}"


def luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def colours(svg: str, scheme: str) -> dict[str, str]:
    """Fill by class in a reader's colour scheme."""
    light, dark = re.findall(r"\.paper\{fill:(#\w{6})\}\.ink\{fill:(#\w{6})\}", svg)
    assert svg.index("prefers-color-scheme:dark") > svg.index(light[0])
    return dict(zip(("paper", "ink"), dark if scheme == "dark" else light, strict=True))


@pytest.mark.parametrize(("scheme", "page"), [("light", "#ffffff"), ("dark", "#0d1117")])
def test_the_picture_reads_in_light_and_in_dark(scheme: str, page: str) -> None:
    """Contrast of at least 4.5 between every text and what is behind it; the background is GitHub's."""
    svg = picture.PICTURE.read_text(encoding="utf-8")
    own = colours(svg, scheme)
    assert own["paper"] == page
    behind = own["paper"]
    for element in ElementTree.fromstring(svg):
        if element.tag == SVG + "rect":
            behind = element.get("fill") or own["paper"]
        elif element.tag == SVG + "text" and element.get("fill"):
            assert contrast(element.get("fill"), behind) >= 4.5, element.text
        elif element.tag == SVG + "text":
            assert "ink" in element.get("class").split() and contrast(own["ink"], own["paper"]) >= 4.5
    shades = [picture.shade(forward, 96) for forward in range(96)]
    assert min(contrast(*shade) for shade in shades) >= 4.5
    brightness = [luminance(fill) for fill, _ in shades]
    assert brightness == sorted(brightness, reverse=True)


@pytest.mark.parametrize("forwards", [1, 2, 7, 8, 95])
def test_the_legend_has_the_shades_of_the_first_and_the_last_forward(forwards: int) -> None:
    words = [f"w{i}" for i in range(forwards)]
    svg = picture.draw("a prompt", [picture.Decode("a rule", words, list(range(forwards)), forwards)])
    elements = list(ElementTree.fromstring(svg))
    fills = [e.get("fill") for e in elements if e.tag == SVG + "rect" and e.get("fill")]
    count = min(forwards, picture.SWATCHES)
    swatches, of_words = fills[:count], fills[count:]
    assert len(of_words) == forwards and swatches[0] == of_words[0] and swatches[-1] == of_words[-1]
    assert len(set(swatches)) == count and set(swatches) <= set(of_words)
    texts = [e.text for e in elements if e.tag == SVG + "text"]
    assert texts[2:4] == ["forward 1", str(forwards)]
    assert all(
        float(e.get("x")) + float(e.get("width")) <= picture.WIDTH for e in elements if e.get("x") and e.get("width")
    )


def test_the_picture_is_the_decode() -> None:
    problem = tiny.generate("held-out", 1, seed=1, steps=5)[0]
    assert picture.draw(problem.prompt, picture.decodes_of(problem)) == picture.PICTURE.read_text(encoding="utf-8")


def test_toy_shapes_are_said_to_show_no_speed(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under every table of theirs and where the benchmark ends; under no other table."""
    report.main([str(results)])
    assert capsys.readouterr().out.count(measure.SMOKE) == 4
    for kind in ("select", "kernels", "canvas", "decode"):
        [result] = report.load(results, kind)
        measure.close(tmp_path, result)
        assert measure.SMOKE in capsys.readouterr().out
        measure.close(tmp_path, result | {"smoke": False})
        assert measure.SMOKE not in capsys.readouterr().out
    report.main([str(measure.RESULTS)])
    assert measure.SMOKE not in capsys.readouterr().out


def test_ways_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    ways = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    seconds = measure.in_turn(ways, 3, 0.0)
    assert "".join(called) == "abababab" and [len(times) for times in seconds.values()] == [3, 3]


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="found none"):
        report.main([str(tmp_path)])


@pytest.mark.parametrize(("begun", "left_out"), [(False, 1), (True, 6)])
def test_a_budget_leaves_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, left_out: int
) -> None:
    """The whole shape or, if that was started in time, its settings."""
    in_time = bench_decode.Benchmark.in_time

    def late(self: bench_decode.Benchmark, facts: dict[str, Any]) -> bool:
        return (begun and "cache" not in facts) or in_time(self, facts)

    monkeypatch.setattr(bench_decode.Benchmark, "in_time", late)
    bench_decode.main(["--smoke", "--budget", "0", "--batches", "1", "--out", str(tmp_path)])
    result = report.load(tmp_path, "decode")[0]
    assert result["rows"] == [] and len(result["left_out"]) == left_out
    assert "left out for time" in report.decode_table(result)


def test_a_cached_forward_is_the_difference_of_two_schedules() -> None:
    """8 full forwards of 30 ms and 5 ms for every cached one."""
    rows = [{"fdpp": {"seconds": 0.24 + 0.005 * n, "nfe": 8 + n}, "published": {"error": "..."}} for n in (53, 81)]
    bench_decode.cached_forward(rows, floor=4.0)
    for row in rows:
        assert row["fdpp"]["ms_cached_forward"] == pytest.approx(5.0)
        assert row["fdpp"]["floor_percent"] == pytest.approx(80.0)


def on_an_h200(us: float, cached_ms: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results as from a GPU, for a time of the selection and of a cached forward."""
    about = {"environment": {"device": "NVIDIA H200"}, "copy_gb_s": 4300.0}
    way = {"us": 200.0, "us_warm": us, "us_cold": 2 * us, "launches": 1, "launches_in_graph": 1, "peak_mb": 0.5}
    way |= {"gb_s": 1000.0, "copy_percent": 23.0}
    row = {"sequences": 1, "positions": 32, "rows": 32, "speedup": 200.0 / us}
    row |= {name: way for name in ("published", "two launches", "fdpp")}
    rate = {"seconds": 0.4, "nfe": 61, "tokens_per_second": 640.0, "peak_gb": 20.0, "ms_cached_forward": cached_ms}
    rate |= {"ms_per_forward": 4.0, "ms_outside_model": 0.1, "floor_percent": 100 * 3.5 / cached_ms}
    rate |= {"steps": {"ms_refresh": 33.0, "ms_step": cached_ms}}
    decode = {"shape": "8b", "cache": "dual", "batch": 1, "prompt": 800, "tokens_per_forward": "4.20, set"}
    decode |= {"block": 32, "new": 256}
    decode |= {"fdpp": rate, "published": {"error": "out of memory"}, "weight_gb": 15.0, "speedup": 5.0}
    more = {"vocabulary": 126464, "matmul_tflop_s": 780.0, "left_out": []}
    return about | more | {"rows": [row]}, about | more | {"rows": [decode]}


@pytest.mark.parametrize(("us", "cached_ms", "missed"), [(8.0, 4.0, 0), (12.0, 4.0, 2), (8.0, 4.3, 1)])
def test_targets(us: float, cached_ms: float, missed: int) -> None:
    select, decode = on_an_h200(us, cached_ms)
    found = report.targets([select], [decode])
    assert len(found) == 7 and [met for _, _, met in found].count(False) == missed
    assert f"{us:.3g} / {2 * us:.3g}" in report.select_table(select)
    assert "out of memory" in report.decode_table(decode)
    widths = {line.count("|") for line in report.select_table(select).splitlines()}
    assert len(widths) == 1 and len({line.count("|") for line in report.decode_table(decode).splitlines()}) == 1


def failing(original: Any, when: Any, message: str) -> Any:
    def call(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments):
            raise RuntimeError(message)
        return original(*arguments, **keywords)

    return call


def test_what_fails_is_a_row_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting of each benchmark raises: its error is in the results and in the tables, the rest is measured."""
    make_problem, attend, decode = bench_select.make_problem, bench_kernels.block_attention, published_decode.decode
    monkeypatch.setattr(bench_select, "make_problem", failing(make_problem, lambda B, T, *_: T == 8, "no | problem"))
    monkeypatch.setattr(
        bench_kernels, "block_attention", failing(attend, lambda q, *_: q.shape[0] == 1, "no attention")
    )
    with pytest.raises(SystemExit, match=r"RuntimeError: no \| problem"):
        bench_select.main(["--smoke", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="RuntimeError: no attention"):
        bench_kernels.main(["--smoke", "--out", str(tmp_path)])
    options = ["--smoke", "--repeats", "1", "--batches", "1", "--caches", "dual", "--prompts", "8", "9"]
    monkeypatch.setattr(
        published_decode, "decode", failing(decode, lambda f, prompt: prompt.shape[1] == 8, "no decode")
    )
    with pytest.raises(SystemExit, match="RuntimeError: no decode"):
        bench_decode.main([*options, "--out", str(tmp_path)])
    select, kernels, decodes = (report.load(tmp_path, kind)[0] for kind in ("select", "kernels", "decode"))
    assert [row.get("error") for row in select["rows"]] == [None, "RuntimeError: no | problem", None]
    assert [row["block_attention"].get("error") for row in kernels["attention"]] == ["RuntimeError: no attention", None]
    assert [row["prompt"] for row in decodes["rows"]] == [8, 8, 9, 9]
    assert ["error" in row["published"] for row in decodes["rows"]] == [True, True, False, False]
    assert all(row["fdpp"]["seconds"] > 0 for row in decodes["rows"])
    text = report.report(tmp_path)
    for cell in ("RuntimeError: no / problem", "RuntimeError: no attention", "RuntimeError: no decode"):
        assert f"| {cell} |" in text
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1
    plots = pytest.importorskip("matplotlib") and importlib.import_module("plots")
    plots.draw(tmp_path)


def test_figures_outlive_a_failure_of_their_details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "arenas_of", failing(None, lambda model: True, "no steps"))
    monkeypatch.setattr(bench_decode.Run, "without_model", failing(None, lambda *_: True, "no ready logits"))
    options = ["--smoke", "--headline", "--repeats", "1", "--caches", "dual", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="no steps"):
        bench_decode.main(options)
    result = report.load(tmp_path, "decode")[0]
    assert all(row["fdpp"]["tokens_per_second"] > 0 and row["speedup"] > 0 for row in result["rows"])
    assert "fdpp: RuntimeError: no steps" in report.decode_table(result)
    assert "fdpp: RuntimeError: no ready logits" in report.decode_table(result)


def test_a_model_that_cannot_be_made_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "random_model", failing(None, lambda config: True, "no model"))
    with pytest.raises(SystemExit, match="no model"):
        bench_decode.main(["--smoke", "--out", str(tmp_path)])
    assert "RuntimeError: no model" in report.report(tmp_path)


def test_a_device_without_memory_is_no_failure(tmp_path: Path) -> None:
    def call() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    results = {"rows": [{"published": measure.attempt(call), "fdpp": {"us": 1.0}}]}
    assert measure.errors(results) == ["out of memory"]
    measure.close(measure.write(tmp_path, "select", results), results)


def test_results_are_there_after_each_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed in its second setting leaves the first."""

    def killed(B: int, T: int, *rest: Any) -> Any:
        if T == 8:
            raise KeyboardInterrupt
        return make_problem(B, T, *rest)

    make_problem = bench_select.make_problem
    monkeypatch.setattr(bench_select, "make_problem", killed)
    with pytest.raises(KeyboardInterrupt):
        bench_select.main(["--smoke", "--out", str(tmp_path)])
    assert [row["rows"] for row in report.load(tmp_path, "select")[0]["rows"]] == [1]


def test_replays_on_a_cpu_are_the_calls() -> None:
    called: list[int] = []
    replayed = measure.captured([lambda: called.append(1), lambda: called.append(2)])
    replayed.replay()
    replayed.replay()
    assert called == [1, 2, 1, 2]
    assert (measure.launches(lambda: torch.zeros(2) + 1) or 0) >= 2


def test_seconds_are_the_median_of_replays_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that only the calls move: on a busy machine a sleep may last several times as long.
    now = 0.0

    def last(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    assert measure.graph_seconds([lambda: last(0.004)] * 2, budget=0.0) == pytest.approx(0.004)
    times = iter([0.5, 0.1, 0.3, 0.2])
    assert measure.replay_seconds(lambda: last(next(times)), budget=0.0) == pytest.approx(0.2)


def test_plot_of_gpu_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for kind, result in zip(("select", "decode"), on_an_h200(8.0, 4.0), strict=True):
        (tmp_path / f"{kind}-nvidia-h200.json").write_text(json.dumps(result))
    report.main([str(tmp_path), "--plot"])
    assert (tmp_path / "roofline-nvidia-h200.png").stat().st_size > 1000


class Machine:
    """A machine with a clock of its own, which only its calls move: `slowness` says how long the next one takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slowness: Callable[[], float]) -> None:
        self.now, self.slowness = 0.0, slowness
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * self.slowness()

        return run


def others(seed: int, at_most: float) -> Callable[[], float]:
    """Slowness of a machine with other work: each call takes up to `at_most` times as long, by chance."""
    chance = random.Random(seed)
    return lambda: at_most ** chance.random()


def busier_and_busier() -> Callable[[], float]:
    """Slowness that triples within the run, slowly: both calls of a pair see about the same."""
    calls = itertools.count()
    return lambda: 1.0 + next(calls) / 20


QUIET: Callable[[], float] = lambda: 1.0  # noqa: E731


@pytest.mark.parametrize(
    ("ours", "slowness", "status", "said"),
    [
        (0.1, QUIET, 0, "gate: passed"),
        (0.1 * gate.ALLOWED * 0.99, QUIET, 0, "gate: passed"),
        (0.1 * gate.ALLOWED * 1.02, QUIET, 1, f"{gate.ALLOWED * 1.02:.2f} times as slow as the baseline"),
        (0.2, others(1, 1.1), 1, "times as slow as the baseline"),
        (0.1, others(2, 1.1), 0, "gate: passed"),
        (0.1, busier_and_busier(), 0, "gate: passed"),
        (0.2, busier_and_busier(), 1, "times as slow as the baseline"),
        (0.1, others(3, 100.0), 75, "too noisy to say: ratios from"),
        (0.2, others(4, 100.0), 75, "too noisy to say: ratios from"),
        (5.8, others(5, 100.0), 75, "too noisy to say: ratios from"),
        (0.001, others(6, 20.0), 0, "gate: passed"),
    ],
    ids=["the same", "allowed", "slower", "slower, some noise", "the same, some noise", "the same, ever busier",
         "slower, ever busier", "the same, noise", "slower, noise", "58 times as slow, noise", "faster, noise"],
)  # fmt: skip
def test_the_gate_tells_a_regression_from_a_noisy_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ours: float,
    slowness: Callable[[], float],
    status: int,
    said: str,
) -> None:
    """Made-up seconds of both ways, on machines whose calls take up to 100 times as long as they should."""
    options = ["--out", str(tmp_path), "--baselines", str(tmp_path / "baselines")]

    def timed(seconds: float, slowness: Callable[[], float], *more: str) -> int:
        machine = Machine(monkeypatch, slowness)
        group = (machine.call(seconds), machine.call(0.4))
        monkeypatch.setattr(gate.bench_gate, "groups", lambda: {"decode": lambda: group})
        return gate.main([*options, *more])

    assert timed(0.1, QUIET, "--store") == 0
    assert timed(ours, slowness) == status
    assert said in capsys.readouterr().out


def test_a_baseline_is_of_one_device_and_never_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path), "--baselines", str(tmp_path / "baselines")]
    measured = {"decode": [0.25] * 9}
    monkeypatch.setattr(gate, "pairs", lambda only: measured)
    assert gate.main(options) == 0
    assert "no baseline for" in capsys.readouterr().out and list(tmp_path.glob("baseline-*.json"))
    measured["select"] = [0.1, 9.0] * 9
    assert gate.main([*options, "--store"]) == 75 and not (tmp_path / "baselines").exists()
    measured["select"] = [0.1] * 9
    assert gate.main([*options, "--store"]) == 0
    [path] = (tmp_path / "baselines").iterdir()
    assert path.stem == measure.slug(measure.environment()["device"])
    assert json.loads(path.read_text())["ratios"] == {"decode": 0.25, "select": 0.1}
    del measured["select"]
    assert gate.main([*options, "--only", "decode"]) == 0
    assert gate.main(options) == 1
    assert "select: not measured" in capsys.readouterr().out


def test_the_gates_pairs_are_of_the_same_problem() -> None:
    """Its decodes give the same tokens up to EOS, and its groups are the baseline's."""
    ours, published = bench_gate.groups()["decode, tiny, dual cache"]()
    responses = [sequences[:, -128:] for sequences in (published()[0], ours().sequences)]
    assert bench_decode.agreement(*responses, eos=torch.tensor(ours.func.__self__.config.eos_token_id)) == 1.0
    assert list(bench_gate.groups()) == list(json.loads(next(gate.BASELINES.glob("cpu-*")).read_text())["ratios"])
