"""The head and the step in one: against float64, against `select` of the logits, and the launches themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import inputs
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import (
    IMPLEMENTATIONS,
    INTERPRETED,
    RULES,
    Problem,
    assert_equal,
    expected,
    generator,
    is_close_call,
    on_gpu,
)
from torch import Tensor

from fdpp import EntropyBound, Frechet, LocalLeap, Quota, Rule, Selection
from fdpp.decoding.head import SMALLEST_VOCABULARY
from fdpp.kernels import project as kernel
from fdpp.kernels.launch import PROJECT_MERGE_TILE, project_launch
from fdpp.step import operators, project
from fdpp.step.terms import Terms, pack

# The interpreter computes with NumPy, which warns of the infinities and NaN that `tl.where` then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
INF, NAN = float("inf"), float("nan")

# One kernel of each kind, which a GPU compiles once: 17 to 32 rows, blocks of 5 to 8 positions, two splits of the ids.
B, T, D, V = 3, 8, 21, 300


@dataclasses.dataclass(frozen=True)
class Head:
    """Hidden states `[B, T, D]` and a weight `[V, D]`; `step` has their logits, taken in float64, and the rest."""

    hidden: Tensor
    weight: Tensor
    step: Problem

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, *rules: Rule, mask_id: int, **changes: Any) -> Head:
        """Everything masked, unless `tokens` say otherwise."""
        tokens = torch.full(hidden.shape[:2], mask_id)
        logits = hidden.double() @ weight.double().T
        return cls(hidden, weight, dataclasses.replace(Problem(logits, tokens, rules, mask_id), **changes))


def random_head(
    seed: int, B: int, T: int, D: int, V: int, *rules: Rule, dtype: torch.dtype = torch.float32, masked: float = 0.7,
    mask_id: int | None = None, active: bool = False, temperature: float = 0.0,
) -> Head:  # fmt: skip
    """Hidden states, each along one row of the weight, so that confidences spread over (0, 1)."""
    g = generator(seed)
    mask_id = V - 1 if mask_id is None else mask_id
    weight = torch.randn(V, D, generator=g)
    weight /= weight.norm(dim=1, keepdim=True)
    favourite = torch.randint(0, V, (B, T), generator=g)
    height = torch.rand(B, T, 1, generator=g) * 12 + torch.tensor(float(V)).log() - 2
    hidden = weight[favourite] * height + 0.3 * torch.randn(B, T, D, generator=g)
    tokens = torch.where(torch.rand(B, T, generator=g) < masked, mask_id, (mask_id + 1) % V)
    return Head.of(
        hidden.to(dtype),
        weight.to(dtype),
        *rules,
        mask_id=mask_id,
        tokens=tokens,
        active=torch.rand(B, T, generator=g) < 0.7 if active else None,
        temperature=temperature,
        seeds=torch.randint(-(2**62), 2**62, (B,), generator=g) if temperature > 0 else None,
    )


def half(implementation: str) -> torch.dtype:
    """The interpreter multiplies bfloat16 matrices by their bit patterns."""
    return torch.float16 if implementation == "interpreter" else torch.bfloat16


def run(implementation: str, head: Head, hidden: Tensor | None = None, weight: Tensor | None = None) -> Selection:
    """An implementation's step; the outputs lie on the CPU."""
    device, step = "cuda" if implementation == "cuda" else "cpu", head.step
    take = project.project_cpu if implementation == "cpu" else project.project_gpu
    params = torch.cat([pack(rule, device) for rule in step.rules])
    tensors = (hidden if hidden is not None else head.hidden, weight if weight is not None else head.weight)
    hidden, weight, tokens, active, seeds = (
        None if x is None else inputs.to_device(x, device) for x in (*tensors, step.tokens, step.active, step.seeds)
    )
    project.check(hidden, weight, tokens, active, seeds)
    terms = Terms(params, step.rules[0].key(), step.mask_id, step.temperature, seeds)
    outputs = take(hidden, weight, tokens, active, terms)
    return Selection(*(output.cpu() for output in outputs))


def library(head: Head) -> Selection:
    """`select` of the logits as PyTorch multiplies them in the dtype of the head."""
    step = dataclasses.replace(head.step, logits=head.hidden @ head.weight.T)
    return inputs.run("cpu", step)


def assert_as_specified(out: Selection, head: Head, rounding: float = 1e-4) -> None:
    """Three ways: the specification on float64 products, the same-dtype product and `select`, and `out`.

    Wherever logits off by `rounding` change nothing, `out` decides as the specification. Its confidences are at most as
    far off as the library's.
    """
    step, before = head.step, inputs.CLOSE
    truth, theirs = expected(step), library(head)
    inputs.CLOSE = rounding
    try:
        assert not any(is_close_call(step, truth, b) for b in range(step.tokens.shape[0])), "choose another input"
    finally:
        inputs.CLOSE = before
    assert [field.dtype for field in out] == [torch.int64, torch.int64, torch.float32, torch.bool, *[torch.int32] * 2]
    for name in ("proposal", "committed", "tokens", "remaining", "nonfinite"):
        assert getattr(out, name).equal(getattr(truth, name)), name
    ours = (out.confidence - truth.confidence).abs()
    same = theirs.proposal == truth.proposal
    assert ours[same].amax() <= (theirs.confidence - truth.confidence).abs()[same].amax() + 1e-6


@on_gpu(lambda rule: rule in (RULES[0], RULES[3], RULES[5]))
@each_implementation
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules(implementation: str, rule: Rule) -> None:
    head = random_head(3, B, T, D, V, rule, active=implementation != "cuda")
    assert_as_specified(run(implementation, head), head)


@on_gpu(lambda T, V: (T, V) in [(1, 2), (8, 129), (40, 700)])
@each_implementation
@pytest.mark.parametrize(
    ("B", "T", "D", "V"),
    [
        (1, 1, 1, 2),
        (1, 1, 16, 17),
        (2, 5, 63, 127),
        (1, 17, 64, 128),
        (3, 9, 65, 129),
        (3, 8, 65, 129),
        (2, 40, 33, 700),
    ],
)
def test_sizes(implementation: str, B: int, T: int, D: int, V: int) -> None:
    """Tiles are 16 to 64 rows, 128 ids and 64 channels (32 in float32): below, at and beyond each."""
    head = random_head(B + T, B, T, D, V, Frechet(0.1), masked=0.8)
    assert_as_specified(run(implementation, head), head)


@each_implementation
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_half_precision(implementation: str, temperature: float) -> None:
    """Ours are sums in float32 on a GPU; the library's logits, and those of the CPU, are rounded to the dtype."""
    head = random_head(5, B, T, D, V, Frechet(0.2), dtype=half(implementation), temperature=temperature)
    if implementation == "cpu":
        out, theirs = run("cpu", head), library(head)
        assert out.proposal.equal(theirs.proposal) and out.committed.equal(theirs.committed)
        torch.testing.assert_close(out.confidence, theirs.confidence, rtol=1e-6, atol=1e-7)
    else:
        assert_as_specified(run(implementation, head), head)


@on_gpu(lambda rule, temperature: (rule.order == "entropy") == (temperature > 0.0))
@each_implementation
@pytest.mark.parametrize("rule", [Frechet(0.2), EntropyBound(3.0)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_several_splits_of_several_tiles(implementation: str, rule: Rule, temperature: float) -> None:
    """Row tiles that hold the masked positions of two or three sequences, over many splits."""
    head = random_head(6, 5, 33, 24, 3000, rule, masked=0.6, temperature=temperature)
    config = project_launch(5, 33, 3000, True, temperature > 0.0)
    assert config.block_r < 5 * 33 and config.splits > 1
    assert_as_specified(run(implementation, head), head)


@on_gpu(lambda dtype: dtype == "half")
@each_implementation
@pytest.mark.parametrize("dtype", ["float32", "half"])
def test_full_vocabulary(implementation: str, dtype: str) -> None:
    kind = half(implementation) if dtype == "half" and implementation != "cpu" else torch.float32
    head = random_head(1, 1, 3, 16, 126464, Frechet(0.1), dtype=kind, masked=1.0, mask_id=126336)
    assert_as_specified(run(implementation, head), head)


@each_implementation
@pytest.mark.parametrize("mask_id", [0, 200, 383, 384, 700, 999, -1, 1000, 126336])
def test_mask_id_in_every_split_and_outside(implementation: str, mask_id: int) -> None:
    """The mask id's logit is the row's largest: never proposed, but in the normaliser."""
    hidden, weight = torch.randn(1, 6, 16, generator=generator(0)), torch.randn(1000, 16, generator=generator(1))
    if 0 <= mask_id < 1000:
        weight[mask_id] = hidden[0].mean(0) * 2
        hidden += hidden.mean(1, keepdim=True)
    head = Head.of(hidden, weight, EntropyBound(2.0), mask_id=mask_id)
    assert project_launch(1, 6, 1000, True, False).splits == 8
    out = run(implementation, head)
    assert (out.proposal != mask_id).all()
    assert_as_specified(out, head)


def integers(seed: int, B: int, T: int, D: int, V: int, rule: Rule, dtype: torch.dtype, **changes: Any) -> Head:
    """Hidden states and weights of small integers: exact logits, in any dtype and order, and many equal ones."""
    g = generator(seed)
    hidden = torch.randint(-2, 3, (B, T, D), generator=g).to(dtype)
    weight = torch.randint(-1, 2, (V, D), generator=g).to(dtype)
    return Head.of(hidden, weight, rule, mask_id=seed % V, **changes)


@each_implementation
@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    seed=st.integers(0, 10**6), B=st.integers(1, 3), T=st.integers(1, 9), D=st.integers(1, 20), V=st.integers(2, 200),
    rule=st.sampled_from(RULES), low=st.booleans(), share=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
)  # fmt: skip
def test_it_is_select_of_the_logits(
    implementation: str, seed: int, B: int, T: int, D: int, V: int, rule: Rule, low: bool, share: float,
    temperature: float,
) -> None:  # fmt: skip
    """Ties and noise included, where the logits are the same to the last bit."""
    if implementation == "cuda":
        B, T, D, V, low = 4, 5 + T % 4, 3 + 2 * (D % 8), 193 + V % 8, True
        rule = RULES[3] if temperature > 0 else RULES[3 + 2 * (seed % 2)]
    g = generator(seed)
    tokens = torch.where(torch.rand(B, T, generator=g) < share, seed % V, (seed + 1) % V)
    seeds = torch.randint(0, 2**62, (B,), generator=g) if temperature > 0 else None
    dtype = half(implementation) if low else torch.float32
    head = integers(seed, B, T, D, V, rule, dtype, tokens=tokens, temperature=temperature, seeds=seeds)
    truth = expected(head.step)
    assume(not any(is_close_call(head.step, truth, b) for b in range(B)))
    out, theirs = run(implementation, head), library(head)
    for name in ("proposal", "committed", "tokens", "remaining", "nonfinite"):
        assert getattr(out, name).equal(getattr(theirs, name)), name
    torch.testing.assert_close(out.confidence, theirs.confidence, rtol=2e-6, atol=1e-7)


@each_implementation
def test_ties_go_to_the_lower_id(implementation: str) -> None:
    """Within a tile of 128 ids, between tiles and between splits."""
    V, D, tied = 1000, 16, [[3, 90], [0, 998], [127, 128], [255, 256, 640], [7, 8, 9], list(range(1000))]
    weight = torch.zeros(V, D)
    for t, ids in enumerate(tied):
        weight[ids, t] = 2.0
    head = Head.of(torch.eye(len(tied), D)[None], weight, EntropyBound(9.0), mask_id=7)
    assert project_launch(1, 6, V, True, False).splits > 1
    assert run(implementation, head).proposal.tolist() == [[3, 0, 127, 255, 8, 0]]


UNUSABLE = {"nan": NAN, "+inf": INF, "all -inf": -INF}


@on_gpu(lambda rule: rule != Quota(9))
@each_implementation
@pytest.mark.parametrize("rule", [Quota(9), Frechet(0.0), EntropyBound(50.0)], ids=str)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_rows_come_last(implementation: str, kind: str, rule: Rule) -> None:
    """Channel 0 of a hidden state makes its logits unusable: the weight is 1 there (half precision has no TF32)."""
    head = random_head(2, B, T, D, V, rule, dtype=half(implementation) if implementation != "cpu" else torch.float32)
    head.weight[:, 0], head.hidden[..., 0] = 1.0, 0.0
    head.hidden[0, [0, 2], 0] = head.hidden[1, :, 0] = UNUSABLE[kind]
    head = Head.of(head.hidden, head.weight, rule, mask_id=299)
    out, truth = run(implementation, head), expected(head.step)
    assert out.nonfinite.tolist() == truth.nonfinite.tolist() == [2, T, 0]
    assert out.committed.equal(truth.committed) and (out.proposal != 299).all()
    assert not out.confidence[1].any() and not out.confidence[0, [0, 2]].any()


@each_implementation
@pytest.mark.parametrize("kind", ["nan", "+inf"])
def test_one_unusable_logit(implementation: str, kind: str) -> None:
    """Of an ordinary id in a later split, of the mask id, and of an id that is alone in its tile."""
    for size, v in ((V, 280), (V, 99), (129, 128)):
        hidden = torch.randn(B, T, D, generator=generator(0)).to(half(implementation))
        weight = torch.randn(size, D, generator=generator(1)).to(half(implementation))
        hidden[..., 0] = 1.0
        weight[v, 0] = UNUSABLE[kind]
        head = Head.of(hidden, weight, Frechet(0.1), mask_id=99)
        assert run(implementation, head).nonfinite.tolist() == [T] * B


@each_implementation
def test_nothing_masked_and_all_masked(implementation: str) -> None:
    head = random_head(1, B, T, D, V, Quota(2), masked=0.0)
    out = run(implementation, Head(head.hidden * NAN, head.weight, head.step))
    assert out.tokens.equal(head.step.tokens) and out.proposal.equal(head.step.tokens)
    assert not out.committed.any() and not out.confidence.any() and not out.remaining.any() and not out.nonfinite.any()
    head = random_head(1, B, T, D, V, Quota(2), masked=1.0)
    out = run(implementation, head)
    assert out.committed.sum(1).tolist() == [2] * B and out.remaining.tolist() == [T - 2] * B
    assert_as_specified(out, head)


@each_implementation
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty(implementation: str, shape: tuple[int, int]) -> None:
    out = run(implementation, Head.of(torch.zeros(*shape, 8), torch.zeros(20, 8), Frechet(0.25), mask_id=3))
    assert [field.shape for field in out] == [shape] * 4 + [shape[:1]] * 2
    assert not out.remaining.any() and not out.nonfinite.any()


@each_implementation
def test_only_masked_active_rows_are_read(implementation: str) -> None:
    head = random_head(6, 4, T, D, V, Frechet(0.1), masked=0.5, active=True)
    poisoned = torch.where(head.step.candidate[..., None], head.hidden, NAN)
    assert poisoned.isnan().any()
    assert_equal(run(implementation, head, hidden=poisoned), run(implementation, head))


@each_implementation
def test_strides(implementation: str) -> None:
    """Columns of a longer sequence, a padded weight, transposed inputs; NaN wherever no row lies."""
    head = random_head(6, B, T, D, V, Frechet(0.1))
    contiguous = run(implementation, head)
    wide = torch.full((7, 15, 27), NAN)
    columns = wide[1::2, 3:11, 3:24].copy_(head.hidden)
    tall = torch.full((310, 37), NAN)[:V, 8:29].copy_(head.weight)
    swapped, inner = (head.hidden.transpose(*axes).contiguous().transpose(*axes) for axes in ((0, 1), (1, 2)))
    for hidden, weight in ((columns, tall), (swapped, tall), (inner, head.weight.T.contiguous().T)):
        assert not hidden.is_contiguous() and not weight.is_contiguous()
        assert_equal(run(implementation, head, hidden, weight), contiguous)


@each_implementation
@pytest.mark.parametrize("apart", ["sequences", "positions", "ids"])
def test_offsets_beyond_int32(implementation: str, apart: str) -> None:
    """Rows 2^30 entries apart, so that the third one's offset is no int32, in memory that is never touched between."""
    device = "cuda" if implementation == "cuda" else "cpu"
    far_apart, D = 2**30 + 16, 16
    near = integers(16, 1 if apart == "positions" else 3, 3, D, 3, Quota(1), torch.float16)
    storage = torch.empty(2 * far_apart + 3 * D, dtype=torch.float16, device=device)
    shape = near.weight.shape if apart == "ids" else near.hidden.shape
    strides = {"sequences": (far_apart, D, 1), "positions": (far_apart, far_apart, 1), "ids": (far_apart, 1)}[apart]
    far = storage.as_strided(shape, strides)
    far.copy_(near.weight if apart == "ids" else near.hidden)
    name = "weight" if apart == "ids" else "hidden"
    step = dataclasses.replace(near.step, tokens=near.step.tokens, active=None)
    assert_equal(run(implementation, Head(near.hidden, near.weight, step), **{name: far}), run(implementation, near))


@each_implementation
def test_a_sequence_does_not_depend_on_its_batch(implementation: str) -> None:
    head = random_head(6, 4, T, D, V, Frechet(0.25), dtype=half(implementation), temperature=0.9)
    together = run(implementation, head)
    # Another alignment of seeds would be another kernel.
    for b in (0, 2) if implementation == "cuda" else (0, 3):
        rows = slice(b, b + 1)
        assert head.step.seeds is not None
        step = dataclasses.replace(head.step, tokens=head.step.tokens[rows], seeds=head.step.seeds[rows])
        alone = run(implementation, Head(head.hidden[rows], head.weight, step))
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[rows], part, rtol=1e-5, atol=1e-7)


@each_implementation
def test_each_sequence_has_its_own_numbers(implementation: str) -> None:
    rules = (Frechet(0.1), Frechet(0.7), Frechet(0.1, calibration=0.2))
    head = random_head(9, B, T, D, V, *rules, masked=1.0)
    assert_as_specified(run(implementation, head), head)


@each_implementation
def test_inputs_stay_unmodified(implementation: str) -> None:
    rule, dtype = (Frechet(0.1), torch.bfloat16) if implementation == "cuda" else (EntropyBound(1.0), torch.float32)
    head = random_head(6, B, T, D, V, rule, dtype=dtype, active=True, temperature=1.0)
    before = [x.clone() for x in (head.hidden, head.weight, head.step.tokens, head.step.active, head.step.seeds)]
    run(implementation, head)
    after = (head.hidden, head.weight, head.step.tokens, head.step.active, head.step.seeds)
    assert all(x.equal(old) for x, old in zip(after, before, strict=True))


def test_cpu_takes_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are masked, and with the same result."""
    head = random_head(6, 3, 30, 24, 40, Frechet(0.1), temperature=0.7)
    whole, sizes = run("cpu", head), []

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        sizes.append(x.shape[0])
        return x @ weight.T

    monkeypatch.setattr(project, "ROWS", 7)
    monkeypatch.setattr(project.F, "linear", linear)
    parts = run("cpu", head)
    assert sum(sizes) == int(head.step.candidate.sum()) and max(sizes) == 7
    assert parts.committed.equal(whole.committed) and parts.proposal.equal(whole.proposal)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_scratch_is_written_for_masked_active_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new tensor starts as NaN or 77. None of it comes through, and no other row leaves a summary."""
    made: list[Tensor] = []

    def rubbish(*shape: Any, **options: Any) -> Tensor:
        made.append(original(*shape, **options))
        return made[-1].fill_(NAN if made[-1].is_floating_point() else 77)

    head = random_head(3, 2, 20, 24, 1000, EntropyBound(2.0), temperature=1.0, active=True)
    clean = run("interpreter", head)
    original = torch.empty
    monkeypatch.setattr(torch, "empty", rubbish)
    assert_equal(run("interpreter", head), clean)
    (summaries,) = (tensor for tensor in made if tensor.dim() == 4)
    assert not head.step.candidate.all()
    assert summaries.isnan().equal(~head.step.candidate[None, :, :, None].expand_as(summaries))


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_rows_that_are_not_masked_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten row tiles, those that hold masked rows meet the weight: none, one or two."""
    multiplied: list[Any] = []
    original = kernel.tile_logits
    monkeypatch.setattr(kernel, "tile_logits", lambda *inputs: (multiplied.append(inputs), original(*inputs))[1])
    head = random_head(6, 10, 64, 8, 20, Quota(1), masked=0.0)
    for rows in (0, 3, 64, 65):
        multiplied.clear()
        tokens = head.step.tokens.clone()
        tokens.view(-1)[1 : 10 * rows : 10] = head.step.mask_id
        run("interpreter", Head(head.hidden, head.weight, dataclasses.replace(head.step, tokens=tokens)))
        assert len(multiplied) == -(-int((tokens == head.step.mask_id).sum()) // 64)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(B=st.integers(1, 300), T=st.integers(1, 1024), V=st.integers(1, 300_000), sampled=st.booleans())
def test_launch_configurations_cover_the_vocabulary(B: int, T: int, V: int, sampled: bool) -> None:
    config = project_launch(B, T, V, False, sampled)
    assert config.splits.bit_count() == config.block_t.bit_count() == config.block_v.bit_count() == 1
    assert config.splits * config.split_len >= V and config.split_len % config.block_v == 0
    assert config.block_t >= T and config.block_t * config.splits <= PROJECT_MERGE_TILE
    assert 16 <= config.block_r <= 64


@settings(deadline=None, max_examples=500, derandomize=True)
@given(
    B=st.integers(1, 300),
    T=st.integers(1, 1024),
    V=st.integers(SMALLEST_VOCABULARY, 1000) | st.integers(SMALLEST_VOCABULARY, 300_000),
    exact=st.booleans(),
    sampled=st.booleans(),
)
def test_scratch_takes_no_more_memory_than_logits(B: int, T: int, V: int, exact: bool, sampled: bool) -> None:
    scratch = project_launch(B, T, V, exact, sampled).scratch_bytes(B * T)
    assert scratch <= B * T * V * (4 if exact else 2)


def test_launch_configurations_fill_the_device() -> None:
    assert project_launch(1, 32, 126464, False, False).splits == 256
    assert project_launch(256, 32, 126464, False, False).splits <= 2


# The public call


class Calls:
    hidden, weight = torch.randn(2, 6, 16, generator=generator(0)), torch.randn(40, 16, generator=generator(1))
    tokens = torch.tensor([[39, 1, 39, 39, 2, 39], [3, 39, 39, 4, 39, 39]])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_that_is_a_parameter(compiled: bool) -> None:
    torch._dynamo.reset()
    call, weight = Calls(), torch.nn.Parameter(Calls.weight)
    expected = project.project_select(call.hidden, call.weight, call.tokens, rule=Frechet(0.1), mask_id=39)

    def choose() -> Selection:
        return project.project_select(call.hidden, weight, call.tokens, rule=Frechet(0.1), mask_id=39)

    out = torch.compile(choose, fullgraph=True, backend="aot_eager")() if compiled else choose()
    assert all(a.equal(b) for a, b in zip(out, expected, strict=True)) and not out.confidence.requires_grad


def test_as_select() -> None:
    call = Calls()
    for rule in (Frechet(0.1), LocalLeap(threshold=0.2, relaxed=0.05, radius=2)):
        for how in ({}, {"temperature": 0.7, "seed": 3}, {"active": call.tokens == 39}):
            ours = project.project_select(call.hidden, call.weight, call.tokens, rule=rule, mask_id=39, **how)
            logits = call.hidden @ call.weight.T
            theirs = operators.select(logits, call.tokens, rule=rule, mask_id=39, **how)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": torch.zeros(2, 6)}, r"hidden: expected \[B, T, D\].*got \[2, 6\]"),
        ({"hidden": torch.zeros(2, 6, 16).double()}, "hidden: .*float64"),
        ({"hidden": torch.zeros(2, 1025, 16)}, "at most 1024 positions, got T=1025"),
        ({"weight": torch.zeros(40, 15)}, r"weight: expected \[V, 16\].*got \[40, 15\]"),
        ({"weight": torch.zeros(40, 16).half()}, "weight: expected .*float32.*got .*float16"),
        ({"weight": torch.zeros(0, 16)}, r"weight: .*got \[0, 16\]"),
        ({"tokens": torch.zeros(2, 5, dtype=torch.int64)}, r"tokens: expected \[2, 6\].*got \[2, 5\]"),
        ({"active": torch.zeros(2, 6)}, "active: expected .*bool"),
        ({"rule": 0.9}, "rule: expected a fdpp.Rule"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0}, "expected a seed"),
    ],
)
def test_errors(changes: dict[str, Any], words: str) -> None:
    arguments = {"hidden": Calls.hidden, "weight": Calls.weight, "tokens": Calls.tokens, "rule": Quota(1), "mask_id": 3}
    with pytest.raises(ValueError, match=words):
        project.project_select(**{**arguments, **changes})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_opcheck(temperature: float, device: str) -> None:
    head = random_head(0, B, T, D, V, Frechet(0.1), dtype=torch.bfloat16, temperature=temperature)
    params, rule = pack(Frechet(0.1), device), Frechet(0.1).key()
    hidden, weight, tokens = (x.to(device) for x in (head.hidden, head.weight, head.step.tokens))
    seeds = None if head.step.seeds is None else head.step.seeds.to(device)
    arguments = (hidden, weight, tokens, None, params, rule, head.step.mask_id, temperature, seeds)
    torch.library.opcheck(project.project_op, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic: bool) -> None:
    params = pack(Frechet(0.1))

    def step(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return project.prefix_step(hidden, weight, tokens, None, Terms(params, Frechet.key(), 39)).tokens

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert compiled(Calls.hidden, Calls.weight, Calls.tokens).equal(step(Calls.hidden, Calls.weight, Calls.tokens))
