"""`fdpp eval`: run tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch

from fdpp.cli.options import (
    CommandError,
    add_decoding_options,
    add_model_options,
    add_rule_options,
    check_output,
    config_of,
    load_model,
    option_of,
    reported,
    rule_of,
    rule_options,
    whole,
)
from fdpp.integrations.evaluation.presets import PRESETS
from fdpp.integrations.evaluation.settings import SAMPLING, asked_by, same_names

EXAMPLES = """examples:
  fdpp eval --tasks tiny_sums --rule frechet --batch-size 25
  fdpp eval --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k,minerva_math,humaneval,mbpp --rule frechet
    --chat-template --gen-length 256 --resume runs/frechet --output frechet.json --confirm-run-unsafe-code
  fdpp eval --model GSAI-ML/LLaDA-8B-Instruct --preset fast-dllm++/gsm8k --rule factor
  fdpp eval --model Dream-org/Dream-v0-Base-7B --preset fast-dllm++/dream-base/gsm8k
  accelerate launch --multi_gpu --num_processes 8 -m fdpp eval --model GSAI-ML/LLaDA-8B-Instruct
    --preset fast-dllm++/gsm8k

presets:
  {presets}
"""
LIBRARIES = ("lm_eval", "datasets", "evaluate", "transformers", "huggingface_hub")
logger = logging.getLogger(__name__)

TASKS = Path(__file__).parents[1] / "integrations" / "tasks"


class Default(NamedTuple):
    """The default of an option that a preset may set; `shown` is what --help says."""

    value: Any
    shown: str

    def __str__(self) -> str:
        return self.shown


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="run tasks of lm-evaluation-harness",
        description="Run tasks of lm-evaluation-harness (the extra eval) and report, beside their "
        "metrics, tokens per second, forwards (NFE) and tokens per forward. tiny_sums is the embedded model's own "
        "task: 500 held-out problems, offline.",
        epilog=EXAMPLES.format(presets="\n  ".join(PRESETS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument_group("tasks").add_argument
    text = "tasks, groups, tags or YAML files of tasks, separated by commas"
    option("--tasks", metavar="NAMES", help=text)
    option("--include-path", type=Path, metavar="DIR", help="folder with more tasks")
    text = (
        "the settings of a published table, see below: task, few-shot examples, rule, cache, lengths, drafts, chat "
        "template and BOS; other options take precedence; a model of another family than the table's is refused"
    )
    option("--preset", choices=tuple(PRESETS), metavar="NAME", help=text)
    option("--num-fewshot", type=whole(0), metavar="N", help="few-shot examples (default: the task's)")
    option("--limit", type=whole(1), metavar="N", help="the first N documents of every task (default: all)")
    text = (
        "settings in the place of a task's own, as in lm-evaluation-harness: name=value,... or JSON; until, "
        "max_gen_toks, do_sample, temperature, names of the options below (with _), rule and its numbers"
    )
    option("--gen-kwargs", "--gen_kwargs", nargs="+", type=gen_kwargs, metavar="SETTINGS", help=text)
    text = (
        "prompts in the tokenizer's chat template; humaneval becomes humaneval_chat, which runs the code of an answer"
    )
    option("--chat-template", action="store_true", help=text)
    option(
        "--multiturn", action="store_true", help="few-shot examples as turns of the chat, not in one with the prompt"
    )
    option("--add-bos-token", action="store_true", help="BOS before every prompt, where the tokenizer puts none")
    text = "run the programs that the model writes, without a sandbox (humaneval, mbpp)"
    option("--confirm-run-unsafe-code", action="store_true", help=text)
    option = of_evaluation = parser.add_argument_group("evaluation").add_argument
    text = "prompts decoded together, of similar length (default: %(default)s)"
    option("--batch-size", type=whole(1), default=1, metavar="N", help=text)
    text = "samples of a log-likelihood's Monte Carlo estimate; block diffusion: for each block (default: %(default)s)"
    option("--mc-num", type=whole(1), default=128, metavar="N", help=text)
    text = "log-likelihoods: also find out whether greedy decoding gives the target (lambada), one forward per token"
    option("--check-greedy", action="store_true", help=text)
    text = "keep finished requests in this folder and skip those that are already there"
    option("--resume", type=Path, metavar="DIR", help=text)
    option("--output", type=Path, metavar="FILE", help="write all results and samples to this JSON file")
    add_model_options(parser)
    add_rule_options(parser)
    before = vars(parser.parse_args([]))
    add_decoding_options(parser, "what the task asks for, else 256")
    text = "end an answer at the end-of-text token or a stop string even where the preset decodes the whole length"
    of_evaluation("--stop-at-eos", dest="no_stop_at_eos", action="store_false", default=False, help=text)
    decoding = {name: value for name, value in vars(parser.parse_args([])).items() if name not in before}
    parser.set_defaults(**{name: Default(value, str(value)) for name, value in decoding.items()})
    parser.set_defaults(rule=Default(before["rule"], before["rule"]))
    parser.set_defaults(decoding=tuple(decoding), run=run)


def gen_kwargs(text: str) -> dict[str, Any]:
    """An argument type: settings as lm-evaluation-harness reads them, a JSON object or `name=value,name=value`.

    Values are Python literals, `true` and `false`, else strings; commas in brackets and quotes belong to a value.
    """
    if text.lstrip().startswith("{"):
        with suppress(ValueError):
            return json.loads(text)
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    items = re.findall(r"""(?:[^,\[\]{}()"']|"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|\([^)]*\))+""", text)
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip() or ",".join(items) != text.strip(","):
            raise argparse.ArgumentTypeError(f"expected name=value,... or JSON, got {text!r}")
        value = {"true": "True", "false": "False", "none": "None"}.get(value.strip().lower(), value.strip())
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
        found[name.strip()] = value
    return found


def resolve(args: argparse.Namespace) -> None:
    """Replace the defaults in `args` by values, the preset's if there is one.

    Adds `args.given`, the fields of `DiffusionGenerationConfig` that options or the preset set: a task's own settings
    do not replace these, and those of --gen_kwargs replace the preset's.
    """
    options = {name for name in args.decoding if not isinstance(getattr(args, name), Default)}
    options |= {"steps"} if args.steps is not None else set()
    if not isinstance(args.rule, Default) or any(getattr(args, option) is not None for option in rule_options()):
        options.add("rule")
    of_preset = set[str]()
    preset = None if args.preset is None else PRESETS[args.preset]
    if preset is not None:
        if args.tasks is None:
            args.tasks = preset.task
        if args.num_fewshot is None:
            args.num_fewshot = preset.shots
        for field in ("chat_template", "multiturn", "add_bos_token"):
            setattr(args, field, getattr(args, field) or getattr(preset, field))
        if isinstance(args.rule, Default):
            args.rule = preset.rule.name
            for field, number in preset.rule.numbers.items():
                option = option_of(field, number)
                if getattr(args, option) is None:
                    setattr(args, option, getattr(preset.rule, field))
        for field in ("cache", "gen_length", "block_length", "drafts"):
            if isinstance(getattr(args, field), Default):
                setattr(args, field, getattr(preset, field))
        if isinstance(args.no_stop_at_eos, Default):
            args.no_stop_at_eos = not preset.stop_early
        of_preset = {"rule", "cache", "gen_length", "block_length", "drafts", "no_stop_at_eos"}
    for name, value in vars(args).items():
        if isinstance(value, Default):
            setattr(args, name, value.value)
    args.gen_kwargs = same_names({name: value for part in args.gen_kwargs or () for name, value in part.items()})
    if args.gen_kwargs.get("temperature"):
        args.gen_kwargs.setdefault("do_sample", True)
    with reported(ValueError, about="--gen_kwargs: "):
        asked = asked_by(args.gen_kwargs, rule_of(args)).fields.keys()
    twice = sorted(asked & set(map(field_of, options)))
    if twice:
        raise CommandError(f"--gen_kwargs: {twice[0]} is set by another option as well")
    if "max_new_tokens" in asked:
        args.gen_length = None
    args.given = set(map(field_of, options | of_preset)) - asked


def field_of(option: str) -> str:
    """The field of `DiffusionGenerationConfig` that an option of the decode sets."""
    return {"gen_length": "max_new_tokens", "no_stop_at_eos": "stop_at_eos"}.get(option, option)


def check_task(args: argparse.Namespace, lm: Any, name: str, task: Any) -> None:
    """Refuse settings of a task that have no meaning here, and say which options change nothing for it."""
    if args.num_fewshot and task.get_config("num_fewshot") == 0:
        logger.warning("task %s takes no few-shot examples: --num-fewshot changes nothing", name)
    if task.get_config("output_type") != "generate_until":
        return
    lm.evaluator.group_of(name, {**(task.get_config("generation_kwargs") or {}), **args.gen_kwargs})
    for idle in sorted(args.gen_kwargs.keys() & SAMPLING - {"temperature"} - lm.evaluator.asked[name].keys()):
        logger.warning("task %s is decoded without a temperature: %s changes nothing", name, idle)


def find_tasks(args: argparse.Namespace, lm: Any) -> tuple[Any, list[str]]:
    """lm-evaluation-harness's manager of tasks, and the names of those to run.

    The manager checks the settings of the tasks that it loads, before any of them runs.
    """
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, task_list: Any) -> Any:
            loaded = super().load(task_list)
            for name, task in loaded["tasks"].items():
                check_task(args, lm, name, task)
            return loaded

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.chat_template:
        names = ["humaneval_chat" if name == "humaneval" else name for name in names]
    paths = [str(path) for path in (TASKS, args.include_path) if path is not None]
    # The harness's own tasks are thousands of files, which take seconds to list.
    manager = Manager(include_path=paths, include_defaults=False)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
        manager = Manager(include_path=paths)
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown or not names:
        raise CommandError(f"--tasks: lm-evaluation-harness knows no task {', '.join(unknown) or 'without a name'}")
    return manager, names


def check_preset(args: argparse.Namespace, model: Any) -> None:
    """Refuse a preset of another family of models, and name those of the same table that there are for this one."""
    if args.preset is None:
        return
    model_of_preset, came = PRESETS[args.preset].model, model.config.model_type
    if came != model_of_preset.model_type:
        table = args.preset.rpartition("/")[2]
        fitting = [
            name
            for name, other in PRESETS.items()
            if name.rpartition("/")[2] == table and other.model.model_type == came
        ]
        raise CommandError(
            f"--preset {args.preset} is of {model_of_preset.name}: expected a model of type "
            f"{model_of_preset.model_type}, got {came} ({args.model}), whose presets of {table} are "
            f"{', '.join(fitting) or 'none'}"
        )


def check_folders(args: argparse.Namespace) -> None:
    """Refuse files and folders that cannot be used, before hours of decoding and not after."""
    if args.include_path is not None and not args.include_path.is_dir():
        raise CommandError(f"--include-path {args.include_path}: no such folder")
    if args.output is not None:
        check_output("--output", args.output)
    if args.resume is not None:
        if args.resume.is_file():
            raise CommandError(f"--resume {args.resume}: a file, expected a folder")
        with reported(OSError, about="--resume: "):
            args.resume.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=args.resume).close()


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries log nothing but errors; what this package logs are notes of the command."""
    notes, own = logging.StreamHandler(), logging.getLogger("fdpp")
    notes.setFormatter(logging.Formatter("fdpp: note: %(message)s"))
    with ExitStack() as undo:
        own.addHandler(notes)
        undo.callback(own.removeHandler, notes)
        for library in map(logging.getLogger, LIBRARIES):
            undo.callback(library.setLevel, library.level)
            library.setLevel(logging.ERROR)
        yield


@contextmanager
def without_chatter() -> Iterator[None]:
    """Tasks and metrics print nothing, the harness draws no bar while it writes the prompts, and, where there is no
    terminal, data sets draw none (nor does the Hub: see `load_model`)."""
    import datasets
    from lm_eval.api import task

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    bar, task.tqdm = task.tqdm, lambda documents, **_: documents
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        task.tqdm = bar


def run(args: argparse.Namespace) -> int:
    resolve(args)
    if args.tasks is None:
        raise CommandError("expected --tasks or --preset (see fdpp eval --help)")
    check_folders(args)
    with quiet():
        return evaluate(args)


def evaluate(args: argparse.Namespace) -> int:
    with reported(ModuleNotFoundError):
        from fdpp.integrations.lm_eval import FdppLM, processes
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    from fdpp.decoding.generate import with_blocks

    gen_length, args.gen_length = args.gen_length, args.gen_length or 256
    config = config_of(args)
    if args.confirm_run_unsafe_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
    with reported(ModuleNotFoundError):
        processes()
    model, tokenizer = load_model(args)
    check_preset(args, model)
    if args.chat_template and not tokenizer.chat_template:
        raise CommandError(f"--chat-template: the tokenizer of --model {args.model} has none")
    with reported(OSError, ValueError, KeyError, ImportError, FloatingPointError, torch.OutOfMemoryError):
        model_of_harness = FdppLM(
            model,
            tokenizer,
            config,
            given=args.given,
            gen_length=gen_length,
            batch_size=args.batch_size,
            mc_num=args.mc_num,
            check_greedy=args.check_greedy,
            add_bos_token=args.add_bos_token,
            resume=args.resume,
        )
        manager, tasks = find_tasks(args, model_of_harness)
        with without_chatter():
            results = simple_evaluate(
                model_of_harness,
                tasks=tasks,
                num_fewshot=args.num_fewshot,
                batch_size=args.batch_size,
                limit=args.limit,
                apply_chat_template=args.chat_template,
                fewshot_as_multiturn=args.multiturn,
                gen_kwargs=args.gen_kwargs or None,
                task_manager=manager,
                log_samples=args.output is not None,
                confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            )
    costs = model_of_harness.report()
    if results is None:
        return 0
    # None: the length that each task asks for.
    decoding = dataclasses.asdict(with_blocks(config, model))
    decoding |= {"rule": repr(config.rule), "max_new_tokens": gen_length}
    by_task = {
        task: {name: repr(value) if name == "rule" else value for name, value in asked.items()}
        for task, asked in model_of_harness.evaluator.asked.items()
    }
    results["fdpp"] = {
        "model": args.model,
        "adapter": args.adapter,
        "quantize": args.quantize,
        "decoding": decoding,
        "gen_length": gen_length,
        "preset": args.preset,
        "add_bos_token": args.add_bos_token,
        "by_task": by_task,
        "costs": costs,
    }
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if costs:
        print(cost_table(costs))
    if args.output is not None:
        with reported(OSError, about="--output: "):
            args.output.write_text(json.dumps(results, indent=1, default=handle_non_serializable) + "\n")
    return 0


def cost_table(costs: dict[str, dict[str, float]]) -> str:
    """What the responses of every task cost, as a table in Markdown."""
    lines = [
        "|Responses to|Number|Tokens|Tokens per second|NFE|NFE per response|Tokens per forward|",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"|{task}|{cost['responses']}|{cost['tokens']}|{cost['tokens_per_second']:.1f}|{cost['nfe']}"
        f"|{cost['nfe_per_response']:.1f}|{cost['tokens_per_forward']:.2f}|"
        for task, cost in costs.items()
    ]
    return "\n".join(lines)
