"""Whole blocks through SGLang's own loops, against `fdpp.select` one request at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from made_up import BLOCK, DEVICE, MASK, MadeUpModel, batch_of, block
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fdpp

pytest.importorskip("sglang", reason="`make sglang-check` runs it, in an environment of its own")

RULES = [
    fdpp.Frechet(0.1, 0.02),
    fdpp.Threshold(0.5),
    fdpp.Factor(1.2),
    fdpp.EntropyBound(1.5),
    fdpp.LocalLeap(0.6, 0.2, 2),
    fdpp.Hierarchy(0.3, 0.6),
    fdpp.Quota(3),
]
BLOCKS = [block(0), block(3, seed=1), block(BLOCK), block(5, seed=2), block(7, seed=3)]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def built(algorithm: Callable[..., Any], rule: fdpp.Rule, fdfo: bool = False) -> Any:
    return algorithm(f"{type(rule).__name__}Profile", fdfo, **vars(rule))


def first_mask(tokens: list[int]) -> int:
    return [*tokens, MASK].index(MASK)


def alone(tokens: list[int], rule: fdpp.Rule, prompt_len: int | None = None) -> list[list[int]]:
    """The block before each of its steps and, last, without a mask, by `fdpp.select` on this request alone."""
    model, states = MadeUpModel(), [tokens]
    prompt_len = first_mask(tokens) if prompt_len is None else prompt_len
    active = torch.arange(BLOCK, device=DEVICE)[None] >= prompt_len
    while MASK in states[-1][prompt_len:]:
        now = torch.tensor([states[-1]], device=DEVICE)
        out = fdpp.select(model.logits(states[-1])[None], now, rule=rule, mask_id=MASK, active=active)
        states.append(out.tokens[0].tolist())
    return states


@rules
def test_synchronous_batches_decode_every_request_as_if_alone(algorithm: Callable[..., Any], rule: fdpp.Rule) -> None:
    model, batch = MadeUpModel(), batch_of(BLOCKS)
    expected = [alone(tokens, rule) for tokens in BLOCKS]
    _, generated, accepted, states, _ = built(algorithm, rule).run(model, batch)
    for tokens, trajectory in zip(generated, expected, strict=True):
        assert tokens.tolist() == trajectory[-1][first_mask(trajectory[0]) :]
    # A state is a forward, the last one included: it writes the keys and values of the final tokens.
    assert model.forwards == max(len(trajectory) for trajectory in expected)
    assert accepted is None and states is None


@rules
def test_first_done_first_out_emits_each_block_as_soon_as_its_keys_are_final(
    algorithm: Callable[..., Any], rule: fdpp.Rule
) -> None:
    engine, model = built(algorithm, rule, fdfo=True), MadeUpModel()
    expected = [alone(tokens, rule) for tokens in BLOCKS]
    waiting, running, rounds = list(range(len(BLOCKS))), {}, [0] * len(BLOCKS)
    finished: dict[int, list[int]] = {}
    while waiting or running:
        for i in waiting[:2]:  # two requests join per round, so that a batch holds blocks of every age
            running[i] = (BLOCKS[i], None)
        waiting = waiting[2:]
        ids = list(running)
        batch = batch_of([running[i][0] for i in ids])
        _, blocks, accepted, states, _ = engine.run(model, batch, [running[i][1] for i in ids])
        for i, tokens, length, state in zip(ids, blocks, accepted, states, strict=True):
            rounds[i] += 1
            assert tokens == expected[i][min(rounds[i], len(expected[i]) - 1)]
            running[i] = (tokens, state)
            if length:
                assert length == BLOCK
                finished[i] = running.pop(i)[0]
    assert [finished[i] for i in range(len(BLOCKS))] == [trajectory[-1] for trajectory in expected]
    assert rounds == [len(trajectory) for trajectory in expected]


def test_the_rules_really_differ_on_these_logits() -> None:
    trajectories = {str([alone(tokens, rule) for tokens in BLOCKS]) for rule in RULES}
    assert len(trajectories) == len(RULES)


@pytest.mark.parametrize("fdfo", [False, True])
def test_threshold_decodes_as_the_shipped_low_confidence(algorithm: Callable[..., Any], fdfo: bool) -> None:
    def unlikely_mask(tokens: list[int], logits: Tensor) -> None:
        logits[:, MASK] = -30.0  # what LowConfidence proposes may be the mask token itself, which fdpp never commits

    results = []
    for name, settings in (("LowConfidence", {"threshold": 0.7}), ("ThresholdProfile", {"tau": 0.7})):
        model, batch = MadeUpModel(unlikely_mask), batch_of(BLOCKS)
        engine = algorithm(name, fdfo, **settings)
        states, history = None, []
        while not history or (fdfo and not all(history[-1][1])):
            _, _, accepted, states, _ = engine.run(model, batch, states)
            history.append((batch.input_ids.tolist(), accepted))
        results.append((history, model.forwards))
    assert results[0] == results[1]


def test_editing_decodes_as_the_shipped_joint_threshold(algorithm: Callable[..., Any]) -> None:
    def unlikely_mask(tokens: list[int], logits: Tensor) -> None:
        logits[:, MASK] = -30.0

    names = {"JointThreshold": {"threshold": 0.7, "edit_threshold": 0.5}, "EditingProfile": {"tau": 0.7, "edit": 0.5}}
    found = []
    for name, settings in names.items():
        batch = batch_of(BLOCKS)
        algorithm(name, **settings).run(MadeUpModel(unlikely_mask), batch)
        found.append(batch.input_ids.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("fdfo", [False, True])
def test_a_mask_id_among_committed_tokens_stays(algorithm: Callable[..., Any], fdfo: bool) -> None:
    tokens = [5, MASK, 7, MASK, *[MASK] * 4]
    rule = fdpp.Threshold(0.5)
    expected = alone(tokens, rule, prompt_len=4)
    batch = batch_of([tokens, [MASK] * BLOCK], prompt_lens=[4, BLOCK])
    engine, model = built(algorithm, rule, fdfo), MadeUpModel()
    for _ in range(len(expected) if fdfo else 1):
        _, generated, accepted, _, _ = engine.run(model, batch)
    assert batch.input_ids.view(2, BLOCK).tolist() == [expected[-1], [MASK] * BLOCK]
    if fdfo:
        assert accepted == [BLOCK, BLOCK]
    else:
        assert [row.tolist() for row in generated] == [expected[-1][4:], []]


def spoil_second(tokens: list[int], logits: Tensor) -> None:
    if tokens[:3] == BLOCKS[1][:3]:
        logits[3:5, 11] = torch.nan


def test_unusable_logits_are_reported_and_hurt_their_own_request_alone(
    algorithm: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    rule, batch = fdpp.Threshold(0.5), batch_of(BLOCKS)
    with caplog.at_level(logging.ERROR, logger="fdpp"):
        built(algorithm, rule).run(MadeUpModel(spoil_second), batch)
    rows = batch.input_ids.view(-1, BLOCK).tolist()
    assert MASK not in rows[1]
    others = [0, 2, 3, 4]
    assert [rows[i] for i in others] == [alone(BLOCKS[i], rule)[-1] for i in others]
    (record,) = caplog.records
    assert "at 2 masked positions of requests ['request-1']" in record.getMessage()


@pytest.mark.parametrize("switch", ["SGLANG_ENABLE_NAN_LOGITS_CHECK", "SGLANG_ENABLE_ASYNC_ASSERT"])
def test_unusable_logits_raise_where_sglang_checks_for_nan(
    algorithm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv(switch, "true")
    engine = algorithm("FrechetProfile")
    engine.run(MadeUpModel(), batch_of(BLOCKS))
    with pytest.raises(RuntimeError, match=r"NaN.*request-1"):
        engine.run(MadeUpModel(spoil_second), batch_of(BLOCKS))


class Recorder(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_a_step_writes_in_place_and_reads_back_once(
    algorithm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, batch = algorithm("FrechetProfile"), batch_of(BLOCKS, prompt_lens=[0, 3, BLOCK, 5, 7])
    logits = torch.cat([MadeUpModel().logits(tokens) for tokens in BLOCKS])
    selection = engine.denoise(logits.view(len(BLOCKS), BLOCK, -1), batch.input_ids.view(-1, BLOCK))
    # The selection has tests of its own, and its CPU path may read what it likes.
    monkeypatch.setattr(engine.denoise, "forward", lambda *inputs: selection)
    reads: list[Tensor] = []
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: reads.append(tensor) or [[1, 0, 0, 0, 0], [0] * 5])
    held = batch.input_ids
    with Recorder() as recorder:
        assert engine.step(batch, logits, [None] * 5) == [False, True, True, True, True]
    assert batch.input_ids is held and torch.equal(held, selection.tokens.view(-1))
    assert [tuple(tensor.shape) for tensor in reads] == [(2, 5)]
    synchronizing = {"aten._local_scalar_dense", "aten.nonzero", "aten.index", "aten.masked_select", "aten.item"}
    assert recorder.names and not synchronizing & set(recorder.names)


def test_rows_of_any_stride_and_an_empty_batch(algorithm: Callable[..., Any]) -> None:
    engine, model = algorithm("FactorProfile"), MadeUpModel()
    rows = torch.cat([model.logits(tokens) for tokens in BLOCKS])
    # Tensor parallelism gathers the vocabulary in the first dimension and cuts the padding off.
    gathered = torch.cat((rows.T, rows.new_full((3, rows.shape[0]), 50.0))).T[:, : rows.shape[1]]
    assert gathered.stride() == (1, rows.shape[0])
    plain, strided = batch_of(BLOCKS), batch_of(BLOCKS)
    assert engine.step(plain, rows, [None] * 5) == engine.step(strided, gathered, [None] * 5)
    assert torch.equal(plain.input_ids, strided.input_ids)
    empty = batch_of(BLOCKS)
    empty.batch_size, empty.input_ids = 0, empty.input_ids[:0]
    assert engine.step(empty, rows[:0], []) == []
