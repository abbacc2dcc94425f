"""What commands share: errors of the user's, the options of model, rule and decode, and what they mean."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

import torch
import transformers
from safetensors import SafetensorError

import fdpp
from fdpp import tiny
from fdpp.decoding.config import BRANCHES, CACHES, HEADS, REMASKINGS, DiffusionGenerationConfig

RULES: dict[str, tuple[type[fdpp.Rule], dict[str, str]]] = {
    "quota": (fdpp.Quota, {"k": "k"}),
    "threshold": (fdpp.Threshold, {"tau": "tau"}),
    "factor": (fdpp.Factor, {"factor": "f"}),
    "frechet": (fdpp.Frechet, {"margin": "margin", "calibration": "calibration"}),
    "entropy": (fdpp.EntropyBound, {"gamma": "gamma"}),
    "localleap": (fdpp.LocalLeap, {"tau": "threshold", "relaxed": "relaxed", "radius": "radius"}),
    "klass": (fdpp.Klass, {"confidence": "confidence", "kl": "kl", "window": "window"}),
    "dawn": (fdpp.Dawn, {field.name: field.name for field in dataclasses.fields(fdpp.Dawn)}),
}
"""Every rule with its options: name on the command line, field of the dataclass."""


class CommandError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


@contextmanager
def reported(*errors: type[Exception], about: str = "") -> Iterator[None]:
    """Turn `errors` into a `CommandError` of one line."""
    try:
        yield
    except errors as error:
        raise CommandError(about + shorten(str(error), 300, placeholder=" ...")) from error


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """An argument type: an int from `low` to `high`."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")

    return parse


def drafts(text: str) -> int | str:
    """An argument type: "auto" or an int of at least 1."""
    return text if text == "auto" else whole(1)(text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    text = "folder or Hugging Face id of a LLaDA checkpoint; tiny: the small one in this package (default: tiny)"
    add("--model", default="tiny", metavar="PATH_OR_ID", help=text)
    text = "auto: a GPU if there is one (default: auto)"
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)
    text = "auto: bfloat16 on a GPU, float32 on a CPU (default: auto)"
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=text)


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rule: which predictions of a forward are committed together").add_argument
    text = (
        "quota: a fixed number of tokens; threshold: all confident ones; factor, frechet: as many of the most "
        "confident as are likely to be right together; entropy: the most certain, up to a budget; localleap: all "
        "confident ones and, near those, less confident ones; klass: those that have stopped changing; dawn: those "
        "that do not depend on each other, by the model's attention (default: frechet)"
    )
    add("--rule", choices=tuple(RULES), default="frechet", help=text)
    for option, kind, metavar, text in (
        ("--margin", float, "M", "frechet: lead over any other reading, 0 or more; less is faster (default: 0.25)"),
        ("--calibration", float, "E", "frechet: taken off every confidence first, 0 to 1 (default: 0)"),
        ("--tau", float, "P", "threshold, localleap: confidence, 0 to 1; less is faster (default: 0.9)"),
        ("--factor", float, "F", "factor: bound on (n + 1)(1 - confidence), above 0; more is faster (default: 0.75)"),
        ("--gamma", float, "NATS", "entropy: budget in nats, 0 or more; more is faster (default: 0.1)"),
        ("--relaxed", float, "P", "localleap: confidence near a confident token, 0 to 1 (default: 0.75)"),
        ("--radius", whole(0), "N", "localleap: how many tokens away is near (default: 4)"),
        ("--confidence", float, "P", "klass: confidence, 0 to 1; less is faster (default: 0.6)"),
        ("--kl", float, "NATS", "klass: most that a prediction may change in a forward (default: 0.015)"),
        ("--window", whole(1), "N", "klass: forwards over which it may not change more (default: 2)"),
        ("--tau-sink", float, "A", "dawn: mean attention that makes a column a sink (default: 0.01)"),
        ("--tau-edge", float, "A", "dawn: attention that makes a dependency (default: 0.07)"),
        ("--tau-induce", float, "P", "dawn: confidence beside a committed token it depends on (default: 0.7)"),
        ("--tau-low", float, "P", "dawn: confidence of tokens free of dependencies (default: 0.75)"),
        ("--tau-high", float, "P", "dawn: confidence of tokens that commit in any case (default: 0.9)"),
        ("--layers", whole(1), "N", "dawn: how many of the last layers' attention counts (default: an eighth)"),
        ("--k", whole(1), "N", "quota: tokens a forward (default: 1, or as --steps asks)"),
        ("--steps", whole(1), "N", "quota: forwards for the whole answer, shared out evenly (default: one a token)"),
    ):
        add(option, type=kind, metavar=metavar, help=text)


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("decoding").add_argument
    add("--gen-length", type=whole(1), default=128, metavar="N", help="longest answer in tokens (default: %(default)s)")
    text = "tokens decoded together, block after block, 1 to 1024 (default: %(default)s)"
    add("--block-length", type=whole(1), default=32, metavar="N", help=text)
    text = (
        "what a block's forwards reuse: none: nothing; prefix: what is before the block; dual: also what is after it, "
        "the fastest (default: %(default)s)"
    )
    add("--cache", choices=CACHES, default="dual", help=text)
    text = "states a forward evaluates: 1: no drafts; more, or auto: same answer in fewer forwards (default: 1)"
    add("--drafts", type=drafts, default=1, metavar="N", help=text)
    text = "batch: a row for each of these states; tree: one row under a mask (default: %(default)s)"
    add("--branches", choices=BRANCHES, default="batch", help=text)
    text = "fused: keep no logits, which saves memory and may be slower (default: %(default)s)"
    add("--head", choices=HEADS, default="library", help=text)
    text = "0: the most likely tokens; above 0: sampled, the wilder the higher (default: 0)"
    add("--temperature", type=float, default=0.0, metavar="T", help=text)
    add("--seed", type=whole(0), default=0, metavar="N", help="same seed, same samples (default: 0)")
    text = "quota: commit the most confident tokens, or any (default: %(default)s)"
    add("--remasking", choices=REMASKINGS, default="low_confidence", help=text)
    text = (
        "classifier-free guidance: how much what the prompt changes is enlarged, 0 or more; above 0 a forward is twice "
        "the work (default: 0)"
    )
    add("--cfg-scale", type=float, default=0.0, metavar="S", help=text)
    add("--logits-eos-inf", action="store_true", help="never propose the end-of-text token")
    text = "commit the end-of-text and end-of-turn tokens after all others"
    add("--confidence-eos-eot-inf", action="store_true", help=text)
    text = "go on to --gen-length after the end-of-text token, and print what follows it"
    add("--no-stop-at-eos", action="store_true", help=text)


def rule_of(args: argparse.Namespace) -> fdpp.Rule:
    """The rule that the options name."""
    rule, options = RULES[args.rule]
    own = {*options, "steps"} if rule is fdpp.Quota else {*options}
    for option in ("steps", *(name for _, names in RULES.values() for name in names)):
        if option not in own and getattr(args, option) is not None:
            takes = " and ".join(f"--{name.replace('_', '-')}" for name in sorted(own))
            raise CommandError(
                f"--{option.replace('_', '-')} does not belong to --rule {args.rule}, which takes {takes}"
            )
    given = {field: getattr(args, option) for option, field in options.items() if getattr(args, option) is not None}
    with reported(ValueError):
        return rule(**given)


def config_of(args: argparse.Namespace) -> DiffusionGenerationConfig:
    rule = rule_of(args)
    with reported(ValueError):
        return DiffusionGenerationConfig(
            max_new_tokens=args.gen_length,
            block_length=args.block_length,
            rule=rule,
            steps=args.steps,
            cache=args.cache,
            stop_at_eos=not args.no_stop_at_eos,
            drafts=args.drafts,
            branches=args.branches,
            head=args.head,
            temperature=args.temperature,
            seed=args.seed,
            remasking=args.remasking,
            cfg_scale=args.cfg_scale,
            logits_eos_inf=args.logits_eos_inf,
            confidence_eos_eot_inf=args.confidence_eos_eot_inf,
        )


def load_model(args: argparse.Namespace) -> tuple[fdpp.LLaDAModelLM, Any]:
    """Model and tokenizer, on the device and in the dtype that the options name."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    name = ("bfloat16" if device == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    transformers.logging.set_verbosity_error()
    if args.model == "tiny" or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    about = f"--model {args.model}: "
    with reported(OSError, ValueError, RuntimeError, SafetensorError, about=about):
        if args.model == "tiny":
            model, tokenizer = tiny.load()
            return model.to(device, getattr(torch, name)), tokenizer
        if not Path(args.model).exists() and (args.model.count("/") != 1 or args.model.startswith((".", "~", "/"))):
            raise CommandError(f"{about}no such folder, and no OWNER/NAME of a model on the Hugging Face Hub")
        kind = transformers.PretrainedConfig.get_config_dict(args.model)[0].get("model_type")
        if kind != "llada":
            raise CommandError(f"{about}expected a config.json with model_type llada, got {kind or 'none'}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model = fdpp.LLaDAModelLM.from_pretrained(args.model, dtype=getattr(torch, name))
        return model.eval().to(device), tokenizer


def encode(tokenizer: Any, prompt: str, raw: bool) -> torch.Tensor:
    """The prompt's ids `[1, P]`, in the tokenizer's chat template where it has one."""
    if tokenizer.chat_template and not raw:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if unknown:
        print(f"fdpp: note: {unknown} of {len(ids)} words of the prompt are unknown to the model", file=sys.stderr)
    return torch.tensor([ids], dtype=torch.int64)
