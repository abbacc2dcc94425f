"""Every kernel and every kind of captured step, once: `python bench/gpu_smoke.py --out FOLDER`, a minute on a GPU.

- A kernel must agree with the float64 reference.
- A captured decode must equal the same steps without graphs, bit for bit. The tokens in which it differs from the eager
  engine are counted; for one sequence in float32 there must be none.

Each check prints a line when it is done and adds one to `smoke.jsonl`. A failure does not stop the others; it makes the
exit status 1. Without a GPU the kernels run in Triton's interpreter, on smaller shapes, and there are no graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

import canvases
import inputs
import measure
import torch.nn.functional as F
from inputs import Problem, generator, random_problem
from measure import DEVICE, ON_GPU
from small import SMALL, left_pad, prompts, small_model
from torch import Tensor

import fdpp
from fdpp import DreamModelLM, Frechet, Rule, SDARModelLM, Selection
from fdpp.attention import split_keys
from fdpp.attention.rotary import Angles, Place, rotary_angles, rotate, rotate_in_place
from fdpp.decoding.arena import uncaptured
from fdpp.decoding.static import steps_of
from fdpp.kernels.layers import HeadNorms
from fdpp.models import launches
from fdpp.models.experts import MoE, Routing, route
from fdpp.models.language_model import DiffusionLM
from fdpp.rules import dawn
from fdpp.rules.dawn import decide, edges
from fdpp.rules.dawn import reference as reference_dawn
from fdpp.step import project
from fdpp.step.terms import Terms, pack

# The interpreter multiplies bfloat16 matrices by their bit patterns.
HALF = torch.bfloat16 if ON_GPU else torch.float16

Check = tuple[str, Callable[[], str]]
"""A name, and a function that raises an `AssertionError` or returns what was seen."""


def select_agrees(problem: Problem) -> str:
    """Commits as the reference does, wherever rounding does not decide."""
    inputs.assert_as_specified(inputs.run("cuda" if ON_GPU else "interpreter", problem), problem)
    return f"{list(problem.logits.shape)} {problem.logits.dtype}"


def canvas_agrees(dtype: torch.dtype, B: int, T: int, vocabulary: int) -> str:
    """The CPU's step, wherever rounding does not decide; the second canvas is finished."""
    problem = canvases.canvases(1, B, T, vocabulary, dtype, bound=(2.0,), softcap=30.0, finished=(False, True))
    out = canvases.run("cuda" if ON_GPU else "interpreter", problem)
    truth = canvases.run("cpu", problem)
    torch.testing.assert_close(out.entropy, truth.entropy, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(out.lse, truth.lse, rtol=1e-5, atol=2e-5)
    differing = int((out.sample != truth.sample).sum() + (out.argmax != truth.argmax).sum())
    # Of float32's rounding: one in tens of thousands.
    assert differing <= 2 and int((out.accepted != truth.accepted).sum()) <= 2, differing
    return f"{list(problem.logits.shape)} {dtype}, {differing} ids differ from the CPU's"


def head_agrees(B: int, T: int, D: int, vocabulary: int, dtype: torch.dtype, temperature: float = 0.0) -> str:
    """`project_select` against the reference on logits from a float64 product."""
    g = generator(T)
    weight = F.normalize(torch.randn(vocabulary, D, generator=g), dim=1)
    favourite = torch.randint(0, vocabulary, (B, T), generator=g)
    height = torch.rand(B, T, 1, generator=g) * 12 + torch.tensor(float(vocabulary)).log() - 2
    hidden = (weight[favourite] * height + 0.3 * torch.randn(B, T, D, generator=g)).to(dtype)
    weight = weight.to(dtype)
    seeds = torch.arange(B) if temperature else None
    tokens = torch.where(torch.rand(B, T, generator=g) < 0.7, vocabulary - 1, 1)
    rule: Rule = Frechet(0.1)
    logits = hidden.double() @ weight.double().T
    problem = Problem(logits, tokens, (rule,), vocabulary - 1, temperature=temperature, seeds=seeds)
    at = [x.to(DEVICE) for x in (hidden, weight, tokens)]
    seeds = None if seeds is None else seeds.to(DEVICE)
    out = project.project_gpu(*at, None, Terms(pack(rule, DEVICE), rule.key(), problem.mask_id, temperature, seeds))
    truth, ours = inputs.expected(problem), Selection(*(field.cpu() for field in out))
    assert ours.proposal.equal(truth.proposal), "other proposals"
    assert ours.committed.equal(truth.committed), "other commits"
    off = float((ours.confidence - truth.confidence).abs().amax())
    assert off < 1e-4, f"confidences are off by {off:.1e}"
    return f"{[B, T]} x {[vocabulary, D]} {dtype}, confidences off by at most {off:.1e}"


def attention_agrees(dtype: torch.dtype, padded: bool, B: int, H: int, kv: int, n: int, S: int, d: int) -> str:
    """At most 1.5 times as far from float64 as PyTorch in the same dtype, plus 2e-6."""
    g = generator(S)
    q, k, v = (torch.randn(B, h, T, d, generator=g).to(dtype).to(DEVICE) for h, T in ((H, n), (kv, S), (kv, S)))
    left = torch.arange(B, device=DEVICE) * (S // (2 * B)) if padded else None
    out = split_keys.attention_gpu(q, k, v, left, d**-0.5).transpose(1, 2)
    wide = [x.double().repeat_interleave(H // x.shape[1], dim=1) for x in (q, k, v)]
    mask = None if left is None else (torch.arange(S, device=DEVICE) >= left[:, None])[:, None, None]
    want = F.scaled_dot_product_attention(*wide, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    ours, allowed = ((x.double() - want).abs().amax().item() for x in (out, theirs))
    assert ours <= 1.5 * allowed + 2e-6, f"off by {ours:.1e}, PyTorch by {allowed:.1e}"
    return f"{[B, H, n, d]} over {S} columns, off by {ours:.1e}, PyTorch by {allowed:.1e}"


def holes_agree(dtype: torch.dtype, H: int, kv: int, n: int, S: int, d: int) -> str:
    """A block amid `S` columns, a quarter of them padding, and as many mask rows, each without its own column of it.

    The rows' keys stand behind the sequence's, which does not see them.
    """
    g, first = generator(S + n), S // 2
    q, k, v = (
        torch.randn(1, h, T, d, generator=g).to(dtype).to(DEVICE) for h, T in ((H, 2 * n), (kv, S + n), (kv, S + n))
    )
    stops, holes = (torch.tensor([a] * n, device=DEVICE) for a in (S, -1))
    stops, holes = torch.cat((stops, stops + n)), torch.cat((holes, first + torch.arange(n, device=DEVICE)))
    out = split_keys.attention_gpu(
        q, k, v, torch.tensor([S // 4], device=DEVICE), d**-0.5, stops=stops, holes=holes
    ).transpose(1, 2)
    columns = torch.arange(S + n, device=DEVICE)
    mask = (columns >= S // 4) & (columns < stops[:, None]) & (columns != holes[:, None])
    wide = [x.double().repeat_interleave(H // x.shape[1], dim=1) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*wide, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    ours, allowed = ((x.double() - want).abs().amax().item() for x in (out, theirs))
    assert ours <= 1.5 * allowed + 2e-6, f"off by {ours:.1e}, PyTorch by {allowed:.1e}"
    return f"{[1, H, 2 * n, d]} over {S + n} columns, off by {ours:.1e}, PyTorch by {allowed:.1e}"


def branches_agree(dtype: torch.dtype, D: int, H: int, kv: int, n: int, S: int, d: int) -> str:
    """D branches of a block at the end of `S` columns, a quarter of them padding, against a cache copied for each."""
    g = generator(S + D)
    cached = [torch.randn(1, kv, S, d, generator=g).to(dtype).to(DEVICE) for _ in range(2)]
    q, *own = (torch.randn(D, h, n, d, generator=g).to(dtype).to(DEVICE) for h in (H, kv, kv))
    left, column = torch.tensor([S // 4], device=DEVICE), torch.arange(S - n, S, device=DEVICE)
    out = split_keys.attention_gpu(q, *cached, left, d**-0.5, *own, column).transpose(1, 2)
    before = [x[:, :, S // 4 : S - n].expand(D, -1, -1, -1) for x in cached]
    copies = [torch.cat(parts, dim=2) for parts in zip(before, own, strict=True)]
    wide = [x.double().repeat_interleave(H // x.shape[1], dim=1) for x in (q, *copies)]
    want, theirs = F.scaled_dot_product_attention(*wide), F.scaled_dot_product_attention(q, *copies, enable_gqa=True)
    ours, allowed = ((x.double() - want).abs().amax().item() for x in (out, theirs))
    assert ours <= 1.5 * allowed + 2e-6, f"off by {ours:.1e}, PyTorch by {allowed:.1e}"
    return f"{[D, H, n, d]} over {S} columns, off by {ours:.1e}, PyTorch by {allowed:.1e}"


def layer_agrees(dtype: torch.dtype, n: int, width: int, H: int, kv: int, hd: int) -> str:
    """What a layer launches around its products: norm, SwiGLU, rotation and the write into a cache.

    The rotation also of half the channels and with norms of queries and keys.
    """
    g = generator(n + hd)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)

    x, weight, gate, up = random(2, n, H * hd), random(H * hd), random(2, n, width), random(2, n, width)
    heads, angles = random(2, n, H + 2 * kv, hd), rotary_angles(torch.arange(n, device=DEVICE)[None] + 700, hd, 1e4)
    k, v = heads[:, :, H:].transpose(1, 2).split(kv, dim=1)
    stored, turned = [torch.zeros(2, kv, n + 5, hd, dtype=dtype, device=DEVICE) for _ in range(2)], heads.clone()
    rotate_in_place(turned, H, kv, angles, Place(*stored, torch.arange(3, n + 3, device=DEVICE), None))
    assert stored[0][:, :, 3:-2].equal(turned[:, :, H : H + kv].transpose(1, 2)), "the cache's keys are others"
    assert stored[1][:, :, 3:-2].equal(v) and not any(s[:, :, :3].any() or s[:, :, -2:].any() for s in stored)
    some = rotary_angles(torch.arange(n, device=DEVICE)[None] + 700, hd // 4 * 2, 1e4)
    norms, normed = HeadNorms(weight[:hd], weight[-hd:], 1e-6), heads.clone()
    rotate_in_place(normed, H, kv, some, None, norms)
    wide, wide_k = x.double(), k.double()
    k_normed = norms.k * F.rms_norm(k.float(), (hd,), eps=1e-6).to(dtype)
    wide_k = norms.k.double() * wide_k / (wide_k.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    pairs = {
        "norm": (
            launches.rms_norm_gpu(x, weight, 1e-5),
            weight * F.rms_norm(x.float(), (H * hd,), eps=1e-5).to(dtype),
            weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(),
        ),
        "SwiGLU": (launches.swiglu_gpu(gate, up), F.silu(gate) * up, F.silu(gate.double()) * up.double()),
        "rotation": (
            turned[:, :, H : H + kv].transpose(1, 2),
            rotate(k, angles),
            exactly_rotated(k, angles),
        ),
        "rotation of half, normalised": (
            normed[:, :, H : H + kv].transpose(1, 2),
            rotate(k_normed, some),
            exactly_rotated(wide_k, some),
        ),
    }
    return all_as_good(pairs)


def exactly_rotated(x: Tensor, angles: Angles) -> Tensor:
    cos, sin = (angle.double() for angle in angles)
    x, passed = x.double().tensor_split((cos.shape[-1],), dim=-1)
    return torch.cat((x * cos + torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1) * sin, passed), dim=-1)


def block_agrees(dtype: torch.dtype, n: int, kind: type[DiffusionLM], **sizes: int) -> str:
    """A block with biases or norms of queries and keys, against PyTorch's operators in the same dtype."""
    config: Any = kind.config_class
    ids_of = {"mask_token_id": 62, "pad_token_id": 61}
    with torch.random.fork_rng():
        torch.manual_seed(n)
        with DEVICE:
            model: Any = kind(config(vocab_size=64, num_hidden_layers=1, **ids_of, **sizes))
        for name, parameter in model.model.blocks[0].named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(0, 60, (1, n), generator=generator(n)).to(DEVICE)
    rounded = model.to(dtype)
    with torch.no_grad():
        ours = rounded.model(ids)
    theirs = rounded.model(ids).detach()  # our kernels take nothing that gradients are recorded for
    with torch.no_grad():
        want = rounded.double().model(ids)
    return all_as_good({"block": (ours, theirs, want)})


@torch.no_grad()
def experts_agree(dtype: torch.dtype, rows: int, hidden: int, width: int, routing: Routing, experts: int) -> str:
    """A mixture of experts, its router's kernel too, captured and replayed with rows of other experts."""
    with torch.random.fork_rng():
        torch.manual_seed(rows)
        with DEVICE:
            moe = MoE(hidden, width, experts, 1, routing)
        torch.nn.init.normal_(moe.gate.weight, std=hidden**-0.5)
        torch.nn.init.normal_(moe.gate.expert_bias, std=0.01)
    moe = moe.to(dtype)
    first, x = (torch.randn(1, rows, hidden, generator=generator(seed)).to(dtype).to(DEVICE) for seed in (1, 2))
    logits = x[0].float() @ moe.gate.weight.float().T
    index, weights = launches.route_gpu(logits, moe.gate.expert_bias, *routing)
    with torch.enable_grad():  # our kernels take nothing that gradients are recorded for
        wanted, of_weights = (part.detach() for part in route(x[0], moe.gate.weight, moe.gate.expert_bias, routing))
        theirs = moe(x).detach()
    assert index.equal(wanted), "other experts"
    torch.testing.assert_close(weights, of_weights, rtol=1e-5, atol=1e-6)
    ours = moe(x)
    if ON_GPU:
        graph, fed = torch.cuda.CUDAGraph(), first
        moe(fed)
        with torch.cuda.graph(graph):
            out = moe(fed)
        fed.copy_(x)
        graph.replay()
        assert out.equal(ours), "a replay with other experts differs"
    return all_as_good({"experts": (ours, theirs, moe.double()(x.double()))})


def product_agrees(dtype: torch.dtype, M: int, N: int, K: int) -> str:
    """A product with weights in int8, alone and added to."""
    g = generator(M)
    x, added = (torch.randn(1, M, size, generator=g).to(dtype).to(DEVICE) for size in (K, N))
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=g).to(DEVICE)
    scale = (torch.rand(N, 1, generator=g) / 100).to(DEVICE)
    want = x.double() @ weight.double().T * scale.double().T
    theirs = (x @ weight.to(dtype).T) * scale.to(dtype).T
    alone = launches.byte_product_gpu(x, weight, scale)
    pairs = {"alone": (alone, theirs, want)}
    together = launches.byte_product_gpu(x, weight, scale, added.clone())
    pairs["added to"] = together, theirs + added, want + added.double()
    return all_as_good(pairs)


def all_as_good(pairs: dict[str, tuple[Tensor, Tensor, Tensor]]) -> str:
    """Ours, PyTorch's and the truth: at most 1.5 times as far from it as PyTorch in the same dtype, plus 2e-6."""
    seen = []
    for name, (out, theirs, want) in pairs.items():
        ours, allowed = ((x.double() - want).abs().amax().item() for x in (out, theirs))
        assert ours <= 1.5 * allowed + 2e-6, f"{name}: off by {ours:.1e}, PyTorch by {allowed:.1e}"
        seen.append(f"{name} off by {ours:.1e}")
    return ", ".join(seen)


def edges_agree(dtype: torch.dtype, n: int, S: int) -> str:
    """The edges of the last half of `n` fed columns, at the end of `S`; the keys of the other columns are shared."""
    g, rule, rows, H, kv, hd = generator(n), dawn.Dawn(tau_sink=0.1, tau_edge=4 / S), 2, 4, 2, 16
    queries = [(2 * torch.randn(rows, H, n, hd, generator=g)).to(dtype) for _ in range(2)]
    shared = [torch.randn(rows, kv, S, hd, generator=g).to(dtype) for _ in range(2)]
    own = [k[:, :, S - n :].contiguous() for k in shared]
    T = n // 2
    bits = edges.edges_gpu(
        *([x.to(DEVICE) for x in tensors] for tensors in (queries, own, shared)),
        None,
        S - n,
        S - T,
        T,
        rule.tau_sink,
        rule.tau_edge,
    )
    A = reference_dawn.attention(queries, shared)
    want = reference_dawn.edges(A, rule, S - n, S - T, T)
    close = ((A[:, -T:] - rule.tau_edge).abs() < 1e-5) | ((A.mean(1, keepdim=True) - rule.tau_sink).abs() < 1e-5)
    differing = (edges.unpack_bits(bits.cpu(), S) != want) & ~close
    assert want.any() and not differing.any(), f"{int(differing.sum())} of {int(want.sum())} edges differ"
    return f"{n} of {S} columns {dtype}, {int(want.sum())} edges"


def commits_agree(T: int, S: int) -> str:
    """DAWN's independent set."""
    g, rule = generator(T), dawn.Dawn(tau_low=0.3, tau_high=0.8, tau_induce=0.6)
    confidence, known = torch.rand(3, T, generator=g), torch.rand(3, S, generator=g)
    candidate, graph = torch.rand(3, T, generator=g) < 0.7, torch.rand(3, T, S, generator=g) < 0.05
    taus = [decide.at_least(tau) for tau in (rule.tau_high, rule.tau_induce, rule.tau_low)]
    tensors = (x.to(DEVICE) for x in (confidence, candidate, known, edges.pack_bits(graph)))
    ours = decide.commit_gpu(*tensors, S - T, *taus).cpu()
    want = reference_dawn.commit(confidence, candidate, known, graph, rule, S - T)
    assert ours.equal(want), f"{int((ours != want).sum())} of {int(want.sum())} commits differ"
    return f"{[3, T]}, {int(want.sum())} commits"


def dawn_agrees(dtype: torch.dtype) -> str:
    """A whole decode by the rule, its kernels as `generate` launches them, against the CPU's in float32.

    The CPU sums products in another order, which may decide near ties of a random model.
    """
    rule = dawn.Dawn(tau_sink=0.1, tau_edge=0.05, tau_low=0.3, tau_high=0.6, tau_induce=0.4)
    settings: dict[str, Any] = {"rule": rule, "max_new_tokens": 16, "block_length": 8}
    ids = prompts(1, 16)
    ours = model_in(dtype).generate(ids.to(DEVICE), **settings).sequences.cpu()
    assert not (ours == small_model().config.mask_token_id).any(), "masks are left"
    exact = dtype == torch.float32 and not ON_GPU
    return counted(ours, small_model().generate(ids, **settings).sequences, exact, "the CPU's")


def kernels() -> Iterator[Check]:
    vocabulary, long = (9001, 1056) if ON_GPU else (700, 160)
    half = torch.bfloat16
    greedy = random_problem(1, 1, 32, vocabulary, Frechet(0.1), dtype=half, active=True)
    yield "select, greedy", partial(select_agrees, greedy)
    yield "select, sampled", partial(select_agrees, random_problem(5, 2, 8, vocabulary, Frechet(0.1), temperature=0.8))
    by_entropy = random_problem(2, 4, 40, vocabulary, fdpp.EntropyBound(2.0))
    yield "select, by entropy, sorted ranks", partial(select_agrees, by_entropy)
    by_margin = random_problem(7, 2, 8, vocabulary, fdpp.TopkMargin(3), temperature=0.8)
    yield "select, by margin, sampled", partial(select_agrees, by_margin)
    if ON_GPU:
        whole = random_problem(4, 1, 32, 126464, Frechet(0.25), dtype=half)
        yield "select, LLaDA's vocabulary", partial(select_agrees, whole)
    for dtype in (half, torch.float32):
        sizes = (2, 64, 262144) if ON_GPU else (2, 9, 700)
        yield f"denoise_canvas, {dtype}", partial(canvas_agrees, dtype, *sizes)
    yield "fused head", partial(head_agrees, 2, 8, 64, vocabulary, HALF)
    yield "fused head, float32", partial(head_agrees, 2, 8, 64, vocabulary, torch.float32)
    yield "fused head, sampled", partial(head_agrees, 2, 8, 64, vocabulary, HALF, 0.8)
    for padded in (True, False):
        for dtype in (HALF, torch.float32):
            name = f"block_attention, {'padded' if padded else 'unpadded'}, {dtype}"
            yield name, partial(attention_agrees, dtype, padded, 2, 4, 2, 32, long, 128 if ON_GPU else 32)
    for dtype in (HALF, torch.float32):
        name = f"block_attention, 3 branches, {dtype}"
        yield name, partial(branches_agree, dtype, 3, 4, 2, 32, long, 128 if ON_GPU else 32)
        name = f"block_attention, mask rows beside, {dtype}"
        yield name, partial(holes_agree, dtype, 4, 2, 32, long, 128 if ON_GPU else 32)
        yield f"dawn, edges, {dtype}", partial(edges_agree, dtype, 16, long)
        yield f"layer, {dtype}", partial(layer_agrees, dtype, 4, *((12288, 32, 32, 128) if ON_GPU else (96, 4, 2, 16)))
    yield "weights of one byte", partial(product_agrees, HALF, 32, *((4096, 12288) if ON_GPU else (130, 256)))
    # Dream: seven heads share one of keys, and a block is fed with the column before it.
    heads, hd = ((28, 4), 128) if ON_GPU else ((7, 1), 16)
    yield "block_attention, Dream", partial(attention_agrees, HALF, True, 1, *heads, 33, long, hd)
    yield "block_attention, 2 branches, Dream", partial(branches_agree, HALF, 2, *heads, 33, long, hd)
    yield "layer, Dream", partial(layer_agrees, HALF, 33, 18944 if ON_GPU else 96, *heads, hd)
    sizes = dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True))
    sizes |= {"hidden_size": heads[0] * hd, "intermediate_size": 18944 if ON_GPU else 96}
    yield "block with biases, Dream", partial(block_agrees, torch.bfloat16, 33, DreamModelLM, **sizes)
    # SDAR-4B: heads of a size of their own, with norms.
    sizes = {"num_attention_heads": 32 if ON_GPU else 4, "num_key_value_heads": 8 if ON_GPU else 2, "head_dim": hd}
    sizes |= dict(zip(("hidden_size", "intermediate_size"), (2560, 9728) if ON_GPU else (40, 96), strict=True))
    yield "block with norms of heads, SDAR", partial(block_agrees, torch.bfloat16, 8, SDARModelLM, **sizes)
    sizes = (2048, 512, Routing(8, 8, 4, 2.5), 256) if ON_GPU else (32, 16, Routing(3, 4, 2, 2.5), 16)
    for dtype in (torch.bfloat16, torch.float32):
        yield f"experts, LLaDA2, {dtype}", partial(experts_agree, dtype, 32, *sizes)
    yield "weights of one byte, Dream", partial(product_agrees, HALF, 33, *((3584, 18944) if ON_GPU else (130, 256)))
    yield "dawn, commits", partial(commits_agree, 32, long)
    # No size is a multiple of a tile.
    yield "select, odd sizes", partial(select_agrees, random_problem(0, 3, 7, 53, Frechet(0.1)))
    yield "fused head, odd sizes", partial(head_agrees, 3, 5, 33, 131, HALF)
    yield "block_attention, odd sizes", partial(attention_agrees, HALF, True, 2, 6, 2, 33, 129, 20)
    yield "block_attention, branches, odd sizes", partial(branches_agree, HALF, 2, 6, 2, 9, 129, 20)
    yield "block_attention, mask rows beside, odd sizes", partial(holes_agree, HALF, 6, 2, 9, 129, 20)
    yield "dawn, edges, odd sizes", partial(edges_agree, HALF, 19, 77)
    yield "layer, odd sizes", partial(layer_agrees, HALF, 3, 33, 3, 1, 6)
    yield "weights of one byte, odd sizes", partial(product_agrees, HALF, 17, 131, 77)
    yield "dawn, commits, odd sizes", partial(commits_agree, 11, 45)


def counted(ours: Tensor, theirs: Tensor, exact: bool, whose: str) -> str:
    """How many tokens differ; with `exact` any difference is an `AssertionError`."""
    differing = int((ours != theirs).sum())
    text = f"{differing} of {ours.numel()} tokens differ from {whose}"
    assert not exact or not differing, text
    return text


@cache
def model_in(dtype: torch.dtype, family: str = "LLaDA") -> Any:
    return SMALL[family]().to(DEVICE, dtype)


def decode_agrees(dtype: torch.dtype, settings: dict[str, Any], ragged: bool, family: str = "LLaDA") -> str:
    """A captured decode against the same steps without graphs, and against the eager engine."""
    model, mask = model_in(dtype, family), None
    ids = prompts(1, 16)
    if ragged:
        ids, mask = left_pad([prompts(1, 5 + 3 * b, seed=b)[0] for b in range(3)])
        mask = mask.to(DEVICE)
    call = partial(model.generate, ids.to(DEVICE), mask, max_new_tokens=16, block_length=8, **settings)
    model.forget_captures()
    captured = call(engine="static")
    steps = steps_of(model)
    graphs = sum(step.graph is not None for step in steps)
    assert steps and graphs == (len(steps) if ON_GPU else 0), f"{graphs} of {len(steps)} steps are captured"
    replayed = call(engine="static")
    model.forget_captures()
    with uncaptured():
        plain = call(engine="static")
        assert all(step.graph is None for step in steps_of(model)), "steps were captured where they should not be"
    model.forget_captures()
    for name, out in (("replayed", replayed), ("uncaptured", plain)):
        for field in captured:
            torch.testing.assert_close(
                captured[field], out[field], rtol=0, atol=0, equal_nan=True, msg=f"{name}: {field} differs"
            )
    exact = dtype == torch.float32 and not ragged
    text = counted(captured.sequences, call(engine="eager").sequences, exact, "the eager engine's")
    return f"{len(steps)} steps, {graphs} captured, {int(captured.nfe.max())} forwards; {text}"


def decodes() -> Iterator[Check]:
    kinds: list[tuple[str, dict[str, Any], bool]] = []
    for kept in ("dual", "prefix", "none"):
        for drafts, branches in ((1, "batch"), (3, "batch"), (3, "tree")):
            name = f"{kept} cache, {f'drafts, {branches}' if drafts > 1 else 'no drafts'}"
            kinds.append((name, {"cache": kept, "drafts": drafts, "branches": branches}, False))
    kinds += [
        ("ragged batch, dual cache", {"cache": "dual"}, True),
        ("guided, dual cache", {"cache": "dual", "cfg_scale": 0.5}, False),
        ("fused head, dual cache", {"cache": "dual", "head": "fused"}, False),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        yield f"dawn, {dtype}", partial(dawn_agrees, dtype)
    for name, settings, ragged in kinds:
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{name}, {dtype}", partial(decode_agrees, dtype, {"rule": Frechet(0.1), **settings}, ragged)
    for name, settings, ragged in kinds:
        # Steps that feed a column beside the block's, in every layout.
        if settings["cache"] != "none" and (settings.get("drafts", 1) == 1 or settings["cache"] == "dual"):
            dream = partial(decode_agrees, torch.float32, {"rule": Frechet(0.1), **settings}, ragged, "Dream")
            yield f"{name}, Dream, float32", dream


def run(checks: Iterator[Check], path: Path) -> int:
    """Print and store each check's outcome as soon as it is known; returns how many failed."""
    failed = 0
    for name, check in checks:
        name, began = name.replace("torch.", ""), time.perf_counter()
        try:
            detail, ok = check().replace("torch.", ""), True
        except Exception as error:
            traceback.print_exc()
            detail, ok = measure.reason(error), False
            failed += 1
        seconds = time.perf_counter() - began
        print(f"ok {name}: {detail}" if ok else f"FAILED {name}: {detail}", f"({seconds:.1f} s)", flush=True)
        with path.open("a") as file:
            file.write(json.dumps({"name": name, "ok": ok, "seconds": seconds, "detail": detail}) + "\n")
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "local", help="folder of the result file")
    parser.add_argument("--kernels", action="store_true", help="the kernels alone, as under compute-sanitizer")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "smoke.jsonl"
    path.write_text(json.dumps(measure.environment()) + "\n")
    print(measure.environment(), flush=True)
    failed = run(kernels(), path) + (0 if options.kernels else run(decodes(), path))
    checks = len(path.read_text().splitlines()) - 1
    print(f"{failed} of {checks} checks failed" if failed else f"{checks} checks, all ok")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
