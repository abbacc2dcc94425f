"""PyTorch's modes around a decode: nothing that outlives a call depends on the mode of the call that made it."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import inputs
import pytest
import script_like
import torch
import torch.nn.functional as F
from captures import captured_on_cpu
from small import RULES, left_pad, prompts, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fdpp
from fdpp import LLaDAModelLM, tiny
from fdpp.decoding import static
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.integrations.evaluation import likelihood
from fdpp.step import parallel, reference
from fdpp.step.canvas import operator, processed_logits, soft_embeddings
from fdpp.step.terms import Terms, pack, streams
from fdpp.trace.record import record

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


# Defaults of dtype and device


class Strays(TorchDispatchMode):
    """Within it the default dtype is float16 and the default device meta: lists the lines that make tensors of it.

    What is computed in it has other dtypes and lies elsewhere. So it finds a factory that was told no dtype as well as
    an integer tensor times a Python float, which has the default dtype, too.
    """

    def __enter__(self) -> list[str]:  # type: ignore[override]
        self.found: list[str] = []
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        super().__enter__()
        self.device = torch.device("meta")
        self.device.__enter__()
        return self.found

    def __exit__(self, *exception: Any) -> None:
        self.device.__exit__(*exception)
        super().__exit__(*exception)
        torch.set_default_dtype(self.before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and (t.dtype == torch.float16 or t.is_meta) for t in tree_leaves(out)):
            line = next(frame for frame in reversed(traceback.extract_stack()[:-1]) if "torch/" not in frame.filename)
            self.found.append(f"{func} in {line.filename}:{line.lineno}: {line.line}")
        return out


EACH: list[dict[str, Any]] = [
    {"cache": "none"},
    {"cache": "dual", "drafts": 3, "temperature": 0.7, "seed": 1},
    {"cache": "prefix", "drafts": "auto", "branches": "tree", "confidence_eos_eot_inf": True},
]


SIZES: dict[str, Any] = {"max_new_tokens": 12, "block_length": 8}


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_decode_makes_a_tensor_with_a_default_dtype_or_device(rule: fdpp.Rule, engine: str) -> None:
    if rule.needs.attention and engine == "static":
        pytest.skip("static steps have no attention for it")
    llada = small_model()
    ids, mask = left_pad([prompts(1, 5 + 3 * b, seed=b)[0] for b in range(2)])
    for settings in EACH:
        settings = {**SIZES, **settings, "rule": rule, "engine": engine}
        if rule.order == "entropy":
            settings.pop("confidence_eos_eot_inf", None)
        want = llada.generate(ids, mask, **settings)
        with Strays() as strays:
            out = llada.generate(ids, mask, **settings)
        assert not strays and equal(out, want)
        assert out.tokens_per_forward.dtype == torch.float64


def arguments(rule: fdpp.Rule) -> dict[str, Any]:
    """Of a step that samples, over so many ids that the argmax runs in two stages."""
    logits = torch.randn(2, 6, 2500, generator=torch.Generator().manual_seed(0)) * 3
    return {"logits": logits, "tokens": torch.full((2, 6), 8), "rule": rule, "mask_id": 8, "temperature": 0.8}


def a_select(rule: fdpp.Rule) -> Callable[[], Any]:
    given = arguments(rule)
    return lambda: fdpp.select(**given, seed=3)


def a_reference(rule: fdpp.Rule) -> Callable[[], Any]:
    given = arguments(rule)
    return lambda: reference.select(**given, seeds=streams(3, 2, given["logits"].device))


def a_module(rule: fdpp.Rule) -> Callable[[], Any]:
    given = arguments(rule)
    step, seeds = fdpp.DenoisingStep(rule, mask_id=8, temperature=0.8), torch.tensor([3, 4])
    return lambda: step(given["logits"], given["tokens"], seeds=seeds)


def a_kernel(rule: fdpp.Rule) -> Callable[[], Any]:
    problem = inputs.random_problem(0, 2, 6, 40, rule, temperature=0.8, active=True)
    return lambda: inputs.run("interpreter", problem)


def slices(rule: fdpp.Rule) -> Callable[[], Any]:
    """Of a row over two slices of the vocabulary, its two summaries merged."""
    rows, at = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    parts = ((0, rows[:, :16]), (16, rows[:, 16:]))

    def merged() -> Any:
        terms = Terms(pack(rule, rows.device), rule.key(), 8, 0.8, streams(3, 4, rows.device))
        # The second slice starts inside of a group, which the first one draws whole.
        others = [F.pad(rows[:, 16:], (16, 24), value=-torch.inf), rows[:, :0]]
        summaries = [
            parallel.summarize(part.clone(), terms, at, at, first, other)
            for (first, part), other in zip(parts, others, strict=True)
        ]
        return parallel.merge(torch.stack(summaries), True, rule.order)

    return merged


def a_trace(rule: fdpp.Rule) -> Callable[[], Any]:
    llada, ids = small_model(), prompts(1, 9)
    config = DiffusionGenerationConfig(max_new_tokens=12, block_length=8, rule=rule)
    return lambda: [(step.missing, step.entropies, step.shown) for step in record(llada, ids, config).steps]


def a_captured_decode(rule: fdpp.Rule) -> Callable[[], Any]:
    llada, ids = small_model(), prompts(2, 9)

    def captured() -> Any:
        llada.warmup(9, 2, engine="static", rule=rule, **SIZES)
        return llada.generate(ids, engine="static", rule=rule, **SIZES).sequences

    def run() -> Any:
        with captured_on_cpu():
            return captured()

    return run


def a_canvas(rule: fdpp.Rule) -> Callable[[], Any]:
    """A step of a canvas, one of three finished, and both ways to condition the next forward; no rule is asked."""
    generator = torch.Generator().manual_seed(0)
    outputs, weight = torch.randn(3, 6, 40, generator=generator), torch.randn(40, 8, generator=generator)
    canvas, finished = torch.randint(40, (3, 6), generator=generator), torch.tensor([False, True, False])
    numbers = torch.tensor([[0.5, 0.7]], dtype=torch.float64)

    def run() -> Any:
        step = operator.step(outputs, canvas, canvas, finished, numbers, streams(3, 3, outputs.device), 30.0)
        logits = processed_logits(outputs, numbers, 30.0, torch.bfloat16, finished)
        return *step, logits, soft_embeddings(outputs, step.lse, numbers, weight, 30.0, 2.0, finished)

    return run


ENTRIES = (a_select, a_reference, a_module, a_kernel, slices, a_trace, a_captured_decode, a_canvas)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_step_makes_a_tensor_with_a_default_dtype_or_device(entry: Callable[[fdpp.Rule], Any]) -> None:
    if entry is a_kernel and not inputs.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    for rule in RULES:
        # One takes its number from a decode's schedule, for the other static steps have no attention.
        if rule == fdpp.Quota() or (entry is a_captured_decode and rule.needs.attention):
            continue
        call = entry(rule)
        want = call()
        with Strays() as strays:
            got = call()
        assert not strays
        assert all(same(a, b) for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True)), rule


def same(a: Any, b: Any) -> bool:
    return (a.dtype == b.dtype and a.equal(b)) if isinstance(a, Tensor) else a == b


def test_no_likelihood_forward_or_script_makes_one() -> None:
    llada, ids = small_model(), prompts(2, 9)
    pair = likelihood.Pair([1, 2, 3], [4, 5, 6])
    logits, x = torch.randn(2, 6, 40), torch.full((2, 6), 39)
    call = {"logits": logits, "temperature": 0.0, "remasking": "low_confidence", "mask_index": x == 39, "x": x}

    def everything() -> Any:
        scores = list(likelihood.log_likelihoods(llada, [pair], samples=4, batch_size=3))
        with torch.no_grad(), fdpp.patch(script_like):
            chosen = script_like.get_transfer_index_dynamic(**call, num_transfer_tokens=None, factor=1.2)
            return scores, llada(ids).logits, chosen

    want = everything()
    with Strays() as strays:
        got = everything()
    assert not strays and all(same(a, b) for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True))


@pytest.mark.parametrize("name", tiny.TASKS)
def test_training_batches_are_those_of_float32(name: str) -> None:
    from fdpp.tiny import train
    from fdpp.tiny.tokenizer import build_tokenizer

    task = tiny.TASKS[name]
    tokenizer = build_tokenizer(task.words)
    for seed, cached in ((3, False), (3, True), (4, True), (5, True), (6, True)):
        want = train.make_batch(task, tokenizer, seed, 512, cached)
        with Strays() as strays:
            got = train.make_batch(task, tokenizer, seed, 512, cached)
        assert not strays and all(map(same, got, want))


def test_what_a_sudoku_can_become_does_not_hang_on_the_mode() -> None:
    from fdpp.tiny import sudoku

    problem = sudoku.generate("held-out", 1)[0]
    words = [*problem.response.split(), "<eos>"]
    kept = sudoku.grids(), sudoku.labels()
    sudoku.grids.cache_clear()
    sudoku.labels.cache_clear()
    with Strays() as strays:
        assert sudoku.completable(words, problem)
        assert sudoku.grids().equal(kept[0]) and sudoku.labels().equal(kept[1])
    assert not strays


def test_a_checkpoint_keeps_its_dtype_and_a_new_model_has_the_default_one() -> None:
    """As `nn.Linear` and `from_pretrained` have it."""
    with default_dtype(torch.bfloat16):
        assert {p.dtype for p in tiny.load()[0].parameters()} == {torch.float32}
        assert {p.dtype for p in small_model().parameters()} == {torch.bfloat16}


FACTORIES = {
    *("tensor", "as_tensor", "scalar_tensor", "zeros", "ones", "empty", "full", "eye", "empty_strided"),
    *("arange", "linspace", "logspace", "rand", "randn", "randint", "randperm", "normal"),
}
OF_THE_DEFAULT_TYPE = {"Tensor", "FloatTensor", "get_default_dtype"}


def test_every_factory_is_told_its_dtype_and_its_device() -> None:
    """`arange` of whole numbers has a dtype of its own; a module's weights have the default dtype, as `nn.Linear`'s."""
    loose, calls = [], 0
    for path in sorted(Path(fdpp.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        weights = {id(call.args[0]) for call in ast.walk(tree) if named(call, "nn", {"Parameter"})}
        for node in ast.walk(tree):
            where = (
                f"{path.name}:{getattr(node, 'lineno', 0)}: {ast.unparse(node) if isinstance(node, ast.Call) else ''}"
            )
            if named(node, "torch", OF_THE_DEFAULT_TYPE):
                loose.append(where)
            if named(node, "torch", {"where"}) and all(isinstance(part, ast.Constant) for part in node.args[1:]):
                loose.append(where)
            if not named(node, "torch", FACTORIES) or id(node) in weights:
                continue
            calls += 1
            told = {keyword.arg for keyword in node.keywords}
            if node.func.attr == "arange" and not any(isinstance(getattr(a, "value", 0), float) for a in node.args):
                told.add("dtype")
            if not {"dtype", "device"} <= told:
                loose.append(where)
    assert not loose and calls > 50


def named(node: Any, module: str, names: set[str]) -> bool:
    """Whether `node` is a call of one of `module`'s `names`."""
    function = node.func if isinstance(node, ast.Call) else None
    is_attribute = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
    return is_attribute and function.value.id == module and function.attr in names
