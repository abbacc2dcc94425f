"""Other people's scripts, models and modules with our step: what is patched, that it works, that nothing stays."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import remote_like
import torch
from golden import SelectorCase, model, selector_case, selector_index, trajectories
from small import MASK, prompts, small_dream, small_model
from torch import Tensor, nn

import fdpp
from fdpp import patching
from fdpp.models.families import families
from fdpp.models.language_model import DiffusionLM
from fdpp.patching import scripts, transfer

NAMES = tuple(scripts.SELECTORS)
pytestmark = pytest.mark.filterwarnings("ignore:.*rope_scaling. is deprecated")  # the published configuration has it


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of its own: as if the script had been imported just now."""
    path = Path(__file__).parent / "helpers" / "script_like.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "generate", module)
    spec.loader.exec_module(module)
    return module


def everything(target: Any) -> dict[Any, Any]:
    """Everything that a target holds, by identity."""
    if isinstance(target, ModuleType):
        return {name: id(value) for name, value in vars(target).items()}
    held: dict[Any, Any] = {"order": [path for path, _ in target.named_modules(remove_duplicate=False)]}
    for path, module in target.named_modules(remove_duplicate=False):
        for table in (vars(module), module._modules, module._parameters, module._buffers):
            held |= {(path, name): id(value) for name, value in table.items()}
    held |= {("data", name): tensor.data_ptr() for name, tensor in target.state_dict(keep_vars=True).items()}
    return held


# Scripts


def arguments_of(run: dict[str, Any], case: SelectorCase) -> dict[str, Any]:
    """Keyword arguments of a recorded call."""
    params = {name: value for name, value in run["params"].items() if name != "mask_limited_to_block"}
    if "threshold" in params or run["func"] == "get_transfer_index_dynamic":
        params.setdefault("num_transfer_tokens", None)
    if params.get("num_transfer_tokens") is not None:
        params["num_transfer_tokens"] = torch.tensor(params["num_transfer_tokens"])
    mask = case.mask
    if run["params"].get("mask_limited_to_block"):
        end = next(other["params"]["block_end"] for other in case.runs if other["peer"] == "llada")
        mask = mask & (torch.arange(mask.shape[1]) < end)
    return {
        "logits": case.logits,
        "temperature": 0.0,
        "remasking": "low_confidence",
        "mask_index": mask,
        "x": case.x,
        **params,
    }


def compared(case: SelectorCase, index: int, row: int, x0: Tensor, transferred: Tensor, formula: Tensor) -> str:
    """How a row of a patched call compares with the recorded one, for the census; `formula`: the stand-in's."""
    run, theirs = case.runs[index], case.transfer_index[index, row]
    mask = case.mask[row]
    assert not (transferred & ~mask).any()
    if (mask & (case.argmax[row] == case.mask_id)).any():
        assert (x0[mask] != case.mask_id).all()
        return "mask id is the argmax"
    assert x0.equal(torch.where(mask, case.x0[index, row], case.x[row]))
    if run["slack"] is not None and run["slack"] <= 1e-6:
        return "decided by rounding or a tie"
    assert transferred.equal(formula)
    if row in run["deviates_rows"]:
        assert not transferred.equal(theirs)
        return "published code breaks its rule"
    assert transferred.equal(theirs & mask)
    return "equal"


CENSUS = {
    "std": {"equal": 4152, "published code breaks its rule": 98},
    "edge": {
        "equal": 621,
        "published code breaks its rule": 23,
        "decided by rounding or a tie": 65,
        "mask id is the argmax": 34,
    },
    "orig": {"equal": 55},
    "attn": {"equal": 453, "published code breaks its rule": 32},
}
"""Rows of recorded calls by how they compare."""


@pytest.mark.parametrize("group", CENSUS)
def test_returns_what_the_published_functions_returned(script: ModuleType, group: str) -> None:
    census: Counter[str] = Counter()
    for entry in (entry for entry in selector_index() if entry["group"] == group):
        case = selector_case(entry["id"])
        for index, run in enumerate(case.runs):
            if run["func"] not in NAMES:
                continue
            arguments = arguments_of(run, case)
            _, formula = getattr(script, run["func"])(**arguments)
            with fdpp.patch(script):
                x0, transferred = getattr(script, run["func"])(**arguments)
            assert (x0.dtype, transferred.dtype) == (torch.int64, torch.bool)
            for row in range(len(x0)):
                try:
                    census[compared(case, index, row, x0[row], transferred[row], formula[row])] += 1
                except AssertionError as error:
                    raise AssertionError(f"case {entry['id']}, run {index} {run['func']}, row {row}") from error
    assert census == CENSUS[group]


def decodes() -> list[Any]:
    runs = [t for peer in ("fastdllm", "fastdllmpp") for t in trajectories(peer)]
    chosen = {
        (t.peer, t.run["mode"]): t
        for t in runs
        if t.run["func"] == "generate" and t.run["model"] == "model_tiny" and t.run["stable"]
        if not t.run["mode"].startswith("factor")
    }
    return [pytest.param(t, id=t.id) for t in chosen.values()]


@pytest.mark.parametrize("trajectory", decodes())
def test_a_script_decodes_as_published(script: ModuleType, trajectory: Any) -> None:
    calls: list[str] = []
    arguments = (model("model_tiny"), trajectory.prompt)
    plain = script.generate(*arguments, **trajectory.run["params"])
    fdpp.patch(script)
    for name in NAMES:
        watched(script, name, calls)
    x, nfe = script.generate(*arguments, **trajectory.run["params"])
    assert x.equal(trajectory.out) and nfe == trajectory.run["nfe"] == len(calls)
    assert plain[0].equal(x) and plain[1] == nfe


def watched(script: ModuleType, name: str, calls: list[str]) -> None:
    function = getattr(script, name)
    setattr(script, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))


def problem(B: int = 2, L: int = 12, V: int = 40, seed: int = 0) -> dict[str, Any]:
    """Arguments whose masked positions lie in the middle; at one of them the mask id is the argmax."""
    g = torch.Generator().manual_seed(seed)
    mask_index = torch.zeros(B, L, dtype=torch.bool)
    mask_index[:, 3:9] = True
    logits = 6 * torch.randn(B, L, V, generator=g)
    logits[0, 5, V - 1] = 30
    x = torch.randint(0, V - 1, (B, L), generator=g).masked_fill(mask_index, V - 1)
    return {"logits": logits, "temperature": 0.0, "remasking": "low_confidence", "mask_index": mask_index, "x": x}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of every step of ours that a script takes."""
    seen: list[Any] = []
    step = transfer.prefix_step
    monkeypatch.setattr(transfer, "prefix_step", lambda *args: seen.append(args) or step(*args))
    return seen


def test_a_patch_runs_the_fused_step_on_the_masked_columns(script: ModuleType, fused: list[Any]) -> None:
    fdpp.patch(script)
    arguments = problem()
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    x0, transferred = script.get_transfer_index_frechet_profile(**arguments, margin=0.1)
    expected = fdpp.select(arguments["logits"], arguments["x"], rule=fdpp.Frechet(0.1), mask_id=39)
    assert x0.equal(expected.proposal) and transferred.equal(expected.committed)
    assert [(tuple(logits.shape), terms.mask_id) for logits, *_, terms in fused] == [((2, 6, 40), 39)]
    assert all(arguments[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize("margin", [0.0, -0.5, 0.9])
def test_numbers_of_all_kinds(script: ModuleType, margin: float, fused: list[Any]) -> None:
    """Also bounds that our rules refuse, one number per row, a quota of 0 and one above the number of masks."""
    arguments = problem()
    arguments["logits"][..., 39] = -30
    quotas = (torch.tensor([0, 4]), torch.tensor([[2], [3]]), torch.tensor([99, 1]))
    calls: list[tuple[str, dict[str, Any]]] = [
        ("get_transfer_index_frechet_profile", {"margin": margin}),
        ("get_transfer_index_dynamic", {"num_transfer_tokens": None, "factor": 1 - margin}),
        ("get_transfer_index", {"num_transfer_tokens": None, "threshold": 0.8 + margin}),
        *(("get_transfer_index", {"num_transfer_tokens": quota}) for quota in quotas),
    ]
    for name, numbers in calls:
        expected = getattr(script, name)(**arguments, **numbers)
        with fdpp.patch(script):
            came = getattr(script, name)(**arguments, **numbers)
        assert all(a.equal(b) for a, b in zip(came, expected, strict=True)), (name, numbers)
    assert len(fused) == len(calls)


def test_as_many_quotas_as_rows(script: ModuleType, fused: list[Any]) -> None:
    arguments = {**problem(), "num_transfer_tokens": torch.tensor([1, 2, 3])}
    expected = script.get_transfer_index(**arguments)
    fdpp.patch(script)
    assert script.get_transfer_index(**arguments)[1].equal(expected[1]) and not fused


def test_the_modules_own_defaults(script: ModuleType) -> None:
    script.get_transfer_index_frechet_profile.__defaults__ = (0.8,)
    arguments = tuple(problem().values())
    fdpp.patch(script)
    by_default = script.get_transfer_index_frechet_profile(*arguments)[1]
    assert by_default.equal(script.get_transfer_index_frechet_profile(*arguments, 0.8)[1])
    assert not by_default.equal(script.get_transfer_index_frechet_profile(*arguments, margin=0.0)[1])


def test_the_mask_id_is_never_proposed(script: ModuleType) -> None:
    arguments = problem()
    plain = script.get_transfer_index_dynamic(**arguments, num_transfer_tokens=None)[0]
    fdpp.patch(script)
    x0 = script.get_transfer_index_dynamic(**arguments, num_transfer_tokens=None)[0]
    differs = plain != x0
    assert differs.nonzero().tolist() == [[0, 5]] and plain[0, 5] == 39


def test_masked_positions_that_hold_several_ids(script: ModuleType, fused: list[Any]) -> None:
    """What they hold is then no mask id, and may be proposed."""
    arguments = problem()
    arguments["x"][1, 4] = 7
    arguments["logits"][1, 6, 7] = 30
    expected = script.get_transfer_index(**arguments, num_transfer_tokens=None, threshold=0.7)
    fdpp.patch(script)
    came = script.get_transfer_index(**arguments, num_transfer_tokens=None, threshold=0.7)
    assert all(a.equal(b) for a, b in zip(came, expected, strict=True)) and len(fused) == 1
    assert came[0][0, 5] == 39 and came[0][1, 6] == 7


def test_nothing_masked_in_a_row_or_at_all(script: ModuleType) -> None:
    fdpp.patch(script)
    arguments = problem()
    arguments["mask_index"][0] = False
    x0, transferred = script.get_transfer_index(**arguments, num_transfer_tokens=torch.tensor([3, 3]))
    assert x0[0].equal(arguments["x"][0]) and transferred.sum(1).tolist() == [0, 3]
    arguments["mask_index"][1] = False
    x0, transferred = script.get_transfer_index(**arguments, num_transfer_tokens=torch.tensor([3, 3]))
    assert x0.equal(arguments["x"]) and not transferred.any()


def test_long_sequences_and_recorded_gradients(script: ModuleType, fused: list[Any]) -> None:
    """The published loops pass prompt and response together; the original takes what has too many masked columns."""
    arguments = problem(L=1500)
    arguments["logits"][..., 39] = -30
    arguments["logits"].requires_grad_()
    for calls, last in ((1, 1026), (1, 1400)):
        arguments["mask_index"][1, last] = True
        arguments["x"][1, last] = 39
        expected = script.get_transfer_index(**arguments, num_transfer_tokens=torch.tensor([2, 5]))
        with fdpp.patch(script):
            came = script.get_transfer_index(**arguments, num_transfer_tokens=torch.tensor([2, 5]))
        assert all(a.equal(b) for a, b in zip(came, expected, strict=True))
        assert len(fused) == calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change", [{"temperature": 0.7}, {"remasking": "random"}, {"logits": problem()["logits"].double()}], ids=str
)
def test_what_the_step_cannot_do_is_left_to_the_original(script: ModuleType, name: str, change: dict[str, Any]) -> None:
    """The same seed of torch's generator gives the same values. Only the original proposes the mask id."""
    arguments = {**problem(), **change}
    if "margin" not in scripts.parameters_of(name):
        arguments["num_transfer_tokens"] = torch.tensor([2, 3])
    torch.manual_seed(5)
    expected = getattr(script, name)(**arguments)
    fdpp.patch(script)
    torch.manual_seed(5)
    came = getattr(script, name)(**arguments)
    assert all(a.equal(b) for a, b in zip(came, expected, strict=True))
    assert came[0][0, 5] == 39


def test_calls_that_do_not_fit_fail_as_before(script: ModuleType) -> None:
    arguments = problem()
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception]]] = [
        ((), {**arguments, "remasking": "other", "num_transfer_tokens": None}, NotImplementedError),
        ((), arguments, TypeError),
        ((), {**arguments, "num_transfer_tokens": None, "margin": 0.1}, TypeError),
        ((arguments["logits"],), {**arguments, "num_transfer_tokens": torch.tensor([2, 3])}, TypeError),
        ((*arguments.values(), None, 0.5, 1), {}, TypeError),
        ((), {**arguments, "num_transfer_tokens": None}, AttributeError),
    ]
    for args, kwargs, error in wrong:
        with pytest.raises(error) as before:
            script.get_transfer_index(*args, **kwargs)
        with fdpp.patch(script), pytest.raises(error, match=re.escape(str(before.value))):
            script.get_transfer_index(*args, **kwargs)


@pytest.mark.parametrize("kept", [NAMES, NAMES[:1], NAMES[2:]])
def test_only_what_a_module_has_is_patched(script: ModuleType, kept: tuple[str, ...]) -> None:
    for name in set(NAMES) - set(kept):
        delattr(script, name)
    before = dict(vars(script))
    fdpp.patch(script)
    assert {name for name in before if vars(script)[name] is not before[name]} == set(kept)
    for name in kept:
        assert getattr(script, name).__doc__ == before[name].__doc__ and getattr(script, name).__name__ == name
    fdpp.unpatch(script)
    assert vars(script) == before


@pytest.mark.parametrize(
    ("function", "came"),
    [
        (lambda logits, x, margin=0.0: None, "(logits, x, margin=0.0)"),
        (lambda logits, temperature, remasking, mask_index, x, *, margin: None, "x, margin)"),
        (lambda logits, temperature, remasking, mask_index, x, tau=0.0: None, "x, tau=0.0)"),
        (0.5, "got (0.5)"),
    ],
)
def test_other_parameters_are_refused(script: ModuleType, function: Any, came: str) -> None:
    script.get_transfer_index_frechet_profile = function
    before = everything(script)
    with pytest.raises(ValueError, match="expected the parameters") as error:
        fdpp.patch(script)
    assert came in str(error.value)
    assert "(logits, temperature, remasking, mask_index, x, margin)" in str(error.value)
    assert everything(script) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_callers_follow(script: ModuleType, name: str, backend: str) -> None:
    torch._dynamo.reset()
    arguments = problem()
    if "margin" not in scripts.parameters_of(name):
        arguments["num_transfer_tokens"] = torch.tensor([2, 3])

    def call() -> tuple[Tensor, Tensor]:
        x0, transferred = getattr(script, name)(**arguments)
        return x0 + 1, transferred

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    plain = compiled()
    assert plain[0][0, 5] == 40
    for _ in range(2):
        with fdpp.patch(script):
            came, expected = compiled(), call()
            assert all(a.equal(b) for a, b in zip(came, expected, strict=True))
            assert came[0][0, 5] != 40
        assert compiled()[0].equal(plain[0])


def test_the_operator_is_registered_properly() -> None:
    arguments = problem()
    params = torch.tensor([[0.1, 0.0, 0.0]], dtype=torch.float64).expand(2, 3).clone()
    key = fdpp.Frechet.key()
    torch.library.opcheck(
        transfer.transfer_op, (arguments["logits"], arguments["mask_index"], arguments["x"], params, key)
    )


# Models with remote code


class Kind(NamedTuple):
    """A family: our small model, the published class and its configuration, and where the layers are.

    `places` are of an embedding, a query's layer, a norm, an up projection, the last norm and the head, each with the
    size of what it returns.
    """

    small: Callable[..., Any]
    published: Any
    config: Any
    kv: dict[str, Any]
    places: dict[str, int]
    head: str

    def ours(self, seed: int = 0, **config: Any) -> Any:
        return self.small(seed, **config)

    def remote(self, seed: int = 0, **config: Any) -> Any:
        """The stand-in for the checkpoint's code, with the weights of our small model."""
        ours = self.small(seed, **config)
        theirs = self.published(self.config(**ours.config.to_dict())).eval()
        theirs.load_state_dict(ours.state_dict(), strict=not ours.config.tie_word_embeddings)
        return theirs

    def logits(self, theirs: Any, ids: Tensor) -> Tensor:
        """Of the tokens in the columns of `ids`."""
        rows: Tensor = theirs(ids).logits
        return self.small().aligned(rows)


KINDS = {
    "LLaDA": Kind(
        small_model,
        remote_like.LLaDAModelLM,
        remote_like.LLaDAConfig,
        {"n_kv_heads": 2},
        {
            "model.transformer.wte": 32,
            "model.transformer.blocks.0.q_proj": 32,
            "model.transformer.blocks.1.attn_norm": 32,
            "model.transformer.blocks.1.up_proj": 48,
            "model.transformer.ln_f": 32,
            "model.transformer.ff_out": 64,
        },
        "model.transformer.ff_out",
    ),
    "Dream": Kind(
        small_dream,
        remote_like.DreamModel,
        remote_like.DreamConfig,
        {"num_key_value_heads": 2},
        {
            "model.embed_tokens": 32,
            "model.layers.0.self_attn.q_proj": 32,
            "model.layers.1.input_layernorm": 32,
            "model.layers.1.mlp.up_proj": 48,
            "model.norm": 32,
            "lm_head": 64,
        },
        "lm_head",
    ),
}


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def remote(seed: int = 0, **config: Any) -> Any:
    return KINDS["LLaDA"].remote(seed, **config)


SETTINGS = {"max_new_tokens": 24, "block_length": 8, "stop_at_eos": False}


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_decodes_as_our_model(family: Kind, cache: str, engine: str) -> None:
    theirs, ours = family.remote(**family.kv), family.ours(**family.kv)
    before = everything(theirs)
    ids, mask = prompts(3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[1, :2] = 0
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
    with fdpp.patch(theirs):
        out = theirs.generate(ids, mask, cache=cache, engine=engine, **SETTINGS)
    expected = ours.generate(ids, mask, cache=cache, engine=engine, **SETTINGS)
    assert out.sequences.equal(expected.sequences) and out.nfe.equal(expected.nfe)
    assert everything(theirs) == before


@pytest.mark.parametrize("config", [{"weight_tying": True}, {"embedding_size": 80}], ids=str)
def test_other_heads_and_configurations(config: dict[str, Any]) -> None:
    theirs, ids = remote(**config).train(), prompts(2, 5)
    if config.get("embedding_size"):
        theirs.config = SimpleNamespace(**theirs.config.to_dict())
    before = everything(theirs)
    fdpp.patch(theirs)
    assert all(before[key] == value for key, value in everything(theirs).items() if key in before and key != "order")
    expected = small_model(**config).generate(ids, **SETTINGS).sequences
    assert theirs.generate(ids, **SETTINGS).sequences.equal(expected)


@pytest.mark.parametrize("engine", ["eager", "static"])
def test_no_weight_is_copied_or_moved(family: Kind, engine: str) -> None:
    theirs = family.remote()
    pointers = {name: weight.data_ptr() for name, weight in theirs.named_parameters()}
    fdpp.patch(theirs)
    theirs.generate(prompts(1, 5), engine=engine, **SETTINGS)
    decoder = dict(theirs.generate.__self__.named_parameters())
    assert decoder.keys() == pointers.keys()
    for name, weight in theirs.named_parameters():
        assert decoder[name] is weight
        assert weight.data_ptr() == pointers[name] and weight.untyped_storage().nbytes() == weight.nbytes


@pytest.mark.parametrize("change", ["to", "assign", "in place", "hook"])
def test_later_changes_of_the_weights_are_seen(family: Kind, change: str) -> None:
    theirs, ids = family.remote(), prompts(2, 5)
    fdpp.patch(theirs)
    before = theirs.generate(ids, **SETTINGS).sequences
    expected = family.ours(1).generate(ids, **SETTINGS).sequences
    if change == "to":
        theirs.to(torch.bfloat16)
        expected = fdpp.patch(family.remote().to(torch.bfloat16)).target.generate(ids, **SETTINGS).sequences
        assert theirs.generate.__self__.dtype == torch.bfloat16
    elif change == "hook":
        theirs.load_state_dict(family.ours(1).state_dict())
        layer = theirs.get_submodule(list(family.places)[1])
        calls: list[int] = []
        layer.register_forward_hook(lambda *_: calls.append(1))
    else:
        theirs.load_state_dict(family.ours(1).state_dict(), assign=change == "assign")
    out = theirs.generate(ids, **SETTINGS)
    assert out.sequences.equal(expected) and not out.sequences.equal(before)
    assert change != "hook" or len(calls) >= out.nfe.max()


class Shifted(nn.Module):
    """A layer in the place of another one, with a weight of its own beside it."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.shift = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(size)))

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shift


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("place", range(6), ids=["embedding", "queries", "norm", "up", "last norm", "head"])
def test_a_layer_that_is_replaced_later_is_called(family: Kind, place: int, engine: str) -> None:
    theirs, ids = family.remote(), prompts(2, 5)
    fdpp.patch(theirs)
    before = theirs.generate(ids, engine=engine, **SETTINGS).sequences
    path, size = list(family.places.items())[place]
    layer = theirs.get_submodule(path)
    theirs.set_submodule(path, Shifted(layer, size))
    ours = family.ours()
    ours.set_submodule(path, Shifted(ours.get_submodule(path), size))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    for _ in range(2):
        after = theirs.generate(ids, engine=engine, **SETTINGS).sequences
        assert after.equal(ours.generate(ids, **SETTINGS).sequences) and not after.equal(before)
    theirs.set_submodule(path, layer)
    assert theirs.generate(ids, engine=engine, **SETTINGS).sequences.equal(before)


def test_a_body_that_is_replaced_later_is_decoded(family: Kind) -> None:
    theirs, ids = family.remote(), prompts(2, 5)
    generate = fdpp.patch(theirs).target.generate
    other, ours = family.remote(1), family.ours(1)
    theirs.model = other.model
    ours.set_output_embeddings(theirs.get_submodule(family.head))
    expected = ours.generate(ids, **SETTINGS).sequences
    assert theirs.generate(ids, **SETTINGS).sequences.equal(expected)
    del theirs
    assert generate(ids, **SETTINGS).sequences.equal(expected)


def test_a_patched_model_is_saved_whole(family: Kind, tmp_path: Path) -> None:
    theirs, ids = family.remote(), prompts(2, 5)
    fdpp.patch(theirs)
    expected = theirs.generate(ids, **SETTINGS).sequences
    torch.save(theirs, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert again.generate(ids, **SETTINGS).sequences.equal(expected)
    again.model = family.remote(1).model
    assert not again.generate(ids, **SETTINGS).sequences.equal(expected)
    fdpp.unpatch(again)
    assert "generate" not in vars(again)


def test_only_the_instance_changes(family: Kind) -> None:
    theirs, other, ids = family.remote(), family.remote(1), prompts(1, 5)
    untouched, kind = everything(other), dict(vars(type(theirs)))
    names, modules = dict(theirs.state_dict()).keys(), set(vars(theirs))
    with torch.no_grad():
        logits = theirs(ids).logits
        fdpp.patch(theirs)
        assert theirs(ids).logits.equal(logits)
    assert everything(other) == untouched and vars(type(theirs)) == kind
    assert dict(theirs.state_dict()).keys() == names
    assert set(vars(theirs)) - modules == {"generate", "infill", patching.RECORD}


def test_a_patch_registers_no_family() -> None:
    """Its class derives from a family's, and has that one's configuration."""
    before = dict(families())
    for kind in KINDS.values():
        fdpp.patch(kind.remote())
    assert families() == before and {fdpp.LLaDAModelLM, fdpp.DreamModelLM} <= set(before.values())


def test_dreams_own_loop_stays() -> None:
    theirs = KINDS["Dream"].remote()
    before = theirs.diffusion_generate
    with fdpp.patch(theirs):
        assert theirs.diffusion_generate == before and theirs.diffusion_generate(3) == 3
    assert not hasattr(theirs, "generate")


def test_a_generate_of_the_instances_own_comes_back(family: Kind) -> None:
    theirs = family.remote()
    theirs.generate, theirs.denoising_step = own = (lambda: 5), nn.Identity()
    before = everything(theirs)
    fdpp.patch(theirs)
    assert isinstance(theirs.denoising_step, fdpp.DenoisingStep) and theirs.generate is not own[0]
    fdpp.unpatch(theirs)
    assert (theirs.generate, theirs.denoising_step) == own and everything(theirs) == before


def test_the_denoising_step(family: Kind) -> None:
    theirs, ids = family.remote(), torch.cat((prompts(2, 4), torch.full((2, 6), MASK)), dim=1)
    fdpp.patch(theirs)
    with torch.no_grad():
        logits = family.logits(theirs, ids)
    expected = fdpp.select(logits, ids, rule=fdpp.Frechet(0.25), mask_id=MASK)
    assert theirs.denoising_step(logits, ids).tokens.equal(expected.tokens)
    torch._dynamo.reset()
    step = torch.compile(theirs.denoising_step, fullgraph=True, backend="eager")
    assert step(logits, ids).committed.equal(expected.committed)


def test_the_denoising_step_lies_and_moves_with_the_model() -> None:
    theirs = remote().to("meta")
    fdpp.patch(theirs)
    assert theirs.denoising_step.bits.device.type == "meta"
    fdpp.unpatch(theirs)
    theirs = remote()
    fdpp.patch(theirs)
    assert theirs.to("meta").denoising_step.bits.device.type == "meta"


def test_a_copy_is_patched_by_itself(family: Kind) -> None:
    theirs, ids = family.remote(), prompts(2, 5)
    fdpp.patch(theirs)
    twin = copy.deepcopy(theirs)
    expected = theirs.generate(ids, **SETTINGS).sequences
    theirs.load_state_dict(family.ours(1).state_dict())
    assert twin.generate(ids, **SETTINGS).sequences.equal(expected)
    assert not theirs.generate(ids, **SETTINGS).sequences.equal(expected)
    fdpp.unpatch(twin)
    assert "generate" not in vars(twin) and "generate" in vars(theirs)


def test_a_compiled_model(family: Kind) -> None:
    torch._dynamo.reset()
    theirs, ids = family.remote(), prompts(2, 5)
    compiled = torch.compile(theirs, fullgraph=True, backend="eager")
    before = everything(theirs)
    with torch.no_grad():
        logits = compiled(ids).logits
        for _ in range(2):
            with fdpp.patch(compiled) as patched:
                assert patched is compiled and compiled(ids).logits.equal(logits)
                assert patched.generate(ids, **SETTINGS).sequences.shape == (2, 29)
            assert compiled(ids).logits.equal(logits) and everything(theirs) == before


def drop(theirs: Any) -> None:
    del theirs.model.transformer.blocks[1].q_proj


def reshape(theirs: Any) -> None:
    theirs.model.transformer.ln_f.weight = nn.Parameter(torch.ones(7))


def quantise(theirs: Any) -> None:
    layer = theirs.model.transformer.blocks[0].up_proj
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


def bias(theirs: Any) -> None:
    theirs.model.transformer.blocks[0].q_proj.bias = nn.Parameter(torch.zeros(32))


def configure(theirs: Any) -> None:
    theirs.config.block_group_size = 2


def unconfigure(theirs: Any) -> None:
    theirs.config = None


def unmask(theirs: Any) -> None:
    theirs.config.mask_token_id = None


def occupy(theirs: Any) -> None:
    theirs.denoising_step = 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "missing model.transformer.blocks.1.q_proj.weight [32, 32]"),
        (reshape, "model.transformer.ln_f.weight: expected [32], got [7]"),
        (quantise, "model.transformer.blocks.0.up_proj.weight: expected [48, 32], got [48, 32] torch.int8"),
        (bias, "unexpected model.transformer.blocks.0.q_proj.bias"),
        (configure, "block_group_size=2 is not implemented"),
        (unconfigure, "expected a config, found none"),
        (unmask, "config.mask_token_id: expected the id of the mask, got None"),
        (occupy, "expected no attribute denoising_step"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_untouched(damage: Any, message: str) -> None:
    theirs = remote()
    damage(theirs)
    before = everything(theirs)
    with pytest.raises(ValueError, match=re.escape(message)):
        fdpp.patch(theirs)
    assert everything(theirs) == before


def unbias(theirs: Any) -> None:
    theirs.model.layers[1].self_attn.v_proj.bias = None


def bias_elsewhere(theirs: Any) -> None:
    theirs.model.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.zeros(32))


def reshape_bias(theirs: Any) -> None:
    theirs.model.layers[0].self_attn.k_proj.bias = nn.Parameter(torch.zeros(5))


def slide(theirs: Any) -> None:
    theirs.config.use_sliding_window = True


DREAM_DAMAGE = [
    (unbias, "missing model.layers.1.self_attn.v_proj.bias [16]"),
    (bias_elsewhere, "unexpected model.layers.0.self_attn.o_proj.bias"),
    (reshape_bias, "model.layers.0.self_attn.k_proj.bias: expected [16], got [5]"),
]


@pytest.mark.parametrize(("damage", "message"), [*DREAM_DAMAGE, (slide, "use_sliding_window=True is not implemented")])
def test_a_dream_that_does_not_fit_is_refused_untouched(damage: Any, message: str) -> None:
    theirs = KINDS["Dream"].remote(num_key_value_heads=2)
    damage(theirs)
    before = everything(theirs)
    with pytest.raises(ValueError, match=re.escape(message)):
        fdpp.patch(theirs)
    assert everything(theirs) == before


@pytest.mark.parametrize(("damage", "message"), DREAM_DAMAGE)
def test_a_patched_dream_that_no_longer_fits_is_refused_by_name(damage: Any, message: str) -> None:
    theirs, ids = KINDS["Dream"].remote(num_key_value_heads=2), prompts(1, 5)
    fdpp.patch(theirs)
    theirs.model = KINDS["Dream"].remote(1, num_key_value_heads=2).model
    damage(theirs)
    with pytest.raises(ValueError, match=r"generate of a patched DreamModel: .*" + re.escape(message)):
        theirs.generate(ids, **SETTINGS)


def wrong_size(theirs: Any) -> None:
    theirs.model.transformer.blocks[0].ff_out = nn.Linear(48, 16, bias=False)


def wrong_size_within(theirs: Any) -> None:
    layer = Shifted(nn.Linear(32, 16), 16)
    layer.in_features, layer.out_features = 32, 16
    theirs.model.transformer.blocks[0].k_proj = layer


def another_block(theirs: Any) -> None:
    theirs.model.transformer.blocks[1] = Shifted(theirs.model.transformer.blocks[1], 32)


def beside(theirs: Any) -> None:
    drop(theirs)
    theirs.model.transformer.blocks[0].extra = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "missing model.transformer.blocks.1.q_proj.weight [32, 32]"),
        (bias, "unexpected model.transformer.blocks.0.q_proj.bias"),
        (wrong_size, "model.transformer.blocks.0.ff_out.weight: expected [32, 48], got [16, 48] torch.float32"),
        (wrong_size_within, "model.transformer.blocks.0.k_proj: expected [32, 32], got [16, 32] of a Shifted"),
        (another_block, "missing model.transformer.blocks.1.attn_norm.weight [32]"),
        (beside, "unexpected model.transformer.blocks.0.extra.weight"),
    ],
)
def test_a_patched_model_that_no_longer_fits_is_refused_by_name(damage: Any, message: str) -> None:
    theirs, ids = remote(), prompts(1, 5)
    fdpp.patch(theirs)
    if damage is bias:
        theirs.model.transformer.blocks[0].q_proj = nn.Linear(32, 32, bias=False)
    damage(theirs)
    for decode in (lambda: theirs.generate(ids, **SETTINGS), lambda: theirs.generate.__self__.warmup(5)):
        with pytest.raises(ValueError, match=r"generate of a patched LLaDAModelLM: .*" + re.escape(message)):
            decode()
    fdpp.unpatch(theirs)


# Modules that hold a step


class TakeAll(nn.Module):
    """A step of somebody else's: commits every masked position, whatever its rule."""

    def __init__(self, rule: Any, mask_id: int = 19) -> None:
        super().__init__()
        self.rule, self.mask_id = rule, mask_id

    def forward(
        self, logits: Tensor, tokens: Tensor, active: Tensor | None = None, seeds: Tensor | None = None
    ) -> fdpp.Selection:
        committed = tokens == self.mask_id
        out = torch.where(committed, logits.argmax(-1), tokens)
        return fdpp.Selection(out, out, logits[..., 0], committed, committed.sum(1), committed.sum(1))


class Decoder(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(8, 20, bias=False)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(1))
        self.step = step
        self.tail = nn.Identity()

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.tail(self.step(self.head(hidden), tokens).tokens)


HIDDEN, TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), torch.full((2, 6), 19)


def test_a_step_is_exchanged_and_comes_back() -> None:
    child = TakeAll(fdpp.Quota(2)).eval()
    child.temperature = 0.5
    decoder = Decoder(child)
    before = everything(decoder)
    fdpp.patch(decoder)
    assert type(decoder.step) is fdpp.DenoisingStep and not decoder.step.training and decoder.training
    assert (decoder.step.rule, decoder.step.mask_id, decoder.step.temperature) == (fdpp.Quota(2), 19, 0.5)
    assert list(decoder._modules) == ["head", "step", "tail"]
    fdpp.unpatch(decoder)
    assert decoder.step is child and everything(decoder) == before


def test_nested_and_shared_steps() -> None:
    shared, single = TakeAll(fdpp.Quota(1)), TakeAll(fdpp.Threshold(0.5))
    parent = nn.ModuleDict({"a": Decoder(shared), "b": nn.ModuleList([shared, Decoder(single)]), "c": shared})
    parent["again"] = parent["a"]
    before = everything(parent)
    with fdpp.patch(parent):
        ours = parent["a"].step
        assert type(ours) is fdpp.DenoisingStep and ours.rule == fdpp.Quota(1)
        assert ours is parent["b"][0] and ours is parent["c"] and ours is parent["again"].step
        assert parent["b"][1].step.rule == fdpp.Threshold(0.5)
        assert not any(isinstance(module, TakeAll) for module in parent.modules())
    assert everything(parent) == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_before_and_after(backend: str) -> None:
    torch._dynamo.reset()
    decoder = Decoder(TakeAll(fdpp.Quota(2)))
    compiled = torch.compile(decoder, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            assert (compiled(HIDDEN, TOKENS) == 19).sum(1).tolist() == [0, 0]
            with fdpp.patch(compiled):
                assert (compiled(HIDDEN, TOKENS) == 19).sum(1).tolist() == [4, 4]
                fresh = torch.compile(decoder, fullgraph=True, backend=backend)
                assert fresh(HIDDEN, TOKENS).equal(decoder(HIDDEN, TOKENS))
        assert (fresh(HIDDEN, TOKENS) == 19).sum(1).tolist() == [0, 0]


def test_a_compiled_step() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(TakeAll(fdpp.Quota(2)), fullgraph=True, backend="eager")
    parent = nn.Sequential(Decoder(compiled))
    before = everything(parent)
    with torch.no_grad(), fdpp.patch(parent):
        assert (parent[0](HIDDEN, TOKENS) == 19).sum(1).tolist() == [4, 4]
        assert not list(parent[0].step.children())
    assert everything(parent) == before and parent[0].step is compiled


def test_a_step_within_a_step_goes_with_it() -> None:
    outer, inner = TakeAll(fdpp.Quota(2)), TakeAll(fdpp.Quota(3))
    outer.inner = inner
    parent = Decoder(outer)
    before = everything(parent)
    with fdpp.patch(parent):
        assert parent.step.rule == fdpp.Quota(2) and not list(parent.step.children()) and outer.inner is inner
    with fdpp.patch(outer):
        assert outer.inner.rule == fdpp.Quota(3) and type(outer.inner) is fdpp.DenoisingStep
    assert everything(parent) == before


def test_the_step_lies_where_the_module_does() -> None:
    decoder = Decoder(TakeAll(fdpp.Quota(2))).to("meta")
    fdpp.patch(decoder)
    assert decoder.step.bits.device.type == "meta"


class OtherForward(TakeAll):
    def forward(self, tokens: Tensor, logits: Tensor) -> Tensor:  # type: ignore[override]
        return tokens


class LogitsAlone(TakeAll):
    def forward(self, logits: Tensor) -> Tensor:  # type: ignore[override]
        return logits


class NoRule(nn.Module):
    mask_id = 19

    def forward(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return tokens


@pytest.mark.parametrize(
    "child",
    [
        OtherForward(fdpp.Quota(2)),
        LogitsAlone(fdpp.Quota(2)),
        NoRule(),
        fdpp.DenoisingStep(fdpp.Quota(2), 19),
        nn.Identity(),
    ],
)
def test_other_children_are_no_steps(child: nn.Module) -> None:
    decoder = Decoder(child)
    before = everything(decoder)
    with pytest.raises(ValueError, match=r"(?s)a Decoder: found no child .*forward\(logits, tokens, active, seeds\)"):
        fdpp.patch(decoder)
    assert everything(decoder) == before


def test_a_rule_that_is_none_of_ours_is_named() -> None:
    parent = nn.Sequential(Decoder(TakeAll(fdpp.Quota(2))), Decoder(TakeAll(0.9)))
    before = everything(parent)
    with pytest.raises(ValueError, match=re.escape("1.step.rule: expected a fdpp.Rule such as fdpp.Frechet(0.25)")):
        fdpp.patch(parent)
    assert everything(parent) == before


# Patch and unpatch


def targets(script: ModuleType) -> list[Any]:
    return [script, remote(), Decoder(TakeAll(fdpp.Quota(2))), KINDS["Dream"].remote()]


@pytest.mark.parametrize("kind", range(4), ids=["script", "model", "module", "dream"])
def test_in_and_out_again(script: ModuleType, kind: int) -> None:
    target = targets(script)[kind]
    before = everything(target)
    for _ in range(2):
        fdpp.patch(target)
        once = everything(target)
        assert once != before
        fdpp.patch(target)
        assert everything(target) == once
        fdpp.unpatch(target)
        assert everything(target) == before
        with pytest.raises(ValueError, match=r"fdpp.unpatch: .* which is not patched"):
            fdpp.unpatch(target)


@pytest.mark.parametrize("kind", range(4), ids=["script", "model", "module", "dream"])
def test_with(script: ModuleType, kind: int) -> None:
    target = targets(script)[kind]
    before = everything(target)
    with pytest.raises(KeyError), fdpp.patch(target) as outer:
        assert outer is target
        once = everything(target)
        with fdpp.patch(target):
            pass
        assert everything(target) == once
        raise KeyError
    assert everything(target) == before
    with fdpp.patch(target):
        fdpp.unpatch(target)
        fdpp.patch(target)
        again = everything(target)
    assert everything(target) == again


STEP = "DenoisingStep(rule=Frechet(margin=0.25, calibration=0.0), mask_id=62, temperature=0.0)"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            0,
            "module 'generate': get_transfer_index -> fdpp's fused step, get_transfer_index_dynamic -> fdpp's fused "
            "step, get_transfer_index_frechet_profile -> fdpp's fused step, _get_transfer_index -> fdpp's fused step",
        ),
        (1, f"a LLaDAModelLM: generate -> fdpp's block loop, infill -> fdpp's block loop, denoising_step -> {STEP}"),
        (2, "a Decoder: step -> DenoisingStep(rule=Quota(k=2), mask_id=19, temperature=0.0)"),
        (3, f"a DreamModel: generate -> fdpp's block loop, infill -> fdpp's block loop, denoising_step -> {STEP}"),
    ],
    ids=["script", "model", "module", "dream"],
)
def test_a_patch_says_what_was_replaced_by_what(script: ModuleType, kind: int, said: str) -> None:
    target = targets(script)[kind]
    what = said.split(":")[0]
    patched, again = fdpp.patch(target), fdpp.patch(target)
    assert str(patched) == repr(patched) == f"fdpp.patch of {said}"
    assert str(again) == f"fdpp.patch of {what}: already patched"
    fdpp.unpatch(target)
    assert str(patched) == f"fdpp.patch of {what}: undone"


def test_nested_steps_are_named_by_their_paths() -> None:
    parent = nn.ModuleDict({"a": Decoder(TakeAll(fdpp.Quota(1))), "b": nn.Sequential(TakeAll(fdpp.Quota(3)))})
    steps = [f"DenoisingStep(rule=Quota(k={k}), mask_id=19, temperature=0.0)" for k in (1, 3)]
    assert str(fdpp.patch(parent)) == f"fdpp.patch of a ModuleDict: a.step -> {steps[0]}, b.0 -> {steps[1]}"


def test_a_patched_model_prints_one_line_more(family: Kind) -> None:
    theirs = family.remote()
    before = str(theirs)
    fdpp.patch(theirs)
    theirs.generate(prompts(1, 5), **SETTINGS)
    assert str(theirs) == f"{before[:-1]}  (denoising_step): {STEP}\n)"


OURS = """LLaDAModelLM(
  (model): LLaDAModel(
    (transformer): ModuleDict(
      (wte): Embedding(64, 32)
      (blocks): ModuleList(
        (0-1): 2 x LLaDABlock(
          (q_proj): Linear(in_features=32, out_features=32, bias=False)
          (k_proj): Linear(in_features=32, out_features=32, bias=False)
          (v_proj): Linear(in_features=32, out_features=32, bias=False)
          (attn_out): Linear(in_features=32, out_features=32, bias=False)
          (attn_norm): RMSNorm(32, eps=1e-05)
          (ff_norm): RMSNorm(32, eps=1e-05)
          (ff_proj): Linear(in_features=32, out_features=48, bias=False)
          (up_proj): Linear(in_features=32, out_features=48, bias=False)
          (ff_out): Linear(in_features=48, out_features=32, bias=False)
        )
      )
      (ln_f): RMSNorm(32, eps=1e-05)
      (ff_out): Linear(in_features=32, out_features=64, bias=False)
    )
  )
)"""


def test_a_model_of_ours_prints_every_layer_once_also_when_weights_are_joined() -> None:
    ours = small_model()
    assert str(ours) == OURS
    ours.generate(prompts(1, 5), engine="static", **SETTINGS)
    assert str(ours) == OURS


@pytest.mark.parametrize("target", [3, "generate", remote_like.LLaDAModelLM, None])
def test_other_targets(target: Any) -> None:
    for function in (fdpp.patch, fdpp.unpatch):
        with pytest.raises(TypeError, match="a Python module with at least one of get_transfer_index"):
            function(target)


def test_an_unknown_module_is_told_what_there_is() -> None:
    for target in (re, nn.Linear(2, 2), small_model(), small_dream()):
        with pytest.raises(ValueError) as error:
            fdpp.patch(target)
        for name in (*NAMES, "DreamModel", "LLaDAModelLM", "rule and mask_id", "DenoisingStep"):
            assert name in str(error.value)
        assert ("needs no patch" in str(error.value)) == isinstance(target, DiffusionLM)


def test_a_patched_model_is_freed_at_once(family: Kind) -> None:
    import gc
    import weakref

    theirs, decoder = family.remote(), Decoder(TakeAll(fdpp.Quota(2)))
    weight, child = weakref.ref(theirs.get_submodule(family.head).weight), weakref.ref(decoder.step)
    gc.collect()
    gc.disable()
    try:
        fdpp.patch(theirs)
        fdpp.patch(decoder)
        del theirs, decoder
        assert weight() is None and child() is None
    finally:
        gc.enable()
