"""diffusers' schedulers with our steps: what they decide, what goes to the original, that nothing stays."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable
from typing import Any

import diffusers_like
import pytest
import scheduler_steps
import torch
from diffusers_like import (
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
    LLaDA2Pipeline,
)
from scheduler_steps import rows
from torch import Tensor

import fdpp
from fdpp.patching import RECORD, schedulers

KINDS = (EntropyBoundScheduler, BlockRefinementScheduler)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def inputs(B: int = 2, T: int = 6, V: int = 30, dtype: torch.dtype = torch.float32) -> tuple[Tensor, int, Tensor]:
    noise = torch.Generator().manual_seed(0)
    return rows(B, T, V, noise, dtype), 0, torch.randint(V, (B, T), generator=noise)


# Decisions


def test_refinement_is_that_of_the_original() -> None:
    seen = [scheduler_steps.refine(BlockRefinementScheduler, seed) for seed in range(300)]
    assert sum(bool(out.transfer_index.any()) for out in seen) > 100
    assert sum(bool(out.editing_transfer_index.any()) for out in seen) > 30


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "noise"])
def test_what_was_sampled_is_decided_as_by_the_original(mask: bool) -> None:
    for seed in range(120):
        scheduler_steps.refine_sampled(BlockRefinementScheduler, seed, mask)


@pytest.mark.parametrize(("B", "T", "steps"), [(1, 1, 1), (2, 7, 3), (3, 16, 16), (1, 5, 9)])
def test_block_of_noise_is_refined_as_by_the_original(B: int, T: int, steps: int) -> None:
    found = [
        scheduler_steps.refine_block(BlockRefinementScheduler, seed, B, T, steps, edit)
        for seed in range(6)
        for edit in (None, 0.5, 0.0)
    ]
    assert any(found) == (steps > 1)


def test_acceptance_is_that_of_the_original() -> None:
    assert sum(scheduler_steps.accept(EntropyBoundScheduler, seed) for seed in range(300)) > 1000


def test_state_of_another_shape_is_begun_anew() -> None:
    patched, plain = BlockRefinementScheduler(), BlockRefinementScheduler()
    fdpp.patch(patched)
    logits, _, canvas = inputs()
    for step, T in ((0, 6), (1, 4), (2, 4)):
        outs = [
            s.step(logits[:, :T], step, canvas[:, :T], generator=torch.Generator().manual_seed(step))
            for s in (patched, plain)
        ]
        scheduler_steps.same(*outs)
        assert patched._committed.equal(plain._committed)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_refinement_draws_from_its_distribution(temperature: float) -> None:
    scheduler = BlockRefinementScheduler(block_length=256)
    fdpp.patch(scheduler)
    row = torch.randn(130, generator=torch.Generator().manual_seed(1)) * 1.5
    logits, canvas = row.expand(2, 256, 130), torch.zeros(2, 256, dtype=torch.int64)

    def step(generator: torch.Generator) -> Tensor:
        return scheduler.step(logits, 0, canvas, temperature=temperature, generator=generator).sampled_tokens

    scheduler_steps.draws_follow(step, (row.double() / temperature).softmax(0))


def test_acceptance_draws_from_its_distribution() -> None:
    scheduler = EntropyBoundScheduler()
    fdpp.patch(scheduler)
    row = torch.randn(130, generator=torch.Generator().manual_seed(1))
    logits, canvas = row.expand(2, 256, 130), torch.zeros(2, 256, dtype=torch.int64)

    def step(generator: torch.Generator) -> Tensor:
        return scheduler.step(logits, 16, canvas, generator=generator).sampled_tokens

    scheduler_steps.draws_follow(step, (row.double() / 0.6).softmax(0))


@kinds
def test_torchs_seed_reproduces(kind: Any) -> None:
    scheduler = kind()
    fdpp.patch(scheduler)
    logits, step, canvas = inputs(T=40)
    more = {"temperature": 1.0} if kind is BlockRefinementScheduler else {}
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(scheduler.step(logits * 0.05, step, canvas, **more))
    scheduler_steps.same(outs[0], outs[1])
    assert not outs[0].sampled_tokens.equal(outs[2].sampled_tokens)
    assert not outs[0].prev_sample.equal(outs[2].prev_sample)


@pytest.mark.parametrize("dtype", scheduler_steps.DTYPES, ids=str)
@kinds
def test_values_have_the_originals_dtypes(kind: Any, dtype: torch.dtype) -> None:
    patched, plain = kind(), kind()
    fdpp.patch(patched)
    arguments = inputs(dtype=dtype)
    ours, theirs = (list(vars(s.step(*arguments)).values()) for s in (patched, plain))
    assert [(v.dtype, v.shape) for v in ours] == [(v.dtype, v.shape) for v in theirs]
    assert ours[-1].equal(theirs[-1])
    plain_tuple = patched.step(*arguments, return_dict=False)
    assert type(plain_tuple) is tuple
    assert len(plain_tuple) == len(ours)


def test_unusable_logits_commit_last_and_are_not_accepted() -> None:
    logits, step, canvas = inputs()
    logits[0, 1, 3], logits[0, 2, 3], logits[1, 0] = torch.nan, torch.inf, -torch.inf
    bad = torch.zeros(2, 6, dtype=torch.bool)
    bad[0, 1] = bad[0, 2] = bad[1, 0] = True
    accepting, refining = EntropyBoundScheduler(entropy_bound=1e9), BlockRefinementScheduler()
    fdpp.patch(accepting)
    fdpp.patch(refining)
    out = accepting.step(logits, step, canvas)
    assert out.accepted_index.equal(~bad)
    assert out.sampled_probs.isnan().equal(bad)
    refining.set_timesteps(2, block_length=6)
    out = refining.step(logits, step, canvas.fill_(5), mask_token_id=5, threshold=2.0)
    assert out.transfer_index.sum(1).tolist() == [3, 3]
    assert not (out.transfer_index & bad).any()
    assert (out.sampled_probs[bad] == 0).all()


def test_equal_confidences_go_by_position() -> None:
    scheduler = BlockRefinementScheduler()
    fdpp.patch(scheduler)
    scheduler.set_timesteps(2, block_length=6)
    for mask in (5, None):
        out = scheduler.step(torch.zeros(1, 6, 9), 0, torch.full((1, 6), 5), mask_token_id=mask)
        assert out.transfer_index.tolist() == [[True] * 3 + [False] * 3]
        assert (out.sampled_tokens == 0).all()


@pytest.mark.parametrize("mask", [1, None], ids=["mask", "noise"])
def test_confidences_on_a_line_do_not_pass(mask: int | None) -> None:
    scheduler = BlockRefinementScheduler()
    fdpp.patch(scheduler)
    scheduler.set_timesteps(4, block_length=4)
    logits, canvas = torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.int64)
    out = scheduler.step(logits, 0, canvas, mask_token_id=mask, threshold=0.5)
    assert (out.sampled_probs == 0.5).all()
    assert out.transfer_index.tolist() == [[True, False, False, False]]
    state = out.transfer_index if mask is None else None
    for edit in (0.5, 0.49):
        scheduler._committed = state
        # With a mask id of 0, no 1 is a mask.
        again = scheduler.step(logits, 1, canvas, mask_token_id=mask and 0, threshold=2.0, editing_threshold=edit)
        edited = [edit < 0.5, *[edit < 0.5 and mask is not None] * 3]
        assert again.editing_transfer_index.tolist() == [edited]


# What goes to the original

REFINING: dict[str, dict[str, Any]] = {
    "top_k": {"temperature": 1.0, "top_k": 3},
    "float64": {"model_output": torch.zeros(2, 6, 30, dtype=torch.float64)},
    "gradient": {"model_output": torch.zeros(2, 6, 30, requires_grad=True)},
    "positions": {
        "model_output": torch.zeros(1, 1025, 2),
        "sample": torch.zeros(1, 1025, dtype=torch.int64),
    },
    "threshold": {"threshold": torch.tensor(0.5)},
    "temperature": {"temperature": torch.tensor(1.0)},
    "tokens": {"sample": torch.zeros(2, 6, dtype=torch.int32)},
}
ACCEPTING: dict[str, dict[str, Any]] = {
    **{name: REFINING[name] for name in ("float64", "gradient", "positions", "tokens")},
    "bound": {"entropy_bound": -1.0},
    "bound of infinity": {"entropy_bound": float("inf")},
    "bound as a tensor": {"entropy_bound": torch.tensor(0.5)},
}
CALLS = [(BlockRefinementScheduler, name) for name in REFINING] + [(EntropyBoundScheduler, name) for name in ACCEPTING]


@pytest.mark.parametrize(("kind", "name"), CALLS, ids=lambda value: getattr(value, "__name__", value))
def test_goes_to_the_original(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, calls = kind(), []
    fdpp.patch(scheduler)
    logits, step, canvas = inputs()
    call = {"model_output": logits, "timestep": step, "sample": canvas, "return_dict": False}
    call |= (REFINING if kind is BlockRefinementScheduler else ACCEPTING)[name]
    monkeypatch.setattr(kind, "step", lambda self, *args, **kwargs: calls.append((self, args, kwargs)) or "theirs")
    assert scheduler.step(**call) == "theirs"
    [(of, args, kwargs)] = calls
    assert of is scheduler
    names = list(inspect.signature(type(scheduler.step).__call__).parameters)[1:]
    came = dict(zip(names, args, strict=False)) | kwargs
    assert came.keys() == set(names)
    assert all(came[key] is value for key, value in call.items())
    with torch.no_grad():
        calls.clear()
        scheduler.step(logits, step, canvas)
        assert calls == []


def test_filters_that_leave_nothing_out_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = BlockRefinementScheduler()
    fdpp.patch(scheduler)
    monkeypatch.setattr(BlockRefinementScheduler, "step", None)
    for more in ({"top_k": 30}, {"top_k": 0}, {"top_k": -1}, {"top_p": 1.0}):
        scheduler.step(*inputs(), temperature=1.0, **more)
    scheduler.step(*inputs(), temperature=0.0, top_p=0.5, top_k=2)
    with pytest.raises(TypeError):
        scheduler.step(*inputs(), temperature=1.0, top_p=0.5)


@pytest.mark.parametrize("t", [0.0, -1.0, torch.tensor(0.5)], ids=["zero", "negative", "tensor"])
def test_a_temperature_that_is_none_goes_to_the_original(t: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = EntropyBoundScheduler(t_min=t, t_max=t)
    fdpp.patch(scheduler)
    monkeypatch.setattr(EntropyBoundScheduler, "step", lambda *_, **__: "theirs")
    assert scheduler.step(*inputs()) == "theirs"


# Patching


@kinds
@pytest.mark.parametrize("pipeline", [None, LLaDA2Pipeline, DiffusionGemmaPipeline])
def test_nothing_stays(kind: Any, pipeline: Any) -> None:
    scheduler = kind()
    target = scheduler if pipeline is None else pipeline(scheduler)
    before = {name: id(value) for name, value in vars(scheduler).items()}
    signature = [(p.name, p.kind, p.default) for p in inspect.signature(scheduler.step).parameters.values()]
    with fdpp.patch(target) as given:
        assert given is target
        assert isinstance(scheduler.step, schedulers.Step)
        came = inspect.signature(scheduler.step).parameters.values()
        assert [(p.name, p.kind, p.default) for p in came] == signature
        assert "step" not in vars(kind())
        with fdpp.patch(target):
            pass
        assert "step" in vars(scheduler)
    assert {name: id(value) for name, value in vars(scheduler).items()} == before
    with pytest.raises(ValueError, match="is not patched"):
        fdpp.unpatch(target)
    fdpp.patch(scheduler)
    fdpp.unpatch(target)
    assert {name: id(value) for name, value in vars(scheduler).items()} == before


def test_says_what_it_did() -> None:
    scheduler = EntropyBoundScheduler()
    patch = fdpp.patch(LLaDA2Pipeline(scheduler))
    assert repr(patch) == "fdpp.patch of a EntropyBoundScheduler: step -> fdpp's fused step"
    assert repr(fdpp.patch(scheduler)) == "fdpp.patch of a EntropyBoundScheduler: already patched"
    assert repr(scheduler.step) == "<fdpp's fused step for a EntropyBoundScheduler>"
    fdpp.unpatch(scheduler)
    assert repr(patch) == "fdpp.patch of a EntropyBoundScheduler: undone"


def test_another_scheduler_of_the_pipeline_has_its_own_step() -> None:
    old, new = BlockRefinementScheduler(), BlockRefinementScheduler()
    pipeline = LLaDA2Pipeline(old)
    with fdpp.patch(pipeline):
        pipeline.scheduler = new
        assert RECORD not in vars(new)
        assert RECORD in vars(old)
        with pytest.raises(ValueError, match="is not patched"):
            fdpp.unpatch(pipeline)
    assert RECORD not in vars(old)
    assert "step" not in vars(old)
    fdpp.patch(pipeline)
    assert "step" in vars(new)


@kinds
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_patched_on_its_own(kind: Any, duplicate: Callable[[Any], Any]) -> None:
    scheduler = kind()
    fdpp.patch(scheduler)
    scheduler.step(*inputs())
    twin = duplicate(scheduler)
    assert twin.step.scheduler is twin
    logits, _, canvas = inputs(T=3)
    twin.step(logits, 0, canvas)
    if kind is BlockRefinementScheduler:
        assert scheduler._committed.shape == (2, 6)
        assert twin._committed.shape == (2, 3)
    fdpp.unpatch(twin)
    assert "step" not in vars(twin)
    assert scheduler.step.scheduler is scheduler
    fdpp.unpatch(scheduler)


@kinds
def test_one_of_the_same_configuration_is_not_patched(kind: Any) -> None:
    scheduler = kind(num_inference_steps=5)
    fdpp.patch(scheduler)
    other = kind.from_config(scheduler.config)
    assert vars(other.config) == vars(kind(num_inference_steps=5).config)
    assert not {"step", RECORD} & vars(other).keys()


class Derived(BlockRefinementScheduler):
    pass


class Stepping(BlockRefinementScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class Sampling(BlockRefinementScheduler):
    def _sample_from_logits(self, *args: Any) -> Any:
        return super()._sample_from_logits(*args)


def test_a_derived_scheduler_is_taken_unless_it_has_another_step() -> None:
    scheduler = Derived()
    fdpp.patch(scheduler)
    assert type(scheduler.step(*inputs())) is diffusers_like.BlockRefinementSchedulerOutput
    for kind, name in ((Stepping, "step"), (Sampling, "_sample_from_logits")):
        with pytest.raises(ValueError, match=f"{name}: expected that of BlockRefinementScheduler, got <bound method"):
            fdpp.patch(kind())
    replaced = BlockRefinementScheduler()
    replaced.step = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="step: expected that of BlockRefinementScheduler, got <function"):
        fdpp.patch(replaced)


@pytest.mark.parametrize("change", ["name", "default", "more"])
def test_an_unknown_signature_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"name": "seed=None", "default": "generator=0", "more": "generator=None, other=1"}[change]
    scope: dict[str, Any] = {}
    exec(f"def step(self, model_output, timestep, sample, *, entropy_bound=None, {more}, return_dict=True): ...", scope)
    monkeypatch.setattr(EntropyBoundScheduler, "step", scope["step"])
    scheduler = EntropyBoundScheduler()
    before = dict(vars(scheduler))
    with pytest.raises(ValueError, match=r"expected the parameters \(model_output, timestep, sample, .*got \(.*") as e:
        fdpp.patch(scheduler)
    assert more.split(", ")[-1] in str(e.value)
    assert vars(scheduler) == before


@kinds
def test_a_missing_output_is_named(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(diffusers_like, f"{kind.__name__}Output")
    with pytest.raises(ValueError, match=f"expected {kind.__name__}Output in diffusers_like, found none"):
        fdpp.patch(kind())


def test_what_is_no_scheduler_of_these_is_refused() -> None:
    expected = "expected EntropyBoundScheduler or BlockRefinementScheduler"
    with pytest.raises(ValueError, match=f"a DiscreteDDIMScheduler: {expected}"):
        fdpp.patch(DiffusionGemmaPipeline(DiscreteDDIMScheduler()))
    for target in (DiscreteDDIMScheduler(), LLaDA2Pipeline(None), object()):
        with pytest.raises(TypeError, match=f"got a {type(target).__name__}.*(?s:.)*{schedulers.SUPPORTED[:40]}"):
            fdpp.patch(target)


def test_diffusers_is_not_imported() -> None:
    assert "diffusers" not in sys.modules
