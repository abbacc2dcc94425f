"""What a capture asks of a step, and what becomes of steps when things change or go wrong: all but the graph itself."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from captures import Captures, captured_on_cpu
from family_of_others import FAMILIES
from small import BLOCK_CAUSAL, exact_model, left_pad, prompts, small_model
from torch import Tensor, nn

import fdpp
from fdpp import LLaDAModelLM
from fdpp.attention import cache
from fdpp.decoding import graphs, static
from fdpp.decoding.forwards import Forwards
from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.static import steps_of

SIZES: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8, "engine": "static", "rule": fdpp.Frechet(0.1)}


@pytest.fixture
def captures() -> Any:
    with captured_on_cpu() as captures:
        yield captures


def ragged(B: int = 3) -> tuple[Tensor, Tensor]:
    return left_pad([prompts(1, 5 + 3 * b, seed=b)[0] for b in range(B)])


def same(a: Any, b: Any) -> bool:
    return a.sequences.equal(b.sequences) and a.commit_step.equal(b.commit_step)


def eager(model: LLaDAModelLM, *prompt: Tensor, **settings: Any) -> Any:
    return model.generate(*prompt, **{**SIZES, **settings, "engine": "eager"})


# A warm-up and the capture after it


KINDS: list[dict[str, Any]] = [
    *({"cache": kept, "drafts": d} for kept in ("none", "prefix", "dual") for d in (1, 3)),
    *({"cache": kept, "drafts": 3, "branches": "tree"} for kept in ("none", "prefix", "dual")),
    {"drafts": "auto"},
    {"cfg_scale": 0.5},
    {"cfg_scale": 0.5, "drafts": 2, "branches": "tree"},
    {"head": "fused"},
    {"head": "fused", "drafts": 3},
    {"temperature": 0.7, "seed": 3},
    {"rule": fdpp.EntropyBound(0.5, tempered=True), "temperature": 0.7, "seed": 3},
    {"rule": fdpp.Klass(0.3, 0.5, 1), "cache": "prefix"},
    {"rule": fdpp.LocalLeap(0.6, 0.3), "drafts": 2},
    {"rule": fdpp.Quota(), "steps": 9, "remasking": "random", "seed": 3},
    {"logits_eos_inf": True, "confidence_eos_eot_inf": True},
    {"repetition_penalty": 1.3, "bad_words_ids": [[3], [1, 2], [4, 2]], "suppress_tokens": [5, 6], "drafts": 2},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.1},
    {"top_p": 0.9, "temperature": 0.7, "seed": 3},
]


def missing_from(warm: list[Any], captured: list[Any]) -> list[Any]:
    """The operators of a capture that the warm-up, in the same order, did not have."""
    rest = iter(warm)
    return [entry for entry in captured if all(entry != other for other in rest)]


CAPTURED = [
    *(
        ("LLaDA", kind, batch, split)
        for kind in KINDS
        for batch in ("one", "even", "ragged")
        for split in (False, True)
    ),
    *(("Dream", kind, batch, True) for kind in KINDS[:9] for batch in ("ragged", "empty")),
    *(("Dream", kind, "ragged", False) for kind in (*KINDS[9:14], KINDS[15])),
    *(("Gist", kind, "empty", True) for kind in KINDS[2:6]),
    *((name, KINDS[kind], "ragged", True) for name in BLOCK_CAUSAL for kind in (0, 4, 5, 8, 9)),
    *((name, KINDS[kind], "empty", False) for name in BLOCK_CAUSAL for kind in (2, 3, 9)),
]


@pytest.mark.parametrize(("family", "settings", "batch", "split"), CAPTURED, ids=str)
def test_a_capture_meets_nothing_that_the_warm_up_has_not(
    family: str, settings: dict[str, Any], batch: str, split: bool, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operator, with the same shapes, strides and dtypes, in every kind of step: libraries plan by them."""
    monkeypatch.setattr(Forwards, "only_masked", property(lambda self: False, lambda self, value: None), raising=False)
    if split:  # as on a GPU
        short = cache.SHORT
        monkeypatch.setattr(cache, "splits_keys", lambda q, k, D=1: q.shape[2] // D <= short)
    llada = (FAMILIES | BLOCK_CAUSAL)[family](eot_token_id=60, num_key_value_heads=2)
    empty = left_pad([prompts(1, 5)[0], prompts(1, 0)[0], prompts(1, 8)[0]])
    prompt = {"one": (prompts(1, 11),), "even": (prompts(3, 12),), "ragged": ragged(), "empty": empty}[batch]
    out = llada.generate(*prompt, **{**SIZES, "cache": "dual", **settings})
    assert len(captures.logs) > 1 or settings.get("cache") == "none"
    if settings.get("cache", "dual") == "dual":
        fed = {step.window.width() for step in steps_of(llada) if not step.window.full}
        widths = {8, 16} if llada.block_causal else {length + llada.shift for length in (8, 4)}
        assert fed <= widths if llada.block_causal else fed == widths
    for step, warm, captured in captures.logs:
        assert len(captured) > 50
        assert not missing_from(warm, captured), step.window
    assert all(step.graph.replays for step in steps_of(llada))
    # Of a row without a prompt all masks are alike, so that rounding decides.
    assert batch == "empty" or same(out, eager(llada, *prompt, **settings))


def test_operators_that_differ_are_told_apart() -> None:
    warm, captured = ([("add", ((2,), (stride,), torch.float32))] for stride in (1, 2))
    assert missing_from(warm, captured) == captured and not missing_from(warm + captured, captured)


def test_a_warm_up_leaves_the_state_as_it_was() -> None:
    """It takes a step on the very tensors of the decode."""
    llada, ids = small_model(), prompts(2, 11)
    settings = {**SIZES, "drafts": 3, "rule": fdpp.Klass(0.3, 0.5, 1)}
    with captured_on_cpu():
        out = llada.generate(ids, **settings)
    plain = small_model().generate(ids, **settings)
    assert same(out, plain) and out.nfe.equal(plain.nfe) and out.query_tokens.equal(plain.query_tokens)
    torch.testing.assert_close(out.acceptance, plain.acceptance, rtol=0, atol=0, equal_nan=True)


# Captures that fail


def failing(captures: Captures, after: int, error: BaseException) -> None:
    def fail() -> None:
        if len(captures.logs) >= after:
            raise error

    captures.fail = fail


@pytest.mark.parametrize("after", [0, 1])
def test_a_capture_that_fails_is_logged_once_and_the_decode_goes_on(
    after: int, captures: Captures, caplog: pytest.LogCaptureFixture
) -> None:
    llada, prompt = small_model(), ragged()
    failing(captures, after, RuntimeError("operation not permitted when stream is capturing"))
    with caplog.at_level(logging.WARNING):
        outs = [llada.generate(*prompt, **SIZES) for _ in range(2)]
        llada.generate(prompts(1, 90), **SIZES)
    assert all(same(out, eager(llada, *prompt)) for out in outs)
    messages = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert len(messages) == 1 and "RuntimeError: operation not permitted" in messages[0]
    assert all(step.graph is None for step in steps_of(llada)) and len(captures.logs) == after

    captures.fail = lambda: None
    llada.forget_captures()
    assert same(llada.generate(*prompt, **SIZES), outs[0])
    assert all(step.graph is not None for step in steps_of(llada))


def test_after_a_failure_the_engine_that_nobody_asked_for_is_left_alone(captures: Captures) -> None:
    llada, config = small_model(), fdpp.DiffusionGenerationConfig()
    failing(captures, 0, RuntimeError("no"))
    llada.generate(prompts(1, 11), **SIZES)
    with static.steps_for(llada, config, torch.device("cuda")) as held:
        assert held is None
    llada.model.transformer["blocks"][0].ff_out = copy.deepcopy(llada.model.transformer["blocks"][0].ff_out)
    with static.steps_for(llada, config, torch.device("cuda")) as held:
        assert held is not None and held.refused is None


def test_no_stream_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def none_left(device: torch.device) -> None:
        raise RuntimeError("expected one of 24 capture streams to be free")

    monkeypatch.setattr(static, "graphs_on", none_left)
    llada, prompt = small_model(), ragged()
    assert same(llada.generate(*prompt, **SIZES), eager(llada, *prompt))
    assert "capture streams" in caplog.text


def test_an_error_of_the_model_is_the_callers(captures: Captures) -> None:
    """A forward that fails would fail without a capture, too."""
    llada = small_model()
    llada.model.transformer["ln_f"].eps = "no number"
    with pytest.raises(TypeError):
        llada.generate(prompts(1, 11), **SIZES)


# Decodes that are interrupted


@pytest.mark.parametrize("moment", ["capture", "replay", "streamer", "criterion"])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_the_decode_after_an_interrupted_one_is_right(moment: str, when: int, captures: Captures) -> None:
    """Wherever Ctrl-C comes: while the cache is allocated, between two blocks, amid a capture."""
    llada, prompt = small_model(), ragged(6)
    calls = iter(range(1000))

    def interrupt(*_: Any, **__: Any) -> Tensor:
        if next(calls) == when:
            raise KeyboardInterrupt
        return torch.zeros(6, dtype=torch.bool)

    class Streamer:
        put = put_draft = staticmethod(interrupt)

        def end(self) -> None: ...

    settings, more = {**SIZES, "stop_at_eos": False}, {}
    if moment == "capture":
        captures.fail = interrupt
    elif moment == "streamer":
        more["streamer"] = Streamer()
    elif moment == "criterion":
        more["stopping_criteria"] = [interrupt]
    else:
        llada.model.transformer["blocks"][0].ff_norm.forward = lambda x: interrupt() is None or x
    with pytest.raises(KeyboardInterrupt):
        llada.generate(*prompt, **more, **settings)
    captures.fail = lambda: None
    llada.model.transformer["blocks"][0].ff_norm.__dict__.pop("forward", None)
    assert gc.isenabled()
    for again in ((prompts(2, 14),), prompt):
        assert same(llada.generate(*again, **settings), eager(small_model(), *again, stop_at_eos=False))
    assert all(step.graph is not None for step in steps_of(llada))


def test_a_streamer_may_decode(captures: Captures) -> None:
    """With the same model, on the same thread, in the midst of a decode."""
    llada, prompt, inner = small_model(), ragged(), []

    class Curious:
        def put(self, value: Tensor) -> None:
            inner.append(llada.generate(prompts(2, 14), **SIZES))

        def end(self) -> None: ...

    out = llada.generate(*prompt, streamer=Curious(), **SIZES)
    assert same(out, eager(llada, *prompt)) and len(inner) > 1
    assert all(same(other, eager(llada, prompts(2, 14))) for other in inner)


# Models that change


class Adapted(nn.Module):
    """A linear layer with a low-rank part, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scaling, self.off = base, {"default": 2.0}, False
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator))
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=generator))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.off else self.base(x) + self.scaling["default"] * (x @ self.a.T @ self.b.T)


def adapt(llada: LLaDAModelLM) -> None:
    block = llada.model.transformer["blocks"][1]
    block.up_proj = Adapted(block.up_proj)


def switch_off(llada: LLaDAModelLM) -> None:
    llada.model.transformer["blocks"][1].up_proj.off = True


def rescale(llada: LLaDAModelLM) -> None:
    llada.model.transformer["blocks"][1].up_proj.scaling["default"] = 0.5


def take_off(llada: LLaDAModelLM) -> None:
    block = llada.model.transformer["blocks"][1]
    block.up_proj = block.up_proj.base


def overwrite(llada: LLaDAModelLM) -> None:
    with torch.no_grad():
        llada.model.transformer["blocks"][0].attn_out.weight.mul_(-1.0)


def exchange(llada: LLaDAModelLM) -> None:
    llada.model.transformer["blocks"][0].ff_out.weight = nn.Parameter(
        torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    )


def change_a_setting(llada: LLaDAModelLM) -> None:
    llada.config.rope_theta = 10.0
    llada.model.config.rope_theta = 10.0


def override_a_forward(llada: LLaDAModelLM) -> None:
    llada.model.transformer["ln_f"].forward = lambda x: -x


def to_and_fro(llada: LLaDAModelLM) -> None:
    llada.double().float()


CHANGES = (
    *(overwrite, adapt, rescale, switch_off, take_off, exchange),
    *(change_a_setting, to_and_fro, override_a_forward, LLaDAModelLM.forget_captures),
)


def test_a_model_that_changes_is_decoded_as_it_is(captures: Captures) -> None:
    """Every change between two decodes; most of them change the tokens, too."""
    llada, ids, seen = small_model(), prompts(2, 11), []
    for change in (lambda llada: None, *CHANGES):
        change(llada)
        out = llada.generate(ids, **SIZES)
        assert same(out, eager(llada, ids)), change
        seen.append(tuple(out.sequences.flatten().tolist()))
    assert len(set(seen)) >= 7


def test_nothing_is_captured_anew_where_nothing_changed(captures: Captures) -> None:
    llada, ids = small_model(), prompts(2, 11)
    for _ in range(3):
        llada.generate(ids, **SIZES)
        overwrite(llada)
        llada.train(False)
    assert len(captures.logs) == len(steps_of(llada))


@pytest.mark.parametrize("kind", ["forward", "pre-forward", "of all modules"])
def test_hooks_are_called(kind: str, captures: Captures) -> None:
    """A replay would skip them: while there is a hook, decodes run eagerly and the captures are kept."""
    llada, ids, calls = small_model(), prompts(2, 11), []
    before = llada.generate(ids, **SIZES)
    made, config = steps_of(llada), fdpp.DiffusionGenerationConfig()

    def hook(*_: Any) -> None:
        calls.append(1)

    layer = llada.model.transformer["blocks"][0].ff_out
    handle = {
        "forward": layer.register_forward_hook,
        "pre-forward": layer.register_forward_pre_hook,
        "of all modules": nn.modules.module.register_module_forward_hook,
    }[kind](hook)
    try:
        with static.steps_for(llada, config, torch.device("cuda")) as held:
            assert held is None
        with pytest.raises(ValueError, match=r"engine='static': .*hook on"):
            llada.generate(ids, **SIZES)
        assert same(eager(llada, ids), before) and calls
    finally:
        handle.remove()
    assert same(llada.generate(ids, **SIZES), before) and steps_of(llada) == made


def test_copies_and_moved_models_keep_nothing(captures: Captures) -> None:
    llada, ids = small_model(), prompts(2, 11)
    out = llada.generate(ids, **SIZES)
    other = copy.deepcopy(llada)
    assert steps_of(llada) and not steps_of(other)
    assert same(other.generate(ids, **SIZES), out) and not set(steps_of(other)) & set(steps_of(llada))
    matrices = [weakref.ref(block.qkv.weight) for block in llada.model.transformer["blocks"]]
    made = steps_of(llada)
    assert llada.to("cpu", torch.float32) is llada and steps_of(llada) == made
    assert all(matrix() is not None for matrix in matrices)
    llada.double()
    assert not steps_of(llada) and not any(matrix() is not None for matrix in matrices)


# What is kept, and for how long


def test_what_is_evicted_is_freed_at_once(captures: Captures) -> None:
    """Not by the garbage collector, which might come amid another capture."""
    llada = small_model()
    gc.collect()
    gc.disable()
    try:
        graphs_seen: dict[int, list[Any]] = {}
        for P in (16, 48, 80, 112, 144):
            llada.generate(prompts(1, P), **{**SIZES, "max_new_tokens": 16})
            arenas = held_buckets(llada)[-1].arenas.values()
            graphs_seen[P] = [weakref.ref(step.graph) for arena in arenas for step in arena.steps.values()]
        del arenas
        captures.logs.clear()
        alive = {P: [graph() is not None for graph in seen] for P, seen in graphs_seen.items()}
        assert not any(alive.pop(16)) and all(all(seen) for seen in alive.values())
        llada.generate(prompts(1, 48), **{**SIZES, "max_new_tokens": 16})  # used again, so 80 is evicted first
        llada.generate(prompts(1, 16), **{**SIZES, "max_new_tokens": 16})
        captures.logs.clear()
        assert not any(graph() for graph in graphs_seen[80]) and all(graph() for graph in graphs_seen[48])
        llada.forget_captures()
        assert not any(graph() for seen in graphs_seen.values() for graph in seen)
    finally:
        gc.enable()


def test_a_model_that_is_gone_leaves_no_graph(captures: Captures) -> None:
    """Nothing that is kept for it holds the model, so both go at once."""
    llada = small_model()
    llada.generate(prompts(1, 16), **SIZES)
    graph, model = weakref.ref(steps_of(llada)[0].graph), weakref.ref(llada)
    captures.logs.clear()
    gc.collect()
    gc.disable()
    try:
        del llada
        assert model() is None and graph() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("B", [1, 2, 4, 5, 6, 7])
def test_only_sizes_that_are_rounded_up_have_fillers(B: int) -> None:
    llada = small_model()
    llada.generate(prompts(B, 16), **SIZES)
    filled = {arena.state.row.shape[0]: arena.state.fillers is not None for arena in static.arenas_of(llada)}
    assert max(filled) == static.graph_size(B)
    assert all(has == (size in (6, 8)) for size, has in filled.items())


# Keys and values of sequences that leave a block


@pytest.mark.parametrize("kept", ["prefix", "dual"])
@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.5}, {"drafts": 3}], ids=str)
def test_every_sequence_has_its_own_keys_when_the_next_block_begins(
    options: dict[str, Any], engine: str, kept: str
) -> None:
    """Those of the sequence decoded alone, though rows left the block one after another.

    With drafts, which of a block's states is written depends on the batch; not so outside of the block.
    """
    llada = exact_model()
    config = llada.settled(None, {**SIZES, "cache": kept, "engine": engine, "stop_at_eos": False, **options})
    ids, mask = ragged(7)

    def block_of(ids: Tensor, mask: Tensor | None) -> tuple[Any, set[int]]:
        """The loop after its first block, and the batch sizes it had."""
        with torch.no_grad(), static.steps_for(llada, config, ids.device) as held:
            loop = BlockLoop(llada, ids, mask, config, None, held)
            return loop, {outcome.row.shape[0] for outcome in loop.steps(0)}

    together, sizes = block_of(ids, mask.bool())
    assert len(sizes) > 2
    order, passes = together.cache.order, together.cache.passes
    stored = [tensor.clone() for pair in together.cache.allocated for tensor in pair]
    for b in range(7):
        alone, _ = block_of(ids[b : b + 1, ids.shape[1] - int(mask[b].sum()) :], None)
        row, L = order.index(b) * passes, int(mask[b].sum()) + 20
        compared = torch.ones(L, dtype=torch.bool)
        if "drafts" in options:
            compared[-20 : -12 if kept == "dual" else None] = False
        for all_rows, own in zip(stored, (t for pair in alone.cache.allocated for t in pair), strict=True):
            mine, theirs = all_rows[row : row + passes, :, -L:], own[:passes, :, -L:]
            torch.testing.assert_close(mine[:, :, compared], theirs[:, :, compared], rtol=0, atol=1e-9)


# The CUDA calls around a capture


class FakeCuda:
    """The part of `torch.cuda` that a capture needs: it hands out streams in turn and has a current one."""

    def __init__(self, streams: int = 32) -> None:
        self.streams, self.made, self.current, self.pools, self.calls = streams, 0, "default", 0, []
        self.broken = False

    def stream(self, device: torch.device, priority: int = 0) -> Any:
        assert priority < 0, "other people's streams"
        self.made += 1
        stream = type("Stream", (), {})()
        stream.cuda_stream = 1000 + (self.made - 1) % self.streams
        return stream

    def note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == "endAllocateToPool" and not self.broken:
            raise RuntimeError("not currently recording to mempool_id")

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    def graph(fake, graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Any:  # noqa: N805
        class Capture:
            def __enter__(self) -> None:
                fake.calls.append(("begin", stream, pool, capture_error_mode))
                fake.current = stream

            def __exit__(self, *exception: object) -> None:
                fake.calls.append(("end", stream))
                if fake.broken and pool is not None:
                    raise RuntimeError("capture invalidated")  # the stream is not given back, as in PyTorch
                fake.current = "default"

        return Capture()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", fake.pool)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("CUDAGraph", (), {})())
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(fake, "current", stream))
    for name in ("clearCublasWorkspaces", "endAllocateToPool", "releasePool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", partial(fake.note, name), raising=False)
    return fake


DEVICE = torch.device("cuda", 0)


def test_no_stream_and_no_pool_is_shared(cuda: FakeCuda) -> None:
    held = [graphs.Graphs(DEVICE) for _ in range(graphs.MOST_STREAMS)]
    assert len({g.stream.cuda_stream for g in held}) == len({g.pool for g in held}) == graphs.MOST_STREAMS
    assert not any(g.used for g in held)
    with pytest.raises(RuntimeError, match="capture streams"):
        graphs.Graphs(DEVICE)
    given = held.pop(3).stream
    gc.collect()
    again = graphs.Graphs(DEVICE)
    assert again.stream is given and again.used and again.pool not in {g.pool for g in held}


def test_streams_that_pytorch_hands_out_twice_are_lent_once(cuda: FakeCuda) -> None:
    cuda.streams = 5
    held = [graphs.Graphs(DEVICE) for _ in range(5)]
    assert len({g.stream.cuda_stream for g in held}) == 5
    with pytest.raises(RuntimeError, match="capture streams"):
        graphs.Graphs(DEVICE)


def test_every_bucket_of_every_model_captures_on_its_own(cuda: FakeCuda, captures: Captures) -> None:
    """And gives its stream back when it is evicted."""

    class Recorded(graphs.Graphs):
        capture = captures.capture

    static.graphs_on, models = lambda device: Recorded(DEVICE), [small_model(seed) for seed in range(2)]
    for llada in models:
        for P in (16, 48, 80, 112, 144):
            llada.generate(prompts(2, P), **SIZES)
            held = [bucket.graphs for model in models for bucket in held_buckets(model)]
            assert len({g.stream.cuda_stream for g in held}) == len({g.pool for g in held}) == len(held)
    assert len(held) == 2 * static.KEPT
    lender = graphs.streams[DEVICE]
    assert len(lender.known) - len(lender.free) == len(held)
    for llada in models:
        llada.forget_captures()
    del held
    assert len(lender.known) == len(lender.free)


def held_buckets(model: LLaDAModelLM) -> list[static.Bucket]:
    held = model.__dict__.get("_static_steps")
    return [] if held is None else list(held.buckets.values())


def test_a_capture_leaves_other_threads_alone(cuda: FakeCuda) -> None:
    held, ran = graphs.Graphs(DEVICE), []
    held.capture(lambda: ran.append((cuda.current, gc.isenabled())))
    assert ran == [(held.stream, False)] and cuda.current == "default" and gc.isenabled()
    assert cuda.calls == [("begin", held.stream, held.pool, "thread_local"), ("end", held.stream)]


def test_workspaces_of_an_earlier_borrower_are_forgotten_once(cuda: FakeCuda) -> None:
    held = graphs.Graphs(DEVICE)
    held.capture(lambda: None)
    assert not [call for call in cuda.calls if call[0] == "clearCublasWorkspaces"]
    stream, cuda.streams = held.stream, 1
    del held
    gc.collect()
    again = graphs.Graphs(DEVICE)
    for _ in range(3):
        again.capture(lambda: None)
    assert again.stream is stream
    assert [call[0] for call in cuda.calls].count("clearCublasWorkspaces") == 1


@pytest.mark.parametrize("where", ["run", "end"])
def test_a_failed_capture_gives_back_what_it_had(where: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    held, kept = graphs.Graphs(DEVICE), []
    monkeypatch.setattr(graphs, "ABANDONED", kept)
    cuda.broken = where == "end"

    def run() -> None:
        if where == "run":
            raise KeyboardInterrupt

    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        held.capture(run)
    assert cuda.current == "default" and gc.isenabled()
    after = cuda.calls[2:]
    if where == "run":
        assert after == [("endAllocateToPool", 0, held.pool)] and not kept
        return
    assert after[:2] == [("endAllocateToPool", 0, held.pool), ("releasePool", 0, held.pool)] and len(kept) == 1
    # A small capture that ends in order, so that the generators draw again.
    assert after[2:] == [("begin", held.stream, None, "global"), ("end", held.stream)]
    cuda.broken = False
    assert held.capture(lambda: None) is not None


def test_pytorch_has_what_a_failed_capture_calls() -> None:
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert hasattr(torch._C, name)


def test_the_collector_comes_back_with_the_last_capture() -> None:
    assert gc.isenabled()
    with graphs.garbage_kept():
        with graphs.garbage_kept():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with graphs.garbage_kept():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


# Deterministic algorithms


REFUSED = (
    *("scatter_add", "scatter_reduce", "index_add", "put_", "histc", "bincount", "kthvalue", "median"),
    *("cumsum_float", "grid_sampler", "replication_pad", "reflection_pad"),
)
"""Operators that raise on a CUDA device under `torch.use_deterministic_algorithms(True)`."""


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_steps_hold_no_operator_that_is_not_deterministic(
    settings: dict[str, Any], captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forwards, "only_masked", property(lambda self: False, lambda self, value: None), raising=False)
    small_model(eot_token_id=60).generate(*ragged(), **{**SIZES, "cache": "dual", **settings})
    for _, _, log in captures.logs:
        for func, *arguments in log:
            name = func.overloadpacket.__name__
            floats = any(isinstance(a, tuple) and a[-1] in (torch.float32, torch.bfloat16) for a in arguments)
            assert not name.startswith(REFUSED) and not (name == "cumsum" and floats), name
