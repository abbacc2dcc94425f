"""The command line as a person meets it: what is printed where, exit codes, and one line instead of a traceback."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dream_files
import pytest
import torch
from family_of_others import GistConfig, GistLM
from small import small_dream
from transformers import AutoTokenizer

import fdpp
from fdpp import cli, tiny
from fdpp.cli import eval as eval_command
from fdpp.cli.options import config_of, ended_by_turn, hint_for
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.tiny import stories, sudoku

PROMPT = (
    "Mia has 12 apples . In May she finds 5 . In June she loses 3 . In July she buys 4 . In August she sells 6 . "
    "How many apples now ?"
)
SHORT = ("--gen-length", "32", "--device", "cpu")
CHAT = "{% for message in messages %}Mia {{ message['content'] }} now{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder like a published checkpoint's, with a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = tiny.load()
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """A folder like a published Dream's."""
    folder = tmp_path_factory.mktemp("dream")
    dream_files.write_checkpoint(folder, small_dream(**dream_files.IDS))
    return folder


def answer(prompt, **settings):
    """What `fdpp generate` should print, by way of the Python API."""
    model, tokenizer = tiny.load()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, generation_config=DiffusionGenerationConfig(max_new_tokens=32, **settings))
    return tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip(), int(out.nfe)


@pytest.mark.parametrize("command", ["", "demo", "generate"])
def test_help(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: fdpp {command}".strip()) and not err


def test_help_of_generate_explains_every_option(capsys):
    cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option, default in (
        ("--model", "tiny"), ("--rule", "frechet"), ("--margin", "0.25"), ("--calibration", "0"), ("--tau", "0.9"),
        ("--factor", "0.75"), ("--gamma", "0.1"), ("--k", "1"), ("--gen-length", "128"),
        ("--block-length", "the model's own"), ("--sub-block-length", "the model's own"),
        ("--cache", "dual"), ("--refresh", "all"), ("--drafts", "1"), ("--branches", "batch"), ("--temperature", "0"),
        ("--seed", "0"), ("--dtype", "auto"), ("--device", "auto"), ("--remasking", "low_confidence"),
        ("--cfg-scale", "0"),
    ):  # fmt: skip
        explained = text[text.index("options:") :].split(f" {option} ", 1)[1]
        assert f"(default: {default}" in explained.split(" --")[0], option
    assert text.count("fdpp generate --") == 3, "three examples"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fdpp {fdpp.__version__}\n"


def test_generate_prints_the_answer_and_its_figures(capsys):
    assert cli.main(["generate", "--prompt", PROMPT, *SHORT]) == 0
    out, err = capsys.readouterr()
    expected, nfe = answer(PROMPT)
    assert out == expected + "\n"
    assert f"{nfe} forwards (NFE)" in err and "tokens per forward" in err and "tok/s" in err


def test_generate_prints_what_drafts_cost_and_bring(capsys):
    assert cli.main(["generate", "--prompt", PROMPT, *SHORT, "--rule", "quota", "--drafts", "3"]) == 0
    said = re.search(r"(\d+) positions evaluated; drafts accepted, by depth: (\d+)%, (\d+)%", capsys.readouterr().err)
    model, tokenizer = tiny.load()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    out = model.generate(ids, rule=fdpp.Quota(), drafts=3, max_new_tokens=32)
    assert [int(group) for group in said.groups()] == [
        out.query_tokens.item(), *(round(100 * share) for share in out.acceptance[0].tolist())
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("--rule quota --steps 5 --cache none", {"rule": fdpp.Quota(), "steps": 5, "cache": "none"}),
        ("--rule quota --k 3 --cache prefix", {"rule": fdpp.Quota(3), "cache": "prefix"}),
        ("--rule threshold --tau 0.5", {"rule": fdpp.Threshold(0.5)}),
        ("--rule factor --factor 1.5 --block-length 16", {"rule": fdpp.Factor(1.5), "block_length": 16}),
        ("--margin 0.1 --calibration 0.01", {"rule": fdpp.Frechet(0.1, 0.01)}),
        ("--rule entropy --gamma 2 --no-stop-at-eos", {"rule": fdpp.EntropyBound(2.0), "stop_at_eos": False}),
        ("--rule budget --budget 0.3 --sure 0.6 --floor 0.5 --rise 0.2", {"rule": fdpp.Budget(0.3, 0.6, 0.5, 0.2)}),
        ("--rule balanced", {"rule": "balanced"}),
        ("--rule localleap --tau 0.8 --relaxed 0.5 --radius 2", {"rule": fdpp.LocalLeap(0.8, 0.5, 2)}),
        ("--rule klass --confidence 0.5 --kl 0.1 --window 1", {"rule": fdpp.Klass(0.5, 0.1, 1)}),
        ("--rule hierarchy --low 0.3 --high 0.8", {"rule": fdpp.Hierarchy(0.3, 0.8)}),
        (
            "--rule credit --tau 0.8 --alpha 2 --boost 0.5 --beta 0.6",
            {"rule": fdpp.Credit(0.8, 2.0, 0.5, 0.6)},
        ),
        ("--rule dawn --tau-sink 0.02 --layers 2", {"rule": fdpp.Dawn(tau_sink=0.02, layers=2)}),
        ("--rule saber --n 4", {"rule": fdpp.Saber(4)}),
        ("--rule prophet --answer 20 --steps 9", {"rule": fdpp.Prophet(None, 20), "steps": 9}),
        ("--rule prophet --k 2 --early 3 --mid 2 --late 1", {"rule": fdpp.Prophet(2, 0, 3.0, 2.0, 1.0)}),
        ("--rule threshold-quota --tau 0.6 --k 2", {"rule": fdpp.ThresholdQuota(0.6, 2)}),
        ("--rule threshold-quota --tau 0.6 --steps 8", {"rule": fdpp.ThresholdQuota(0.6, None), "steps": 8}),
        ("--rule editing --tau 0.6 --edit 0.5 --post 2", {"rule": fdpp.Editing(0.6, edit=0.5, post=2)}),
        ("--rule wino --tau 0.4 --back 0.8 --cap 5", {"rule": fdpp.Wino(0.4, 0.8, 5)}),
        ("--rule revocable --margin 0.1", {"rule": fdpp.Revocable(fdpp.Frechet(0.1))}),
        (
            "--rule revocable --of threshold --tau 0.4 --below 0.8 --at-most 2 --drafts 2",
            {"rule": fdpp.Revocable(fdpp.Threshold(0.4), 0.8, 2), "drafts": 2},
        ),
        ("--rule revocable --of quota --steps 9", {"rule": fdpp.Revocable(fdpp.Quota()), "steps": 9}),
        ("--rule revocable --of balanced", {"rule": fdpp.Revocable("balanced")}),
        ("--rule quota --drafts 4", {"rule": fdpp.Quota(), "drafts": 4}),
        ("--drafts auto --branches tree", {"drafts": "auto", "branches": "tree"}),
        ("--refresh window:8:end --block-length 8", {"refresh": "window:8:end", "block_length": 8}),
        ("--temperature 0.7 --seed 3", {"temperature": 0.7, "seed": 3}),
        ("--rule quota --remasking random --seed 4", {"rule": fdpp.Quota(), "remasking": "random", "seed": 4}),
        ("--rule quota --k 4 --cfg-scale 2", {"rule": fdpp.Quota(4), "cfg_scale": 2.0}),
        (
            "--top-k 9 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --suppress-token 50 --suppress-token 51 "
            "--bad-word 40 41 --bad-word 42",
            {"top_k": 9, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "suppress_tokens": [50, 51]}
            | {"bad_words_ids": [[40, 41], [42]]},
        ),
    ],
)
def test_options_reach_the_decode(options, settings, capsys):
    assert cli.main(["generate", "--prompt", PROMPT, *SHORT, *options.split()]) == 0
    out, err = capsys.readouterr()
    expected, nfe = answer(PROMPT, **settings)
    assert out == expected + "\n" and f"{nfe} forwards" in err


def test_an_answer_ends_before_a_stop_string(capsys):
    whole, _ = answer(PROMPT)
    stop = whole.split()[4]
    assert cli.main(["generate", "--prompt", PROMPT, *SHORT, "--stop-string", "never", "--stop-string", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)].strip() + "\n"
    config = config_of(cli.build_parser().parse_args(["chat", "--stop-string", "\n"]))
    assert config.stop_strings == ["\n"]


@pytest.mark.parametrize("option", ["--logits-eos-inf", "--confidence-eos-eot-inf"])
def test_switches_of_lladas_generate(option):
    for given in ([], [option]):
        config = config_of(cli.build_parser().parse_args(["generate", "--prompt", "x", *given]))
        assert getattr(config, option[2:].replace("-", "_")) is bool(given)
        assert config.logits_eos_inf + config.confidence_eos_eot_inf == len(given)


def test_stream_without_a_terminal_prints_the_same(capsys):
    cli.main(["generate", "--prompt", PROMPT, "--device", "cpu"])
    plain = capsys.readouterr().out
    assert cli.main(["generate", "--prompt", PROMPT, "--device", "cpu", "--stream"]) == 0
    assert capsys.readouterr().out.split() == plain.split()


def test_prompt_from_standard_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert cli.main(["generate", "--prompt", "-", *SHORT]) == 0
    assert capsys.readouterr().out == answer(PROMPT)[0] + "\n"


def test_standard_input_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert cli.main(["generate", "--prompt", "-"]) == 2
    assert capsys.readouterr().err.startswith("fdpp: error: --prompt -: ")


def test_words_that_the_model_does_not_know_are_pointed_out(capsys):
    assert cli.main(["generate", "--prompt", "Mia has a \udcff 5", *SHORT]) == 0
    assert "2 of 5 words of the prompt are unknown to the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "hinted"),
    [("What is the capital of France?", True), ("Mia has 12 apples .", True), (PROMPT.replace(" .", "."), False)],
)
def test_a_prompt_that_the_embedded_model_cannot_answer_gets_a_hint(prompt, hinted, capsys):
    """On standard error, with a problem that it can answer; the answer is as without."""
    assert cli.main(["generate", "--prompt", prompt, *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out == answer(prompt)[0] + "\n" and ("fdpp: note: the small model sums answers" in err) is hinted
    found = re.search(r"problems like this one: (.*\?) For other prompts name a model with --model\.", err)
    assert bool(found) is hinted and (found is None or tiny.is_problem(found[1]))


def prompt_of(name):
    return tiny.MODELS[name].generate("held-out", 1)[0].prompt


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_embedded_model_has_a_name_and_decodes_with_its_own_settings(name, capsys):
    prompt = prompt_of(name)
    assert cli.main(["generate", "--model", f"tiny:{name}", "--prompt", prompt, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = tiny.load(name)
    decoded = model.generate(torch.tensor([tokenizer(prompt)["input_ids"]]))
    response = decoded.sequences[0, len(tokenizer(prompt)["input_ids"]) :]
    assert out.strip() == tokenizer.decode(response, skip_special_tokens=True).strip()
    assert f" {int(decoded.nfe)} forwards (NFE)" in err and "fdpp: note" not in err


@pytest.mark.parametrize("command", ["generate --prompt x", "chat", "trace", "eval --tasks tiny_sums"])
@pytest.mark.parametrize(
    ("model", "lengths"),
    [
        ("tiny", (128, 32)),
        ("tiny:sums", (128, 32)),
        ("tiny:sudoku", (42, 14)),
        ("tiny:stories", (48, 24)),
        ("tiny:stories-block", (48, 16)),
        ("other/model", (128, None)),
    ],
)
def test_default_lengths_are_those_of_the_embedded_model(command, model, lengths):
    parser, argv = cli.build_parser(), [*command.split(), "--model", model]
    args = parser.parse_args(argv)
    if command.startswith("eval"):
        eval_command.resolve(args)
    assert (config_of(args).max_new_tokens, config_of(args).block_length) == lengths
    args = parser.parse_args([*argv, "--gen-length", "9", "--block-length", "5"])
    if command.startswith("eval"):
        eval_command.resolve(args)
    assert (config_of(args).max_new_tokens, config_of(args).block_length) == (9, 5)


def test_what_a_models_name_means():
    assert tiny.task_of("tiny") is tiny.task_of("tiny:sums") is tiny.TASKS["sums"]
    assert tiny.task_of("tiny:sudoku") is tiny.TASKS["sudoku"]
    assert [tiny.task_of(name) for name in ("GSAI-ML/LLaDA-8B-Base", "sudoku", "./tiny:sudoku", "tiny/sums")] == [
        None
    ] * 4
    for name in ("tiny:", "tiny:chess", "tiny:sums:sums"):
        with pytest.raises(
            ValueError, match=f"expected one of tiny:sums, tiny:sudoku, tiny:stories, tiny:stories-block, got '{name}'"
        ):
            tiny.task_of(name)


@pytest.mark.parametrize("name", tiny.TASKS)
def test_hints_are_of_the_task(name, capsys):
    """Prompts of its form get none; a prompt of another task gets one, with an example of the model's own."""
    for other in tiny.TASKS:
        hint = hint_for(f"tiny:{name}", prompt_of(other))
        if other == name:
            assert hint is None
        else:
            assert hint.startswith(
                f"the small model {name} answers nothing but problems like this one: {prompt_of(name)} "
            )


def test_only_sudokus_that_the_model_was_trained_on_are_problems():
    is_problem = tiny.TASKS["sudoku"].is_problem
    written = [puzzle.prompt for split in ("train", "held-out") for puzzle in sudoku.generate(split, 100)]
    assert all(map(is_problem, written)) and all(is_problem(text.replace(" /", "/")) for text in written)
    few, many = (sudoku.generate("train", 1, givens=givens)[0] for givens in (4, 20))
    given = next(cell for cell, digit in enumerate(few.givens) if digit)
    empty = many.givens.index(0)
    for puzzle, cell, digit in ((few, given, 0), (many, empty, many.solution[empty])):
        cells = [*puzzle.givens]
        cells[cell] = digit
        assert not is_problem(sudoku.Sudoku(tuple(cells), puzzle.solution).prompt), "3 givens, and 21"
    prompt = few.prompt
    assert is_problem(prompt) and not is_problem(prompt.removesuffix(" =")) and not is_problem(f"{prompt} 1")
    assert not is_problem(prompt.replace(".", "7", 1)) and not is_problem(prompt.replace(" /", "", 1))
    assert not is_problem(prompt.replace(". ", "", 1)) and not is_problem("") and not is_problem(few.response)
    assert not is_problem("1 1 . . . . / 2 2 . . . . / " + ". . . . . . / " * 4 + "="), "no grid keeps these"


def test_only_prompts_of_stories_that_the_model_was_trained_on_are_problems():
    is_problem = tiny.TASKS["stories"].is_problem
    written = [story.prompt for split in ("train", "held-out") for story in stories.generate(split, 200)]
    assert all(map(is_problem, written)) and all(is_problem(text.replace(" ,", ",")) for text in written)
    assert is_problem("tell of the market , yesterday , 3 + 2 + 6 :")
    for text in (
        "tell of the moon , yesterday , 3 + 2 + 6 :",
        "tell of the market , never , 3 + 2 + 6 :",
        "tell of the market , yesterday , 3 + 2 + 7 :",
        "tell of the market , yesterday , 3 + 2 + 0 :",
        "tell of the market , yesterday , 1 + 2 + 2 :",
        "tell of the market , yesterday , 3 + 2 :",
        "tell of the market , yesterday , 3 + 2 + 6 : now",
        "",
    ):
        assert not is_problem(text), text


def test_generate_fills_the_empty_cells_of_a_sudoku(capsys):
    text = tiny.TASKS["sudoku"].generate("held-out", 1)[0].holes
    assert cli.main(["generate", "--model", "tiny:sudoku", "--fill", text, "--device", "cpu"]) == 0
    model, tokenizer = tiny.load("sudoku")
    out = model.infill(torch.tensor([tokenizer(text)["input_ids"]]))
    assert capsys.readouterr().out == tokenizer.decode(out.sequences[0], skip_special_tokens=True) + "\n"


def test_another_model_gets_no_hint(checkpoint, capsys):
    assert cli.main(["generate", "--model", str(checkpoint), "--prompt", "What is it?", *SHORT]) == 0
    assert "small model" not in capsys.readouterr().err


def test_checkpoint_folder_with_chat_template(checkpoint, capsys):
    said = {}
    for raw in ([], ["--raw"]):
        assert cli.main(["generate", "--model", str(checkpoint), "--prompt", "has 12 apples .", *SHORT, *raw]) == 0
        said[bool(raw)] = capsys.readouterr().out.strip()
    assert said[True] == answer("has 12 apples .")[0]
    assert said[False] == answer("Mia has 12 apples . now")[0]


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["chat", "raw"])
def test_a_dream_answers(dream, raw, capsys):
    """From its folder alone: nothing but `--model` says what it is."""
    assert cli.main(["generate", "--model", str(dream), "--prompt", "hello hello", *SHORT, *raw]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = fdpp.DreamModelLM.from_pretrained(dream), AutoTokenizer.from_pretrained(dream)
    text, ends = "hello hello", [dream_files.EOS]
    if not raw:
        text = "<|im_start|>user\nhello hello<|im_end|>\n<|im_start|>assistant\n"
        ends.append(dream_files.TURN)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    expected = model.generate(ids, max_new_tokens=32, eos_token_id=ends)
    assert out == tokenizer.decode(expected.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip() + "\n"
    assert f"{int(expected.nfe)} forwards (NFE)" in err


def test_a_dream_fills_blanks_and_is_traced(dream, tmp_path, capsys):
    assert cli.main(["generate", "--model", str(dream), "--fill", "hello <mask> hello", *SHORT]) == 0
    assert capsys.readouterr().out.startswith("hello ")
    page = tmp_path / "dream.html"
    assert cli.main(["trace", "--model", str(dream), "--prompt", "hello", "-o", str(page), *SHORT]) == 0
    assert "<|im_start|>assistant" in page.read_text().replace("\\u003c", "<")


def test_a_family_of_somebody_elses_is_read_by_its_model_type(tmp_path, capsys):
    _, tokenizer = tiny.load()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "eos", "pad")}
    torch.manual_seed(0)
    model = GistLM(GistConfig(vocab_size=len(tokenizer), **ids)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", PROMPT, *SHORT]) == 0
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    out = model.generate(prompt, max_new_tokens=32).sequences[0, prompt.shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(out, skip_special_tokens=True).strip() + "\n"


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({}, [dream_files.EOS, dream_files.TURN]),
        ({"eos_token_id": 7}, [7, dream_files.TURN]),
        ({"eos_token_id": [dream_files.TURN]}, [dream_files.TURN]),
        ({"stop_at_eos": False}, None),
        ({"logits_eos_inf": True}, None),
    ],
    ids=str,
)
def test_a_turn_ends_with_what_the_template_writes_behind_an_answer(dream, settings, ends):
    model, tokenizer = fdpp.DreamModelLM.from_pretrained(dream), AutoTokenizer.from_pretrained(dream)
    config = DiffusionGenerationConfig(**settings)
    assert ended_by_turn(config, model, tokenizer).eos_token_id == ends
    for template in (None, CHAT, "{% for message in messages %}{{ message['content'] }}{% endfor %}"):
        tokenizer.chat_template = template
        assert ended_by_turn(config, model, tokenizer) is config


def test_bfloat16(capsys):
    assert cli.main(["generate", "--prompt", PROMPT, *SHORT, "--dtype", "bfloat16"]) == 0
    assert "NFE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND (see fdpp --help)"),
        ("frobnicate", "'frobnicate'"),
        ("generate", "--prompt --fill is required (see fdpp generate --help)"),
        ("generate --prompt", "--prompt: expected one argument"),
        ("generate --prompt x --steep 2", "unrecognized arguments: --steep 2"),
        ("generate --prompt x --tau 0.9", "--tau does not belong to --rule frechet, which takes --calibration and"),
        ("generate --prompt x --steps 9", "--steps does not belong to --rule frechet"),
        (
            "generate --prompt x --rule quota --margin 0",
            "--margin does not belong to --rule quota, which takes --k and",
        ),
        ("generate --prompt x --of threshold", "--of does not belong to --rule frechet, but to --rule revocable"),
        ("generate --prompt x --rule revocable --of dawn", "argument --of: invalid choice: 'dawn'"),
        ("generate --prompt x --rule revocable --tau 0.5", "--tau does not belong to --rule frechet, which takes"),
        (
            "generate --prompt x --rule wino --drafts 2 --branches tree",
            "branches='tree' has no columns for the rows",
        ),
        ("generate --prompt x --rule quota --k 2 --steps 9", "steps=9 is a schedule for rule=Quota()"),
        ("generate --prompt x --rule quota --k 0", "--k: expected a whole number of at least 1, got '0'"),
        ("generate --prompt x --rule wild", "--rule: invalid choice: 'wild'"),
        ("generate --prompt x --margin -1", "expected margin in [0, inf), got -1.0"),
        ("generate --prompt x --margin much", "--margin: invalid float value: 'much'"),
        ("generate --prompt x --gen-length 1.5", "--gen-length: expected a whole number of at least 1, got '1.5'"),
        ("generate --prompt x --block-length 1025", "block_length: expected an int from 1 to 1024, got 1025"),
        ("generate --prompt x --drafts 65", 'drafts: expected an int from 1 to 64 or "auto", got 65'),
        ("generate --prompt x --drafts few", "--drafts: expected a whole number of at least 1, got 'few'"),
        ("generate --prompt x --temperature nan", "temperature: expected a finite number"),
        ("generate --prompt x --remasking random", "remasking='random' needs a number of positions, rule=Quota(...)"),
        ("generate --prompt x --remasking some", "--remasking: invalid choice: 'some'"),
        ("generate --prompt x --cfg-scale -1", "cfg_scale: expected a finite number of at least 0, got -1.0"),
        ("generate --prompt x --seed 9223372036854775808", "--seed: expected a whole number"),
        ("generate --prompt x --gen-length 1000", "exceed the model's window of"),
        ("generate --prompt x --model no/such/folder", "no/such/folder: no such folder"),
        ("generate --prompt x --model unknown", "unknown: no such folder"),
        *(
            (
                f"{command} --model tiny:chess",
                "--model: expected one of tiny:sums, tiny:sudoku, tiny:stories, tiny:stories-block, got 'tiny:ch",
            )
            for command in ("generate --prompt x", "chat", "trace", "eval --tasks tiny_sums")
        ),
        ("generate --prompt x --gen-length 0", "--gen-length: expected a whole number of at least 1, got '0'"),
        ("demo --task chess", "--task: invalid choice: 'chess'"),
        ("demo --problems 0", "--problems: expected a whole number of at least 1"),
        ("demo --cache all", "--cache: invalid choice: 'all'"),
    ],
)
def test_user_errors(arguments, message, capsys):
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("fdpp: error: ") and message in line and "Traceback" not in err and not out


@pytest.mark.parametrize("command", ["generate --prompt x", "chat", "trace --prompt x"])
@pytest.mark.parametrize("name, content", [("config.json", '{"model_type": "llada"}'), ("model.safetensors", "")])
def test_a_file_is_no_model(command, name, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.write_text(content)
    assert cli.main([*command.split(), "--model", str(file)]) == 2
    expected = f"fdpp: error: --model {file}: a file, expected the folder of a model\n"
    assert capsys.readouterr().err == expected and list(tmp_path.iterdir()) == [file]


def test_empty_prompt(capsys):
    assert cli.main(["generate", "--prompt", " \n"]) == 2
    assert capsys.readouterr().err == "fdpp: error: the prompt is empty\n"


def test_cuda_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["generate", "--prompt", "x", "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_folders_that_are_no_llada_checkpoint(checkpoint, tmp_path, capsys):
    def complaint(name, **files):
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        for file, content in files.items():
            path = next(folder.glob(f"{file}.*"))
            path.unlink() if content is None else path.write_text(content)
        assert cli.main(["generate", "--prompt", "x", "--model", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"fdpp: error: --model {folder}: ") and err.count("\n") == 1 and not out
        return err

    config = json.loads((checkpoint / "config.json").read_text())
    other = complaint("other", config=json.dumps({"model_type": "gpt2"}))
    assert all(said in other for said in ("expected a config.json with model_type ", "llada", "Dream", "got gpt2"))
    assert "got none" in complaint("configless", config=None)
    assert "not a valid JSON" in complaint("broken", config="{")
    assert "missing keys" in complaint("deeper", config=json.dumps({**config, "n_layers": config["n_layers"] + 1}))
    assert "alibi" in complaint("unimplemented", config=json.dumps({**config, "alibi": True}))
    complaint("weightless", model=None)
    complaint("damaged", model="not safetensors")
    complaint("wordless", tokenizer=None)


def test_non_finite_logits_are_reported(checkpoint, tmp_path, capsys):
    folder = tmp_path / "nan"
    shutil.copytree(checkpoint, folder)
    model = fdpp.LLaDAModelLM.from_pretrained(folder)
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    model.save_pretrained(folder)
    assert cli.main(["generate", "--prompt", "Mia", "--model", str(folder), *SHORT]) == 2
    assert "fdpp: error: the model's logits held NaN" in capsys.readouterr().err


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(fdpp.LLaDAModelLM, "generate", interrupted)
    assert cli.main(["generate", "--prompt", PROMPT]) == 130
    assert capsys.readouterr() == ("", "\n")


def test_closed_pipe_is_quiet():
    """A real process, for the interpreter flushes once more when it exits."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fdpp", "generate", "--prompt", PROMPT, *SHORT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141, err
    assert "Error" not in err and "Traceback" not in err


def test_output_in_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["demo", "--help"]) == 0
    assert b"Fr?chet" in out.buffer.getvalue()


FILL = "Mia has 12 apples . In May she finds 5 , so Mia has <mask> apples . In June she <mask> 3 ."


@pytest.mark.parametrize("each", [1, 3])
def test_generate_fills_the_blanks_of_a_text(each, capsys):
    assert cli.main(["generate", "--fill", FILL, "--fill-length", str(each), "--cache", "none"]) == 0
    model, tokenizer = tiny.load()
    ids = torch.tensor([tokenizer(FILL.replace("<mask>", "<mask>" * each))["input_ids"]])
    out = model.infill(ids, cache="none")
    told = capsys.readouterr()
    assert told.out == tokenizer.decode(out.sequences[0], skip_special_tokens=True).strip() + "\n"
    assert "<mask>" not in told.out and told.out.startswith("Mia has 12 apples . In May she finds 5 , so Mia has ")
    assert f"{2 * each} tokens" in told.err


def test_generate_streams_a_text_with_its_blanks_filled(capsys):
    assert cli.main(["generate", "--stream", "--fill", FILL, "--block-length", "4"]) == 0
    assert capsys.readouterr().out.startswith("Mia has 12 apples . In May she finds 5 , so Mia has ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fill", "Mia has 12 apples ."], "--fill: expected <mask> at the blanks of the text, got none"),
        (["--fill", " "], "--fill: the text is empty"),
        (["--fill", FILL, "--prompt", PROMPT], "not allowed with"),
        (["--prompt", PROMPT, "--fill-length", "2"], "--fill-length belongs to --fill"),
        (["--fill", FILL, "--fill-length", "200"], "exceed the model's window of 256"),
    ],
)
def test_blanks_that_cannot_be_filled(arguments, message, capsys):
    assert cli.main(["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_masks_that_are_words_of_the_text_are_refused(capsys, monkeypatch):
    model, tokenizer = tiny.load()
    model.config.mask_token_id = tokenizer("apples")["input_ids"][0]
    monkeypatch.setattr(tiny, "load", lambda task: (model, tokenizer))
    assert cli.main(["generate", "--fill", FILL]) == 2
    assert "--fill: expected 2 masks, the tokenizer makes 4 of them" in capsys.readouterr().err
