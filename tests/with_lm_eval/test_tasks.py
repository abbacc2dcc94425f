"""lm-evaluation-harness's own loop around the embedded model: metrics, contexts, costs, processes."""

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import dream_files
import pytest
import torch
from small import small_dream

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install '.[eval]'")

import datasets  # noqa: E402
import evaluate  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import fdpp  # noqa: E402
from fdpp import cli, tiny  # noqa: E402
from fdpp.decoding.settings import DiffusionGenerationConfig  # noqa: E402
from fdpp.integrations.evaluation.evaluator import Request  # noqa: E402
from fdpp.integrations.lm_eval import FdppLM  # noqa: E402

ROOT = Path(__file__).parents[2]
CHAT = "{% for message in messages %}Mia {{ message['content'] }} now {% endfor %}"


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


def run_command(tmp_path, *argv):
    """What `fdpp eval` writes for the embedded model's task."""
    output = tmp_path / "out.json"
    argv = ("eval", "--tasks", "tiny_sums", "--cache", "none", "--device", "cpu", *argv, "--output", str(output))
    assert cli.main(list(argv)) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def test_accuracy_and_costs_are_those_of_make_quality(tmp_path, monkeypatch, capsys, loaded):
    monkeypatch.syspath_prepend(ROOT / "bench")
    threads = torch.get_num_threads()
    try:
        runs = import_module("quality_runs")
        expected = runs.run(runs.Setting("sums", fdpp.Frechet(0.25), "none", problems=24))
    finally:
        torch.set_num_threads(threads)
    got = run_command(tmp_path, "--limit", "24", "--batch-size", "7")
    assert got["results"]["tiny_sums"]["exact_match,none"] == expected["share"]
    cost = got["fdpp"]["costs"]["tiny_sums"]
    assert (cost["responses"], cost["nfe_per_response"]) == (24, expected["nfe"])
    assert cost["tokens_per_forward"] == expected["tokens_per_forward"]
    assert got["fdpp"]["decoding"]["max_new_tokens"] is None, "the task's own length"
    texts = [sample["resps"][0][0].strip() for sample in got["samples"]["tiny_sums"]]
    _, tokenizer = loaded
    assert sorted(texts) == sorted(tokenizer.decode(ids, skip_special_tokens=True) for ids in expected["responses"])
    out = capsys.readouterr().out
    assert "exact_match" in out and f"|{expected['tokens_per_forward']:.2f}|" in out


def test_responses_belong_to_their_documents(tmp_path, loaded):
    model, tokenizer = loaded
    got = run_command(tmp_path, "--limit", "3", "--rule", "threshold", "--tau", "0.8", "--batch-size", "3")
    for sample, problem in zip(got["samples"]["tiny_sums"], tiny.generate("held-out", 3), strict=True):
        ids = torch.tensor([tokenizer(problem.prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=128, rule=fdpp.Threshold(0.8), cache="none")
        text = tokenizer.decode(out.sequences[0, ids.shape[1] :]).split("<eos>")[0].strip()
        assert sample["resps"] == [[text]] and sample["exact_match"] == tiny.is_right(text, problem)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    first = run_command(tmp_path, "--limit", "4", "--resume", str(tmp_path / "runs"))
    monkeypatch.setattr(fdpp.LLaDAModelLM, "generate", None)
    again = run_command(tmp_path, "--limit", "4", "--resume", str(tmp_path / "runs"))
    assert again["samples"] == first["samples"] and again["fdpp"]["costs"] == first["fdpp"]["costs"]


def few_shot_task(**changes):
    problems = tiny.generate("train", 6)
    docs = datasets.Dataset.from_list([{"prompt": p.prompt, "response": p.response} for p in problems])
    return {
        "task": "few_shot",
        "custom_dataset": lambda **_: {"train": docs, "test": docs},
        "output_type": "generate_until",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{response}}",
        "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }


@pytest.mark.filterwarnings("ignore")
def test_a_chat_holds_the_plain_prompt_as_one_turn(loaded):
    model, _ = loaded
    tokenizer = tiny.load()[1]
    tokenizer.chat_template = CHAT
    contexts = []
    for chat in (False, True):
        results = lm_eval.simple_evaluate(
            FdppLM(model, tokenizer, DiffusionGenerationConfig(cache="none")),
            tasks=[few_shot_task()],
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=1,
            limit=1,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=False,
        )
        contexts.append(results["samples"]["few_shot"][0]["arguments"][0][0])
    plain, chat = contexts
    assert plain.count("How many") == 2 and chat == f"Mia {plain} now "


def test_likelihoods_choose_between_answers(loaded):
    model, tokenizer = loaded
    problems = tiny.generate("held-out", 6)
    docs = [{"prompt": p.prompt, "choices": [problems[i - 1].response, p.response]} for i, p in enumerate(problems)]
    task = few_shot_task(
        task="choice",
        custom_dataset=lambda **_: {"test": datasets.Dataset.from_list(docs)},
        output_type="multiple_choice",
        fewshot_split=None,
        doc_to_choice="{{choices}}",
        doc_to_target=1,
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    lm = FdppLM(model, tokenizer, mc_num=4, batch_size=4)
    results = lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    assert results["results"]["choice"]["acc,none"] == 1.0
    sample = results["samples"]["choice"][2]
    own = [(problems[2].prompt, " " + choice) for choice in docs[2]["choices"]]
    assert [tuple(resp[0]) for resp in sample["resps"]] == lm.evaluator.likelihoods(own)


def test_the_name_is_registered_and_takes_flat_arguments():
    made = get_model("fdpp").create_from_arg_string(
        "pretrained=tiny,rule=threshold,tau=0.8,block_length=16,cache=prefix,gen_length=64,mc_num=2",
        {"batch_size": "3", "max_batch_size": None, "device": "cpu"},
    )
    assert isinstance(made, FdppLM)
    evaluator = made.evaluator
    assert (evaluator.config.rule, evaluator.config.block_length, evaluator.config.cache) == (
        fdpp.Threshold(0.8),
        16,
        "prefix",
    )
    assert (evaluator.gen_length, evaluator.mc_num, evaluator.batch_size) == (64, 2, 3)
    assert FdppLM.create_from_arg_string("cache=none").evaluator.config.cache == "none"
    for argument, block_length in (("", 14), (",block_length=7", 7)):
        evaluator = FdppLM.create_from_arg_string(f"pretrained=tiny:sudoku,device=cpu{argument}").evaluator
        assert evaluator.config.block_length == block_length
        assert len(evaluator.tokenizer) == len(tiny.load("sudoku")[1])
    for arguments, message in (
        ("rule=best", "rule: expected one of "),
        ("margin=0.2,tau=0.8", r"unknown \['tau'\]"),
        (
            "pretrained=tiny:chess",
            "expected one of tiny:sums, tiny:sudoku, tiny:stories, tiny:stories-block, got 'tiny:chess'",
        ),
        ("batch_size=auto", "batch_size: expected an int"),
        ("dtype=float99", "dtype: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            FdppLM.create_from_arg_string(arguments)


def test_a_dream_is_evaluated_with_its_bos(tmp_path):
    dream_files.write_checkpoint(tmp_path, small_dream(**dream_files.IDS))
    made = FdppLM.create_from_arg_string(
        f"pretrained={tmp_path},device=cpu,add_bos_token=true,block_length=8"
    ).evaluator
    assert type(made.model) is fdpp.DreamModelLM and made.encode("a")[0] == dream_files.BOS
    [text] = made.responses([Request("task", "hello", {"until": [], "max_gen_toks": 16})])
    plain = FdppLM.create_from_arg_string(f"pretrained={tmp_path},device=cpu,block_length=8").evaluator
    ids = torch.tensor([made.encode("hello")])
    out = plain.model.generate(ids, max_new_tokens=16, block_length=8).sequences[0, ids.shape[1] :].tolist()
    out = out[: out.index(dream_files.EOS)] if dream_files.EOS in out else out
    assert text == made.tokenizer.decode(out, skip_special_tokens=True) and plain.encode("a")[0] != dream_files.BOS


def test_a_preset_of_another_family_decodes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(fdpp.LLaDAModelLM, "generate", None)
    assert cli.main(["eval", "--preset", "dawn/dream-base/gsm8k", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert (
        "error: --preset dawn/dream-base/gsm8k is of Dream-org/Dream-v0-Base-7B: expected a model of type Dream" in err
    )
    assert err.rstrip().endswith("freedave/gsm8k, freedave++/gsm8k") and err.count("error") == 1


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_goes_by_the_harness_name_and_by_the_option(tmp_path, loaded):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny.load()[0], config).save_pretrained(tmp_path / "adapter")
    made = FdppLM.create_from_arg_string(f"pretrained=tiny,device=cpu,peft={tmp_path / 'adapter'}").evaluator
    weights = [model.model.transformer.blocks[0].q_proj.weight for model in (made.model, loaded[0])]
    assert type(made.model) is fdpp.LLaDAModelLM and not torch.equal(*weights)
    plain = FdppLM.create_from_arg_string("pretrained=tiny,device=cpu").evaluator
    assert made.model_key != plain.model_key
    got = run_command(tmp_path, "--limit", "1", "--adapter", str(tmp_path / "adapter"))
    assert got["fdpp"]["adapter"] == str(tmp_path / "adapter")


@pytest.mark.parametrize("name", fdpp.Rule.named())
def test_every_rule_goes_by_its_name(name):
    assert type(FdppLM.create_from_arg_string(f"rule={name}").evaluator.config.rule) is fdpp.Rule.named()[name]


def test_humaneval_in_chat_form_is_checked_by_its_tests(monkeypatch, loaded):
    """The task's data and the program runner come from the Hugging Face Hub: both have stand-ins."""

    class Runner:
        def compute(self, references, predictions, k):
            def passes(program, test):
                try:
                    exec(program + "\n" + test, {})
                except Exception:
                    return False
                return True

            return [{"pass@1": float(passes(predictions[0][0], references[0]))}]

    doc = {
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    }
    right, wrong = ("def double(x):\n    return 2 * x", "def double(x):\n    return x")
    answers = [f"```python\n{right}\n```", f"```python\n{wrong}\n```", f"```Python\n{right}\n```", right]
    data = {"test": datasets.Dataset.from_list([doc] * 4)}
    monkeypatch.setattr(evaluate, "load", lambda name: Runner())
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: data)
    monkeypatch.setattr(FdppLM, "generate_until", lambda self, requests: answers)
    folder = ROOT / "fdpp" / "integrations" / "tasks"
    results = lm_eval.simple_evaluate(
        FdppLM(*loaded),
        tasks=["humaneval_chat"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    got = results["results"]["humaneval_chat"]
    # The published scripts do not know "```Python".
    assert (got["pass@1,create_test"], got["pass@1,fast_dllm"]) == (0.75, 0.5)


def test_gen_kwargs_decode_as_the_options_do(tmp_path):
    options = ("--rule", "threshold", "--tau", "0.7", "--block-length", "16", "--gen-length", "64")
    settings = ("--gen_kwargs", "rule=threshold,tau=0.7", "block_length=16,max_new_tokens=64,num_beams=1")
    one, two, plain = (run_command(tmp_path, "--limit", "3", *argv) for argv in (options, settings, ()))
    texts = [[sample["resps"] for sample in run["samples"]["tiny_sums"]] for run in (one, two, plain)]
    costs = [run["fdpp"]["costs"]["tiny_sums"] for run in (one, two, plain)]
    assert texts[0] == texts[1] and costs[0]["nfe"] == costs[1]["nfe"] != costs[2]["nfe"]
    assert two["fdpp"]["by_task"]["tiny_sums"] == {
        "rule": repr(fdpp.Threshold(0.7)),
        "block_length": 16,
        "max_new_tokens": 64,
    }


def test_settings_of_a_task_are_refused_before_anything_is_decoded(tmp_path, monkeypatch, capsys):
    text = (ROOT / "fdpp/integrations/tasks/tiny_sums.yaml").read_text().replace("task: tiny_sums", "task: beams")
    (tmp_path / "beams.yaml").write_text(text.replace("  do_sample: false", "  num_beams: 4"))
    monkeypatch.setattr(fdpp.LLaDAModelLM, "generate", None)
    options = ("--include-path", str(tmp_path), "--num-fewshot", "2", "--gen_kwargs", "typical_p=0.9")
    assert cli.main(["eval", "--tasks", "tiny_sums,beams", *options]) == 2
    err = capsys.readouterr().err
    assert "fdpp: error: task beams: num_beams=4 is of autoregressive generation" in err
    assert "fdpp: note: task tiny_sums takes no few-shot examples: --num-fewshot changes nothing\n" in err
    assert "fdpp: note: task tiny_sums is decoded without a temperature: typical_p changes nothing\n" in err


def test_a_run_without_a_terminal_says_how_far_it_is_and_nothing_else(tmp_path):
    """But for what transformers prints where it is imported beside torchao."""
    command = ("-m", "fdpp", "eval", "--tasks", "tiny_sums", "--cache", "none", "--limit", "2")
    imported, done = (
        subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
        for argv in (("-c", "import transformers.modeling_utils"), command)
    )
    assert done.returncode == 0
    said = done.stderr.splitlines()[len(imported.stderr.splitlines()) :]
    assert [line.split(",")[0] for line in said] == ["responses: 2 of 2"]
    assert all(line.startswith("|") for line in done.stdout.splitlines() if line)


def test_an_unknown_task_is_named(capsys):
    assert cli.main(["eval", "--tasks", "tiny_sums,no_such_task"]) == 2
    assert "knows no task no_such_task" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate: pip install '.[eval]'")
def test_two_processes_share_the_requests(tmp_path):
    one = run_command(tmp_path, "--limit", "5")
    arguments = ("--tasks", "tiny_sums", "--cache", "none", "--limit", "5", "--output", str(tmp_path / "two.json"))
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [*launch, "-m", "fdpp", "eval", *arguments, "--resume", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    assert two["results"]["tiny_sums"]["exact_match,none"] == one["results"]["tiny_sums"]["exact_match,none"]
    costs = [results["fdpp"]["costs"]["tiny_sums"] for results in (one, two)]
    assert all(costs[0][name] == costs[1][name] for name in ("responses", "tokens", "nfe"))
    lines = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "runs").iterdir())]
    assert lines == [3, 2]
