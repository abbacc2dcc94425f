"""On a GPU: many launches, streams and graphs, compiled modules, big inputs, and what a step costs besides time.

`test_select.py`, `test_canvas.py`, `test_kernels.py`, `test_ops.py`, `test_noise.py`, `test_rules.py`, `test_dawn.py`,
`test_project.py` and `test_attention.py` run there too, with the compiled kernels in place of the interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import unwritten
from canvases import Canvases, canvases
from canvases import assert_equal as assert_equal_steps
from canvases import run as run_canvases
from inputs import Problem, assert_as_specified, assert_equal, expected, generator, random_problem, run
from small import MASK, SMALL, left_pad, prompts
from torch import Tensor

import fdpp
from fdpp import DenoisingStep, EntropyBound, Frechet, Quota, Rule, Selection, Threshold, Wino
from fdpp.attention import block_attention
from fdpp.decoding.arena import uncaptured
from fdpp.decoding.static import steps_of
from fdpp.step import gpu, operators, project, reference
from fdpp.step.canvas import operator as canvas_operator
from fdpp.step.terms import Terms, pack

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def on_device(problem: Problem) -> Problem:
    tensors = {name: getattr(problem, name) for name in ("logits", "tokens", "active", "seeds")}
    return dataclasses.replace(
        problem, **{name: None if tensor is None else tensor.to(DEVICE) for name, tensor in tensors.items()}
    )


def step_for(problem: Problem) -> DenoisingStep:
    return DenoisingStep(problem.rules[0], problem.mask_id, problem.temperature).to(DEVICE)


def call(step: DenoisingStep, problem: Problem) -> Selection:
    return step(problem.logits, problem.tokens, problem.active, problem.seeds)


def problems() -> list[Problem]:
    """Few and many splits, counted and sorted ranks, greedy and sampled."""
    return [
        random_problem(0, 3, 7, 23, Frechet(0.1)),
        random_problem(1, 1, 32, 9001, Frechet(0.1), dtype=torch.bfloat16, active=True),
        random_problem(2, 4, 40, 9001, EntropyBound(2.0), temperature=0.8),
        random_problem(3, 2, 130, 2500, Threshold(0.3)),
        random_problem(4, 1, 3, 126464, Frechet(0.1), dtype=torch.bfloat16),
    ]


@pytest.mark.slow
def test_thousands_of_launches() -> None:
    """Whichever program arrives last, the result is the same to the last bit, and right."""
    for problem in problems():
        truth = expected(problem)
        device = on_device(problem)
        step = step_for(problem)
        first = call(step, device)
        assert_as_specified(Selection(*(field.cpu() for field in first)), problem, truth)
        differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(2000):
            for a, b in zip(first, call(step, device), strict=True):
                differing += (a != b).sum()
        assert int(differing) == 0
    assert all(not tickets.any() for tickets in gpu.tickets.values())


@pytest.mark.slow
def test_streams_do_not_share_tickets() -> None:
    """Four streams launch at once, each with tickets of its own."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    work = [on_device(problem) for problem in problems()[:4]]
    steps = [step_for(problem) for problem in work]
    first = [call(step, problem) for step, problem in zip(steps, work, strict=True)]
    differing = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    for repeat in range(500):
        for i, stream in enumerate(streams):
            k = (i + repeat) % 4
            with torch.cuda.stream(stream):
                for a, b in zip(first[k], call(steps[k], work[k]), strict=True):
                    differing[i] += (a != b).sum()
    torch.cuda.synchronize()
    assert differing.tolist() == [0] * 4


def test_reset_after_an_aborted_launch() -> None:
    problem = problems()[0]
    run("cuda", problem)
    for tickets in gpu.tickets.values():
        tickets.fill_(3)
    gpu.reset_tickets()
    assert_as_specified(run("cuda", problem), problem)


def test_a_captured_step_is_one_launch() -> None:
    """Its tickets were made before the capture, and are its own."""
    problem = on_device(problems()[0])
    step = step_for(problem)
    call(step, problem)
    before = gpu.spare[torch.device("cuda", torch.cuda.current_device())].numel()
    with unwritten.left_alone():
        graph, outputs = captured(step, problem)
    assert gpu.spare[torch.device("cuda", torch.cuda.current_device())].numel() < before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 1 and "select_kernel" in names[0], names
    assert not any(slab.any() for slab in gpu.slabs)
    assert_as_specified(Selection(*(field.cpu() for field in outputs)), problems()[0])


@pytest.mark.parametrize("sequences", [gpu.TICKETS, gpu.TICKETS + 1, 70_000])
def test_many_sequences(sequences: int) -> None:
    """More than the kept tickets serve, and more than a grid's second dimension may hold."""
    tokens = torch.full((sequences, 1), 16, device=DEVICE)
    logits = torch.randn(sequences, 1, 17, device=DEVICE)
    out = fdpp.select(logits, tokens, rule=EntropyBound(0.0), mask_id=16)
    assert out.committed.all() and out.tokens.equal(logits[..., :16].argmax(-1))


def captured(step: DenoisingStep, problem: Problem) -> tuple[torch.cuda.CUDAGraph, Selection]:
    call(step, problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(step, problem)
    return graph, out


@pytest.mark.parametrize("index", range(5))
def test_graph_replays_equal_eager(index: int) -> None:
    """New inputs in the captured memory, many replays, and eager launches in between."""
    problem = on_device(problems()[index])
    step = step_for(problem)
    graph, out = captured(step, problem)
    for seed in range(20):
        problem.logits.copy_(torch.randn(problem.logits.shape, generator=generator(seed)) * 3)
        problem.tokens.copy_(
            torch.where(torch.rand(problem.tokens.shape, generator=generator(seed)) < 0.5, 0, problem.mask_id)
        )
        graph.replay()
        assert_equal(out, call(step, problem))


@pytest.mark.slow
def test_graph_of_a_whole_block() -> None:
    """Steps chained in one graph, replayed a thousand times."""
    problem = on_device(random_problem(1, 2, 32, 9001, Quota(2), dtype=torch.bfloat16, masked=1.0))
    step = step_for(problem)

    def block() -> Tensor:
        tokens = problem.tokens
        for _ in range(16):
            tokens = step(problem.logits, tokens).tokens
        return tokens

    eager = block()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = block()
    for _ in range(1000):
        graph.replay()
    assert tokens.equal(eager) and (tokens != problem.mask_id).all()


def test_a_step_does_not_wait_for_the_device() -> None:
    work = [(step_for(problem), on_device(problem)) for problem in problems()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, problem in work:
            call(step, problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_step() -> None:
    """Outputs and scratch take less than 1% of the logits' memory, however many rows are masked."""
    problem = on_device(random_problem(0, 1, 32, 126464, Frechet(0.25), dtype=torch.bfloat16))
    step = step_for(problem)
    call(step, problem)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(step, problem)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.01 * problem.logits.numel() * problem.logits.element_size()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_compiled_step(mode: str, dynamic: bool, temperature: float) -> None:
    torch._dynamo.reset()
    for seed, (B, T, V) in enumerate([(2, 8, 23), (3, 7, 21), (4, 5, 29)][: 3 if dynamic else 1]):
        problem = on_device(random_problem(seed, B, T, V, Frechet(0.25), active=True, temperature=temperature))
        step = step_for(problem)
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, mode=mode)
        for _ in range(3):
            assert_equal(call(compiled, problem), call(step, problem))


def test_a_step_left_on_the_cpu_is_refused() -> None:
    problem = on_device(problems()[0])
    with pytest.raises(ValueError, match="cpu"):
        call(DenoisingStep(problem.rules[0], problem.mask_id), problem)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Frechet(0.25), EntropyBound(0.5)], ids=str)
@pytest.mark.parametrize("T", [32, 256, 1024])
def test_full_size(rule: Rule, T: int) -> None:
    """LLaDA's vocabulary in bfloat16; the specification's formulas, vectorised over the rows in float64."""
    B, V, mask_id = 2, 126464, 126336
    g = torch.Generator(DEVICE).manual_seed(T)
    logits = torch.randn(B, T, V, generator=g, device=DEVICE, dtype=torch.bfloat16)
    raised = torch.randint(0, mask_id, (B, T, 1), generator=g, device=DEVICE)
    height = torch.rand(B, T, 1, generator=g, device=DEVICE) * 12 + 10
    logits.scatter_(2, raised, height.bfloat16())
    tokens = torch.full((B, T), mask_id, device=DEVICE)
    tokens[:, ::3] = 5
    out = fdpp.select(logits, tokens, rule=rule, mask_id=mask_id)
    for b in range(B):
        profile = []
        for t in (tokens[b] == mask_id).nonzero().flatten().tolist():
            row = logits[b, t].double()
            proposal = int(row.index_fill(0, torch.tensor([mask_id], device=DEVICE), -torch.inf).argmax())
            assert int(out.proposal[b, t]) == proposal
            r, h = reference.residual(row, proposal), reference.entropy(row)
            assert float(out.confidence[b, t]) == pytest.approx(1.0 / (1.0 + r), rel=2e-6)
            profile.append((h if rule.order == "entropy" else r, t, r, h))
        profile.sort()

        def count(scale: float, profile: list[tuple[float, int, float, float]] = profile) -> int:
            return max(reference.accepted(rule, [p[2] * scale for p in profile], [p[3] * scale for p in profile]), 1)

        assert count(1 - 1e-5) <= int(out.committed[b].sum()) <= count(1 + 1e-5) or (
            count(1 + 1e-5) <= int(out.committed[b].sum()) <= count(1 - 1e-5)
        )
        last = profile[int(out.committed[b].sum()) - 1][0]
        for key, t, _, _ in profile:
            assert bool(out.committed[b, t]) == (key <= last) or abs(key - last) < 1e-5 * last


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one() -> None:
    problem = problems()[0]
    out = fdpp.select(
        problem.logits.to("cuda:1"), problem.tokens.to("cuda:1"), rule=problem.rules[0], mask_id=problem.mask_id
    )
    assert out.tokens.device == torch.device("cuda:1")
    assert_as_specified(Selection(*(field.cpu() for field in out)), problem)


def test_the_dispatcher_leads_to_the_kernel() -> None:
    problem = problems()[0]
    device = on_device(problem)
    arguments = (device.logits, device.tokens, None, pack(problem.rules[0], DEVICE), problem.rules[0].key())
    out = operators.select_op(*arguments, problem.mask_id, 0.0, None)
    assert_equal(Selection(*out), call(step_for(problem), device))


def replayed(function: Callable[..., Any], *tensors: Tensor) -> None:
    """A captured call waits for nothing and, replayed on other contents of its inputs, gives what a call gives."""
    function(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*tensors)
    for seed in range(5):
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator(seed)))
        graph.replay()
        for a, b in zip(pytree.tree_leaves(out), pytree.tree_leaves(function(*tensors)), strict=True):
            assert a.equal(b)


def canvas_arguments() -> tuple[Canvases, tuple[Any, ...]]:
    """A shape of `test_canvas.py`, whose kernel is there already."""
    problem = canvases(1, 2, 9, 72, bound=(0.3,), softcap=30.0, finished=(False, True))
    return problem, problem.arguments(DEVICE)


def test_a_canvass_step_in_a_graph() -> None:
    """Replays with new logits, a finished canvas and another temperature; a loop's tensors are all that changes."""
    problem, arguments = canvas_arguments()
    logits, _, _, finished, numbers, _, _ = arguments
    canvas_operator.step(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = canvas_operator.step(*arguments)
    for seed in range(5):
        logits.copy_(torch.randn(logits.shape, generator=generator(seed)) * 3)
        finished.copy_(torch.tensor([seed % 2 == 1, seed % 3 == 1]))
        numbers[:, 1] = 0.3 + 0.1 * seed
        graph.replay()
        assert_equal_steps(out, canvas_operator.step(*arguments))
    assert not any(slab.any() for slab in gpu.slabs) and len(problem.canvas) == 2


def test_a_canvass_step_does_not_wait_for_the_device() -> None:
    _, arguments = canvas_arguments()
    torch.cuda.set_sync_debug_mode("error")
    try:
        canvas_operator.step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_dispatcher_leads_to_the_canvass_kernel() -> None:
    problem, arguments = canvas_arguments()
    out = canvas_operator.denoise_op(*arguments)
    assert_equal_steps(fdpp.CanvasStep(*(field.cpu() for field in out)), run_canvases("cuda", problem))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_fused_head_in_a_graph(temperature: float) -> None:
    hidden = torch.randn(4, 8, 21, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(300, 21, device=DEVICE, dtype=torch.bfloat16)
    tokens = torch.where(torch.rand(4, 8, device=DEVICE) < 0.6, 299, 1)
    params, seeds = pack(Frechet(0.1), DEVICE), torch.arange(4, device=DEVICE)

    def step(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Selection:
        terms = Terms(params, Frechet.key(), 299, temperature, seeds)
        return project.prefix_step(hidden, weight, tokens, None, terms)

    replayed(step, hidden, weight, tokens)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_a_graph(padded: bool) -> None:
    q, k, v = (torch.randn(2, 8, T, 128, device=DEVICE, dtype=torch.bfloat16) for T in (32, 1056, 1056))
    left = torch.tensor([0, 300], device=DEVICE) if padded else None
    replayed(lambda q, k, v: block_attention(q, k, v, left), q, k, v)


@pytest.mark.parametrize("padded", [False, True])
def test_branches_in_a_graph(padded: bool) -> None:
    """A replay takes the block's column as it is then."""
    q, k, v = (torch.randn(B, 8, T, 128, device=DEVICE).bfloat16() for B, T in ((6, 32), (2, 1056), (2, 1056)))
    own = torch.randn_like(q), torch.randn_like(q)
    left = torch.tensor([0, 300], device=DEVICE) if padded else None
    column = torch.arange(400, 432, device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, column: Tensor) -> Tensor:
        return block_attention(q, k, v, left, own=own, column=column)

    replayed(attend, q, k, v, column)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, column)
    for start in (500, 1024):
        column.copy_(torch.arange(start, start + 32))
        graph.replay()
        assert out.equal(attend(q, k, v, column))


def test_holes_in_a_graph() -> None:
    """A replay takes each query's stop and hole as they are then."""
    q, k, v = (torch.randn(2, 8, T, 128, device=DEVICE).bfloat16() for T in (64, 1088, 1088))
    left = torch.tensor([0, 300], device=DEVICE)
    stops, holes = torch.full((64,), 1056, device=DEVICE), torch.full((64,), -1, device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, stops: Tensor, holes: Tensor) -> Tensor:
        return block_attention(q, k, v, left, stops=stops, holes=holes)

    replayed(attend, q, k, v, stops, holes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, stops, holes)
    before = out.clone()
    for start in (400, 1024):
        stops[32:], holes[32:] = 1088, torch.arange(start, start + 32)
        graph.replay()
        assert out.equal(attend(q, k, v, stops, holes)) and not out[:, :, 32:].equal(before[:, :, 32:])


@pytest.mark.slow
@pytest.mark.parametrize(("B", "T"), [(1, 32), (8, 32), (1, 1024)])
def test_fused_head_of_llada(B: int, T: int) -> None:
    """4096 channels and 126,464 ids in bfloat16, against float32 products; its memory is not that of the logits."""
    D, V, mask_id = 4096, 126464, 126336
    g = torch.Generator(DEVICE).manual_seed(T)
    weight = torch.randn(V, D, generator=g, device=DEVICE).bfloat16()
    favourite = torch.randint(0, mask_id, (B, T), generator=g, device=DEVICE)
    height = 10 + 12 * torch.rand(B, T, 1, generator=g, device=DEVICE)
    hidden = (
        weight[favourite].float() * height / D + 0.02 * torch.randn(B, T, D, generator=g, device=DEVICE)
    ).bfloat16()
    tokens = torch.full((B, T), mask_id, device=DEVICE)
    tokens[:, ::3] = 5
    params = pack(Threshold(0.9), DEVICE)
    arguments = (hidden, weight, tokens, None, Terms(params, Threshold.key(), mask_id))
    project.prefix_step(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = project.prefix_step(*arguments)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * B * T * V * weight.element_size()
    rows = hidden[tokens == mask_id].float()
    logits = torch.cat([rows @ part.float().T for part in weight.split(16384)], dim=1)
    confidence = logits.softmax(1)
    logits[:, mask_id] = -torch.inf
    best, proposal = logits.max(1)
    clear = best - logits.scatter(1, proposal[:, None], -torch.inf).amax(1) > 1e-2
    assert clear.float().mean() > 0.9
    assert out.proposal[tokens == mask_id][clear].equal(proposal[clear])
    want = confidence.gather(1, proposal[:, None])[:, 0]
    torch.testing.assert_close(out.confidence[tokens == mask_id][clear], want[clear], rtol=1e-2, atol=1e-4)
    sure = (want - 0.9).abs() > 1e-2
    assert out.committed[tokens == mask_id][clear & sure].equal((want > 0.9)[clear & sure])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Dream", {"cache": "prefix", "rule": Frechet(0.1), "drafts": 1}),
        ("Dream", {"cache": "prefix", "rule": Frechet(0.1), "drafts": 3}),
        ("LLaDA", {"cache": "dual", "rule": Wino(0.2, 0.9, None)}),
    ],
    ids=str,
)
def test_captured_steps_of_other_layouts(family: str, settings: dict[str, Any]) -> None:
    """Steps that feed a column beside their block, or rows: replays equal the steps run one by one, bit for bit.

    Dream with the prefix cache alone: for another layout of the block a GPU would compile kernels that nothing else
    needs.
    """
    sizes = {"Dream": {"num_attention_heads": 2, "num_key_value_heads": 1}, "LLaDA": {"n_heads": 2, "n_kv_heads": 1}}
    model = SMALL[family](**sizes[family]).to(DEVICE, torch.bfloat16)
    ids, mask = left_pad([prompts(1, 5 + 3 * b, seed=b)[0] for b in range(5)])
    arguments = {"attention_mask": mask.to(DEVICE), "max_new_tokens": 20, "block_length": 8, **settings}

    def decode() -> Any:
        return model.generate(ids.to(DEVICE), engine="static", **arguments)

    captured = [decode() for _ in range(2)]
    assert all(step.graph is not None for step in steps_of(model))
    with uncaptured():
        plain = decode()
    for out in captured:
        for name in plain:
            torch.testing.assert_close(out[name], plain[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert not (plain.sequences == MASK).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("B", "heads", "kv_heads", "n"),
    [(1, 32, 32, 32), (4, 32, 4, 32), (16, 32, 32, 32), (1, 32, 32, 7), (1, 28, 4, 33), (8, 28, 4, 33)],
)
def test_attention_of_llada_and_dream(B: int, heads: int, kv_heads: int, n: int) -> None:
    """Heads of 128 channels over 1056 columns in bfloat16, at most as far from float64 as PyTorch's."""
    q, k, v = (torch.randn(B, H, T, 128, device=DEVICE) for H, T in ((heads, n), (kv_heads, 1056), (kv_heads, 1056)))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    left = torch.randint(0, 800, (B,), device=DEVICE)
    mask = (torch.arange(1056, device=DEVICE) >= left[:, None])[:, None, None]
    ours = block_attention(q, k, v, left)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    wide = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), *wide, mask)
    assert (ours - want).abs().amax() <= (theirs - want).abs().amax() * 1.5 + 1e-6
