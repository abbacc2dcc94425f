"""The model's forwards against those of the published model code, cached ones included."""

from __future__ import annotations

import pytest
import torch
from golden import forward_arrays, model
from torch import Tensor

from fdpp.attention.cache import BlockCache
from fdpp.attention.rotary import rotary_angles, rotate
from fdpp.models.llada import LLaDAModelLM

ATOL, DEEP_ATOL = 1e-4, 2.5e-4
"""Float32 and float64 runs of the published code differ by up to 2.5e-4. Ours stays far closer to the float32 ones; the
deep model was run with its attention written out, so there two orders of summation meet."""


def close(ours: Tensor, name: str, atol: float = ATOL) -> None:
    torch.testing.assert_close(ours, forward_arrays()[name], rtol=0, atol=atol)


def cached_forward(llada: LLaDAModelLM, cache: BlockCache, x: Tensor, start: int, stop: int) -> Tensor:
    with torch.no_grad():
        return llada.project(llada.model(x[:, start:stop].long(), cache=cache, start=start))


@pytest.mark.parametrize("name", ["a", "b"])
def test_logits(name: str) -> None:
    with torch.no_grad():
        close(model("model_tiny")(forward_arrays()[f"{name}_x"].long()).logits, f"{name}_logits")


def test_logits_of_32_layers() -> None:
    with torch.no_grad():
        logits = model("model_deep32")(forward_arrays()["b_x"].long()).logits
    close(logits[:1], "b_deep_logits", DEEP_ATOL)


def test_hidden_states() -> None:
    with torch.no_grad():
        states = model("model_tiny")(forward_arrays()["a_x"].long(), output_hidden_states=True).hidden_states
    close(torch.stack(states), "a_hidden")


def test_cache_holds_rotated_keys_and_plain_values() -> None:
    cache, x = BlockCache(), forward_arrays()["a_x"]
    cached_forward(model("model_tiny"), cache, x, 0, x.shape[1])
    k = forward_arrays()["a_k0"]
    config = model("model_tiny").config
    angles = rotary_angles(torch.arange(k.shape[2])[None], k.shape[3], config.rope_theta)
    torch.testing.assert_close(cache.keys[0], rotate(k, angles), rtol=0, atol=ATOL)
    close(cache.values[0], "a_v0")
    assert len(cache.keys) == len(cache.values) == config.n_layers


@pytest.fixture
def cache_of_b() -> BlockCache:
    cache, x = BlockCache(), forward_arrays()["b_x"]
    close(cached_forward(model("model_tiny"), cache, x, 0, x.shape[1]), "b_logits")
    return cache


def test_prefix_cache(cache_of_b: BlockCache) -> None:
    x, start = forward_arrays()["prefix_x"], int(forward_arrays()["prefix_len"])
    close(cached_forward(model("model_tiny"), cache_of_b, x, start, x.shape[1]), "prefix_logits")


def test_dual_cache_and_its_second_forward(cache_of_b: BlockCache) -> None:
    arrays = forward_arrays()
    start, stop = int(arrays["dual_start"]), int(arrays["dual_end"])
    before = cache_of_b.keys[0].clone()
    close(cached_forward(model("model_tiny"), cache_of_b, arrays["dual_x"], start, stop), "dual_logits")
    outside = torch.ones(before.shape[2], dtype=torch.bool)
    outside[start:stop] = False
    assert cache_of_b.keys[0][:, :, outside].equal(before[:, :, outside])
    assert not cache_of_b.keys[0][:, :, start:stop].equal(before[:, :, start:stop])
    close(cached_forward(model("model_tiny"), cache_of_b, arrays["dual2_x"], start, stop), "dual2_logits")


def test_a_stale_cache_would_show() -> None:
    """The recorded cached logits differ from a full forward's, so the tests above can fail."""
    arrays = forward_arrays()
    for name, start, stop in (("prefix", int(arrays["prefix_len"]), None), ("dual", 36, 52)):
        with torch.no_grad():
            full = model("model_tiny")(arrays[f"{name}_x"].long()).logits[:, start:stop]
        assert (full - arrays[f"{name}_logits"]).abs().max() > 100 * ATOL
