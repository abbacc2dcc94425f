"""`fdpp trace`: a decode as a page that replays it."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fdpp import tiny
from fdpp.cli.generate import read_text
from fdpp.cli.options import (
    CommandError,
    add_decoding_options,
    add_model_options,
    add_rule_options,
    check_output,
    config_of,
    encode,
    ended_by_turn,
    give_hint,
    load_model,
    reported,
    whole,
)

PAGE = "trace.html"

EXAMPLES = """examples:
  fdpp trace -o trace.html
  fdpp trace -o sudoku.html --model tiny:sudoku --rule factor
  fdpp trace -o drafts.html --png drafts.png --rule quota --drafts 4
  fdpp trace -o llada.html --model GSAI-ML/LLaDA-8B-Instruct --prompt 'Why is the sky blue?'
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "trace",
        help="write a page that replays a decode step by step",
        description="Decode a prompt and write one self-contained HTML page that replays it: every position, the step "
        "that committed it and its confidence, and at each step the confidence profile, the rule's bound and what "
        "other rules would have committed instead.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = f"the page (default: {PAGE}, or none with --png alone)"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=text)
    text = "a still picture; needs matplotlib, the extra png"
    parser.add_argument("--png", type=Path, metavar="FILE", help=text)
    text = "the step whose profile the still picture shows (default: 1)"
    parser.add_argument("--step", type=whole(1), default=1, metavar="N", help=text)
    text = "the prompt; -: read it from standard input (default: a problem that the small model was not trained on)"
    parser.add_argument("--prompt", metavar="TEXT", help=text)
    parser.add_argument("--raw", action="store_true", help="pass the prompt as it is, not as a turn of a chat")
    add_model_options(parser)
    add_rule_options(parser)
    add_decoding_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fdpp.trace import page, still
    from fdpp.trace.record import record

    if args.prompt is None:
        task = tiny.task_of(args.model)
        if task is None:
            raise CommandError(f"--model {args.model} needs a --prompt")
        args.prompt = task.generate("held-out", 1)[0].prompt
    if args.png and find_spec("matplotlib") is None:
        raise CommandError("--png needs matplotlib: pip install matplotlib, or fdpp with its extra png")
    config, prompt = config_of(args), read_text(args.prompt, "--prompt")
    output = args.output or (None if args.png else Path(PAGE))
    for option, path in (("-o", output), ("--png", args.png)):
        if path:
            check_output(option, path)
    model, tokenizer = load_model(args)
    config = config if args.raw else ended_by_turn(config, model, tokenizer)
    give_hint(args.model, prompt)
    with reported(ValueError, FloatingPointError, torch.OutOfMemoryError):
        trace = record(model, encode(tokenizer, prompt, args.raw).to(model.device), config)
    data = page.data_of(trace, tokenizer, args.model)
    if args.step > len(trace.steps):
        raise CommandError(f"--step {args.step}: the decode took {len(trace.steps)} steps")
    with reported(OSError):
        if output:
            output.write_text(page.render(data), encoding="utf-8")
        if args.png:
            still.draw(data, args.png, args.step - 1)
    written = " and ".join(str(path) for path in (output, args.png) if path)
    print(f"{len(trace.steps)} steps in {data['nfe']} forwards, written to {written}", file=sys.stderr)
    return 0
