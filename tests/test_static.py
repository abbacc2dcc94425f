"""Steps on static tensors: the tokens of the eager engine, from tensors and steps that are made once."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from captures import captured_on_cpu
from family_of_others import FAMILIES
from inputs import on_gpu
from small import EOS, exact_model, left_pad, prompts, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fdpp
from fdpp import LLaDAModelLM
from fdpp.attention import cache as attention_cache
from fdpp.decoding import static
from fdpp.decoding.arena import uncaptured
from fdpp.decoding.forwards import Forwards
from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.static import steps_of
from fdpp.step import cpu, project

RULES = [
    fdpp.Quota(),
    fdpp.Threshold(0.5),
    fdpp.Frechet(0.1),
    fdpp.EntropyBound(1.0),
    fdpp.LocalLeap(0.6, 0.3),
    fdpp.Klass(0.3, 0.5, 1),
    fdpp.Budget(0.6, 0.5, 0.2, 0.3),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def llada(request: pytest.FixtureRequest) -> LLaDAModelLM:
    """On a GPU in float64: static steps run at other batch sizes than eager ones, for which a library may sum in
    another order. In float64 that decides nothing."""
    return small_model() if request.param == "cpu" else exact_model().to(request.param)


def ragged(llada: LLaDAModelLM, B: int = 5) -> tuple[Tensor, Tensor]:
    ids, mask = left_pad([prompts(1, 5 + 3 * b, seed=b)[0] for b in range(B)])
    return ids.to(llada.device), mask.to(llada.device)


def both(llada: LLaDAModelLM, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> tuple[Any, Any]:
    """The outputs of both engines."""
    return tuple(llada.generate(ids, mask, engine=engine, **settings) for engine in ("eager", "static"))


def assert_same(eager: Any, captured: Any) -> None:
    """All but `query_tokens`, which counts the columns that fill a bucket; probabilities up to rounding."""
    assert eager.keys() == captured.keys()
    for name in ("confidence", "log_prob"):
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in eager.keys() - {"query_tokens", "confidence", "log_prob"}:
        torch.testing.assert_close(captured[name], eager[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_same_decode_as_the_eager_engine(llada: LLaDAModelLM, rule: fdpp.Rule, cache: str, drafts: int) -> None:
    """Ragged rows that end at different blocks, a last block that is shorter, and columns that need padding."""
    ids, mask = ragged(llada)
    eager, captured = both(llada, ids, mask, rule=rule, cache=cache, drafts=drafts, max_new_tokens=27, block_length=8)
    assert_same(eager, captured)
    assert rule == fdpp.Quota() or len(set(eager.nfe.tolist())) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"branches": "tree", "drafts": 3, "cache": "dual"},
        {"branches": "tree", "drafts": 3, "cache": "prefix"},
        {"drafts": "auto", "cache": "dual"},
        {"temperature": 0.7, "seed": 3, "cache": "dual"},
        {"rule": fdpp.Quota(), "steps": 9, "cache": "prefix"},
        {"stop_at_eos": False, "cache": "none"},
        {"refresh": "recent", "drafts": 3},
        {"rule": fdpp.Wino(0.2, 0.9, None), "cache": "dual"},
        {"rule": fdpp.Revocable(fdpp.EntropyBound(9.0), 1.0), "cache": "prefix", "drafts": 2},
        {"rule": fdpp.Credit(0.5), "cache": "dual", "drafts": 2},
    ],
    ids=str,
)
def test_same_decode_with_other_settings(llada: LLaDAModelLM, settings: dict[str, Any]) -> None:
    ids, mask = ragged(llada)
    settings = {"rule": fdpp.Frechet(0.1)} | settings
    eager, captured = both(llada, ids, mask, max_new_tokens=32, block_length=8, **settings)
    assert_same(eager, captured)


class Capturable(TorchDispatchMode):
    """Refuses what on a GPU would wait for the device, or copy from the host, during a capture."""

    WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2")
    looking = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.looking:
            assert name not in self.WAITING, f"{name} waits for the device"
            if name.startswith("index"):
                indices = args[1] if isinstance(args[1], (list, tuple)) else []
                assert not any(i is not None and i.dtype == torch.bool for i in indices), f"{name} counts a mask"
            assert name != "lift_fresh" or not args[0].dim(), "a list is copied from the host"
            assert name not in ("index_put", "index_put_") or args[2].dim(), f"{name} copies its value from the host"
        return func(*args, **(kwargs or {}))

    def unseen(self, function: Any) -> Any:
        """`function`, the CPU's stand-in for a kernel, exempt from the check."""

        def call(*args: Any) -> Any:
            self.looking = False
            try:
                return function(*args)
            finally:
                self.looking = True

        return call


WATCHED: list[dict[str, Any]] = [
    *({"rule": rule, "drafts": drafts} for rule in RULES for drafts in (1, 3)),
    {"branches": "tree", "drafts": 3},
    {"branches": "tree", "drafts": "auto", "cache": "prefix"},
    {"branches": "tree", "drafts": 3, "cache": "none"},
    {"temperature": 0.7, "seed": 3, "cache": "prefix"},
    {"rule": fdpp.Quota(), "steps": 9, "remasking": "random", "seed": 3},
    {"cfg_scale": 0.5, "drafts": 2},
    {"logits_eos_inf": True, "confidence_eos_eot_inf": True, "rule": fdpp.Quota(2)},
    {"head": "fused", "rule": fdpp.LocalLeap(0.6, 0.3)},
    {"refresh": "recent", "cfg_scale": 0.5},
]


@pytest.mark.parametrize(
    ("family", "settings"),
    [*(("LLaDA", settings) for settings in WATCHED), *(("Dream", settings) for settings in WATCHED[4:])],
    ids=str,
)
def test_a_step_holds_nothing_that_a_capture_refuses(
    family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, run, taken = Capturable(), static.Step.run, []
    monkeypatch.setattr(cpu, "select", mode.unseen(cpu.select))
    monkeypatch.setattr(project, "project_cpu", mode.unseen(project.project_cpu))
    # Only a CPU's attention reads it, row by row.
    monkeypatch.setattr(attention_cache, "left_padding", mode.unseen(attention_cache.left_padding))
    monkeypatch.setattr(Forwards, "only_masked", property(lambda self: False, lambda self, value: None), raising=False)

    def watched(step: static.Step, *arguments: Any) -> None:
        with mode:
            run(step, *arguments)
        taken.append(step)

    monkeypatch.setattr(static.Step, "run", watched)
    llada = FAMILIES[family](eot_token_id=60)
    sizes = {"max_new_tokens": 20, "block_length": 8, "engine": "static", "cache": "dual"}
    prompt = ragged(llada, 3) if family == "LLaDA" else left_pad([prompts(1, P)[0] for P in (5, 0, 11)])
    llada.generate(*prompt, **{**sizes, **settings})
    assert len(set(taken)) > 1


REPLAYED = [
    *({"cache": kept, "drafts": drafts} for kept in ("none", "prefix", "dual") for drafts in (1, 3)),
    {"drafts": 3, "branches": "tree"},
    {"cfg_scale": 0.5},
    {"head": "fused"},
    {"temperature": 0.7, "seed": 3},
    {"rule": fdpp.Klass(0.3, 0.5, 1)},
]


REPLAYS = [
    *(("LLaDA", settings, batch) for settings in REPLAYED for batch in ("one", "even", "ragged")),
    *(("Dream", settings, "ragged") for settings in REPLAYED[:8]),
    ("Dream", REPLAYED[4], "one"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "settings", "batch"), REPLAYS, ids=str)
@on_gpu(lambda batch, dtype: (batch, dtype) in (("ragged", torch.bfloat16), ("one", torch.float32)))
def test_a_replay_is_its_step_to_the_bit(
    family: str, settings: dict[str, Any], batch: str, device: str, dtype: torch.dtype
) -> None:
    """Confidences of every forward too: the same operators on the same tensors, captured or not."""
    heads = "n_heads" if family == "LLaDA" else "num_attention_heads"
    llada = FAMILIES[family](**{heads: 2, "num_key_value_heads": 1}).to(device, dtype)
    prompt = {"one": (prompts(1, 11),), "even": (prompts(5, 12),), "ragged": ragged(llada)}[batch]
    whole = {"rule": fdpp.Frechet(0.1), "cache": "dual", "max_new_tokens": 20, "block_length": 8, **settings}
    config = llada.settled(None, {**whole, "engine": "static"})

    def decode() -> tuple[Tensor, list[Tensor]]:
        ids, mask = (*(part.to(device) for part in prompt), None)[:2]
        with torch.no_grad(), static.steps_for(llada, config, ids.device) as held:
            loop = BlockLoop(llada, ids, None if mask is None else mask.bool(), config, None, held)
            seen, blocks = [], iter(range(3))
            while not loop.finished() and (block := next(blocks, None)) is not None:
                seen += [outcome.chosen.confidence.clone() for outcome in loop.steps(block)]
            return loop.sequences, seen

    with uncaptured():
        want = decode()
        assert all(step.graph is None for step in steps_of(llada))
    llada.forget_captures()
    with captured_on_cpu() if device == "cpu" else nullcontext():
        for _ in range(2):
            sequences, seen = decode()
            assert sequences.equal(want[0]) and len(seen) == len(want[1])
            assert all(a.equal(b) for a, b in zip(seen, want[1], strict=True))
        assert all(step.graph is not None for step in steps_of(llada))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
def test_how_far_the_engines_may_differ(device: str, dtype: torch.dtype, bound: float) -> None:
    """A first forward of five sequences, which static steps pad to six: up to the dtype's rounding."""
    llada = small_model(n_heads=2, n_kv_heads=1).to(device, dtype)
    ids, mask = ragged(llada)

    def first(engine: str) -> Any:
        config = llada.settled(None, {"engine": engine, "max_new_tokens": 20, "block_length": 8})
        with torch.no_grad(), static.steps_for(llada, config, ids.device) as held:
            return next(BlockLoop(llada, ids, mask.bool(), config, None, held).steps(0)).chosen

    eager, captured = first("eager"), first("static")
    alike = eager.proposal == captured.proposal
    assert alike.double().mean() > (0.95 if dtype == torch.bfloat16 else 0.99)
    ours, theirs = (torch.where(alike, chosen.confidence, 0.0) for chosen in (captured, eager))
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_a_decode_makes_one_step_for_full_forwards_and_one_for_blocks() -> None:
    llada = small_model()
    settings: dict[str, Any] = {"rule": fdpp.Quota(2), "stop_at_eos": False, "max_new_tokens": 32, "block_length": 8}
    first = llada.generate(prompts(1, 20), engine="static", **settings)
    assert {(step.window.full, step.window.width()) for step in steps_of(llada)} == {(True, 52), (False, 8)}
    made = steps_of(llada)
    # Another length of the same bucket makes a full forward of its own, and the same one again makes nothing.
    llada.generate(prompts(1, 27), engine="static", **settings)
    assert [step.window.width() for step in steps_of(llada) if step not in made] == [59]
    assert torch.equal(llada.generate(prompts(1, 20), engine="static", **settings).sequences, first.sequences)
    assert len(steps_of(llada)) == len(made) + 1


def masks_of(llada: LLaDAModelLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Of every call of PyTorch's attention: queries, keys, and whether there is a mask."""
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        seen.append((q.shape[2], k.shape[2], attn_mask is not None))
        return attention(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("P", [16, 15, 9])
def test_full_forwards_of_prompts_of_one_length_need_no_mask(
    P: int, padding: int, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their length, and also where all are padded alike: columns without a token are neither fed nor seen."""
    llada, ids = small_model(), prompts(2, P)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    seen = masks_of(llada, monkeypatch)
    out = llada.generate(ids, mask, engine="static", cache=cache, rule=fdpp.Quota(), max_new_tokens=16, block_length=8)
    full = P - padding + 16
    assert {call for call in seen if call[0] == full} == {(full, full, False)}
    assert cache == "dual" or all(keys == full and not masked for _, keys, masked in seen)
    want = llada.generate(ids[:, padding:], cache=cache, rule=fdpp.Quota(), max_new_tokens=16, block_length=8)
    assert_same(want, replace(out, sequences=out.sequences[:, padding:]))
    assert torch.equal(out.query_tokens, want.query_tokens)


def test_prompts_of_different_lengths_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a CPU attends row by row instead."""
    monkeypatch.setattr(attention_cache, "left_padding", lambda mask, rows: None)
    llada = small_model()
    seen = masks_of(llada, monkeypatch)
    ids, mask = left_pad([prompts(1, 16)[0], prompts(1, 15)[0]])
    llada.generate(ids, mask, engine="static", max_new_tokens=16, block_length=8)
    assert seen and all(keys == 32 and masked for _, keys, masked in seen)


def test_the_keys_and_values_stay_where_they_are() -> None:
    llada = small_model()
    settings: dict[str, Any] = {"engine": "static", "rule": fdpp.Frechet(0.1), "max_new_tokens": 32, "block_length": 8}

    def addresses() -> list[int]:
        (bucket,) = llada.__dict__["_static_steps"].buckets.values()
        return [tensor.data_ptr() for pair in bucket.cache.allocated for tensor in pair]

    ids, mask = ragged(llada)
    llada.generate(ids, mask, **settings)
    before = addresses()
    llada.generate(ids.flip(0)[1:], mask.flip(0)[1:], **settings)
    assert addresses() == before and len(before) == 4


def test_batches_run_at_a_few_sizes() -> None:
    sizes = [static.graph_size(b) for b in range(1, 65)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(b <= size <= max(b + 1, 3 * b // 2) for b, size in enumerate(sizes, 1))


def test_steps_do_not_outlive_the_weights() -> None:
    llada = small_model()
    settings: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8, "rule": fdpp.Quota()}
    llada.generate(prompts(1, 16), engine="static", **settings)
    made = steps_of(llada)
    llada.double().float()
    llada.load_state_dict(small_model(seed=1).state_dict())
    assert_same(*both(llada, prompts(1, 16), **settings))
    assert not set(made) & set(steps_of(llada))


def test_other_settings_get_other_steps() -> None:
    """What a capture bakes in must tell two decodes apart."""
    llada = small_model()
    for settings in (
        {"rule": fdpp.LocalLeap(0.6, 0.3)},
        {"rule": fdpp.LocalLeap(0.9, 0.6)},
        {"rule": fdpp.Frechet(0.1)},
        {"rule": fdpp.Frechet(0.9)},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.2, "seed": 1},
        {"stop_at_eos": False},
        {"eos_token_id": 5},
        {"eos_token_id": [5, EOS]},
    ):
        assert_same(*both(llada, prompts(2, 16), max_new_tokens=16, block_length=8, **settings))


def test_few_buckets_are_kept() -> None:
    llada = small_model()
    for P in (16, 48, 80, 112, 144, 16):
        assert_same(*both(llada, prompts(1, P), max_new_tokens=16, block_length=8))
        assert len(llada.__dict__["_static_steps"].buckets) <= static.KEPT


def test_a_larger_batch_after_a_smaller_one() -> None:
    llada = small_model()
    for B in (1, 5, 2, 7):
        eager, captured = both(llada, prompts(B, 16), max_new_tokens=16, block_length=8)
        assert_same(eager, captured)


def test_copies_start_without_steps() -> None:
    llada = small_model()
    expected = llada.generate(prompts(1, 16), engine="static", max_new_tokens=16, block_length=8)
    stored = io.BytesIO()
    torch.save(llada, stored)
    stored.seek(0)
    for other in (copy.deepcopy(llada), pickle.loads(pickle.dumps(llada)), torch.load(stored, weights_only=False)):
        assert not other.__dict__["_static_steps"].buckets
        assert_same(expected, other.generate(prompts(1, 16), engine="static", max_new_tokens=16, block_length=8))


def test_drafts_shown_while_decoding_are_those_of_the_eager_engine() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.clone())

        put_draft = put

        def end(self) -> None: ...

    recorders = {}
    for engine in ("eager", "static"):
        recorders[engine] = Recorder()
        small_model().generate(
            prompts(2, 11), engine=engine, streamer=recorders[engine], max_new_tokens=20, block_length=8
        )
    pairs = zip(recorders["eager"].seen, recorders["static"].seen, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_stopping_criteria_see_no_padding() -> None:
    llada, widths = small_model(), []

    def stop(ids: Tensor, scores: None, **_: Any) -> Tensor:
        widths.append(ids.shape[1])
        return torch.tensor([True, False])[: len(ids)]

    outs = both(llada, prompts(2, 11), max_new_tokens=20, block_length=8, stopping_criteria=[stop])
    assert widths[: len(widths) // 2] == widths[len(widths) // 2 :] and widths[0] == 19
    assert_same(*outs)


def test_dawn_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="engine='static': rule=Dawn"):
        small_model().generate(prompts(1, 8), engine="static", rule=fdpp.Dawn(), max_new_tokens=8)


def test_weights_on_several_devices_are_not_captured() -> None:
    llada = small_model()
    assert static.why_not_static(llada, fdpp.DiffusionGenerationConfig()) is None
    llada.model.transformer["ln_f"].to("meta")  # as where accelerate offloads it
    with pytest.raises(ValueError, match="engine='static': weights on several devices"):
        llada.generate(prompts(1, 8), engine="static", max_new_tokens=8)


def test_an_unknown_engine() -> None:
    with pytest.raises(ValueError, match="engine: expected one of auto, eager, static, got 'fast'"):
        small_model().generate(prompts(1, 8), engine="fast", max_new_tokens=8)


@pytest.mark.gpu
def test_graphs_are_captured_and_announced(caplog: pytest.LogCaptureFixture) -> None:
    llada = small_model().cuda()
    with caplog.at_level("INFO", logger="fdpp.decoding.static"):
        out = llada.generate(prompts(1, 16).cuda(), max_new_tokens=16, block_length=8, rule=fdpp.Quota())
    assert out.sequences.is_cuda and all(step.graph is not None for step in steps_of(llada))
    levels = [record.levelname for record in caplog.records if "capturing" in record.message]
    assert levels == ["WARNING", "INFO", "INFO"] and len(steps_of(llada)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "dual"},
        {"cache": "prefix", "drafts": 3},
        {"cache": "none", "drafts": "auto", "rule": fdpp.Quota()},
        {"refresh": "recent:2", "drafts": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["LLaDA", "Dream"])
def test_warming_up_makes_all_steps(family: str, settings: dict[str, Any]) -> None:
    llada = FAMILIES[family]()
    settings = {"engine": "static", "rule": fdpp.Frechet(0.1), "max_new_tokens": 20, "block_length": 8} | settings
    ids, mask = ragged(llada, 4)
    llada.warmup(ids.shape[1], batch_size=4, **settings)
    made = steps_of(llada)
    out = llada.generate(ids, mask, **settings)
    assert steps_of(llada) == made
    assert_same(FAMILIES[family]().generate(ids, mask, **settings), out)
