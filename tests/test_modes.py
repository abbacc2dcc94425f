"""PyTorch's modes around a decode: nothing that outlives a call depends on the mode of the call that made it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small import left_pad, prompts, small_model

import fdpp
from fdpp import LLaDAModelLM
from fdpp.decoding import static

SETTINGS: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8, "rule": fdpp.Frechet(0.1)}
KINDS: list[dict[str, Any]] = [
    {"cache": "dual"},
    {"cache": "none", "drafts": 3},
    {"cache": "dual", "drafts": 3, "branches": "tree"},
    {"cache": "prefix", "cfg_scale": 0.5},
    {"temperature": 0.7, "seed": 1},
    {"rule": fdpp.Quota(), "steps": 9, "remasking": "random", "seed": 3},
    {"head": "fused"},
]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


def decode(llada: LLaDAModelLM, **settings: Any) -> Any:
    ids, mask = left_pad([prompts(1, 5 + 3 * b, seed=b)[0] for b in range(3)])
    return llada.generate(ids, mask, **{**SETTINGS, **settings})


def equal(a: Any, b: Any) -> bool:
    return all(
        a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in ("sequences", "nfe", "commit_step")
    )


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_decode_is_the_same_in_a_mode_and_after_it(settings: dict[str, Any], mode: str, engine: str) -> None:
    llada, settings = small_model(), settings | {"engine": engine}
    want = decode(small_model(), **settings)
    ids, mask = left_pad([prompts(1, 5 + 3 * b, seed=b)[0] for b in range(3)])
    with MODES[mode]():
        inside = llada.generate(ids, mask, **{**SETTINGS, **settings})
        again = llada.generate(ids, mask, **{**SETTINGS, **settings})
    assert equal(inside, want) and equal(again, want)
    assert equal(decode(llada, **settings), want)
    inside.sequences.add_(1)  # which a tensor of inference mode would refuse


@pytest.mark.parametrize("first", ["generate", "forward", "warmup"])
def test_a_model_that_decoded_in_inference_mode_can_be_trained(first: str) -> None:
    """Joining lays weights into one matrix, which must not be a tensor of inference mode."""
    llada, ids = small_model(), prompts(2, 9)
    with torch.inference_mode():
        if first == "generate":
            llada.generate(ids, **SETTINGS)
        elif first == "warmup":
            llada.warmup(9, engine="static", **SETTINGS)
        else:
            llada(ids)
    assert not any(parameter.is_inference() for parameter in llada.parameters())
    optimizer = torch.optim.SGD(llada.parameters(), lr=0.1)
    before = llada.model.transformer["blocks"][0].q_proj.weight.clone()
    llada(ids).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    assert not before.equal(llada.model.transformer["blocks"][0].q_proj.weight)
    assert equal(decode(llada), decode(llada, engine="static"))


def test_prompts_from_inference_mode() -> None:
    llada = small_model()
    with torch.inference_mode():
        ids = prompts(2, 9) + 0
        mask = torch.ones_like(ids)
    for engine in ("eager", "static"):
        out = llada.generate(ids, mask, engine=engine, **SETTINGS)
        assert out.sequences[:, :9].equal(ids) and not out.sequences.is_inference()


def test_a_step_in_inference_mode_and_after_it() -> None:
    logits, tokens = torch.randn(2, 4, 9), torch.full((2, 4), 8)
    step = fdpp.DenoisingStep(fdpp.Frechet(0.1), mask_id=8)
    with torch.inference_mode():
        inside = step(logits, tokens)
    assert all(a.equal(b) for a, b in zip(inside, step(logits, tokens), strict=True))


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_autocast_is_what_it_is_in_the_forward(cache: str) -> None:
    """Products in bfloat16 inside, in float32 after it; no captured step comes of it."""
    llada, ids = small_model(), prompts(2, 11)
    settings = {**SETTINGS, "cache": cache, "stop_at_eos": False}
    plain = llada.generate(ids, **settings)
    seen: list[torch.dtype] = []
    project = llada.project
    llada.project = lambda hidden: seen.append((out := project(hidden)).dtype) or out
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = llada.generate(ids, **settings)
        assert set(seen) == {torch.bfloat16}
        logits = llada(ids).logits
        with pytest.raises(ValueError, match="engine='static': autocast"):
            llada.generate(ids, engine="static", **settings)
    assert logits.dtype == torch.bfloat16 and not (cast.sequences == small_model().config.mask_token_id).any()
    seen.clear()
    assert equal(llada.generate(ids, **settings), plain) and set(seen) == {torch.float32}


def test_autocast_on_a_gpu_leaves_captures_alone() -> None:
    llada, config = small_model(), fdpp.DiffusionGenerationConfig()
    with (
        torch.autocast("cuda", dtype=torch.bfloat16) if torch.cuda.is_available() else pytest.MonkeyPatch.context() as m
    ):
        if not torch.cuda.is_available():
            m.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        with static.steps_for(llada, config, torch.device("cuda")) as held:
            assert held is None
    with static.steps_for(llada, config, torch.device("cuda")) as held:
        assert held is not None
