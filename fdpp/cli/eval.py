"""`fdpp eval`: run tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fdpp.cli.options import (
    CommandError,
    add_decoding_options,
    add_model_options,
    add_rule_options,
    config_of,
    load_model,
    option_of,
    reported,
    whole,
)
from fdpp.integrations.evaluation.presets import PRESETS

EXAMPLES = """examples:
  fdpp eval --tasks tiny_sums --rule frechet --batch-size 25
  fdpp eval --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k,minerva_math,humaneval,mbpp --rule frechet
    --chat-template --gen-length 256 --resume runs/frechet --output frechet.json --confirm-run-unsafe-code
  fdpp eval --model GSAI-ML/LLaDA-8B-Instruct --preset fast-dllm++/gsm8k --rule factor
  accelerate launch --multi_gpu --num_processes 8 -m fdpp eval --model GSAI-ML/LLaDA-8B-Instruct
    --preset fast-dllm++/gsm8k

presets:
  {presets}
"""
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
        description="Run tasks of lm-evaluation-harness (needs `pip install 'fdpp[eval]'`) and report, beside their "
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
        "the settings of a published table, see below: task, few-shot examples, rule, cache, lengths, drafts and chat "
        "template; other options take precedence"
    )
    option("--preset", choices=tuple(PRESETS), metavar="NAME", help=text)
    option("--num-fewshot", type=whole(0), metavar="N", help="few-shot examples (default: the task's)")
    option("--limit", type=whole(1), metavar="N", help="the first N documents of every task (default: all)")
    text = (
        "prompts in the tokenizer's chat template; humaneval becomes humaneval_chat, which runs the code of an answer"
    )
    option("--chat-template", action="store_true", help=text)
    option(
        "--multiturn", action="store_true", help="few-shot examples as turns of the chat, not in one with the prompt"
    )
    text = "run the programs that the model writes, without a sandbox (humaneval, mbpp)"
    option("--confirm-run-unsafe-code", action="store_true", help=text)
    option = parser.add_argument_group("evaluation").add_argument
    text = "prompts decoded together, of similar length (default: %(default)s)"
    option("--batch-size", type=whole(1), default=1, metavar="N", help=text)
    text = "end an answer at the end-of-text token or a stop string even where the preset decodes the whole length"
    option("--stop-at-eos", dest="no_stop_at_eos", action="store_false", default=False, help=text)
    text = "samples of a log-likelihood's Monte Carlo estimate (default: %(default)s)"
    option("--mc-num", type=whole(1), default=128, metavar="N", help=text)
    text = "log-likelihoods: also find out whether greedy decoding gives the target (lambada), one forward per token"
    option("--check-greedy", action="store_true", help=text)
    text = "keep finished requests in this folder and skip those that are already there"
    option("--resume", type=Path, metavar="DIR", help=text)
    option("--output", type=Path, metavar="FILE", help="write all results and samples to this JSON file")
    add_model_options(parser)
    add_rule_options(parser)
    add_decoding_options(parser)
    for name in ("rule", "block_length", "cache", "drafts", "no_stop_at_eos"):
        parser.set_defaults(**{name: Default(parser.get_default(name), str(parser.get_default(name)))})
    parser.set_defaults(gen_length=Default(None, "what the task asks for, else 256"), run=run)


def resolve(args: argparse.Namespace) -> None:
    """Replace the defaults in `args` by values, the preset's if there is one."""
    preset = None if args.preset is None else PRESETS[args.preset]
    if preset is not None:
        if args.tasks is None:
            args.tasks = preset.task
        if args.num_fewshot is None:
            args.num_fewshot = preset.shots
        args.chat_template, args.multiturn = True, args.multiturn or preset.multiturn
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
    for name, value in vars(args).items():
        if isinstance(value, Default):
            setattr(args, name, value.value)


def find_tasks(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """lm-evaluation-harness's manager of tasks, and the names of those to run."""
    from lm_eval.tasks import TaskManager

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.chat_template:
        names = ["humaneval_chat" if name == "humaneval" else name for name in names]
    paths = [str(path) for path in (TASKS, args.include_path) if path is not None]
    # The harness's own tasks are thousands of files, which take seconds to list.
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
        manager = TaskManager(include_path=paths)
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown or not names:
        raise CommandError(f"--tasks: lm-evaluation-harness knows no task {', '.join(unknown) or 'without a name'}")
    return manager, names


def run(args: argparse.Namespace) -> int:
    resolve(args)
    if args.tasks is None:
        raise CommandError("expected --tasks or --preset (see fdpp eval --help)")
    if args.output is not None:
        # Fail before hours of decoding, not after.
        with reported(OSError, about="--output: "):
            args.output.parent.mkdir(parents=True, exist_ok=True)
            existed = args.output.exists()
            args.output.open("a").close()
            if not existed:
                args.output.unlink()
    with reported(ModuleNotFoundError):
        from fdpp.integrations.lm_eval import FdppLM, processes
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    gen_length, args.gen_length = args.gen_length, args.gen_length or 256
    config = config_of(args)
    if args.confirm_run_unsafe_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
    with reported(ModuleNotFoundError):
        processes()
    model, tokenizer = load_model(args)
    if args.chat_template and not tokenizer.chat_template:
        raise CommandError(f"--chat-template: the tokenizer of --model {args.model} has none")
    with reported(OSError, ValueError, KeyError, ImportError, FloatingPointError, torch.OutOfMemoryError):
        manager, tasks = find_tasks(args)
        model_of_harness = FdppLM(
            model,
            tokenizer,
            config,
            gen_length=gen_length,
            batch_size=args.batch_size,
            mc_num=args.mc_num,
            check_greedy=args.check_greedy,
            resume=args.resume,
        )
        results = simple_evaluate(
            model_of_harness,
            tasks=tasks,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            limit=args.limit,
            apply_chat_template=args.chat_template,
            fewshot_as_multiturn=args.multiturn,
            task_manager=manager,
            log_samples=args.output is not None,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
    costs = model_of_harness.report()
    if results is None:
        return 0
    # None: the length that each task asks for.
    decoding = dataclasses.asdict(config) | {"rule": repr(config.rule), "max_new_tokens": gen_length}
    settings = {
        "model": args.model,
        "adapter": args.adapter,
        "decoding": decoding,
        "gen_length": gen_length,
        "preset": args.preset,
    }
    results["fdpp"] = {**settings, "costs": costs}
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
