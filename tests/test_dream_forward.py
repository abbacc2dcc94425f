"""Dream's forwards against those of the published model code, cached ones included, and against a plain one."""

from __future__ import annotations

import pytest
import torch
from golden_dream import DATA, PAD, forward_arrays, forward_facts, model, plain
from plain_dream import Held, PlainDream
from torch import Tensor

from fdpp import DreamModelLM
from fdpp.attention import Probe
from fdpp.attention.cache import BlockCache
from fdpp.attention.rotary import rotary_angles, rotate

ATOL, DEEP_ATOL = 2e-4, 1e-3
"""Float32 and float64 runs of the published code differ by up to 1.1e-4, and by 3.3e-4 with 28 layers. The plain
forward of these tests is 1.1e-4 and 8.4e-4 from the recorded one."""


def close(ours: Tensor, name: str, atol: float = ATOL) -> None:
    torch.testing.assert_close(ours, forward_arrays()[name], rtol=0, atol=atol)


def cached_forward(dream: DreamModelLM, cache: BlockCache, x: Tensor, start: int, stop: int) -> Tensor:
    with torch.no_grad():
        return dream.project(dream.model(x[:, start:stop].long(), cache=cache, start=start))


@pytest.mark.parametrize("name", ["a", "b"])
def test_logits_are_raw(name: str) -> None:
    """Row i - 1 predicts the token at i: nothing is shifted."""
    with torch.no_grad():
        close(model("model_tiny")(forward_arrays()[f"{name}_x"].long()).logits, f"{name}_logits")


def test_logits_of_28_layers() -> None:
    with torch.no_grad():
        logits = model("model_deep28")(forward_arrays()["a_x"].long()).logits
    close(logits, "deep_logits", DEEP_ATOL)


def test_hidden_states() -> None:
    with torch.no_grad():
        states = model("model_tiny")(forward_arrays()["a_x"].long(), output_hidden_states=True).hidden_states
    close(torch.stack(states), "a_hidden")


def test_cache_holds_rotated_keys_and_plain_values() -> None:
    dream, cache, x = model("model_tiny"), BlockCache(), forward_arrays()["a_x"]
    cached_forward(dream, cache, x, 0, x.shape[1])
    size = plain("model_tiny").head_dim
    k, v = (forward_arrays()[name].unflatten(2, (-1, size)).transpose(1, 2) for name in ("a_k0", "a_v0"))
    angles = rotary_angles(torch.arange(k.shape[2])[None], size, dream.config.rope_theta)
    torch.testing.assert_close(cache.keys[0], rotate(k, angles), rtol=0, atol=ATOL)
    torch.testing.assert_close(cache.values[0], v, rtol=0, atol=ATOL)
    assert len(cache.keys) == len(cache.values) == plain("model_tiny").config["num_hidden_layers"]


@pytest.fixture
def cache_of_b() -> BlockCache:
    cache, x = BlockCache(), forward_arrays()["b_x"]
    close(cached_forward(model("model_tiny"), cache, x, 0, x.shape[1]), "b_logits")
    return cache


def test_prefix_cache(cache_of_b: BlockCache) -> None:
    x, start = forward_arrays()["prefix_x"], forward_facts()["prefix_len"]
    close(cached_forward(model("model_tiny"), cache_of_b, x, start, x.shape[1]), "prefix_logits")


def test_dual_cache_and_its_second_forward(cache_of_b: BlockCache) -> None:
    arrays = forward_arrays()
    start, stop = forward_facts()["dual_start"], forward_facts()["dual_end"]
    before = cache_of_b.keys[0].clone()
    close(cached_forward(model("model_tiny"), cache_of_b, arrays["dual_x"], start, stop), "dual_logits")
    outside = torch.ones(before.shape[2], dtype=torch.bool)
    outside[start:stop] = False
    assert cache_of_b.keys[0][:, :, outside].equal(before[:, :, outside])
    assert not cache_of_b.keys[0][:, :, start:stop].equal(before[:, :, start:stop])
    close(cached_forward(model("model_tiny"), cache_of_b, arrays["dual2_x"], start, stop), "dual2_logits")


def test_a_stale_cache_would_show() -> None:
    """The recorded cached logits differ from a full forward's, so the tests above can fail."""
    arrays, facts = forward_arrays(), forward_facts()
    for name, start, stop in (
        ("prefix", facts["prefix_len"], None),
        ("dual", facts["dual_start"], facts["dual_end"]),
    ):
        with torch.no_grad():
            full = model("model_tiny")(arrays[f"{name}_x"].long()).logits[:, start:stop]
        assert (full - arrays[f"{name}_logits"]).abs().max() > 100 * ATOL


def test_left_padding() -> None:
    """At real positions; what a position of padding holds is of no use to anybody."""
    x = forward_arrays()["pad_x"].long()
    real = x != PAD
    real[1] = True
    assert int((~real[0]).sum()) == forward_facts()["pad_row0"]
    with torch.no_grad():
        logits = model("model_tiny")(x, attention_mask=real.long()).logits
    torch.testing.assert_close(logits[real], forward_arrays()["pad_logits"][real], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name, x", [("b", "b_x"), ("deep", "a_x")])
def test_dawn_attention(name: str, x: str) -> None:
    """Queries and keys of the last layers, as a rule sees them, give DAWN's average over heads and layers."""
    dream = model("model_deep28" if name == "deep" else "model_tiny")
    n = plain("model_deep28" if name == "deep" else "model_tiny").config["num_hidden_layers"]
    first = forward_facts()[f"dawn_attn_from_layer_{'deep' if name == 'deep' else 'tiny'}"]
    probe = Probe(range(first, n))
    with torch.no_grad():
        dream.model(forward_arrays()[x].long(), cache=probe)
    maps = []
    for q, k in zip(probe.queries, probe.own, strict=True):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        maps.append((q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1).mean(1))
    close(torch.stack(maps).mean(0), f"{name}_dawn_avg_attn", 2e-5)


@pytest.mark.parametrize("name, x", [("model_tiny", "a"), ("model_tiny", "b"), ("model_deep28", "deep")])
def test_the_plain_forward(name: str, x: str) -> None:
    """The oracle below against the records."""
    ids = forward_arrays()["a_x" if x == "deep" else f"{x}_x"].long()
    close(plain(name)(ids), f"{x}_logits", DEEP_ATOL if x == "deep" else ATOL)


@pytest.mark.parametrize("start, stop", [(0, 20), (7, 20), (9, 13)], ids=["full", "prefix", "dual"])
def test_against_a_plain_forward_in_float64(start: int, stop: int) -> None:
    dream, exact = (
        DreamModelLM.from_pretrained(DATA / "model_tiny").eval().double(),
        PlainDream(DATA / "model_tiny", torch.float64),
    )
    x = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(1))
    cache, held = BlockCache(), Held()
    with torch.no_grad():
        dream.model(x, cache=cache, start=0)
        exact(x, held=held)
        x[:, start:stop] = x[:, start:stop].flip(1)
        ours = dream.project(dream.model(x[:, start:stop], cache=cache, start=start))
    # Norms and angles are in float32 in one and in float64 in the other.
    torch.testing.assert_close(ours, exact(x[:, start:stop], held=held, start=start), rtol=0, atol=ATOL)
