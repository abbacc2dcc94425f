"""DAWN: recorded selections, the graph and the independent set against float64, and the kernels."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from golden import DATA, forward_arrays, model, selector_index, stored_logits, trajectories
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import IMPLEMENTATIONS, INTERPRETED, TRITON, on_gpu
from torch import Tensor

import fdpp
from fdpp.attention import Probe
from fdpp.attention.cache import BlockCache, tree_mask
from fdpp.kernels.dependency import Case, Inputs, Layout, Strides, averaged_attention
from fdpp.models.llada import LLaDAModelLM
from fdpp.moved import dawn as dawn_step
from fdpp.rules import dawn
from fdpp.rules.dawn import Dawn, decide
from fdpp.rules.dawn import edges as edges_by
from fdpp.rules.dawn import reference as reference_dawn
from fdpp.rules.dawn.edges import pack_bits, unpack_bits

KERNELS = IMPLEMENTATIONS[1:]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CLOSE = 1e-6
# The interpreter multiplies bfloat16 matrices by their bit patterns.
HALF = torch.float16 if INTERPRETED else torch.bfloat16


def random_layers(
    seed: int, rows: int, H: int, kv: int, n: int, hd: int, layers: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys whose attention is sharp enough for edges and sinks."""
    g = torch.Generator().manual_seed(seed)
    queries = [(2 * torch.randn(rows, H, n, hd, generator=g)).to(dtype) for _ in range(layers)]
    return queries, [torch.randn(rows, kv, n, hd, generator=g).to(dtype) for _ in range(layers)]


def device_of(implementation: str) -> str:
    return "cuda" if implementation == "cuda" else "cpu"


def moved(value: Any, device: str) -> Any:
    """`value`, a tensor, anything else, or a sequence of these, on `device`."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(x, device) for x in value)
    return value.to(device) if isinstance(value, Tensor) else value


def edges_of(
    implementation: str, queries: list[Tensor], own: list[Tensor], shared: list[Tensor], **rest: Any
) -> Tensor:
    """`dependency_edges` by an implementation, on the CPU."""
    if implementation == "cpu":
        return dawn.dependency_edges(queries, own, shared, **rest)
    rule = rest.pop("rule")
    arguments = {"queries": queries, "own": own, "shared": shared, "key_mask": None, **rest}
    arguments = {name: moved(value, device_of(implementation)) for name, value in arguments.items()}
    return edges_by.edges_gpu(**arguments, tau_sink=rule.tau_sink, tau_edge=rule.tau_edge).cpu()


def commit_of(
    implementation: str, c: Tensor, candidate: Tensor, known: Tensor, bits: Tensor, *, rule: Dawn, first: int
) -> Tensor:
    """`commit` by an implementation, on the CPU."""
    if implementation == "cpu":
        return dawn.commit(c, candidate, known, bits, rule=rule, first=first)
    taus = (decide.at_least(tau) for tau in (rule.tau_high, rule.tau_induce, rule.tau_low))
    return decide.commit_gpu(*moved((c, candidate, known, bits), device_of(implementation)), first, *taus).cpu()


class TestRule:
    @pytest.mark.parametrize(
        "wrong",
        [{"tau_sink": -0.1}, {"tau_edge": 0.0}, {"tau_induce": 1.5}, {"tau_low": float("nan")}, {"tau_high": True}],
    )
    def test_thresholds_are_validated(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"Dawn: expected {next(iter(wrong))} in"):
            Dawn(**wrong)

    @pytest.mark.parametrize("layers", [0, -1, True, 1.5])
    def test_layers_are_validated(self, layers: Any) -> None:
        with pytest.raises(ValueError, match="Dawn: expected layers as an int"):
            Dawn(layers=layers)

    def test_probed_layers(self) -> None:
        assert Dawn().probed(32) == range(28, 32)
        assert Dawn().probed(4) == range(3, 4)
        assert Dawn(layers=2).probed(4) == range(2, 4)
        with pytest.raises(ValueError, match="layers=5, but the model has 4"):
            Dawn(layers=5).probed(4)

    def test_alone_it_is_its_first_clause(self) -> None:
        logits = torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(0)) * 4
        tokens = torch.full((3, 9), 19)
        rule = Dawn(tau_high=0.8)
        ours = fdpp.select(logits, tokens, rule=rule, mask_id=19)
        assert torch.equal(ours.committed, fdpp.select(logits, tokens, rule=fdpp.Threshold(0.8), mask_id=19).committed)

    @given(st.floats(1e-30, 1.0))
    def test_at_least_is_the_next_float32(self, tau: float) -> None:
        rounded = np.float32(decide.at_least(tau))
        assert float(rounded) == decide.at_least(tau) >= tau
        assert float(np.nextafter(rounded, np.float32(0))) < tau


def recorded_calls() -> list[tuple[str, int]]:
    found = []
    for entry in selector_index():
        if entry["group"] == "attn":
            with np.load(DATA / f"selectors/{entry['id']}.npz") as stored:
                runs = json.loads(bytes(stored["meta"]))["runs"]
            found += [(entry["id"], i) for i, run in enumerate(runs) if run["func"] == "get_transfer_index_dawn"]
    return found


def recorded(commit: Any, every: int = 1) -> Counter[str]:
    """Compare recorded DAWN selections, row by row, and count how each compared."""
    census: Counter[str] = Counter()
    arrays: dict[str, Any] = {}
    for case, r in recorded_calls()[::every]:
        if arrays.get("id") != case:
            with np.load(DATA / f"selectors/{case}.npz") as stored:
                arrays = {"id": case, **stored}
        run = json.loads(bytes(arrays["meta"]))["runs"][r]
        p, A = run["params"], stored_logits(arrays, "attn").double()
        mask, published = torch.from_numpy(arrays["mask"]), torch.from_numpy(arrays["transfer_index"][r])
        c, L = torch.from_numpy(arrays["conf64"]), mask.shape[1]
        known = c.masked_fill(mask, 0.0)
        known[:, p["prompt_length"] + (p["num_block"] + 1) * p["block_length"] :] = 0.0
        rule = Dawn(p["tau_sink"], p["tau_edge"], p["tau_induce"], p["tau_low"])
        ours = commit(c, mask, known, reference_dawn.edges(A, rule, 0, 0, L), rule)
        for b in range(mask.shape[0]) if p.get("only_row") is None else [p["only_row"]]:
            equal = bool((ours[b] == published[b]).all())
            assert equal != (b in run["deviates_rows"]), (case, r, b)
            census["equal" if equal else "published code breaks its rule"] += 1
    return census


CENSUS = Counter({"equal": 269, "published code breaks its rule": 195})


class TestRecordedSelections:
    def test_reference(self) -> None:
        assert recorded(lambda *args: reference_dawn.commit(*args, first=0)) == CENSUS

    @pytest.mark.slow
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_implementations(self, implementation: str) -> None:
        def commit(c: Tensor, mask: Tensor, known: Tensor, E: Tensor, rule: Dawn) -> Tensor:
            return commit_of(implementation, c.float(), mask, known.float(), pack_bits(E), rule=rule, first=0)

        if implementation == "interpreter":  # a second for some of them
            assert recorded(commit, every=7) == Counter({"equal": 32, "published code breaks its rule": 22})
        else:
            assert recorded(commit) == CENSUS


def probed_forward(name: str, layers: int | None, x: Tensor, **inputs: Any) -> tuple[Tensor, Probe]:
    llada = model(name)
    probe = Probe(Dawn(layers=layers).probed(llada.config.n_layers))
    with torch.no_grad():
        return llada.project(llada.model(x, cache=probe, **inputs)), probe


class TestRecordedAttention:
    @pytest.mark.parametrize(
        ("name", "layers", "key"),
        [("model_tiny", 2, "b_dawn_avg_attn"), ("model_deep32", None, "b_deep_dawn_avg_attn")],
    )
    def test_published_average(self, name: str, layers: int | None, key: str) -> None:
        want = forward_arrays()[key].float()
        x = forward_arrays()["b_x"].long()[: want.shape[0]]
        _, probe = probed_forward(name, layers, x)
        torch.testing.assert_close(reference_dawn.attention(probe.queries, probe.own).float(), want, atol=2e-6, rtol=0)


def full_keys(own: list[Tensor], shared: list[Tensor], start: int) -> list[Tensor]:
    """Every row's keys in all columns."""
    if not shared:
        return own
    found = []
    for k, stored in zip(own, shared, strict=True):
        keys = stored.repeat_interleave(k.shape[0] // stored.shape[0], dim=0).clone()
        keys[:, :, start : start + k.shape[2]] = k
        found.append(keys)
    return found


def left_padding(b: int, S: int) -> Tensor:
    """Row i has 3 i padding columns."""
    return torch.arange(S)[None] >= 3 * torch.arange(b)[:, None]


SHAPES = {
    # rows, H, kv_heads, hd, layers, S, start, n, first, T, sequences that share keys (0: a full forward), padded
    "full": (2, 2, 2, 16, 2, 45, 0, 45, 33, 7, 0, False),
    "full, padded, grouped heads": (2, 2, 1, 8, 1, 67, 0, 67, 40, 17, 0, True),
    "prefix": (2, 2, 1, 24, 2, 50, 20, 30, 20, 8, 2, True),
    "dual": (2, 2, 2, 16, 2, 66, 30, 9, 30, 9, 2, False),
    "dual, branches, padded": (4, 2, 2, 16, 2, 40, 21, 8, 21, 8, 2, True),
    "one position": (1, 1, 1, 16, 1, 33, 32, 1, 32, 1, 1, False),
    "one position of two branches": (2, 2, 2, 16, 2, 33, 32, 1, 32, 1, 1, True),
}
ON_GPU = {
    torch.float32: ("full", "dual, branches, padded", "one position of two branches"),
    HALF: ("full, padded, grouped heads", "prefix"),
}
"""With and without shared keys, padding, grouped heads and branches, and heads below and between powers of two."""


class TestEdges:
    """`dependency_edges` against the float64 map, decision by decision."""

    @on_gpu(lambda dtype, shape: shape in ON_GPU[dtype])
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_against_float64(self, implementation: str, shape: str, dtype: torch.dtype) -> None:
        rows, H, kv, hd, layers, S, start, n, first, T, b, padded = SHAPES[shape]
        queries, own = random_layers(1, rows, H, kv, n, hd, layers, dtype)
        shared = random_layers(2, b, H, kv, S, hd, layers, dtype)[1] if b else []
        mask = left_padding(b or rows, S) if padded else None
        per_row = None if mask is None else mask.repeat_interleave(rows // mask.shape[0], dim=0)
        rule = Dawn(tau_sink=1.5 / S, tau_edge=0.02)
        before = [x.clone() for x in (*queries, *own, *shared)]

        bits = edges_of(implementation, queries, own, shared, rule=rule, start=start, first=first, T=T, key_mask=mask)

        assert all(map(torch.equal, before, (*queries, *own, *shared)))
        A = reference_dawn.attention(queries, full_keys(own, shared, start), per_row)
        want = reference_dawn.edges(A, rule, start, first, T, per_row)
        weight = torch.ones(rows, n) if per_row is None else per_row[:, start : start + n]
        mean = (A * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True)
        clear = ((A - rule.tau_edge).abs() > CLOSE)[:, first - start :][:, :T]
        clear = clear & ((mean - rule.tau_sink).abs() > CLOSE)[:, None]
        got = unpack_bits(bits, S)
        assert bits.dtype == torch.int32 and tuple(bits.shape) == (rows, T, -(-S // 32))
        assert torch.equal(got & clear, want & clear)
        assert clear.float().mean() > 0.99 and (n == 1 or 0 < int(want.sum()) < want.numel())
        assert not unpack_bits(bits, 32 * bits.shape[2])[..., S:].any()

    def test_sinks_are_those_of_the_fed_queries(self) -> None:
        """Column 0 attracts only the queries outside the block, column 9 only those in it."""
        q, k = torch.zeros(1, 1, 40, 16), torch.zeros(1, 1, 40, 16)
        q[:, :, :30, 0], q[:, :, 30:, 1] = 40.0, 40.0
        k[:, :, 0, 0], k[:, :, 9, 1] = 1.0, 1.0
        rule = Dawn(tau_sink=0.4, tau_edge=0.9)
        full = unpack_bits(dawn.dependency_edges([q], [k], rule=rule, start=0, first=30, T=10), 40)
        assert full[0].nonzero()[:, 1].unique().tolist() == [9], "a quarter of all queries is no sink"
        fed = [q[:, :, 30:]], [k[:, :, 30:]], [k]
        dual = unpack_bits(dawn.dependency_edges(*fed, rule=rule, start=30, first=30, T=10), 40)
        assert not dual.any(), "to the block's queries alone it is one"

    def test_padding_counts_for_nothing(self) -> None:
        queries, keys = random_layers(3, 2, 2, 2, 40, 16)
        rule, mask = Dawn(tau_sink=0.04, tau_edge=0.03), left_padding(2, 40)
        both = unpack_bits(dawn.dependency_edges(queries, keys, rule=rule, start=0, first=30, T=10, key_mask=mask), 40)
        alone = dawn.dependency_edges(
            *([x[1:, :, 3:] for x in layers] for layers in (queries, keys)), rule=rule, start=0, first=27, T=10
        )
        assert torch.equal(both[1, :, 3:], unpack_bits(alone, 37)[0])
        assert not both[1, :, :3].any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"queries": []}, "expected queries and keys of the same layers"),
            ({"own": [torch.zeros(2, 3, 8, 16)] * 2}, r"own: expected keys \[2, a divisor of 2, 8, 16\]"),
            ({"shared": [torch.zeros(2, 2, 9, 16)] * 2}, "shared: expected keys"),
            ({"shared": []}, "start: expected 0 without shared keys, got 4"),
            ({"first": 7, "T": 6}, "first, T: expected a block within the fed columns 4 to 12"),
            ({"key_mask": torch.ones(2, 19, dtype=torch.bool)}, r"key_mask: expected \[2, 20\] bool"),
            ({"queries": [torch.zeros(2, 2, 8, 16), torch.zeros(2, 2, 7, 16)]}, "queries: expected every layer"),
            ({"queries": [torch.zeros(2, 2, 8, 16, dtype=torch.int64)] * 2}, "in a floating dtype"),
        ],
    )
    def test_errors_name_the_argument(self, change: dict[str, Any], message: str) -> None:
        queries, own = random_layers(0, 2, 2, 2, 8, 16)
        shared = random_layers(0, 2, 2, 2, 20, 16)[1]
        arguments = {"queries": queries, "own": own, "shared": shared, "start": 4, "first": 4, "T": 8, **change}
        with pytest.raises(ValueError, match=message):
            dawn.dependency_edges(**arguments, rule=Dawn())


@triton.jit
def attention_kernel(
    inputs, lse, column, out, strides, n, CASE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    o_q, o_k = tl.arange(0, BLOCK_Q), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_mean, _ = averaged_attention(inputs, lse, column, Layout(strides, 0, n, n), tl.program_id(1), o_q, o_k, CASE)
    at = (tl.program_id(1) * n + o_q[:, None]) * n + o_k[None, :]
    tl.store(out + at, b_mean, mask=(o_q < n)[:, None] & (o_k < n)[None, :])


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_averaged_attention_three_ways(implementation: str, dtype: torch.dtype) -> None:
    """Float64 is the truth; our error is at most that of PyTorch in the inputs' dtype.

    In float32 at most four times PyTorch's, since exp2(score - lse) takes two numbers rounded at the scores' size; on a
    GPU eight times, since its exp2 is itself off by up to 2**-22.
    """
    rows, H, n, hd, layers = 2, 2, 16, 16, 2
    queries, keys = random_layers(5, rows, H, H, n, hd, layers, dtype)
    truth = reference_dawn.attention(queries, keys)
    theirs = torch.stack(
        [((q @ k.transpose(2, 3)) / hd**0.5).softmax(-1).mean(1) for q, k in zip(queries, keys, strict=True)]
    ).mean(0)
    lse = torch.stack([torch.logsumexp(q.double() @ k.double().mT / hd**0.5, -1) for q, k in zip(queries, keys)], 1)  # noqa: B905
    device = device_of(implementation)
    lse = (lse.flatten(1, 2) / np.log(2)).float().to(device)
    out, column = torch.zeros(rows, n, n, device=device), torch.zeros(rows, layers * H, n, device=device)
    q, k = moved((tuple(queries), tuple(keys)), device)
    strides = Strides(*(x[0].stride()[:3] for x in (q, k, k)))
    case = Case(H, hd, 16, 1, 1, layers, HAS_SHARED=False, HAS_MASK=False, PRECISION="ieee")
    attention_kernel[(1, rows)](
        Inputs(q, k, k, column), lse, column, out, strides, n, CASE=case, BLOCK_Q=16, BLOCK_K=32
    )
    ours, bound = (out.cpu() - truth).abs().max(), (theirs.double() - truth).abs().max()
    assert ours <= bound * (1 if dtype != torch.float32 else 8 if implementation == "cuda" else 4)


@st.composite
def problems(draw: st.DrawFn, least: int = 1) -> dict[str, Any]:
    """A block in a sequence: confidences with ties, candidates, anchors and edges of any density."""
    b, T = draw(st.integers(1, 3)), draw(st.integers(least, 12))
    first = draw(st.integers(0, 40))
    S = first + T + draw(st.integers(0, 30))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    grid = draw(st.sampled_from([4.0, 20.0, 1e6]))
    c = (torch.rand(b, T, generator=g) * grid).round() / grid
    candidate = torch.rand(b, T, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    known = torch.rand(b, S, generator=g) * (torch.rand(b, S, generator=g) < 0.5)
    known[:, first : first + T] = known[:, first : first + T].masked_fill(candidate, 0.0)
    E = torch.rand(b, T, S, generator=g) < density
    E &= torch.arange(S) != torch.arange(first, first + T)[:, None]
    taus = [draw(st.sampled_from([0.05, 0.25, 0.5, 0.7, 0.75, 0.9, 1.0])) for _ in range(3)]
    rule = Dawn(tau_induce=taus[0], tau_low=taus[1], tau_high=taus[2])
    return {"confidence": c, "candidate": candidate, "known": known, "E": E, "rule": rule, "first": first}


def committed(p: dict[str, Any], commit: Any = dawn.commit, rule: Dawn | None = None) -> Tensor:
    return commit(
        p["confidence"], p["candidate"], p["known"], pack_bits(p["E"]), rule=rule or p["rule"], first=p["first"]
    )


class TestCommit:
    @given(problems())
    def test_equals_the_reference(self, p: dict[str, Any]) -> None:
        want = reference_dawn.commit(p["confidence"], p["candidate"], p["known"], p["E"], p["rule"], p["first"])
        assert torch.equal(committed(p), want)

    @pytest.mark.parametrize("implementation", KERNELS)
    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_kernel_equals_the_reference(self, implementation: str, data: st.DataObject) -> None:
        # Blocks of 9 to 12 positions share a kernel, which a GPU compiles once.
        p = data.draw(problems(least=9 if implementation == "cuda" else 1))
        want = reference_dawn.commit(p["confidence"], p["candidate"], p["known"], p["E"], p["rule"], p["first"])
        assert torch.equal(committed(p, functools.partial(commit_of, implementation)), want)

    @given(problems())
    def test_only_candidates_and_at_least_one(self, p: dict[str, Any]) -> None:
        chosen = committed(p)
        assert not (chosen & ~p["candidate"]).any()
        assert torch.equal(chosen.any(1), p["candidate"].any(1))

    @given(problems())
    def test_rows_are_independent(self, p: dict[str, Any]) -> None:
        rows = [
            committed({name: value[b : b + 1] if isinstance(value, Tensor) else value for name, value in p.items()})
            for b in range(p["confidence"].shape[0])
        ]
        assert torch.equal(committed(p), torch.cat(rows))

    @given(problems())
    def test_the_set_is_independent_and_maximal(self, p: dict[str, Any]) -> None:
        """Without sure and induced positions: no two chosen ones conflict, and every other one conflicts with one."""
        p["known"] = torch.zeros_like(p["known"])
        p["confidence"] = p["confidence"].clamp(max=0.95)
        rule = Dawn(tau_high=1.0, tau_low=p["rule"].tau_low)
        free = p["candidate"] & (p["confidence"].double() >= rule.tau_low)
        chosen = committed(p, rule=rule)
        T = chosen.shape[1]
        among = p["E"][:, :, p["first"] : p["first"] + T]
        conflict = among | among.transpose(1, 2)
        hit = (conflict & chosen[:, None]).any(2)
        assert not (hit & chosen).any()
        assert ((hit | chosen) | ~free).all()

    @given(problems(), st.sampled_from([0.1, 0.3, 0.6, 0.8]))
    def test_a_lower_tau_low_commits_no_less(self, p: dict[str, Any], tau: float) -> None:
        rules = (Dawn(tau_low=low, tau_high=p["rule"].tau_high) for low in (max(tau, 0.3), min(tau, 0.3)))
        few, many = (committed(p, rule=rule) for rule in rules)
        assert not (few & ~many).any()

    @given(problems())
    def test_without_edges_it_is_a_threshold(self, p: dict[str, Any]) -> None:
        p["E"] = torch.zeros_like(p["E"])
        bound = min(p["rule"].tau_low, p["rule"].tau_high)
        above = p["candidate"] & (p["confidence"].double() >= bound)
        chosen = committed(p)
        assert torch.equal(chosen & above.any(1, keepdim=True), above)
        assert bool((chosen.sum(1)[~above.any(1)] <= 1).all())

    @on_gpu(lambda T: T != 32)
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("T", [1, 32, 33, 100])
    def test_large_blocks(self, implementation: str, T: int) -> None:
        g = torch.Generator().manual_seed(T)
        p = {
            "confidence": torch.rand(2, T, generator=g),
            "candidate": torch.rand(2, T, generator=g) < 0.8,
            "known": torch.rand(2, T + 45, generator=g) * (torch.rand(2, T + 45, generator=g) < 0.1),
            "E": torch.rand(2, T, T + 45, generator=g) < 0.05,
            "rule": Dawn(tau_low=0.3),
            "first": 13,
        }
        p["E"] &= torch.arange(T + 45) != torch.arange(13, 13 + T)[:, None]
        want = reference_dawn.commit(p["confidence"], p["candidate"], p["known"], p["E"], p["rule"], 13)
        assert torch.equal(committed(p, functools.partial(commit_of, implementation)), want)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"confidence": torch.zeros(1, 4, dtype=torch.float64)}, r"confidence: expected \[1, 4\] torch.float32"),
            ({"candidate": torch.zeros(1, 5, dtype=torch.bool)}, r"candidate: expected \[1, 4\]"),
            ({"edges": torch.zeros(1, 4, 2, dtype=torch.int32)}, r"edges: expected \[1, 4, 1\]"),
            ({"first": 7}, "first: expected a block of at most 1024 of 10 columns, got 4 at 7"),
        ],
    )
    def test_errors_name_the_argument(self, change: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {
            "confidence": torch.zeros(1, 4),
            "candidate": torch.ones(1, 4, dtype=torch.bool),
            "committed_confidence": torch.zeros(1, 10),
            "edges": torch.zeros(1, 4, 1, dtype=torch.int32),
            "first": 2,
        }
        with pytest.raises(ValueError, match=message):
            dawn.commit(**{**arguments, **change}, rule=Dawn())


def probed(probe: Probe, rule: Dawn, start: int, first: int, T: int, key_mask: Tensor | None = None) -> Tensor:
    """The edges of the forward that went through `probe`."""
    seen = (probe.queries, probe.own, probe.shared)
    return dawn.dependency_edges(*seen, rule=rule, start=start, first=first, T=T, key_mask=key_mask)


class TestSelect:
    def step(self, logits: Tensor, tokens: Tensor, E: Tensor, known: Tensor, **rest: Any) -> Any:
        return dawn_step.select(
            logits, tokens, rule=Dawn(tau_low=0.5), mask_id=9, edges=pack_bits(E), committed_confidence=known, first=0,
            **rest,
        )  # fmt: skip

    def test_fields(self) -> None:
        """Position 0 is a committed anchor of 2; 1 and 3 are coupled, and 3 is surer."""
        logits, tokens = torch.zeros(1, 4, 10), torch.tensor([[5, 9, 9, 9]])
        for t, (token, c) in enumerate([(4, 0.95), (3, 0.8), (2, 0.72), (1, 0.85)]):
            logits[0, t, token] = float(np.log(9 * c / (1 - c)))
        E = torch.zeros(1, 4, 6, dtype=torch.bool)
        E[0, 2, 0] = E[0, 1, 3] = True
        out = self.step(logits, tokens, E, torch.zeros(1, 6))
        assert out.tokens.tolist() == [[5, 9, 2, 1]]
        assert out.proposal.tolist() == [[5, 3, 2, 1]]
        assert out.committed.tolist() == [[False, False, True, True]]
        assert out.remaining.tolist() == [1] and out.nonfinite.tolist() == [0]
        torch.testing.assert_close(out.confidence, torch.tensor([[0, 0.8, 0.72, 0.85]]))

    def test_unusable_logits_are_counted_and_commit_last(self) -> None:
        logits, tokens = torch.zeros(1, 3, 10), torch.full((1, 3), 9)
        logits[0, 0] = torch.nan
        E, known = torch.zeros(1, 3, 3, dtype=torch.bool), torch.zeros(1, 3)
        out = self.step(logits, tokens, E, known)
        assert out.committed.tolist() == [[False, True, False]] and out.nonfinite.tolist() == [1]

    def test_samples_are_reproducible(self) -> None:
        logits, tokens = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0)), torch.full((2, 8), 9)
        E, known = torch.zeros(2, 8, 8, dtype=torch.bool), torch.zeros(2, 8)
        once, again, other = (
            self.step(logits, tokens, E, known, temperature=1.0, seeds=torch.tensor([s, s + 1])) for s in (0, 0, 7)
        )
        assert torch.equal(once.proposal, again.proposal) and not torch.equal(once.proposal, other.proposal)


class TestProbe:
    """The probe changes no forward, and drafted states see the graph that they would see alone."""

    LAYERS = range(1, 2)

    def sequences(self) -> Tensor:
        return torch.randint(0, 499, (2, 20), generator=torch.Generator().manual_seed(0))

    def test_the_forward_is_the_same(self) -> None:
        with torch.no_grad():
            plain = model("model_tiny").model(self.sequences())
            probed = model("model_tiny").model(self.sequences(), cache=Probe(self.LAYERS))
        assert torch.equal(plain, probed)

    @pytest.mark.parametrize("layout", ["batch", "tree"])
    @pytest.mark.parametrize("fed", [slice(8, 20), slice(8, 14)], ids=["prefix", "dual"])
    def test_branches(self, layout: str, fed: slice) -> None:
        llada, x, D = model("model_tiny").model, self.sequences(), 3
        n, rule = fed.stop - fed.start, Dawn(tau_sink=0.1, tau_edge=0.06)
        mask = left_padding(2, 20)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = torch.randint(0, 499, (2, D, n), generator=torch.Generator().manual_seed(1))

        def cache() -> BlockCache:
            filled = BlockCache(layout, spare=(D - 1) * n if layout == "tree" else 0)
            llada(x, mask, positions, cache=filled)
            return filled

        with torch.no_grad():
            alone = []
            for d in range(D):
                probe = Probe(self.LAYERS, cache())
                llada(states[:, d], mask, positions[:, fed], cache=probe, start=fed.start)
                alone.append(probed(probe, rule, fed.start, 8, 6, mask))
            branched = cache()
            branched.branches = D
            probe = Probe(self.LAYERS, branched, branches=D, layout=layout)
            p = positions[:, fed].repeat_interleave(D, dim=0).view(2, -1)
            if layout == "tree":
                sees = tree_mask(20, fed, n, D, x.device, mask.bool())
                llada(states.flatten(1), sees, p, cache=probe, start=fed.start)
            else:
                p = p.view(2 * D, n)
                llada(states.flatten(0, 1), mask.repeat_interleave(D, 0), p, cache=probe, start=fed.start)
        together = probed(probe, rule, fed.start, 8, 6, mask).unflatten(0, (2, D))
        assert int(unpack_bits(together, 20).sum()) > 0
        assert torch.equal(together, torch.stack(alone, 1))

    def test_uncached_tree(self) -> None:
        llada, x, D = model("model_tiny").model, self.sequences(), 2
        states = torch.stack((x, x.flip(0)), 1)
        rule, everything = Dawn(tau_sink=0.1, tau_edge=0.06), slice(0, 20)
        probe = Probe(self.LAYERS, branches=D, layout="tree")
        positions = torch.arange(20).repeat(2, D)
        sees = tree_mask(20, everything, 20, D, x.device).expand(2, -1, -1, -1)
        with torch.no_grad():
            llada(states.flatten(1), sees, positions, cache=probe)
            together = probed(probe, rule, 0, 8, 6).unflatten(0, (2, D))
            for d in range(D):
                alone = Probe(self.LAYERS)
                llada(states[:, d], cache=alone)
                assert torch.equal(together[:, d], probed(alone, rule, 0, 8, 6))


class TestOperators:
    def edges_arguments(self, shared: bool) -> tuple[Any, ...]:
        queries, own = random_layers(0, 2, 2, 2, 8, 16)
        stored = random_layers(1, 1, 2, 2, 20, 16)[1] if shared else []
        mask = left_padding(1, 20) if shared else None
        return (queries, own, stored, mask, 4 if shared else 0, 4, 4, 0.1, 0.05)

    def commit_arguments(self) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(0)
        bits = pack_bits(torch.rand(2, 8, 20, generator=g) < 0.2)
        c, known = torch.rand(2, 8, generator=g), torch.rand(2, 20, generator=g)
        return (c, torch.ones(2, 8, dtype=torch.bool), known, bits, 5, 0.9, 0.7, 0.5)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("shared", [False, True])
    def test_opcheck_edges(self, shared: bool, device: str) -> None:
        torch.library.opcheck(edges_by.edges_op, moved(self.edges_arguments(shared), device))

    @pytest.mark.parametrize("device", DEVICES)
    def test_opcheck_commit(self, device: str) -> None:
        torch.library.opcheck(decide.commit_op, moved(self.commit_arguments(), device))

    @pytest.mark.slow
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled_without_a_graph_break(self, dynamic: bool) -> None:
        queries, own, *_ = self.edges_arguments(False)
        c, candidate, known, *_ = self.commit_arguments()

        def step(queries: list[Tensor], own: list[Tensor], c: Tensor, candidate: Tensor, known: Tensor) -> Tensor:
            rule = Dawn(tau_sink=0.5, tau_edge=0.05)
            bits = dawn.dependency_edges(queries, own, rule=rule, start=0, first=0, T=8)
            return dawn.commit(c, candidate, known[:, :8], bits, rule=rule, first=0)

        arguments = (queries, own, c, candidate, known)
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        assert torch.equal(compiled(*arguments), step(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_decodes_on_a_gpu_are_those_on_the_cpu(cache: str) -> None:
    """Two rows that decode the same with weights off by 1e-5, and otherwise by `tau_low` or `tau_high` alone."""
    prompt = next(t.prompt for t in trajectories("dawn") if t.run["prompt"] == "p20ab")
    there = LLaDAModelLM.from_pretrained(DATA / "model_tiny").eval().to("cuda")

    def decode(llada: LLaDAModelLM, rule: fdpp.Rule) -> Any:
        return llada.generate(
            prompt.to(llada.device), max_new_tokens=64, block_length=16, rule=rule, cache=cache, stop_at_eos=False
        )

    rule = Dawn(tau_sink=0.05, tau_low=0.5, layers=2)
    want, got = decode(model("model_tiny"), rule), decode(there, rule)
    assert got.sequences.device.type == "cuda"
    assert torch.equal(got.sequences.cpu(), want.sequences)
    assert torch.equal(got.commit_step.cpu(), want.commit_step)
    assert torch.equal(got.nfe.cpu(), want.nfe)
    for tau in (rule.tau_low, rule.tau_high):
        assert not torch.equal(decode(model("model_tiny"), fdpp.Threshold(tau)).commit_step, want.commit_step)


@pytest.fixture(scope="module")
def builds() -> list[dict[str, Any]]:
    script = Path(__file__).parent / "helpers" / "aot_dawn.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
class TestAheadOfTime:
    """Every kernel compiles for GPUs that this machine lacks."""

    def test_no_spills(self, builds: list[dict[str, Any]]) -> None:
        assert {build["target"] for build in builds} == {"sm_80", "sm_90", "sm_100", "gfx942"}
        spills = [(build["target"], build["stack"] + build["local"]) for build in builds]
        other_versions = {"3.6": [("sm_80", 16)], "3.8": [("sm_90", 8)]}
        assert [s for s in spills if s[1]] == other_versions.get(TRITON, [])

    def test_queries_and_keys_come_16_bytes_at_a_time(self, builds: list[dict[str, Any]]) -> None:
        """Nothing that is read in bulk is read two bytes at a time."""
        narrow = ("ld.global.b16", "ld.global.u16", "global_load_ushort", "buffer_load_ushort")
        for build in builds:
            assert not any(operation.startswith(narrow) for operation in build["memory"]), build["kernel"]
