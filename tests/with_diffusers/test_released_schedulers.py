"""The released diffusers: its schedulers and whole pipelines with our steps, beside the same without."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scheduler_steps
import torch
from golden_block import DATA, PAD, BlockRun, runs
from torch import Tensor

import fdpp
from fdpp.patching import RECORD

pytest.importorskip("diffusers", reason="`make diffusers-check` runs it, in an environment of its own")

from diffusers import (
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
    LLaDA2Pipeline,
)
from gemma import CANVAS, prompt, tiny_gemma

KINDS = (EntropyBoundScheduler, BlockRefinementScheduler)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def test_refinement_is_that_of_the_original() -> None:
    seen = [scheduler_steps.refine(BlockRefinementScheduler, seed) for seed in range(600)]
    assert sum(bool(out.transfer_index.any()) for out in seen) > 200
    assert sum(bool(out.editing_transfer_index.any()) for out in seen) > 60


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "noise"])
def test_what_was_sampled_is_decided_as_by_the_original(mask: bool) -> None:
    for seed in range(300):
        scheduler_steps.refine_sampled(BlockRefinementScheduler, seed, mask)


@pytest.mark.parametrize(("B", "T", "steps"), [(1, 1, 1), (2, 7, 3), (3, 16, 16), (1, 5, 9), (2, 256, 48)])
def test_block_of_noise_is_refined_as_by_the_original(B: int, T: int, steps: int) -> None:
    found = [
        scheduler_steps.refine_block(BlockRefinementScheduler, seed, B, T, steps, edit)
        for seed in range(6)
        for edit in (None, 0.5, 0.0)
    ]
    assert any(found) == (steps > 1)


def test_acceptance_is_that_of_the_original() -> None:
    assert sum(scheduler_steps.accept(EntropyBoundScheduler, seed) for seed in range(600)) > 2000


@pytest.mark.parametrize("dtype", scheduler_steps.DTYPES, ids=str)
@kinds
def test_values_have_the_originals_dtypes(kind: Any, dtype: torch.dtype) -> None:
    patched, plain = kind(), kind()
    fdpp.patch(patched)
    noise = torch.Generator().manual_seed(0)
    logits, canvas = scheduler_steps.rows(2, 6, 30, noise, dtype), torch.zeros(2, 6, dtype=torch.int64)
    ours, theirs = (s.step(logits, 0, canvas, return_dict=False) for s in (patched, plain))
    assert [(v.dtype, v.shape) for v in ours] == [(v.dtype, v.shape) for v in theirs]
    assert ours[-1].equal(theirs[-1])
    assert patched.step(logits, 0, canvas).keys() == plain.step(logits, 0, canvas).keys()


@pytest.mark.parametrize("more", [{"top_k": 3}, {"top_p": 0.5}], ids=["top_k", "top_p"])
def test_filters_are_the_originals(more: dict[str, Any]) -> None:
    patched, plain = BlockRefinementScheduler(), BlockRefinementScheduler()
    fdpp.patch(patched)
    noise = torch.Generator().manual_seed(0)
    logits, canvas = scheduler_steps.rows(2, 6, 30, noise), torch.zeros(2, 6, dtype=torch.int64)
    more = {"temperature": 1.0, **more}
    outs = [s.step(logits, 0, canvas, generator=torch.manual_seed(1), **more) for s in (patched, plain)]
    assert all(a.equal(b) for a, b in zip(*(out.to_tuple() for out in outs), strict=True))


@kinds
def test_nothing_stays(kind: Any, tmp_path: Path) -> None:
    scheduler = kind(num_inference_steps=7)
    pipeline = DiffusionGemmaPipeline(model=None, scheduler=scheduler, processor=None)
    assert pipeline.scheduler is scheduler
    before = {name: id(value) for name, value in vars(scheduler).items()}
    parameters = list(inspect.signature(scheduler.step).parameters)
    with fdpp.patch(pipeline):
        assert list(inspect.signature(scheduler.step).parameters) == parameters
        assert "step" not in vars(kind())
        other = kind.from_config(scheduler.config)
        scheduler.save_pretrained(tmp_path)
        for unpatched in (other, kind.from_pretrained(tmp_path)):
            assert not {"step", RECORD} & vars(unpatched).keys()
            assert unpatched.config.num_inference_steps == 7
        for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            assert twin.step.scheduler is twin
            fdpp.unpatch(twin)
            assert "step" not in vars(twin)
        pipeline.scheduler = other
    assert {name: id(value) for name, value in vars(scheduler).items()} == before


def test_another_scheduler_is_refused() -> None:
    pipeline = DiffusionGemmaPipeline(model=None, scheduler=DiscreteDDIMScheduler(), processor=None)
    with pytest.raises(ValueError, match="a DiscreteDDIMScheduler: expected EntropyBoundScheduler or Block"):
        fdpp.patch(pipeline)


# Whole pipelines

RECORDED = [run for run in runs("diffusers") if run.facts["stable"]]


@pytest.fixture(scope="module")
def llada2() -> Any:
    return fdpp.LLaDA2ModelLM.from_pretrained(DATA / "llada2/model_tiny").eval()


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: run.id)
def test_llada2s_pipeline_decodes_what_was_recorded(run: BlockRun, llada2: Any) -> None:
    # The pipeline's mask says nothing of blocks: the model sees those of its configuration.
    llada2.config.block_length = run.block_length
    pipeline = LLaDA2Pipeline(model=llada2, scheduler=BlockRefinementScheduler())
    pipeline.set_progress_bar_config(disable=True)
    n = max(map(len, run.prompts))
    pads = [n - len(prompt) for prompt in run.prompts]
    ids = torch.stack([torch.cat((torch.full((k,), PAD), p)) for k, p in zip(pads, run.prompts, strict=True)])
    mask = torch.stack([(torch.arange(n) >= k).long() for k in pads])
    forwards = 0

    def counted(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    def decode() -> Tensor:
        out = pipeline(
            input_ids=ids, attention_mask=mask, mask_token_id=run.mask, output_type="seq", **run.facts["params"]
        )
        return out.sequences

    hook = llada2.register_forward_hook(counted)
    with fdpp.patch(pipeline):
        ours = decode()
    hook.remove()
    assert forwards == run.facts["n_forward"]
    for row, (sequence, k) in enumerate(zip(ours, pads, strict=True)):
        recorded = run.out[row][n - k :]
        assert sequence.equal(recorded[: len(sequence)])
    assert ours.equal(decode())


class Processor:
    """Token ids of one prompt for every conversation."""

    eos_token_id = None
    tokenizer = SimpleNamespace(eos_token_id=None)

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, Tensor]:
        ids = prompt(2)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def gemma() -> Any:
    return tiny_gemma()


def denoised(gemma: Any, scheduler: Any, patched: bool, canvases: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Sequences, and the canvas after every step."""
    pipeline = DiffusionGemmaPipeline(model=gemma, scheduler=scheduler, processor=Processor())
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def callback(_pipe: Any, _step: int, _timestep: int, held: dict[str, Any]) -> dict[str, Any]:
        seen.append(held["canvas"])
        return {}

    if patched:
        fdpp.patch(pipeline)
    out = pipeline(
        "Hello",
        gen_length=canvases * CANVAS,
        num_inference_steps=6,
        output_type="seq",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=callback,
    )
    assert ("step" in vars(scheduler)) == patched
    return out.sequences, seen


@pytest.mark.parametrize("edit", [None, 0.5], ids=["kept", "edited"])
def test_diffusiongemmas_pipeline_refines_as_before(gemma: Any, edit: float | None) -> None:
    (ours, canvases), (theirs, others) = (
        denoised(gemma, BlockRefinementScheduler(threshold=0.7, editing_threshold=edit), patched)
        for patched in (True, False)
    )
    assert ours.equal(theirs)
    assert all(a.equal(b) for a, b in zip(canvases, others, strict=True))
    assert len(canvases) > 2


def test_diffusiongemmas_pipeline_reproduces_with_a_generator(gemma: Any) -> None:
    (ours, canvases), (again, others) = (denoised(gemma, EntropyBoundScheduler(), True) for _ in range(2))
    assert ours.equal(again)
    assert all(a.equal(b) for a, b in zip(canvases, others, strict=True))
    assert len(canvases) > 2


def test_diffusiongemmas_pipeline_ends_where_it_did(gemma: Any) -> None:
    """At a temperature so low that what is drawn is the argmax, canvases and forwards are those of the original."""
    # Of one canvas: the next begins with what the generator gives then.
    (ours, canvases), (theirs, others) = (
        denoised(gemma, EntropyBoundScheduler(t_min=1e-5, t_max=1e-5, entropy_bound=1e3), patched, canvases=1)
        for patched in (True, False)
    )
    assert ours.equal(theirs)
    assert all(a.equal(b) for a, b in zip(canvases, others, strict=True))
    assert len(canvases) > 1
