"""The benchmarks: that what they compare is the same, that they run, and what is made of their results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_decode
import bench_kernels
import bench_select
import gate
import gpu_check
import measure
import published
import published_decode
import pytest
import report
import torch
import two_launch
from inputs import INTERPRETED, on_gpu, random_problem
from small import MASK, prompts, small_model
from torch import Tensor

import fdpp
from fdpp.decoding.config import DiffusionGenerationConfig

SETTINGS: list[dict[str, Any]] = [
    {"rule": fdpp.Quota(), "steps": 7},
    {"rule": fdpp.Threshold(0.3)},
    {"rule": fdpp.Frechet(0.05)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_published_decode_gives_our_tokens(cache: str, settings: dict[str, Any]) -> None:
    model, prompt = small_model(n_kv_heads=2), prompts(3, 9)
    model.get_output_embeddings().weight.data[MASK] = 0.0  # else they never end
    config = DiffusionGenerationConfig(20, 8, cache=cache, stop_at_eos=False, **settings)
    ours = model.generate(prompt, generation_config=config)
    sequences, nfe = published_decode.decode(
        published_decode.PublishedModel(model),
        prompt,
        blocks=config.blocks(),
        rules=config.block_rules(),
        cache=cache,
        mask_id=MASK,
    )
    assert sequences.equal(ours.sequences)
    # A batch of theirs goes on until its slowest row is done, block by block.
    assert nfe == (7 if "steps" in settings else nfe) and nfe >= ours.nfe.max()


def test_a_published_decode_without_end_is_given_up() -> None:
    def forward(tokens: Tensor, past: Any, replace: Any) -> tuple[Tensor, list[Any]]:
        return torch.nn.functional.one_hot(torch.full_like(tokens, MASK), 64).float(), []

    with pytest.raises(RuntimeError, match="proposal is the mask"):
        published_decode.decode(
            forward, prompts(1, 3), blocks=[(0, 4)], rules=[[fdpp.Quota(1)]], cache="none", mask_id=MASK
        )


@pytest.mark.parametrize("rule", [fdpp.Quota(3), fdpp.Threshold(0.2), fdpp.Frechet(0.1)], ids=str)
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


def test_a_step_is_checked_before_it_is_timed() -> None:
    problem = bench_select.make_problem(1, 4, 4, 50, 49)
    ways = bench_select.ways(49)
    bench_select.check(problem, ways, 49)
    with pytest.raises(AssertionError, match="commit differently"):
        bench_select.check(problem, ways | {"published": lambda logits, tokens: tokens}, 49)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    bench_select.main(["--smoke", "--out", str(folder)])
    bench_kernels.main(["--smoke", "--out", str(folder)])
    bench_decode.main(["--smoke", "--repeats", "1", "--batches", "2", "--caches", "none", "dual", "--out", str(folder)])
    return folder


def test_results_say_what_was_measured_and_on_what(results: Path) -> None:
    select, decode = (report.load(results, kind)[0] for kind in ("select", "decode"))
    for result in (select, decode):
        assert {"device", "torch", "triton", "transformers", "commit"} <= set(result["environment"])
        assert result["copy_gb_s"] > 0
    for row in select["rows"]:
        assert row["published"]["us"] > 0 and row["fdpp"]["gb_s"] > 0
    assert {row["cache"] for row in decode["rows"]} == {"none", "dual"}
    for row in decode["rows"]:
        assert row["same_tokens"] == 1.0
        for way in (row["published"], row["fdpp"]):
            assert way["tokens"] == 32 and way["nfe"] == round(16 / float(row["tokens_per_forward"].split(",")[0]))
            assert way["tokens_per_second"] == pytest.approx(32 / way["seconds"])
            total = way["nfe"] * (way["ms_per_forward"] + way["ms_outside_model"])
            assert total == pytest.approx(1e3 * way["seconds"])


def test_kernels_are_compared_on_the_same_problem(results: Path) -> None:
    [result] = report.load(results, "kernels")
    for row in result["head"] + result["attention"] + result["branches"]:
        assert all(way["us"] > 0 and way["peak_mb"] >= 0 for way in row.values() if isinstance(way, dict))
    problem = torch.randn(1, 8, 16), torch.randn(50, 16), torch.full((1, 8), 49)
    assert bench_kernels.library_head(*problem, 49).equal(bench_kernels.fused_head(*problem, 49))
    shared, ours = (way() for way in bench_kernels.branch_ways(3, 2, 5, 40, 2, 16).values())
    torch.testing.assert_close(ours, shared, rtol=1e-2, atol=1e-2)


def test_tables_and_plot(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    report.main([str(results), "--plot"])
    text = capsys.readouterr().out
    sizes = ("8 x 32 positions, all masked", "smoke, dual, 2", "256 masked rows of 8 x 32", "over 1056 columns")
    for size in (*sizes, "4 branches, 8 x 32"):
        assert size in text
    device = report.load(results, "decode")[0]["environment"]["device"]
    name = "cpu" if device.startswith("CPU") else measure.slug(device)
    assert "<svg" in (results / f"roofline-{name}.svg").read_text()


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="found none"):
        report.main([str(tmp_path)])


def test_a_budget_leaves_out_and_says_so(tmp_path: Path) -> None:
    bench_decode.main(["--smoke", "--budget", "0", "--batches", "1", "--out", str(tmp_path)])
    result = report.load(tmp_path, "decode")[0]
    assert result["rows"] == [] and len(result["left_out"]) == 6
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
    decode = {"shape": "8b", "cache": "dual", "batch": 1, "tokens_per_forward": "4.20, set", "block": 32, "new": 256}
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


def test_plot_of_gpu_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for kind, result in zip(("select", "decode"), on_an_h200(8.0, 4.0), strict=True):
        (tmp_path / f"{kind}-nvidia-h200.json").write_text(json.dumps(result))
    report.main([str(tmp_path), "--plot"])
    assert (tmp_path / "roofline-nvidia-h200.png").stat().st_size > 1000


def benchmark_file(path: Path, ours: float, theirs: float = 0.4) -> Path:
    entries = [
        {"group": "decode", "extra_info": {"way": way}, "stats": {"min": seconds, "median": 9.0}}
        for way, seconds in (("fdpp", ours), ("published", theirs))
    ]
    path.write_text(json.dumps({"benchmarks": entries}))
    return path


def test_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baselines = ["--baselines", str(tmp_path / "baselines")]
    assert gate.main([str(benchmark_file(tmp_path / "a.json", 0.1)), *baselines]) == 0
    assert "no baseline for" in capsys.readouterr().out and list(tmp_path.glob("baseline-*.json"))
    assert gate.main([str(tmp_path / "a.json"), *baselines, "--store"]) == 0
    allowed = 0.1 * gate.ALLOWED
    for ours, theirs, status in ((allowed * 0.99, 0.4, 0), (allowed * 1.01, 0.4, 1), (allowed * 1.01, 0.5, 0)):
        assert gate.main([str(benchmark_file(tmp_path / "b.json", ours, theirs)), *baselines]) == status
    (tmp_path / "c.json").write_text(json.dumps({"benchmarks": []}))
    assert gate.main([str(tmp_path / "c.json"), *baselines]) == 1
    assert "not measured" in capsys.readouterr().out


def test_gpu_check_sums_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def python(name: str, code: str, seconds: float = 60.0, **settings: Any) -> gpu_check.Stage:
        return gpu_check.Stage(name, [sys.executable, "-c", code], seconds, **settings)

    found = [
        python("good", "print('all well')"),
        python("bad", "raise SystemExit(3)"),
        python("slow", "import time; time.sleep(60)", 0.5),
        python("missing", "raise SystemExit(1)", 0.0, needs=lambda: "no such tool"),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda out: found)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[1] for line in summary] == ["passed", "FAILED", "OUT", "left"]
    assert "all well" in summary[0] and "no such tool" in summary[3]
    assert gpu_check.main(["--out", str(tmp_path), "--only", "good", "missing"]) == 0
    # The time of a stage that is left out is there for the others, once.
    found[2:] = [
        python("first", "import time; time.sleep(1.5)", 0.0),
        python("second", "import time; time.sleep(60)", 0.0),
        python("missing", "", 4.0, needs=lambda: "no such tool"),
    ]
    assert gpu_check.main(["--out", str(tmp_path), "--only", "first", "second", "missing"]) == 1
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[1] for line in summary] == ["passed", "OUT", "left"]
    capsys.readouterr()


def test_gpu_check_counts_tests_by_name(tmp_path: Path) -> None:
    cases = '<testcase name="test_opcheck[a]"/><testcase name="test_opcheck[b]"><skipped/></testcase>'
    cases += '<testcase name="test_compiled"><failure/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert gpu_check.count(tmp_path / "tests.xml", "opcheck") == ("passed", "1 of 2, 1 skipped")
    assert gpu_check.count(tmp_path / "tests.xml", "compile") == ("FAILED", "0 of 1, 0 skipped")
    assert gpu_check.count(tmp_path / "tests.xml", "graph") is None


def test_the_stages_take_less_than_ten_minutes() -> None:
    assert sum(stage.seconds for stage in gpu_check.stages(Path())) <= 600
