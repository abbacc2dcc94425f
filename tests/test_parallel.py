"""Selection over a shared-out vocabulary, tensor-parallel and data-parallel decoding: two gloo processes on the CPU."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import Lead, assert_as_specified, assert_equal
from small import SMALL, name_of, prompts, small_model
from two_processes import DECODES, MADE, MODELS, QUESTIONS, answers, cases, decode, in_float64, problems

from fdpp import EntropyBound, Frechet, LLaDAConfig, Rule, tiny
from fdpp.models.language_model import DiffusionLM
from fdpp.step import cpu, parallel
from fdpp.step.terms import Terms, pack

TESTS = Path(__file__).parent
HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
needs_accelerate = pytest.mark.skipif(not HAS_ACCELERATE, reason="needs accelerate, as transformers does for a tp_plan")


def model_of(name: str) -> DiffusionLM:
    family, config = MODELS[name]
    return MADE[family](**config)


def tiny_prompts() -> torch.Tensor:
    _, tokenizer = tiny.load()
    return torch.tensor([tokenizer(tiny.generate("held-out", 1)[0].prompt)["input_ids"]])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes of `two_processes.py` have found, by rank."""
    folder = tmp_path_factory.mktemp("parallel")
    if HAS_ACCELERATE:
        for name in MODELS:
            model_of(name).save_pretrained(folder / name)
        for family in SMALL:
            SMALL[family](num_key_value_heads=1).save_pretrained(folder / f"one kv head of {family}")
        tiny.load()[0].save_pretrained(folder / "tiny")
        torch.save(tiny_prompts(), folder / "tiny.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*torchrun, str(TESTS / "helpers" / "two_processes.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture
def selected(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [results["select"] for results in found]


@pytest.fixture
def decoded(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [results["decode"] for results in found]


@pytest.mark.parametrize("name", problems())
def test_slices_give_the_result_of_the_whole(name: str, selected: list[dict[str, Any]]) -> None:
    problem, _ = problems()[name]
    assert_as_specified(selected[0][name][0], problem)
    assert_equal(selected[0][name][0], selected[1][name][0])


def test_three_numbers_per_row_are_exchanged(selected: list[dict[str, Any]]) -> None:
    """When sampling two more, and before them a group's logits and its number."""
    for name, (problem, _) in problems().items():
        _, numbers, unchanged = selected[1][name]
        rows, sampled = int(problem.candidate.sum()), problem.temperature > 0
        more = {"confidence": 0, "margin": 1, "entropy": 3}[problem.rules[0].order]
        assert numbers == ([rows * 65] * sampled + [rows * (3 + 2 * sampled + more)] if rows else []), name
        assert unchanged, name


def test_select_draws_the_noise_of_the_whole(selected: list[dict[str, Any]]) -> None:
    mine, whole = selected[1]["public"]
    assert mine.tokens.equal(whole.tokens)
    assert mine.committed.equal(whole.committed)


def test_only_a_tensor_parallel_head_is_a_slice(selected: list[dict[str, Any]]) -> None:
    for results in selected:
        assert results["rows"] == results["replicated"] == "no error"
        assert "Shard(dim=1)" in results["columns"]
        assert "fsdp" in results["fsdp"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 200) | st.sampled_from((63, 64, 65, 128)), min_size=1, max_size=5),
    temperature=st.sampled_from((0.0, 1.5, 80.0)),
    rule=st.sampled_from((Frechet(0.1), EntropyBound(0.1), Lead(0.1))),
    levels=st.sampled_from((1.0, 8.0, 1e4)),
    scale=st.sampled_from((3.0, 200.0)),
)
def test_summaries_of_any_slices_merge_to_that_of_the_row(
    seed: int, cuts: list[int], temperature: float, rule: Rule, levels: float, scale: float
) -> None:
    V, mask_id = 200, seed % 201
    g = torch.Generator().manual_seed(seed)
    rows = (torch.randn(6, V, generator=g) * levels).round() / levels * scale  # coarse levels tie
    rows[rows < -1.5 * scale] = -torch.inf
    seeds, positions, rows_of = torch.randint(0, 99, (6,), generator=g), torch.arange(6), torch.arange(6)
    terms = Terms(pack(rule), rule.key(), mask_id, temperature, seeds)
    edges = [0, *sorted(cuts), V]
    slices = [(first_id, rows[:, first_id:stop]) for first_id, stop in itertools.pairwise(edges) if stop > first_id]
    lent = torch.stack([parallel.lend(part[None], terms, rows_of * 0, positions, first) for first, part in slices])
    summaries = torch.stack(
        [
            parallel.summarize(
                part.clone(), terms, rows_of, positions, first, parallel.borrowed(lent, first + part.shape[1])
            )
            for first, part in slices
        ]
    )
    merged = parallel.merge(summaries.flip(0), temperature > 0, rule.order)
    whole = cpu.summarize(rows.clone(), terms, rows_of, positions)
    assert merged[0].equal(whole[0])
    # An exponential of x is exact to 1e-7 (1 + |x|), and the logits of one row are up to 800 apart.
    found, truth = (residual.clamp(min=1e-37).log() for residual in (merged[1], whole[1]))
    torch.testing.assert_close(found, truth, rtol=2e-7, atol=2e-6, equal_nan=True)
    if rule.order == "margin":
        found, truth = (odds.clamp(min=1e-37).log() for odds in (merged[2], whole[2]))
        usable = ~whole[1].isnan()
        torch.testing.assert_close(found[usable], truth[usable], rtol=2e-7, atol=2e-6)
    if rule.order == "entropy":
        torch.testing.assert_close(merged[2], whole[2], rtol=2e-6, atol=1e-6, equal_nan=True)


def test_a_plan_for_every_matrix_of_the_blocks_and_the_head() -> None:
    for tied in (False, True):
        model = small_model(weight_tying=tied)
        plan = {name for name in model.tp_plan if name.startswith("model.transformer.")}
        matrices = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.dim() == 2 and ".1." not in n}
        assert {name.replace("*", "0") for name in plan} == matrices - (set() if tied else {"model.transformer.wte"})
    assert "base_model_tp_plan" not in LLaDAConfig().to_dict()


@needs_accelerate
@pytest.mark.parametrize(("name", "case"), [(name, case) for name in MODELS for case in cases(name)])
def test_two_processes_decode_the_tokens_of_one(name: str, case: str, decoded: list[dict[str, Any]]) -> None:
    truth = decode(in_float64(model_of(name)), DECODES[case])
    for rank in range(2):
        for found, one in zip(decoded[rank][name]["decodes"][case], truth, strict=True):
            assert found.equal(one)


@needs_accelerate
def test_the_embedded_model_decodes_the_same_tokens(decoded: list[dict[str, Any]]) -> None:
    model = in_float64(tiny.load()[0])
    truth = model.generate(tiny_prompts(), max_new_tokens=48, cache="dual", rule=Frechet(0.25)).sequences
    assert decoded[0]["tiny"].equal(truth)
    assert decoded[1]["tiny"].equal(truth)


@needs_accelerate
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_shared_out_and_logits_gathered_on_demand(name: str, decoded: list[dict[str, Any]]) -> None:
    model = in_float64(model_of(name))
    first, second = (results[name] for results in decoded)
    rows, size = model.head.shape[0], model.config.vocab_size
    assert first["held"] == (0, min(-(-rows // 2), size))
    assert second["held"] == (first["held"][1], size - first["held"][1])
    shared = {n for n, p in model.named_parameters() if p.dim() == 2 or n.endswith("bias")}
    if not model.config.tie_word_embeddings:
        # transformers shares it out too, where it has the usual name.
        embedding = name_of(model, model.get_input_embeddings().weight)
        shared -= {embedding} - first["weights"].keys()
        assert MODELS[name][0] != "LLaDA" or embedding not in shared
    assert first["weights"].keys() == second["weights"].keys() == shared
    for n in shared:
        parts = first["weights"][n], second["weights"][n]
        assert sum(parts) == model.get_parameter(n).numel()
        assert abs(parts[0] - parts[1]) <= model.config.hidden_size
    for results in (first, second):
        torch.testing.assert_close(results["logits"], model(prompts(2, 7)).logits)


@needs_accelerate
def test_what_cannot_be_shared_out_is_refused(decoded: list[dict[str, Any]]) -> None:
    for results in decoded:
        assert "all heads" in results["dawn"]
        assert results["static"].startswith("engine='static': ")
        assert "n_kv_heads=1" in results["heads of LLaDA"]
        assert "num_key_value_heads=1" in results["heads of Dream"]


@needs_accelerate
def test_processes_that_draw_a_seed_draw_the_same(decoded: list[dict[str, Any]]) -> None:
    """Their generators are seeded otherwise, and sequences that differ would hang a collective sooner or later."""
    first, second = (results["drawn seed"] for results in decoded)
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


@needs_accelerate
def test_accelerate_shares_out_the_prompts(decoded: list[dict[str, Any]]) -> None:
    model = in_float64(small_model())
    alone = [answers(model, [question])[0] for question in QUESTIONS]
    assert [results["answers"] for results in decoded] == [alone, alone]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "frechet"}, "rule: expected"),
        ({"temperature": -1.0}, "temperature: expected"),
        ({"temperature": 1.0}, "expected a seed"),
        ({"tokens": torch.zeros(2, 4)}, "tokens: expected"),
    ],
)
def test_wrong_arguments_are_refused_before_any_exchange(changes: dict[str, Any], message: str) -> None:
    arguments = {"tokens": torch.zeros(2, 4, dtype=torch.int64), "rule": Frechet(), "mask_id": 0, "first_id": 0}
    with pytest.raises(ValueError, match=message):
        parallel.select(torch.zeros(2, 4, 9), **{**arguments, **changes})
