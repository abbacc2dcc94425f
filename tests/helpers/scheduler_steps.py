"""Steps of a patched scheduler beside those of one that is not, of the released diffusers or of the stand-ins."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import fdpp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(B: int, T: int, V: int, noise: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits `[B, T, V]` without ties, and confidences without, in bfloat16 too.

    They are 0 and below, in some order, with an even gap between any two, of a sequence's positions each another one.
    """
    order, gaps = torch.rand(B, T, V, generator=noise).argsort(-1), max(T, 64)
    gap = 4.0 * (torch.rand(B, gaps, generator=noise).argsort(1)[:, :T, None] + 1) / gaps
    return ((order - (V - 1)) * gap).to(dtype)


class Case(NamedTuple):
    """One call of `BlockRefinementScheduler.step`, and its `set_timesteps`, None for none."""

    call: dict[str, Any]
    schedule: dict[str, Any] | None


def refinement(seed: int) -> Case:
    noise = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=noise))]

    B, T, V = pick(1, 2, 3), pick(1, 2, 5, 8, 13), pick(2, 7, 65, 80)
    mask_id = pick(0, V - 1)
    sample = torch.randint(V, (B, T), generator=noise)
    sample[torch.rand(B, T, generator=noise) < pick(0.0, 0.5, 0.8, 1.0)] = mask_id
    given = int(torch.randint(T + 1, (), generator=noise))
    step = int(torch.randint(T + 2, (), generator=noise))
    call = {
        "model_output": rows(B, T, V, noise, pick(*DTYPES)),
        "timestep": pick(step, torch.tensor(step)),
        "sample": sample,
        "mask_token_id": mask_id,
        "threshold": pick(None, 0.0, 0.3, 0.7, 0.95, 1.0, 2.0, -1.0),
        "editing_threshold": pick(None, 0.3, 0.6, 0.0, 1.0, -1.0),
        "prompt_mask": pick(None, torch.arange(T) < given),
        "temperature": pick(0.0, 0.0, 0.7),
        "sampling_method": "greedy",
        "top_k": pick(None, 3),
    }
    if call["temperature"] == 0.0:
        call["sampling_method"] = pick("auto", "greedy", "multinomial")
    steps = {"num_inference_steps": pick(1, 2, T, 2 * T), "block_length": T}
    return Case(call, pick(steps, steps, steps, None))


def copied(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}


def same(ours: Any, theirs: Any, ignored: tuple[str, ...] = ()) -> None:
    """All values are equal, in their dtypes; the probabilities up to rounding."""
    assert type(ours) is type(theirs)
    for name, value in vars(theirs).items():
        mine = getattr(ours, name)
        assert (mine.dtype, mine.shape) == (value.dtype, value.shape), name
        if name == "sampled_probs":
            torch.testing.assert_close(mine, value, rtol=2e-5, atol=1e-6)
        elif name not in ignored:
            assert mine.equal(value), name


def refine(kind: Any, seed: int) -> Any:
    """What a patched and an unpatched scheduler make of `refinement(seed)` is the same, and no input changes."""
    call, schedule = refinement(seed)
    patched, plain = kind(threshold=0.9), kind(threshold=0.9)
    for scheduler in (patched, plain):
        if schedule is not None:
            scheduler.set_timesteps(**schedule)
    given = copied(call)
    with fdpp.patch(patched):
        ours = patched.step(**given)
    same(ours, plain.step(**call))
    assert ours.pred_logits is given["model_output"]
    for name, value in call.items():
        assert value.equal(given[name]) if isinstance(value, Tensor) else value == given[name], name
    return ours


def drawing(tokens: Tensor) -> Any:
    """In a `with`: the original draws these."""
    return patch.object(torch, "multinomial", lambda *_, **__: tokens.reshape(-1, 1))


def refine_sampled(kind: Any, seed: int, mask: bool) -> None:
    """A patched step that samples decides about its tokens as the original does about them."""
    call, _ = refinement(seed)
    T = call["sample"].shape[1]
    temperature = (0.4, 1.0, 1.5)[seed % 3]
    call |= {"sampling_method": ("auto", "multinomial")[seed % 2], "temperature": temperature, "top_k": None}
    if not mask:
        call["mask_token_id"] = None
    patched, plain = kind(), kind()
    for scheduler in (patched, plain):
        scheduler.set_timesteps(T, block_length=T)
    with fdpp.patch(patched):
        ours = patched.step(**call, generator=torch.Generator().manual_seed(seed))
    with drawing(ours.sampled_tokens):
        theirs = plain.step(**call, generator=torch.Generator().manual_seed(seed))
    same(ours, theirs, () if mask else ("prev_sample",))
    if not mask:
        held = plain._committed
        assert patched._committed.equal(held)
        assert ours.prev_sample[held].equal(theirs.prev_sample[held])
        assert (ours.prev_sample >= 0).all() and (ours.prev_sample < call["model_output"].shape[2]).all()


def refine_block(kind: Any, seed: int, B: int, T: int, steps: int, edit: float | None) -> Tensor:
    """A whole block without a mask id, greedy: the same canvas after every step. The number of edits."""
    noise, V = torch.Generator().manual_seed(seed), 40
    patched, plain = (kind(threshold=0.97, editing_threshold=edit) for _ in range(2))
    fdpp.patch(patched)
    ours = theirs = torch.randint(V, (B, T), generator=noise)
    draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
    edits = 0
    for scheduler in (patched, plain):
        scheduler.set_timesteps(steps, block_length=T)
    for step in range(steps):
        logits = rows(B, T, V, noise)
        outs = [
            scheduler.step(logits, step, canvas, generator=draw)
            for scheduler, canvas, draw in zip((patched, plain), (ours, theirs), draws, strict=True)
        ]
        same(*outs)
        assert patched._committed.equal(plain._committed)
        ours, theirs = (out.prev_sample for out in outs)
        edits += int(outs[0].editing_transfer_index.sum())
    assert patched._committed.all()
    return edits


def accept(kind: Any, seed: int) -> int:
    """A patched `EntropyBoundScheduler` accepts what the original does. How many positions."""
    noise = torch.Generator().manual_seed(seed)
    B, T, V = 1 + seed % 3, (1, 2, 7, 16)[seed % 4], (3, 64, 65, 200)[seed // 4 % 4]
    logits = torch.randn(B, T, V, generator=noise) * torch.empty(B, T, 1).uniform_(0.0, 12.0, generator=noise)
    logits, canvas = 30.0 * (logits / 30.0).tanh(), torch.randint(V, (B, T), generator=noise)
    patched, plain = (kind(entropy_bound=(0.1, 1.0, 0.01)[seed % 3]) for _ in range(2))
    for scheduler in (patched, plain):
        scheduler.set_timesteps(12)
    bound = (None, 3.0)[seed % 2]
    call = {"model_output": logits, "timestep": seed % 12, "sample": canvas, "entropy_bound": bound}
    given = copied(call)
    with fdpp.patch(patched):
        ours = patched.step(**given, generator=noise)
    with drawing(ours.sampled_tokens):
        theirs = plain.step(**call)
    same(ours, theirs, ("prev_sample",))
    accepted = ours.accepted_index
    assert ours.prev_sample[accepted].equal(ours.sampled_tokens[accepted])
    assert (ours.prev_sample >= 0).all() and (ours.prev_sample < V).all()
    assert all(given[name].equal(call[name]) for name in ("model_output", "sample"))
    return int(accepted.sum())


def chi_square(counts: Tensor, p: Tensor) -> float:
    """How many standard deviations the statistic is above its mean; ids that are rarer than 5 are joined."""
    expected = p.double() * counts.sum()
    rare = expected < 5.0
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected, observed = expected[expected > 0], observed[expected > 0]
    freedom = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return (statistic - freedom) / (2.0 * freedom) ** 0.5


def draws_follow(step: Any, p: Tensor, times: int = 40) -> None:
    """`step(generator)` draws its tokens from `p` `[V]`, and anew every time."""
    noise = torch.Generator().manual_seed(5)
    drawn = [step(noise) for _ in range(times)]
    assert not drawn[0].equal(drawn[1])
    counts = torch.stack(drawn).flatten().bincount(minlength=len(p))
    assert chi_square(counts, p) < 5.0
    again = torch.Generator().manual_seed(5)
    assert all(step(again).equal(tokens) for tokens in drawn[:2])
