"""peft's adapters: a decode has their weights, whoever puts them in, and what it can't apply is refused."""

from __future__ import annotations

import copy
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import remote_like
import torch
from captures import Captures, captured_on_cpu
from family_of_others import TIED
from packaging.version import Version
from plain import plain_llada
from small import exact, exact_model, left_pad, prompts, small_dream, small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.generation import GenerationMixin
from transformers.integrations import peft as integrations

import fdpp
from fdpp import cli, tiny
from fdpp.decoding.static import steps_of
from fdpp.integrations.evaluation.evaluator import Evaluator, Request
from fdpp.integrations.evaluation.journal import fingerprint
from fdpp.models.adapters import merge_adapter
from fdpp.trace.record import record

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8, "steps": 8, "stop_at_eos": False}
EIGHT = {**STEPS, "rule": fdpp.Quota(), "cache": "none"}
IDS, MASK = left_pad([prompts(1, 7, seed=1)[0], prompts(1, 4, seed=2)[0]])
PROMPT_LEARNING = [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig]


def lora(*layers: str, **settings: Any) -> Any:
    """Of the queries and the gate unless `layers` are named."""
    targets = "all-linear" if layers == ("all-linear",) else list(layers) or ["q_proj", "ff_proj"]
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **settings})


def adapted(model: Any, config: Any, seed: int = 0) -> Any:
    """`model`, wrapped with random weights of an adapter, the same for the same names."""
    made = peft.get_peft_model(model, copy.deepcopy(config)).eval()  # peft writes into a configuration
    trained = {name: weight for name, weight in made.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(trained):
        weight = trained[name].data
        noise = torch.randn(weight.shape, generator=generator).to(weight).mul_(0.4)
        weight.copy_(noise if "lora_" in name and "magnitude" not in name else weight + noise)
    return made


def by_formula(made: Any, scale: float = 1.5, family: str = "LLaDA", **config: Any) -> Any:
    """A model without adapters whose weights are W + scale B A, of `made` on `exact(family, **config)`."""
    tied = dict.fromkeys(TIED[family], False)
    model, weights = exact(family, **{**config, **tied}), exact(family, **config).state_dict()
    lacking = model.state_dict().keys() - weights.keys()
    if lacking:  # an adapter of the embedding is none of the head
        (head,), embedding = lacking, {"LLaDA": "model.transformer.wte.weight", "Dream": "model.embed_tokens.weight"}
        weights[head] = weights[embedding[family]].clone()
    found = peft.get_peft_model_state_dict(made)
    for key, a in found.items():
        for lora_a, lora_b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if key.endswith(lora_a):
                name = key.removeprefix("base_model.model.").removesuffix(lora_a) + "weight"
                delta = scale * found[key.removesuffix(lora_a) + lora_b] @ a
                weights[name] += delta.T if "embedding" in lora_a else delta
    model.load_state_dict(weights)
    return model


def decoded(model: Any, **settings: Any) -> Tensor:
    """Both prompts' tokens by `settings`, else by eight steps without a cache."""
    return model.generate(IDS, MASK, **{**EIGHT, **settings}).sequences


def rows_alone(model: Any) -> Tensor:
    """What `decoded` should give, by a plain float64 loop over positions."""
    rows = [
        plain_llada(model, ids[mask.bool()], steps=8, max_new_tokens=16) for ids, mask in zip(IDS, MASK, strict=True)
    ]
    return torch.stack([row[-16:] for row in rows])


def same(model: Any, other: Any, **settings: Any) -> bool:
    return bool(decoded(model, **settings).equal(decoded(other, **settings)))


# Adapters in the layers


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_a_decode_has_the_weights_of_the_adapter(task: str | None) -> None:
    """A batch with padding, by position and by name, on both engines, with drafts."""
    made = adapted(exact_model(), lora("q_proj", "ff_proj", "ff_out", task_type=task))
    expected = rows_alone(by_formula(made))
    assert not expected.equal(rows_alone(exact_model()))
    by_name = made.generate(input_ids=IDS, attention_mask=MASK, **EIGHT).sequences
    for tokens in (by_name, decoded(made), decoded(made, engine="static"), decoded(made, drafts=3)):
        assert tokens[:, IDS.shape[1] :].equal(expected)
    assert made(input_ids=IDS, attention_mask=MASK).logits.shape == (*IDS.shape, 64)
    assert made.warmup(5, engine="static") is None


LAYERS: list[Any] = [
    ("LLaDA", lora("q_proj", "k_proj", "v_proj", "up_proj", "attn_out"), {}),
    ("LLaDA", lora("ff_out"), {}),
    ("LLaDA", lora("transformer.ff_out"), {}),
    ("LLaDA", lora("wte"), {}),
    ("LLaDA", lora("wte", "q_proj"), {"weight_tying": True}),
    ("LLaDA", lora("q_proj", use_rslora=True, lora_alpha=3), {}),
    ("Dream", lora("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), {}),
    ("Dream", lora("gate_proj", "up_proj", "down_proj", "lm_head"), {}),
    ("Dream", lora("embed_tokens", "k_proj"), {"tie_word_embeddings": True}),
]


def named(value: Any) -> str:
    """The same in every process, unlike the order of a set."""
    targets = getattr(value, "target_modules", value)
    return "-".join(sorted(targets)) if isinstance(targets, set) else str(targets)


@pytest.mark.parametrize(("family", "config", "model"), LAYERS, ids=named)
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_lora_on_any_layer(cache: str, family: str, config: Any, model: dict[str, Any]) -> None:
    made = adapted(exact(family, **model), config)
    expected = by_formula(made, family=family, **model)
    for settings in ({}, {"engine": "static"}, {"drafts": 2}):
        assert same(made, expected, cache=cache, **settings)
    with made.disable_adapter():
        assert same(made, exact(family, **model), cache=cache)
    assert not same(made, exact(family, **model), cache=cache)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("LLaDA", lora("q_proj", "v_proj")),
        ("LLaDA", lora("all-linear")),
        ("LLaDA", lora(modules_to_save=["attn_norm"])),
        ("LLaDA", lora(modules_to_save=["wte", "transformer.ff_out"])),
        ("LLaDA", lora(trainable_token_indices=[1, 2, 3])),
        ("LLaDA", lora("q_proj", use_dora=True)),
        ("LLaDA", peft.LNTuningConfig(target_modules=["attn_norm", "ln_f"])),
        ("LLaDA", peft.IA3Config(target_modules=["v_proj", "ff_out"], feedforward_modules=["ff_out"])),
        ("LLaDA", peft.LoHaConfig(target_modules=["ff_proj"])),
        ("Dream", lora("q_proj", "v_proj", bias="all")),
        ("Dream", lora("all-linear", bias="lora_only")),
        ("Dream", lora("k_proj", "down_proj", use_dora=True)),
        ("Dream", lora("q_proj", modules_to_save=["input_layernorm", "k_proj", "embed_tokens", "lm_head"])),
    ],
    ids=lambda given: given if isinstance(given, str) else f"{type(given).__name__}-{named(given)}",
)
def test_a_merged_adapter_decodes_alike_and_its_weights_are_joined_again(family: str, config: Any) -> None:
    """Weights that were joined before are views, into which peft writes. Biases that were trained are biases still."""
    model = exact(family)
    model.join_weights()
    made = adapted(model, config)
    before, drafted = decoded(made), decoded(made, drafts=3)
    assert not before.equal(decoded(exact(family))) and drafted.equal(before)
    merged = made.merge_and_unload()
    assert merged is model and decoded(merged).equal(before)
    fresh = exact(family)
    fresh.load_state_dict(merged.state_dict())
    assert same(merged, fresh, cache="dual")
    with torch.no_grad():
        matrices = [joined.matrix() for block in model.model.blocks for joined in block.joins()]
    assert all(matrix is not None for matrix in matrices)


def test_wrapped_layers_are_called_and_their_neighbours_too() -> None:
    """No matrix joins a layer that is more than its weight, and a norm that is wrapped is no RMSNorm."""
    made = adapted(small_model(), lora("q_proj", "attn_out"))
    block = made.base_model.model.model.transformer.blocks[0]
    with torch.no_grad():
        assert block.qkv.matrix() is None and block.gate_up.matrix() is not None
    assert type(block.attn_out) is not nn.Linear


@pytest.fixture
def captures() -> Iterator[Captures]:
    with captured_on_cpu() as captures:
        yield captures


def test_captured_steps_follow_what_becomes_of_adapters(captures: Captures) -> None:
    model = exact_model()
    made = adapted(model, lora(task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    made.add_adapter("second", lora("up_proj", task_type="CAUSAL_LM", init_lora_weights=False))
    settings, seen = {"engine": "static", "cache": "dual"}, []

    def scale() -> None:
        made.base_model.model.model.transformer.blocks[0].q_proj.scaling["default"] = 0.2

    changes = [
        *(lambda: None, lambda: made.set_adapter("second"), made.base_model.disable_adapter_layers),
        *(made.base_model.enable_adapter_layers, lambda: made.set_adapter("default"), scale, made.merge_adapter),
        *(made.unmerge_adapter, lambda: made.set_adapter("second"), made.unload),
    ]
    for change in changes:
        change()
        tokens = decoded(made, **settings)
        assert tokens.equal(decoded(made, engine="eager", cache="dual"))
        seen.append(tuple(tokens.flatten().tolist()))
    assert all(step.graph is not None for step in steps_of(model))
    default, second, off, on, again, scaled, merged, apart, other, unloaded = seen
    assert len({default, second, off, scaled}) == 4
    assert (on, again, other, merged, apart, unloaded) == (second, default, second, scaled, scaled, off)


def test_files_are_loaded_by_peft_and_by_transformers(tmp_path: Path) -> None:
    made = adapted(small_model(), lora(task_type="CAUSAL_LM"))
    expected, base = decoded(made), decoded(small_model())
    made.save_pretrained(tmp_path / "adapter")
    small_model().save_pretrained(tmp_path / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    folder = str(tmp_path / "adapter")
    assert decoded(peft.PeftModel.from_pretrained(small_model(), folder)).equal(expected)
    for kind in (peft.AutoPeftModelForCausalLM, fdpp.LLaDAModelLM, AutoModelForCausalLM):
        assert decoded(kind.from_pretrained(folder)).equal(expected)
    model = small_model()
    model.load_adapter(folder)
    assert decoded(model).equal(expected) and not expected.equal(base)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(integrations.MIN_PEFT_VERSION),
    reason=f"transformers' own adapters ask for peft {integrations.MIN_PEFT_VERSION}",
)
def test_adapters_are_switched_by_transformers() -> None:
    model = small_model()
    base = decoded(model)
    model.add_adapter(lora(init_lora_weights=False), "default")
    expected = decoded(model)
    assert not expected.equal(base)
    model.disable_adapters()
    assert decoded(model).equal(base)
    model.add_adapter(lora("up_proj", init_lora_weights=False), "another")
    model.enable_adapters()
    assert not decoded(model).equal(expected) and not decoded(model).equal(base)
    model.set_adapter("default")
    assert decoded(model).equal(expected)


def test_an_adapter_trained_on_the_remote_code_fits(tmp_path: Path) -> None:
    theirs = adapted(remote(), lora("q_proj", "v_proj", "wte", "ff_out", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    keys = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    assert "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight" in keys
    ours = peft.PeftModel.from_pretrained(small_model(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


# What is refused


@pytest.mark.parametrize("kind", PROMPT_LEARNING, ids=lambda kind: kind.__name__)
def test_prompt_learning_is_refused_and_leaves_the_model_as_it_was(kind: Any) -> None:
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    made = peft.get_peft_model(model := small_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes))
    expected = "a block decode takes ids, expected an adapter in the layers such as LoRA, got prompt learning"
    with pytest.raises(ValueError, match=expected):
        decoded(made)
    if kind is peft.PrefixTuningConfig:
        with pytest.raises(TypeError, match=r"unexpected arguments \['past_key_values'\], expected input_ids"):
            made(IDS)
    else:  # a forward takes the embeddings that it hands over
        assert made(IDS).logits.shape[:2] == (IDS.shape[0], 3 + IDS.shape[1])
    base = decoded(small_model())
    assert decoded(model).equal(base)
    with made.disable_adapter():
        assert decoded(made).equal(base)


def test_one_adapter_for_each_row_is_refused_and_no_hook_stays() -> None:
    made = adapted(small_model(), lora())
    made.add_adapter("second", lora())
    expected = decoded(made)
    with pytest.raises(ValueError, match="adapter_names is not implemented: rows of a decode end and are repeated"):
        decoded(made, adapter_names=["default", "second"])
    assert decoded(made).equal(expected)


def test_arguments_of_forward_that_say_nothing() -> None:
    model, logits = small_model(), small_model()(IDS).logits
    assert model(IDS, labels=None, inputs_embeds=None, output_attentions=False, use_cache=False).logits.equal(logits)
    assert model(IDS, output_hidden_states=None).hidden_states is None
    with pytest.raises(TypeError, match=r"unexpected arguments \['labels', 'use_cache'\]"):
        model(IDS, labels=IDS, use_cache=True)
    with pytest.raises(TypeError, match=r"unexpected arguments \[\], expected input_ids"):
        model(attention_mask=MASK)


# Models with remote code


class Generating(remote_like.LLaDAModelLM, GenerationMixin):
    """As transformers makes of the remote code's class, which generates."""


def remote(**config: Any) -> Any:
    """The stand-in for the checkpoint's code, with the weights of `small_model`."""
    ours = small_model(**config)
    theirs = Generating(remote_like.LLaDAConfig(**ours.config.to_dict())).eval()
    theirs.load_state_dict(ours.state_dict(), strict=not ours.config.weight_tying)
    return theirs


@pytest.mark.parametrize("when", ["before", "after", "of the wrapper"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_patched_model_decodes_with_its_adapter(when: str, task: str | None) -> None:
    theirs, config = remote(), lora("q_proj", "up_proj", "wte", "ff_out", task_type=task)
    expected = adapted(small_model(), config)
    if when == "before":
        fdpp.patch(theirs)
    made = adapted(theirs, config)
    target = made if when == "of the wrapper" else theirs
    fdpp.patch(target)
    for settings in ({}, {"cache": "dual"}, {"engine": "static"}, {"drafts": 3}):
        assert same(made, expected, **settings)
    assert same(theirs, expected) and not same(theirs, small_model())
    with made.disable_adapter():
        assert same(made, small_model())
    merged = made.merge_and_unload()
    assert merged is theirs and same(theirs, expected.merge_and_unload())
    fdpp.unpatch(theirs)
    assert "generate" not in vars(theirs) and "denoising_step" not in theirs._modules


def test_a_tied_head_of_a_patched_model_has_no_adapter() -> None:
    theirs, config = remote(weight_tying=True), lora("wte", "q_proj")
    fdpp.patch(theirs)
    made, expected = adapted(theirs, config), adapted(small_model(weight_tying=True), config)
    assert same(made, expected) and not same(made, small_model(weight_tying=True))
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, expected(IDS).logits)


def test_unpatch_leaves_an_adapter_alone() -> None:
    theirs = remote()
    fdpp.patch(theirs)
    made = adapted(theirs, lora())
    with torch.no_grad():
        logits = made(IDS).logits
        fdpp.unpatch(made)
        assert made(IDS).logits.equal(logits)


@pytest.mark.parametrize("kind", PROMPT_LEARNING, ids=lambda kind: kind.__name__)
def test_prompt_learning_on_a_patched_model_is_refused(kind: Any) -> None:
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    theirs = remote()
    fdpp.patch(theirs)
    made = peft.get_peft_model(theirs, kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes))
    with pytest.raises(ValueError, match="got prompt learning"):
        decoded(made)
    assert decoded(theirs).equal(decoded(small_model()))


def test_copies_of_a_patched_model_have_adapters_of_their_own() -> None:
    theirs = remote()
    fdpp.patch(theirs)
    made = adapted(theirs, lora())
    twin, expected = copy.deepcopy(made), decoded(made)
    adapted(twin.unload(), lora(), seed=1)
    assert decoded(made).equal(expected) and not decoded(twin).equal(expected)


def test_threads_that_meet_a_new_adapter_together() -> None:
    theirs = remote()
    fdpp.patch(theirs)
    made, expected = adapted(theirs, lora("all-linear")), decoded(adapted(small_model(), lora("q_proj")))
    made = adapted(made.unload(), lora("q_proj"))
    start, found = threading.Barrier(6), []

    def work() -> None:
        start.wait()
        found.append(decoded(made))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(tokens.equal(expected) for tokens in found)


# Merged when a model is loaded


def saved(path: Path, config: Any, **model: Any) -> str:
    adapted(small_model(**model), config).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_merged_into_the_weights(tied: bool, tmp_path: Path) -> None:
    """Not into an embedding that is also the head."""
    config = lora("wte", "q_proj", "ff_out", task_type="CAUSAL_LM")
    expected = decoded(adapted(small_model(weight_tying=tied), config))
    model = merge_adapter(small_model(weight_tying=tied), saved(tmp_path, config, weight_tying=tied))
    assert type(model) is fdpp.LLaDAModelLM and decoded(model).equal(expected)
    assert any("lora" in name for name, _ in model.named_parameters()) == tied


def test_an_adapter_of_dreams_is_merged_and_its_joined_biases_stay(tmp_path: Path) -> None:
    config = lora("q_proj", "o_proj", "down_proj", task_type="CAUSAL_LM")
    unmerged = adapted(small_dream(), config)
    unmerged.save_pretrained(tmp_path)
    keys = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    model = merge_adapter(small_dream(), str(tmp_path))
    assert type(model) is fdpp.DreamModelLM and decoded(model).equal(decoded(unmerged))
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        merge_adapter(small_dream(), saved(tmp_path / "LLaDA's", lora("attn_out")))


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        (lora(), {"n_layers": 4}, "unexpected base_model.model.model.transformer.blocks.2.ff_proj.lora_A.weight"),
        (lora(), {"n_layers": 1}, "missing base_model.model.model.transformer.blocks.1.ff_proj.lora_A.weight"),
        (lora(), {"d_model": 64}, "size mismatch for base_model.model.model.transformer.blocks.0.q_proj"),
    ],
)
def test_an_adapter_of_another_model_is_refused(config: Any, model: Any, message: str, tmp_path: Path) -> None:
    """peft leaves out layers that the model lacks, and lets those that the file lacks be as they began."""
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        merge_adapter(small_model(), saved(tmp_path, config, **model))


def test_other_folders_are_no_adapters_that_can_be_merged(tmp_path: Path) -> None:
    elsewhere = peft.get_peft_model(nn.ModuleDict({"gate": nn.Linear(4, 4)}), lora("gate"))
    elsewhere.save_pretrained(tmp_path / "elsewhere")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=32)
    config.num_attention_heads = 4
    peft.get_peft_model(small_model(), config).save_pretrained(tmp_path / "prompt")
    for name, message in (
        ("elsewhere", "Target modules .* not found in the base model"),
        (
            "prompt",
            r"expected an adapter in the layers such as LoRA, got one of prompt learning \(PromptTuningConfig\)",
        ),
        ("nothing", "Can't find 'adapter_config.json'"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapter(small_model(), str(tmp_path / name))


def test_the_command_line_takes_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.load()
    made = adapted(model, lora("q_proj", "ff_proj", "ff_out", task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path / "adapter")
    prompt = tiny.generate("held-out", 1)[0].prompt
    command = ["generate", "--prompt", prompt, "--gen-length", "32", "--device", "cpu", "--adapter"]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = made.generate(ids, max_new_tokens=32).sequences
    assert not expected.equal(tiny.load()[0].generate(ids, max_new_tokens=32).sequences)
    assert cli.main([*command, str(tmp_path / "adapter")]) == 0
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert capsys.readouterr().out.strip() == text
    other = saved(tmp_path / "other", lora(), n_layers=1)
    for path, message in (
        (tmp_path / "none", "no such folder, and no OWNER/NAME of an adapter on the Hugging Face Hub"),
        (tmp_path, "Can't find 'adapter_config.json'"),
        (other, "size mismatch for base_model"),
    ):
        assert cli.main([*command, str(path)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fdpp: error: --adapter {path}: ") and message in line
    monkeypatch.setitem(sys.modules, "peft", None)
    assert cli.main([*command, str(tmp_path / "adapter")]) == 2
    assert "adapters need peft, which is not installed: pip install peft" in capsys.readouterr().err


def test_evaluations_and_traces_take_a_wrapped_model() -> None:
    """Its `model` is not the transformer but the model."""
    model, tokenizer = tiny.load()
    made = adapted(model, lora("q_proj", "ff_proj", task_type="CAUSAL_LM"))
    request = Request("sums", tiny.generate("held-out", 1)[0].prompt, {"until": []})
    config = fdpp.DiffusionGenerationConfig(max_new_tokens=16)
    ids = tokenizer(request.context, return_tensors="pt")["input_ids"]

    def all_of(decoder: Any) -> Any:
        evaluator = Evaluator(decoder, tokenizer, gen_length=16, mc_num=2)
        likelihoods = evaluator.likelihoods([(request.context, " In May")])
        return evaluator.responses([request]), likelihoods, record(decoder, ids, config).response

    wrapped, plain = all_of(made), all_of(tiny.load()[0])
    merged = all_of(made.merge_and_unload())
    assert (wrapped[0], wrapped[2]) == (merged[0], merged[2]) and wrapped[0] != plain[0] and wrapped[2] != plain[2]
    assert wrapped[1][0][0] == pytest.approx(merged[1][0][0], rel=1e-4) and wrapped[1] != plain[1]
    prompted = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=6, token_dim=128)
    prompted.num_attention_heads = 4
    with pytest.raises(ValueError, match=r"got prompt learning \(PromptTuningConfig\)"):
        Evaluator(peft.get_peft_model(tiny.load()[0], prompted), tokenizer)


def test_an_evaluation_that_resumes_tells_adapters_apart() -> None:
    """Their weights, merged or not, which of them is active, and their scales."""
    made = adapted(small_model(), lora())
    made.add_adapter("second", lora(init_lora_weights=False))
    found = [fingerprint(small_model()), fingerprint(made)]
    made.set_adapter("second")
    found.append(fingerprint(made))
    made.base_model.model.model.transformer.blocks[1].q_proj.scaling["second"] = 0.5
    found.append(fingerprint(made))
    with made.disable_adapter():
        found.append(fingerprint(made))
    found += [fingerprint(adapted(small_model(), lora(), seed).merge_and_unload()) for seed in (0, 1)]
    assert len(set(found)) == 7
    assert fingerprint(adapted(small_model(), lora()).unload()) == found[0]
