"""The functions of dllm's samplers and of Dream's and FreeDave's code with our step."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import dllm_like
import pytest
import script_like
import torch
from torch import Tensor

import fdpp
from fdpp import patching

PLACES: dict[str, tuple[str, Callable[..., Any]]] = {
    "block": ("_diffusion_step_block", dllm_like.diffusion_step_block),
    "older block": ("diffusion_step_block", dllm_like.diffusion_step_block),
    "fastdllm": ("_get_transfer_index", script_like._get_transfer_index),
    "nemotron": ("sample_tokens", dllm_like.nemotron_tokens),
    "dream": ("sample_tokens", dllm_like.dream_tokens),
    "llada2": ("sample_tokens", dllm_like.llada2_tokens),
}
"""Stand-ins by sampler, with the names that the samplers' modules have for them."""

DECIDE = tuple(PLACES)[:4]
"""Those that say what commits; the others return confidences."""


class Sampler:
    """A module with one function of `PLACES`, patched."""

    def __init__(self, kind: str) -> None:
        self.name, self.stand_in = PLACES[kind]
        self.originals = 0

        @functools.wraps(self.stand_in)
        def original(*args: Any, **kwargs: Any) -> Any:
            self.originals += 1
            return self.stand_in(*args, **kwargs)

        self.module, self.original = ModuleType("sampler"), original
        setattr(self.module, self.name, original)
        fdpp.patch(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.name)(*args, **kwargs)


@pytest.fixture(params=PLACES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DECIDE)
def decider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def problem(seed: int = 0, B: int = 3, L: int = 16, V: int = 40, dtype: torch.dtype = torch.float32) -> Any:
    """Logits `[B, L, V]`, tokens and masks `[B, L]`, quotas `[B]`; V - 1 is the mask id and never the argmax."""
    g = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(B, L, V, generator=g) * torch.rand(B, L, 1, generator=g)).to(dtype)
    logits[..., V - 1] = -9
    mask = torch.rand(B, L, generator=g) < torch.rand(B, 1, generator=g)
    x = torch.randint(0, V - 1, (B, L), generator=g).masked_fill(mask, V - 1)
    return logits, x, mask, torch.randint(0, L + 3, (B,), generator=g)


def arguments(kind: str, logits: Tensor, x: Tensor, mask: Tensor, quotas: Tensor, **more: Any) -> dict[str, Any]:
    """The greedy call of a function of `PLACES` by quota; `more` are others of its arguments."""
    own: dict[str, dict[str, Any]] = {
        "block": {"x_block": x, "mask_block": mask, "num_transfer_step": quotas, "remasking": "low_confidence"},
        "fastdllm": {"x": x, "mask_index": mask, "num_transfer_tokens": quotas, "remasking": "low_confidence"},
        "nemotron": {"x": x, "mask_index": mask, "num_transfer_tokens": quotas},
        "dream": {},
        "llada2": {"top_k": None, "top_p": None},
    }
    return {"logits": logits, "temperature": 0.0, **own[kind.removeprefix("older ")], **more}


def assert_same(came: Any, expected: Any) -> None:
    """Tokens and commits exactly, confidences within what float32 says of them and the dtype keeps."""
    if isinstance(expected, Tensor):
        came, expected = (came,), (expected,)
    assert isinstance(came, tuple) and len(came) == len(expected)
    for a, b in zip(came, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=max(2e-6, torch.finfo(a.dtype).eps), atol=0.0)
        else:
            assert a.equal(b)


NUMBERS: dict[str, list[dict[str, Any]]] = {
    "fastdllm": [
        {},
        {"threshold": 0.3},
        {"num_transfer_tokens": None, "threshold": 0.6},
        {"factor": 1.3},
        {"num_transfer_tokens": None, "threshold": 0.9, "factor": 0.7},
    ],
    "nemotron": [{}, {"threshold": 0.3}, {"num_transfer_tokens": None, "threshold": 0.6}],
    "dream": [{}, {"top_p": 1.0, "top_k": 40}, {"top_k": 99}],
    "llada2": [{}, {"top_k": 3, "top_p": 0.5}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_formula_in_float64(kind: str, dtype: torch.dtype) -> None:
    sampler, calls, commits = Sampler(kind), 0, set()
    for seed in range(40):
        logits, x, mask, quotas = problem(seed, dtype=dtype)
        for numbers in NUMBERS.get(kind, [{}]):
            given = arguments(kind, logits, x, mask, quotas, **numbers)
            before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
            came, expected = sampler(**given), sampler.stand_in(**given)
            assert_same(came, expected)
            assert all(given[name].equal(value) for name, value in before.items())
            calls += 1
            commits.add(int(expected[1].sum()) if kind in DECIDE[2:] else 0)
    assert sampler.originals == 0 and calls >= 40
    assert kind not in DECIDE[2:] or len(commits) > 20


def test_every_number_of_masks(decider: str) -> None:
    """None at all, none in a row, one, all of them; quotas of 0 and above the masks; blocks of one position."""
    sampler = Sampler(decider)
    for L in (1, 2, 7):
        logits, x, _, _ = problem(L, B=5, L=L)
        counts = torch.tensor([0, 1, L // 2, L, L])
        for masked in (counts, counts * 0, counts * 0 + L):
            mask = torch.arange(L) >= L - masked[:, None]
            x = x.masked_fill(mask, 39)
            for quotas in (torch.tensor([0, 1, 99, L, 1]), torch.zeros(5, dtype=torch.int64)):
                given = arguments(decider, logits, x, mask, quotas)
                assert_same(sampler(**given), sampler.stand_in(**given))
    assert sampler.originals == 0


def test_no_sequence_and_no_position(kind: str) -> None:
    sampler = Sampler(kind)
    for B, L in ((0, 4), (2, 0)):
        logits, x, mask, _ = problem(B=B, L=L)
        given = arguments(kind, logits, x, mask, torch.ones(B, dtype=torch.int64))
        found = sampler(**given)
        assert all(value.shape == (B, L) for value in (found if isinstance(found, tuple) else (found,)))
    assert sampler.originals == 0


def tokens_of(kind: str, result: Any, x: Tensor) -> Tensor:
    """The tokens after the step that `result` tells of."""
    return result if isinstance(result, Tensor) else torch.where(result[1], result[0], x)


def test_equals_commit_in_order(decider: str) -> None:
    """Of equal confidences the lower position, of equal logits the lower id."""
    logits = torch.zeros(1, 9, 8)
    logits[0, :, 3] = logits[0, :, 5] = 4
    logits[0, 6, 5] = 7
    x = torch.full((1, 9), 7)
    x[0, 1] = 2
    sampler = Sampler(decider)
    came = sampler(**arguments(decider, logits, x, x == 7, torch.tensor([3])))
    assert tokens_of(decider, came, x).tolist() == [[3, 2, 3, 7, 7, 7, 5, 7, 7]] and sampler.originals == 0


def test_confident_positions_of_bfloat16_logits_do_not_tie(decider: str) -> None:
    """In bfloat16 both probabilities are 1; the second is the larger one."""
    logits = torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    logits[0, :, 1] = torch.tensor([16, 17])
    assert logits.softmax(-1)[0, :, 1].tolist() == [1, 1]
    x = torch.full((1, 2), 7)
    came = Sampler(decider)(**arguments(decider, logits, x, x == 7, torch.tensor([1])))
    assert tokens_of(decider, came, x).tolist() == [[7, 1]]


def test_the_mask_id_is_never_committed(decider: str) -> None:
    logits, x, _, _ = problem(B=1, L=3)
    x[:] = 39
    logits[..., 39] = 50
    came = Sampler(decider)(**arguments(decider, logits, x, x == 39, torch.tensor([3])))
    assert tokens_of(decider, came, x).equal(logits[..., :39].argmax(-1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_unusable_rows_come_last(decider: str, bad: float) -> None:
    logits, x, _, _ = problem(B=1, L=3)
    x[:] = 39
    logits[0, 0, 0 if bad > 0 or bad != bad else slice(None)] = bad
    came = tokens_of(decider, Sampler(decider)(**arguments(decider, logits, x, x == 39, torch.tensor([2]))), x)
    assert (came == 39).tolist() == [[True, False, False]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["dream", "llada2"])
def test_unusable_rows_have_confidence_0(kind: str, bad: float) -> None:
    logits, *rest = problem()
    logits[1, 2, 3] = bad
    result = Sampler(kind)(**arguments(kind, logits, *rest))
    confidence, token = result if kind == "dream" else result[::-1]
    assert (confidence == 0).nonzero().tolist() == [[1, 2]] and 0 <= token[1, 2] < 40


@pytest.mark.parametrize("kind", ["dream", "llada2"])
def test_rows_of_any_shape(kind: str) -> None:
    """Flat, as Dream's code has them, of more positions than a step takes, and slices of longer logits."""
    sampler = Sampler(kind)
    wide = torch.randn(3, 1100, 12, generator=torch.Generator().manual_seed(1))
    for logits in (wide[0], wide[0, :0], wide[:, 7:1044], wide[:, 5:9], wide[0, 0], wide[:, :8].reshape(3, 2, 4, 12)):
        assert_same(sampler(logits, 0.0, None, None), sampler.stand_in(logits, 0.0, None, None))
        strided = logits.transpose(0, -1).contiguous().transpose(0, -1)
        assert_same(sampler(strided, 0.0, None, None), sampler.stand_in(logits, 0.0, None, None))
    assert sampler.originals == 0


def test_confidences_fit_into_a_tensor_of_the_logits_dtype() -> None:
    """As Dream's loop puts them there, which takes no other dtype."""
    logits, x, mask, _ = problem(dtype=torch.bfloat16)
    confidence, token = Sampler("dream")(logits[mask])
    full = torch.full(x.shape, -torch.inf, dtype=logits.dtype)
    full[mask] = confidence
    assert (full > -torch.inf).equal(mask) and token.equal(dllm_like.dream_tokens(logits[mask])[1])


ELSEWHERE: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"temperature": 0.7}) for kind in PLACES),
    *((kind, {"remasking": "random"}) for kind in DECIDE[:3]),
    *((kind, {"logits": problem()[0].double()}) for kind in PLACES),
    ("dream", {"top_k": 5}),
    ("dream", {"top_p": 0.9}),
    ("dream", {"margin_confidence": True}),
    ("dream", {"neg_entropy": True}),
    ("llada2", {"temperature": 0.5, "top_k": 5, "top_p": 0.9}),
    ("block", {"num_transfer_step": torch.tensor([1, 2, 3, 4])}),
]


@pytest.mark.parametrize(
    ("kind", "change"), ELSEWHERE, ids=[f"{kind}-{'-'.join(change)}" for kind, change in ELSEWHERE]
)
def test_what_the_step_cannot_do_is_left_to_the_original(kind: str, change: dict[str, Any]) -> None:
    """The same seed of torch's generator gives the same values."""
    given = {**arguments(kind, *problem()), **change}
    sampler = Sampler(kind)
    torch.manual_seed(5)
    expected = sampler.stand_in(**given)
    torch.manual_seed(5)
    came = sampler(**given)
    assert sampler.originals == 1
    for a, b in zip(*((v,) if isinstance(v, Tensor) else v for v in (came, expected)), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("change", [{"remasking": "other"}, {"num_transfer_step": torch.tensor([4])}], ids=str)
def test_calls_that_do_not_fit_fail_as_before(change: dict[str, Any]) -> None:
    given, sampler = arguments("block", *problem(), **change), Sampler("block")
    with pytest.raises((NotImplementedError, IndexError)) as before:
        sampler.stand_in(**given)
    with pytest.raises(type(before.value), match=re.escape(str(before.value))):
        sampler(**given)
    with pytest.raises(TypeError, match="missing 1 required"):
        sampler(*list(given.values())[:5])


def test_a_modules_own_defaults() -> None:
    """FreeDave's function has LLaDA2's parameters, and samples by default."""

    def sample_tokens(logits: Any, temperature: Any = 1.0, top_k: Any = None, top_p: Any = None) -> Any:
        return dllm_like.llada2_tokens(logits, temperature, top_k, top_p)

    module: Any = ModuleType("core")
    module.sample_tokens = sample_tokens
    logits = problem()[0]
    torch.manual_seed(3)
    drawn = sample_tokens(logits)
    with fdpp.patch(module):
        torch.manual_seed(3)
        assert module.sample_tokens(logits)[0].equal(drawn[0])
        assert_same(module.sample_tokens(logits, 0.0), sample_tokens(logits, 0.0))
        assert not drawn[0].equal(sample_tokens(logits, 0.0)[0])


def test_unpatched_and_copied_back(kind: str) -> None:
    sampler = Sampler(kind)
    patched = getattr(sampler.module, sampler.name)
    assert patched.__name__ == sampler.stand_in.__name__ and patched.__doc__ == sampler.stand_in.__doc__
    assert str(fdpp.patch(sampler.module)) == "fdpp.patch of module 'sampler': already patched"
    fdpp.unpatch(sampler.module)
    before = {"__name__": "sampler", sampler.name: sampler.original}
    assert before.items() <= vars(sampler.module).items() and patching.RECORD not in vars(sampler.module)
    with fdpp.patch(sampler.module) as module:
        assert getattr(module, sampler.name) not in (patched, sampler.original)
    assert getattr(sampler.module, sampler.name) is sampler.original


@pytest.mark.parametrize(
    "function",
    [
        lambda logits, temperature, top_p, top_k: None,
        lambda logits, temperature, top_k, *, top_p: None,
        lambda logits, temperature, mask_index, x, num_transfer_tokens: None,
        torch.nn.Identity(),
        "sample_tokens",
    ],
    ids=["order", "keyword", "fewer", "module", "string"],
)
def test_other_parameters_are_refused(function: Any) -> None:
    module: Any = ModuleType("sampler")
    module.sample_tokens = function
    before = dict(vars(module))
    with pytest.raises(ValueError, match="sample_tokens: expected the parameters") as error:
        fdpp.patch(module)
    assert vars(module) == before
    known = (
        "(logits, temperature, top_k, top_p) or (logits, temperature, mask_index, x, num_transfer_tokens, threshold)"
    )
    assert known in str(error.value)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_callers_follow(kind: str, backend: str) -> None:
    """With logits of which the originals make something else: the mask id is the argmax, or a row holds NaN."""
    torch._dynamo.reset()
    name, stand_in = PLACES[kind]
    module = ModuleType("sampler")
    setattr(module, name, stand_in)
    logits, x, mask, _ = problem()
    logits[:, :, 39] = 9 if kind in DECIDE else torch.nan
    given = arguments(kind, logits, x, mask, torch.tensor([2, 3, 16]))

    def call() -> Any:
        return getattr(module, name)(**given)

    original = call()
    with fdpp.patch(module):
        came, expected = torch.compile(call, fullgraph=True, backend=backend)(), call()
    assert_same(came, expected)
    with pytest.raises(AssertionError):
        assert_same(expected, original)
