"""What every family's model does, ours and somebody else's: rows, caches, drafts, engines, weights, registration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_of_others import EACH_FAMILY, FAMILIES
from partial_refresh import FIRST, decode
from plain import Boost, naive_forward, plain_infill, plain_llada, predicting
from small import MASK, SMALL, left_pad, make_exact, prompts
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.generation import RepetitionPenaltyLogitsProcessor

import fdpp
from fdpp import Wino
from fdpp.models.families import load
from fdpp.models.language_model import DiffusionLM
from fdpp.rules.dawn import reference as dawn

SHIFTED = ("Dream", "Gist")
"""Families in which a column predicts the next one; what LLaDA does is tested file by file."""
ROWS = [prompts(1, P, seed=P + 4)[0] for P in (3, 9, 0, 5)]
DAWN = fdpp.Dawn(tau_sink=0.1, tau_edge=0.05, tau_low=0.3, tau_high=0.6, tau_induce=0.4)
SIZES: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8, "stop_at_eos": False}


def exactly(family: str, seed: int = 0, **config: Any) -> DiffusionLM:
    """A family's small model in float64, so that no rounding decides a commit."""
    model = FAMILIES[family](seed, **config)
    make_exact(model)
    return model


@pytest.fixture(scope="module", params=SHIFTED)
def model(request: pytest.FixtureRequest) -> DiffusionLM:
    """Shared: no test may change it."""
    return exactly(request.param)


def assert_rows_are_alone(model: DiffusionLM, rows: list[Tensor] = ROWS, **settings: Any) -> Any:
    """Every row of a ragged batch decodes as by itself on the eager engine; returns the batch's output."""
    settings = SIZES | settings
    by_itself = settings | {"engine": "eager"}
    ids, mask = left_pad(rows)
    new = settings["max_new_tokens"] or None
    together = model.generate(ids, mask, **settings)
    for b, row in enumerate(rows):
        alone, length = model.generate(row[None], **by_itself), new or len(row)
        assert together.sequences[b, -length:].equal(alone.sequences[0, -length:])
        assert together.commit_step[b, -length:].equal(alone.commit_step[0, -length:])
        assert together.nfe[b] == alone.nfe[0]
    return together


# Configurations


DREAM_7B = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
"""The keys of the published Dream-v0 `config.json`, with the values of the 7B model."""

DREAM_LAYER = {
    *(f"self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")),
    *(f"{name}.weight" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    *(f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
}


def folder(path: Path, config: dict[str, Any], name: str = "config.json") -> Path:
    (path / name).write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"bos_token_id": 151665, "eos_token_id": 151645, "rope_theta": 10000.0},
        {"bos_token_id": None, "eos_token_id": None, "vocab_size": 152065, "sliding_window": 131072},
        {"dtype": "float32", "_name_or_path": "somewhere", "a_key_of_tomorrow": [1, 2], "num_labels": 2},
    ],
    ids=["Dream", "other ids", "another vocabulary", "other keys"],
)
@pytest.mark.filterwarnings("error")
def test_dreams_published_config_loads_in_whole(others: dict[str, Any], tmp_path: Path) -> None:
    """Also as its relatives have it: the same architecture, other ids, another vocabulary or base."""
    given = DREAM_7B | others
    config = AutoConfig.from_pretrained(folder(tmp_path, given))
    assert type(config) is fdpp.DreamConfig
    not_kept = {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache", "rope_scaling"}
    for key in given.keys() - not_kept:
        assert getattr(config, key) == given[key], key
    assert config.dtype == (torch.float32 if "dtype" in others else torch.bfloat16)
    with torch.device("meta"):
        dream = fdpp.DreamModelLM(config)
    of_layers = {f"model.layers.{n}.{name}" for n in range(28) for name in DREAM_LAYER}
    assert set(dream.state_dict()) == of_layers | {
        f"{n}.weight" for n in ("model.embed_tokens", "model.norm", "lm_head")
    }
    wider = given["vocab_size"] - DREAM_7B["vocab_size"]
    assert sum(p.numel() for p in dream.parameters()) == 7_615_616_512 + 2 * 3584 * wider
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5.0}),
        ("use_sliding_window", True),
        ("use_mrope", True),
    ],
)
def test_options_of_dream_that_are_not_implemented_are_named(option: str, value: Any, tmp_path: Path) -> None:
    folder(tmp_path, DREAM_7B | {option: value})
    for load_it in (fdpp.DreamConfig.from_pretrained, AutoConfig.from_pretrained, AutoModel.from_pretrained, load):
        with pytest.raises(ValueError, match=rf"Dream config: {option}=.* is not implemented, expected") as error:
            load_it(str(tmp_path))
        assert f"{option}={value!r}" in str(error.value)


@pytest.mark.parametrize("config", [fdpp.LLaDAConfig, fdpp.DreamConfig], ids=lambda config: config.model_type)
def test_the_table_that_transformers_makes_of_rope_theta(config: Any) -> None:
    table = {"rope_type": "default", "rope_theta": 5.0}
    assert config(rope_parameters=table).rope_theta == config(rope_parameters=table, rope_theta=5.0).rope_theta == 5.0
    assert config(rope_parameters=None).rope_theta == config().rope_theta > 5.0
    with pytest.raises(ValueError, match=r"contradicts rope_theta=6\.0"):
        config(rope_parameters=table, rope_theta=6.0)
    for other in (
        {"rope_type": "linear", "rope_theta": 5.0},
        {"rope_theta": 5.0, "factor": 2.0},
        {"rope_type": "default"},
    ):
        with pytest.raises(ValueError, match=r"rope_parameters=.* is not implemented"):
            config(rope_parameters=other)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30, num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"hidden_size": 12}, "even head size, got 3"),
        *(({name: 0}, f"{name}=0") for name in ("num_attention_heads", "num_hidden_layers", "intermediate_size")),
        *(({name: 0}, f"{name}=0") for name in ("vocab_size", "hidden_size")),
        ({"num_attention_heads": -4}, "num_attention_heads=-4"),
    ],
    ids=str,
)
def test_sizes_of_dream_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"Dream config: .*{message}"):
        SMALL["Dream"](**sizes)


@pytest.mark.parametrize("name", ["mask_token_id", "pad_token_id"])
def test_an_id_outside_of_dreams_vocabulary_is_none(name: str) -> None:
    assert getattr(fdpp.DreamConfig(vocab_size=64), name) is None
    assert getattr(fdpp.DreamConfig(vocab_size=64, **{name: 63}), name) == 63


DREAM_SAMPLER = {
    "_from_model_config": True,
    "alg": "origin",
    "alg_temp": None,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "eps": 0.001,
    "mask_token_id": None,
    "output_history": False,
    "pad_token_id": 151643,
    "steps": 512,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "transformers_version": "4.46.2",
}
"""Every key of the `generation_config.json` that is published with Dream-v0-Instruct-7B."""


def test_the_settings_of_dreams_own_sampler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What means the same is taken. Its schedule is no rule of ours, nor are its steps those of `Quota`."""
    read = fdpp.DiffusionGenerationConfig.from_pretrained
    config = read(folder(tmp_path, DREAM_SAMPLER, "generation_config.json"))
    assert config == fdpp.DiffusionGenerationConfig(eos_token_id=151643, pad_token_id=151643)
    assert len(caplog.records) == 1 and "no effect: alg, alg_temp, eps, output_history, steps" in caplog.text
    given = DREAM_SAMPLER | {"temperature": 0.2, "top_p": 0.95, "max_new_tokens": 64, "mask_token_id": 151666}
    config = read(folder(tmp_path, given, "generation_config.json"))
    assert (config.temperature, config.top_p, config.max_new_tokens) == (0.2, 0.95, 64)
    assert (config.mask_token_id, config.rule) == (151666, fdpp.Frechet())
    config = read(folder(tmp_path, given | {"rule": "quota"}, "generation_config.json"))
    assert (config.rule, config.steps) == (fdpp.Quota(), 512)
    with pytest.raises(ValueError, match=r"unknown settings \['alg_tmp'\]"):
        read(folder(tmp_path, DREAM_SAMPLER | {"alg_tmp": 0.1}, "generation_config.json"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, "auto"], ids=str)
def test_a_published_folder_of_dreams_decodes(dtype: Any, tmp_path: Path) -> None:
    dream = SMALL["Dream"]().bfloat16()
    dream.save_pretrained(tmp_path)
    shape = {key: value for key, value in dream.config.to_diff_dict().items() if key in DREAM_7B and "_id" not in key}
    ids = {"mask_token_id": 62, "eos_token_id": 63, "pad_token_id": 63, "bos_token_id": 63}
    folder(tmp_path, DREAM_7B | shape | ids | {"architectures": ["DreamModel"]})
    folder(tmp_path, DREAM_SAMPLER | ids, "generation_config.json")
    loaded = AutoModel.from_pretrained(tmp_path, **{} if dtype is None else {"dtype": dtype})
    assert loaded.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
    out = loaded.generate(prompts(2, 5), max_new_tokens=12, block_length=8)
    assert out.sequences.shape == (2, 17) and not out.sequences.eq(MASK).any()


@EACH_FAMILY
def test_a_folder_of_any_family_is_loaded_by_its_model_type(family: str, tmp_path: Path) -> None:
    made = FAMILIES[family]()
    made.save_pretrained(tmp_path)
    expected = made.generate(prompts(2, 6), max_new_tokens=12, block_length=8).sequences
    autos = [auto.from_pretrained for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM)]
    for loader in (load, type(made).from_pretrained, *autos):
        loaded = loader(str(tmp_path), dtype=torch.float32)
        assert type(loaded) is type(made)
        assert loaded.generate(prompts(2, 6), max_new_tokens=12, block_length=8).sequences.equal(expected)
    assert load(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_family_that_nobody_registered_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type llada or .*Dream.*, got mamba"):
        load(str(folder(tmp_path, {"model_type": "mamba"})))
    with pytest.raises(ValueError, match=r"model_type llada or .*Dream.*, got none"):
        load(str(folder(tmp_path, {"hidden_size": 32})))


# Decodes


EXPENSIVE = fdpp.Frechet(0.1)
COMBINED: list[dict[str, Any]] = [
    *(
        {"cache": cache, **drafts, **more}
        for cache in ("none", "prefix", "dual")
        for drafts in ({}, {"drafts": 3}, {"drafts": 3, "branches": "tree"})
        for more in ({}, {"cfg_scale": 0.5}, {"engine": "static"}, {"refresh": "recent"})
        if cache != "none" or "refresh" not in more
    ),
    *({"rule": fdpp.Klass(0.3, 0.5, 1), **more} for more in ({}, {"cache": "prefix", "drafts": "auto"})),
    *({"rule": fdpp.LocalLeap(0.6, 0.3), **more} for more in ({"drafts": 2}, {"cache": "none", "engine": "static"})),
    *({"rule": fdpp.Budget(0.6, 0.5, 0.2, 0.3), **more} for more in ({"engine": "static"}, {"refresh": "recent:2"})),
    *({"rule": fdpp.Quota(), "steps": 9, **more} for more in ({"cache": "none", "cfg_scale": 1.0}, {"drafts": 3})),
    {"rule": fdpp.EntropyBound(0.5), "refresh": "window:9:end", "drafts": 3, "engine": "static"},
    {"rule": fdpp.Factor(1.0), "refresh": "block"},
    {"stop_at_eos": True, "top_p": 0.9, "repetition_penalty": 1.3},
]
"""Each cache with each layout of drafts on each engine, with guidance, with a partial refresh; other rules by turns."""


@pytest.mark.parametrize("settings", COMBINED, ids=str)
def test_a_row_of_a_ragged_batch_is_the_row_alone(model: DiffusionLM, settings: dict[str, Any]) -> None:
    out = assert_rows_are_alone(model, **{"rule": EXPENSIVE, **settings})
    assert not out.sequences.eq(MASK).any()


@pytest.mark.parametrize("sizes", [(20, 1), (1, 1), (3, 8), (17, 5)], ids=str)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_blocks_of_any_length(model: DiffusionLM, cache: str, sizes: tuple[int, int]) -> None:
    settings = {"cache": cache, "max_new_tokens": sizes[0], "block_length": sizes[1], "rule": fdpp.Threshold(0.5)}
    plain = assert_rows_are_alone(model, **settings)
    for more in ({"engine": "static"}, {"drafts": 3}):
        out = model.generate(*left_pad(ROWS), **{**SIZES, **settings, **more})
        assert out.sequences.equal(plain.sequences) and out.commit_step.equal(plain.commit_step)


def test_rows_that_sample_draw_from_their_own_streams(model: DiffusionLM) -> None:
    ids, mask = left_pad(ROWS)
    settings = {**SIZES, "temperature": 0.7, "rule": EXPENSIVE}
    for more in ({}, {"cache": "none", "drafts": 3}, {"engine": "static"}):
        together = model.generate(ids, mask, seed=5, **settings, **more)
        for b, row in enumerate(ROWS):
            alone = model.generate(row[None], seed=5 + b, **settings, **more)
            assert together.sequences[b, -20:].equal(alone.sequences[0, -20:])
    assert not together.sequences.equal(model.generate(ids, mask, **settings | {"temperature": 0.0}).sequences)


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 0.7}], ids=str)
def test_without_a_cache_against_a_plain_decode(model: DiffusionLM, settings: dict[str, Any]) -> None:
    for row in ROWS:
        sizes = {"max_new_tokens": 20, "block_length": 5, "steps": 12}
        plain = plain_llada(model, row, **sizes, **settings)
        for more in ({}, {"drafts": 3, "branches": "tree"}, {"engine": "static"}):
            out = model.generate(
                row[None], rule=fdpp.Quota(), cache="none", stop_at_eos=False, **sizes, **settings, **more
            )
            assert out.sequences[0].equal(plain)


def test_processors_see_the_rows_that_predict_a_block(model: DiffusionLM) -> None:
    sizes, row = {"max_new_tokens": 20, "block_length": 5, "steps": 12}, ROWS[1]
    for processor in (Boost(), RepetitionPenaltyLogitsProcessor(1.5)):
        plain = plain_llada(model, row, **sizes, processors=[processor])
        settings = {"rule": fdpp.Quota(), "cache": "none", "stop_at_eos": False, "logits_processor": [processor]}
        for more in ({}, {"drafts": 2}, {"drafts": 3, "branches": "tree"}):
            assert model.generate(row[None], **sizes, **settings, **more).sequences[0].equal(plain)


@pytest.mark.parametrize(
    ("refresh", "cfg_scale"), [*((text, 0.0) for text in ("all", "recent", "window:9:end", "window:3:5")), ("all", 0.7)]
)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_a_cache_against_a_plain_decode(model: DiffusionLM, cache: str, refresh: str, cfg_scale: float) -> None:
    """Also what is fed: one column more than a block has, and than the block before has."""
    for row in ROWS:
        text = torch.cat((row, torch.full((20,), MASK)))
        how = {"rule": EXPENSIVE, "cache": cache, "cfg_scale": cfg_scale}
        x, step_of, steps, fed = decode(model, text, len(row), 8, first=FIRST[refresh], stop_at_eos=False, **how)
        for engine in ("eager", "static"):
            out = model.generate(row[None], **SIZES, **how, refresh=refresh, engine=engine)
            assert out.sequences[0].equal(x) and out.commit_step[0].equal(step_of[len(row) :])
            assert out.nfe.item() == steps and (engine == "static" or out.query_tokens.item() == fed)


@pytest.mark.parametrize("drafts", [{"drafts": 3}, {"drafts": 3, "branches": "tree"}, {"drafts": "auto"}], ids=str)
@pytest.mark.parametrize("refresh", ["recent", "window:9:end"])
def test_drafts_change_nothing_under_a_partial_refresh(
    model: DiffusionLM, refresh: str, drafts: dict[str, Any]
) -> None:
    """What a drafted block leaves in the column before it depends on the drafts, too: the next block feeds it."""
    ids, mask = left_pad(ROWS)
    for rule in (fdpp.Quota(), fdpp.Factor(1.0), fdpp.Klass(0.3, 0.5, 1)):
        for cache in ("prefix", "dual"):
            settings = {**SIZES, "rule": rule, "cache": cache, "refresh": refresh}
            plain, drafted = (model.generate(ids, mask, **settings, **more) for more in ({}, drafts))
            assert drafted.sequences.equal(plain.sequences) and drafted.commit_step.equal(plain.commit_step)


def texts() -> list[Tensor]:
    """To fill: the first token and others, all of them, some in the middle, one."""
    found = []
    for seed, masks in enumerate(([0, 1, 2, 9, 10, 17], range(12), [3, 4, 5, 12, 13], [0])):
        text = prompts(1, (18, 12, 18, 3)[seed], seed=seed)[0]
        text[list(masks)] = MASK
        found.append(text)
    return found


def test_the_first_token_is_filled_from_its_own_column(model: DiffusionLM) -> None:
    for text in texts():
        tokens, step_of, steps = plain_infill(model, text, EXPENSIVE, 7)
        for more in ({}, {"drafts": 3}, {"engine": "static"}):
            out = model.infill(text[None], rule=EXPENSIVE, cache="none", block_length=7, stop_at_eos=False, **more)
            assert out.sequences[0].equal(tokens) and out.commit_step[0].equal(step_of)
            assert out.nfe.item() == steps if "drafts" not in more else out.nfe.item() <= steps


@pytest.mark.parametrize(
    "settings",
    [
        *({"cache": cache} for cache in ("none", "prefix", "dual")),
        *({"cache": cache, "engine": "static", "drafts": 3} for cache in ("none", "prefix", "dual")),
        {"cache": "dual", "drafts": 3, "branches": "tree", "cfg_scale": 0.5},
        {"cache": "dual", "refresh": "recent", "drafts": 3},
        {"cache": "prefix", "rule": DAWN},
    ],
    ids=str,
)
def test_infilling_a_ragged_batch_is_each_text_alone(model: DiffusionLM, settings: dict[str, Any]) -> None:
    """Texts that start with a mask stand behind padding, whose column predicts nothing."""
    settings = {"rule": EXPENSIVE, "block_length": 7, "stop_at_eos": False, **settings}
    ids, mask = left_pad(texts())
    together = model.infill(ids, mask, **settings)
    undrafted = model.infill(ids, mask, **settings | {"drafts": 1})
    assert together.sequences.equal(undrafted.sequences) and together.commit_step.equal(undrafted.commit_step)
    for b, text in enumerate(texts()):
        alone = model.infill(text[None], **settings)
        assert together.sequences[b, -len(text) :].equal(alone.sequences[0])
        assert together.commit_step[b, -len(text) :].equal(alone.commit_step[0])


def plain_dawn(model: DiffusionLM, prompt: Tensor, cache: str) -> tuple[Tensor, int]:
    """A decode by DAWN of one row in float64, from the architecture on: its tokens, and how many forwards."""
    new, T, shift, rule = SIZES["max_new_tokens"], SIZES["block_length"], model.shift, DAWN
    x = torch.cat((prompt, torch.full((new,), MASK)))
    L, forwards, kept = len(x), 0, None
    for start in range(len(prompt), L, T):
        block, anchors = slice(start, min(start + T, L)), torch.zeros(L, dtype=torch.float64)
        everything = slice(0, L)
        fed = everything
        while (x[block] == MASK).any():
            logits, maps, held = naive_forward(model, x[fed], fed.start, None if fed == everything else kept)
            forwards, kept = forwards + 1, held
            proposal = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).argmax(1)
            c = logits.softmax(1).gather(1, proposal[:, None])[:, 0]
            if fed == everything:
                anchors = c[predicting(shift, everything)].masked_fill(x == MASK, 0.0)
            rows, masked = predicting(shift, block) - fed.start, x[block] == MASK
            anchors[block] = c[rows].masked_fill(masked, 0.0)
            A = maps[rule.probed(len(maps)).start :].mean(0)
            E = dawn.edges(A[None], rule, fed.start, block.start, block.stop - block.start)
            commit = dawn.commit(c[rows][None], masked[None], anchors[None], E, rule, block.start)[0]
            x[block] = torch.where(commit, proposal[rows], x[block])
            first = max(block.start - shift, 0)
            fed = {"none": everything, "prefix": slice(first, L), "dual": slice(first, block.stop)}[cache]
    return x, forwards


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@EACH_FAMILY
def test_dawn_against_a_plain_decode(family: str, cache: str) -> None:
    exact, commits = exactly(family, seed=1), []
    rows = [row for row in ROWS if len(row)]  # masks alone are all alike, so that rounding would decide
    ids, mask = left_pad(rows)
    for more in ({}, {"drafts": 3}, {"drafts": 2, "branches": "tree"}):
        out = exact.generate(ids, mask, rule=DAWN, cache=cache, **SIZES, **more)
        for b, row in enumerate(rows):
            tokens, forwards = plain_dawn(exact, row, cache)
            assert out.sequences[b, ids.shape[1] - len(row) :].equal(tokens)
            assert out.nfe[b] == forwards if not more else out.nfe[b] <= forwards
            commits.append(forwards)
    assert len(set(commits)) > 1 and max(commits) < SIZES["max_new_tokens"]


def test_a_rule_that_feeds_rows_is_refused(model: DiffusionLM) -> None:
    """A row has no column before it."""
    settings = {"rule": Wino(0.3, 0.5), "cache": "none", "block_length": 8}
    for use in (
        lambda: model.generate(ROWS[0][None], max_new_tokens=8, **settings),
        lambda: model.infill(texts()[0][None], **settings),
    ):
        with pytest.raises(
            ValueError, match=r"rule=Wino\(...\) feeds rows, and this model reads a row's token off the"
        ):
            use()
