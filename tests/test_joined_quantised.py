"""Quantised projections: joined part by part, bit for bit the layers called one by one, and captured like others."""

from __future__ import annotations

import copy
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captures import Operators, captured_on_cpu
from family_of_others import FAMILIES
from small import BLOCK_CAUSAL, prompts, small_model
from torch import Tensor, nn

import fdpp
from fdpp import LLaDAModelLM, cli, tiny
from fdpp.decoding.identity import held_by
from fdpp.decoding.static import steps_of
from fdpp.integrations.evaluation.journal import fingerprint
from fdpp.models import weights
from fdpp.models.joined import Joined
from fdpp.models.language_model import DiffusionLM
from fdpp.models.linear import apply, is_product, linear
from fdpp.models.quantised import KINDS, check_kind, quantise, torchao_config

quantization = pytest.importorskip("torchao.quantization")

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {"d_model": 64, "mlp_hidden_size": 96, "n_kv_heads": 2}
"""Sizes that every kind takes: groups of 32, products of float8 in multiples of 16."""
SIZES_OF = {"LLaDA": WIDE, "Dream": {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}}
SIZES: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8, "stop_at_eos": False}
IDS = prompts(2, 9)
ALL = pytest.mark.parametrize("kind", KINDS)
OF_EACH_FAMILY = pytest.mark.parametrize(("kind", "family"), [(kind, family) for family in SIZES_OF for kind in KINDS])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
IN_BOTH = [(kind, torch.float32) for kind in KINDS if kind != "float8-dynamic"]
IN_BOTH += [(kind, torch.bfloat16) for kind in KINDS]
"""torchao's products of float8 by row take bfloat16 alone."""


def multiplies_float8_by_row() -> bool:
    """Whether PyTorch does on a CPU, as it does from 2.12 or 2.13 on."""
    a, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(a, a.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.fixture(autouse=True)
def float8_products_on_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has them there, and torchao refuses to use them."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    given = getattr(request.node, "callspec", None)
    if given and given.params.get("kind") == "float8-dynamic" and not multiplies_float8_by_row():
        pytest.skip("this PyTorch multiplies no float8 by row on a CPU")


def made(
    kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 4, family: str = "LLaDA", **options: Any
) -> DiffusionLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fdpp.models.quantised.check_kind", lambda *_: None)
        model = {**FAMILIES, **BLOCK_CAUSAL}[family](seed=seed, **SIZES_OF.get(family, SIZES_OF["Dream"]) | options)
        return quantise(model.to(dtype), kind, CPU)


def layer(rows: int, kind: str, dtype: torch.dtype, seed: int = 0, bias: bool = False) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(64, rows, bias=bias).to(dtype)
    quantization.quantize_(made, torchao_config(kind, False, 32))
    return made


def block_of(model: DiffusionLM) -> Any:
    return model.model.blocks[0]


def is_joined(model: DiffusionLM) -> bool:
    """Whether every part of every layer is a view of its joined weight's part, and every bias of the joined one."""

    def storages(weight: Tensor) -> list[int]:
        return [part.untyped_storage().data_ptr() for part in held_by(weight)]

    with torch.no_grad():
        return all(
            joined.matrix() is not None
            and all(
                storages(getattr(joined.modules[name], joined.what)) == storages(joined.weight) for name in joined.names
            )
            for block in model.model.blocks
            for joined in block.joins()
        )


def logits(model: DiffusionLM, joined: bool = True) -> Tensor:
    """By joined weights, or by the layers one by one: recording gradients keeps them apart."""
    with torch.set_grad_enabled(not joined):
        return model(IDS).logits.detach()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind, dtype", IN_BOTH, ids=str)
def test_a_joined_weight_is_its_layers_bit_for_bit(kind: str, dtype: torch.dtype, bias: bool) -> None:
    """A bias is added to the product after it is rounded to the dtype; torchao's own adds it before or after."""
    layers = {
        name: layer(rows, kind, dtype, seed, bias)
        for seed, (name, rows) in enumerate([("q", 64), ("k", 32), ("v", 32)])
    }
    before = {name: copy.deepcopy(each.weight) for name, each in layers.items()}
    parameters = {name: each.weight for name, each in layers.items()}
    x = torch.randn(3, 5, 64, dtype=dtype)
    x[1, 1] *= 1e4
    if kind != "float8-dynamic":  # whose scale of a row of zeros is zero
        x[0, 0] = 0.0
    joined = Joined(layers, *layers, biased=bias)  # type: ignore[arg-type]
    biases = Joined(layers, *layers, biased=bias, what="bias")  # type: ignore[arg-type]
    with torch.no_grad():
        expected = [F.linear(x, weight) for weight in before.values()]
        if bias:
            expected = [part + each.bias for part, each in zip(expected, layers.values(), strict=True)]
            for part, each in zip(expected, layers.values(), strict=True):
                torch.testing.assert_close(each(x), part, rtol=0.02, atol=0.02)
        matrix = joined.matrix()
        assert matrix is not None and type(matrix) is type(before["q"]) and matrix.shape == (128, 64)
        assert joined.matrix() is matrix
        assert (biases.matrix() is not None) == bias
        assert linear(x, matrix, biases.matrix()).equal(torch.cat(expected, dim=-1))
        assert all(apply(each, x).equal(part) for each, part in zip(layers.values(), expected, strict=True))
    for name, each in layers.items():
        assert each.weight is parameters[name] and each.weight.dequantize().equal(before[name].dequantize())
    held = {part.untyped_storage().data_ptr() for weight in (matrix, *parameters.values()) for part in held_by(weight)}
    assert held == {part.untyped_storage().data_ptr() for part in held_by(matrix)}


@OF_EACH_FAMILY
def test_a_model_by_joined_weights(kind: str, family: str) -> None:
    model = made(kind, family=family)
    layers = block_of(model).layers()
    assert is_joined(model) and is_product(layers.out) and is_product(layers.down)
    together = logits(model)
    for block in model.model.blocks:
        block.qkv.allowed = False
    assert logits(model).equal(together)
    # While gradients are recorded torchao's own products are taken, with another rounding of the biases.
    own = logits(model, joined=False)
    assert own.equal(together) if family == "LLaDA" else (own - together).std() < 0.2 * own.std()


@OF_EACH_FAMILY
def test_no_weight_is_held_twice(kind: str, family: str) -> None:
    model = made(kind, family=family)
    logits(model)
    joins = [joined.weight for block in model.model.blocks for joined in block.joins()]
    tensors = [part for weight in (*joins, *model.parameters()) for part in held_by(weight)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}
    assert sum(storages.values()) == sum(part.nbytes for weight in model.parameters() for part in held_by(weight))


@OF_EACH_FAMILY
def test_saved_loaded_and_copied(kind: str, family: str, tmp_path: Path) -> None:
    from transformers import TorchAoConfig

    whole = FAMILIES[family](seed=4, **SIZES_OF[family]).bfloat16()
    whole.save_pretrained(tmp_path / "whole")
    config = TorchAoConfig(torchao_config(kind, False, 32))
    model = type(whole).from_pretrained(tmp_path / "whole", quantization_config=config)
    assert is_joined(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "quantised")
    again = type(whole).from_pretrained(tmp_path / "quantised")
    assert is_joined(again) and logits(again).equal(expected)
    files = sum(path.stat().st_size for path in (tmp_path / "quantised").glob("*.safetensors"))
    assert files < 1.1 * sum(part.nbytes for weight in model.parameters() for part in held_by(weight)) + 20_000
    other = copy.deepcopy(model)
    for weight in model.parameters():
        for part in held_by(weight.detach()):
            part.zero_()
    assert logits(other).equal(expected) and is_joined(other)


@ALL
def test_what_happens_to_layers_is_noticed(kind: str) -> None:
    model, other = made(kind), made(kind, seed=5)
    mine, theirs = block_of(model), block_of(other)
    first = logits(model)
    mine.k_proj, mine.up_proj.weight = theirs.k_proj, theirs.up_proj.weight
    changed = logits(model)
    assert not changed.equal(first) and changed.equal(logits(model, joined=False)) and is_joined(model)
    mine.v_proj.weight.scale = 2 * mine.v_proj.weight.scale
    doubled = logits(model)
    assert not doubled.equal(changed) and doubled.equal(logits(model, joined=False)) and is_joined(model)

    handle = mine.q_proj.register_forward_hook(lambda module, inputs, output: -output)
    hooked = logits(model)
    assert not hooked.equal(doubled) and mine.qkv.weight is None
    handle.remove()
    addresses = [part.data_ptr() for weight in model.parameters() for part in held_by(weight)]
    assert logits(model).equal(doubled) and is_joined(model)
    # Captured steps know the addresses.
    assert addresses == [part.data_ptr() for weight in model.parameters() for part in held_by(weight)]


def test_weights_of_different_kinds_are_called_one_by_one() -> None:
    model = made("int8")
    block = block_of(model)
    quantised_otherwise = made("int8-dynamic")
    block.k_proj = block_of(quantised_otherwise).k_proj
    block.up_proj = small_model(seed=4, **WIDE).bfloat16().model.transformer["blocks"][0].up_proj
    assert logits(model).equal(logits(model, joined=False))
    assert block.qkv.weight is None and block.gate_up.weight is None


@pytest.mark.parametrize("kind", ["per tensor", "per tensor, inputs too"])
def test_rows_that_share_a_scale_are_called_one_by_one(kind: str) -> None:
    per_tensor = quantization.PerTensor()
    config = {
        "per tensor": lambda: quantization.Int8WeightOnlyConfig(granularity=per_tensor),
        "per tensor, inputs too": lambda: quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=per_tensor
        ),
    }[kind]()
    model = small_model(seed=4, **WIDE).bfloat16()
    quantization.quantize_(model.model.transformer["blocks"], config)
    assert logits(model).equal(logits(model, joined=False))
    assert block_of(model).qkv.weight is None


def test_threads_that_join_at_the_same_time() -> None:
    model = made("int8")
    expected = logits(model)
    for block in model.model.transformer["blocks"]:
        for name in ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj"):
            getattr(block, name).weight = nn.Parameter(getattr(block, name).weight.clone(), requires_grad=False)
    found: list[Tensor] = []
    barrier = threading.Barrier(4)

    def run() -> None:
        barrier.wait()
        found.append(logits(model))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(each.equal(expected) for each in found) and is_joined(model)


# int8 with inputs quantised as they come


@DTYPES
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_the_int8_product_is_torchaos_bit_for_bit(rows: int, dtype: torch.dtype) -> None:
    weight = layer(96, "int8-dynamic", dtype).weight
    generator = torch.Generator().manual_seed(rows)
    ordinary = torch.randn(rows, 64, generator=generator)
    # Halves between two numbers, one number alone, and what no number is left of.
    halves = torch.arange(64).float() - 31.5
    halves[0] = -63.75
    edges = [torch.zeros(64), halves, -halves, torch.full((64,), -1e4), 1e-9 * ordinary[0], torch.eye(64)[3] * -3e38]
    edges += [torch.eye(64)[3] * float("nan"), torch.eye(64)[3] * float("inf")]
    for x in (
        ordinary.to(dtype),
        1e4 * ordinary.to(dtype),
        *(torch.stack([edge, *ordinary]).to(dtype) for edge in edges),
    ):
        with torch.no_grad():
            expected = F.linear(x, weight)
            torch.testing.assert_close(weights.int8_product(x, weight), expected, rtol=0, atol=0, equal_nan=True)


def test_the_int8_product_of_no_row() -> None:
    assert weights.int8_product(torch.empty(2, 0, 64), layer(96, "int8-dynamic", torch.float32).weight).shape == (
        2,
        0,
        96,
    )


def test_the_int8_product_takes_few_operators() -> None:
    """Each is a kernel on a GPU. Memory is filled by the settings of these tests."""
    x, weight = torch.randn(32, 64).bfloat16(), layer(96, "int8-dynamic", torch.bfloat16).weight
    with torch.no_grad(), Operators() as operators:
        weights.int8_product(x, weight)
    made = [entry[0].__name__ for entry in operators.log if not entry[0].is_view]
    assert len([name for name in made if name not in ("empty_like.default", "fill_.Scalar")]) == 12, made


@pytest.mark.parametrize("strided", ["columns", "rows", "expanded"])
def test_the_int8_product_of_strided_rows(strided: str) -> None:
    weight, wide = layer(96, "int8-dynamic", torch.float32).weight, torch.randn(6, 20, 128)
    x = {"columns": wide[..., 64:], "rows": wide[:, ::3, :64], "expanded": wide[:1, :, :64].expand(6, -1, -1)}[strided]
    with torch.no_grad():
        assert weights.int8_product(x, weight).equal(F.linear(x.contiguous(), weight))


def nothing_is_printed(*_: Any, **__: Any) -> str:
    raise AssertionError("a tensor was printed, which waits for its device")


def test_no_product_prints_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's own does, where the device is no CPU."""
    monkeypatch.setattr("torchao.kernel.intmm._is_device", lambda *_: False)
    model = made("int8-dynamic")
    quantization.quantize_(model.model.transformer["ff_out"], torchao_config("int8-dynamic", False, 32))
    monkeypatch.setattr(Tensor, "__repr__", nothing_is_printed)
    with pytest.raises(AssertionError, match="was printed"), torch.no_grad():
        F.linear(torch.randn(17, 64).bfloat16(), block_of(model).q_proj.weight)
    assert not model.generate(IDS, **SIZES, engine="static").sequences.eq(fdpp.LLaDAConfig().mask_token_id).any()


@pytest.mark.parametrize("change", ["asymmetric", "sizes", "scale", "range", "tensor"])
def test_other_products_are_torchaos_own(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "int8_product", lambda *_: pytest.fail("not for this weight"))
    made, options = nn.Linear(64, 36 if change == "sizes" else 32, bias=False), {}
    if change == "asymmetric":
        options["act_mapping_type"] = quantization.MappingType.ASYMMETRIC
    if change == "range":
        options["reduce_range"] = True
    if change == "tensor":
        options["granularity"] = [quantization.PerTensor(), quantization.PerRow()]
    quantization.quantize_(made, quantization.Int8DynamicActivationInt8WeightConfig(**options))
    if change == "scale":
        made.weight.act_pre_scale = torch.rand(64)
    x = torch.randn(20, 64)
    with torch.no_grad():
        assert linear(x, made.weight).equal(F.linear(x, made.weight))


# Decodes


@OF_EACH_FAMILY
def test_a_capture_meets_nothing_that_the_warm_up_has_not(kind: str, family: str) -> None:
    model = made(kind, family=family)
    settings = {**SIZES, "drafts": 2, "rule": fdpp.Frechet(0.25)}
    eager = model.generate(IDS, **settings, engine="eager")
    with captured_on_cpu() as captures:
        static = model.generate(IDS, **settings, engine="static")
        assert all(step.graph.replays for step in steps_of(model))
    assert static.sequences.equal(eager.sequences) and static.nfe.equal(eager.nfe)
    assert len(captures.logs) > 1
    for _, warm, captured in captures.logs:
        rest = iter(warm)
        assert len(captured) > 50 and all(any(entry == other for other in rest) for entry in captured)


@OF_EACH_FAMILY
def test_a_forward_asks_for_nothing_that_a_capture_refuses(kind: str, family: str) -> None:
    """A number on the host, or a shape that depends on data. What is printed is not seen here, see above."""
    model = made(kind, family=family)
    quantization.quantize_(model.get_output_embeddings(), torchao_config(kind, False, 32))
    with torch.no_grad(), Operators() as operators:
        model.project(model.model(IDS))
    names = {entry[0].__name__.partition(".")[0] for entry in operators.log}
    assert names >= {"int8-dynamic": {"_int_mm"}, "float8-dynamic": {"_scaled_mm"}}.get(kind, {"mm"})
    assert not names & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
    products = sum(entry[0].__name__.partition(".")[0] in ("mm", "_int_mm", "_scaled_mm") for entry in operators.log)
    assert products == 4 * model.config.num_hidden_layers + 1


@ALL
def test_engines_caches_and_drafts(kind: str) -> None:
    model = made(kind)
    for cache in ("none", "prefix", "dual"):
        eager = model.generate(IDS, **SIZES, cache=cache, engine="eager")
        assert model.generate(IDS, **SIZES, cache=cache, engine="static").sequences.equal(eager.sequences), cache


@OF_EACH_FAMILY
def test_a_padded_row_decodes_as_if_alone(kind: str, family: str) -> None:
    """Inputs are quantised row by row, so that none depends on the rows beside it."""
    dtype, ids = torch.float32 if kind != "float8-dynamic" else torch.bfloat16, IDS.clone()
    model = made(kind, dtype, family=family)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    out = model.generate(ids, attention_mask=mask, **SIZES)
    for row, start in ((0, 0), (1, 4)):
        alone = model.generate(IDS[row : row + 1, start:], **SIZES)
        assert out.sequences[row, start:].equal(alone.sequences[0]), row


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "float8"])
def test_compiled_layers_take_joined_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fdpp.models import block as module

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="eager")

    # PyTorch leaves alone what other tests compiled in too many forms.
    torch.compiler.reset()
    made_by: dict[Any, Any] = {}
    monkeypatch.setattr(module, "compiled", lambda function: made_by.setdefault(function, compiled(function)))
    model = made(kind, torch.float32)
    expected = logits(model)
    model.compile_layers()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert {function.__name__ for function in made_by} == {"attention_inputs", "block_output"}


# By name


def on_the_command_line(*options: str) -> int:
    return cli.main(["generate", "--device", "cpu", "--gen-length", "32", "--prompt", PROMPT, *options])


PROMPT = tiny.generate("held-out", 1)[0].prompt


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "float8", "int4"])
def test_the_command_line_quantises_an_embedded_model(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny.load()
    quantise(model, kind, CPU)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=32)
    assert on_the_command_line("--quantize", kind) == 0
    printed, figures = capsys.readouterr()
    assert printed.strip() == tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert f"{int(out.nfe)} forwards" in figures


def test_the_command_line_quantises_a_folder_but_none_that_is_quantised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import TorchAoConfig

    model, tokenizer = tiny.load()
    for folder, config in (("whole", None), ("quantised", TorchAoConfig(torchao_config("int8", False, 0)))):
        if config is not None:
            model = LLaDAModelLM.from_pretrained(tmp_path / "whole", quantization_config=config)
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    assert on_the_command_line("--model", str(tmp_path / "quantised")) == 0
    expected = capsys.readouterr().out
    assert on_the_command_line("--model", str(tmp_path / "whole"), "--quantize", "int8") == 0
    assert capsys.readouterr().out == expected
    assert on_the_command_line("--model", str(tmp_path / "quantised"), "--quantize", "int8") == 2
    assert re.search(
        r"expected a folder of whole weights, .*quantised is quantised by torchao", capsys.readouterr().err
    )


def test_float8_products_are_refused_where_they_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any weight is loaded."""
    monkeypatch.setattr("fdpp.cli.options.load_base", lambda *_: pytest.fail("loaded"))
    assert on_the_command_line("--quantize", "float8-dynamic") == 2
    assert (
        "float8-dynamic: expected an NVIDIA GPU of compute capability 8.9 or newer, got a CPU"
        in capsys.readouterr().err
    )
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for capability, kind, message in (
        ((8, 6), "float8-dynamic", r"8\.9 or newer, got Some GPU \(8\.6\)"),
        ((7, 5), "int4", r"8\.0 or newer, got Some GPU \(7\.5\)"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(ValueError, match=message):
            check_kind(kind, gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for kind in KINDS:
        check_kind(kind, gpu, torch.bfloat16)
    for kind in ("float8-dynamic", "int4"):
        with pytest.raises(ValueError, match="expected bfloat16 for all that stays as it is, got float32"):
            check_kind(kind, gpu, torch.float32)
    with pytest.raises(ValueError, match=r"expected one of int8, .*, got 'int3'"):
        check_kind("int3", gpu, torch.bfloat16)


def test_without_torchao_the_option_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert on_the_command_line("--quantize", "int8") == 2
    assert (
        "--quantize int8: quantised weights need torchao, which is not installed: pip install"
        in capsys.readouterr().err
    )


def test_sizes_that_torchao_cannot_quantise() -> None:
    for options in ({"mlp_hidden_size": 48}, {"family": "SDAR", "head_dim": 12}):
        with pytest.raises(ValueError, match=r"int4: expected layers with inputs in multiples of 32, got \(64, 48"):
            made("int4", **options)
    with pytest.raises(
        ValueError, match=r"float8-dynamic: expected torchao to quantise every layer, it left 6 .*\(40, 64\)"
    ):
        made("float8-dynamic", mlp_hidden_size=40)


def test_the_head_and_the_embedding_stay_whole() -> None:
    model = made("int8")
    assert {type(model.head), type(model.get_input_embeddings().weight)} == {nn.Parameter}
    library = model.generate(IDS, **SIZES)
    assert model.generate(IDS, **SIZES, head="fused").sequences.equal(library.sequences)


def test_settings_of_the_process_stay_as_they_are() -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_float32_matmul_precision(),
            inductor.coordinate_descent_tuning,
            inductor.force_fuse_int_mm_with_mul,
        )

    from torch._inductor import config as inductor

    before = settings()
    for kind in KINDS:
        made(kind)
    assert settings() == before


def test_fingerprints_of_quantised_models_differ() -> None:
    """So that an evaluation that is resumed takes no other's responses."""
    found = [fingerprint(made(kind)) for kind in KINDS]
    found += [fingerprint(made("int8", seed=5)), fingerprint(small_model(seed=4, **WIDE).bfloat16())]
    assert len(set(found)) == len(found) and fingerprint(made("int8")) == found[0]
