"""`fdpp generate`: answer a prompt."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
import transformers

from fdpp.cli.live import LiveView, is_live
from fdpp.cli.options import (
    CommandError,
    add_decoding_options,
    add_model_options,
    add_rule_options,
    config_of,
    encode,
    load_model,
    reported,
)

EXAMPLES = """examples:
  fdpp generate --stream --cache none --prompt 'Mia has 12 apples . In May she finds 5 . In June she loses 3 .
    In July she buys 4 . In August she sells 6 . How many apples now ?'
  echo 'Why is the sky blue?' | fdpp generate --model GSAI-ML/LLaDA-8B-Instruct --prompt - --margin 0.2
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a prompt",
        description="Answer a prompt. The answer goes to standard output, its figures to standard error.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt; -: read it from standard input")
    parser.add_argument("--raw", action="store_true", help="pass the prompt as it is, not as a turn of a chat")
    text = "show the answer while it is unmasked; where there is no terminal, print it block by block"
    parser.add_argument("--stream", action="store_true", help=text)
    add_model_options(parser)
    add_rule_options(parser)
    add_decoding_options(parser)
    parser.set_defaults(run=run)


def read_prompt(args: argparse.Namespace) -> str:
    prompt = args.prompt
    if prompt == "-":
        with reported(ValueError, about="--prompt -: "):
            prompt = sys.stdin.read()
    if not prompt.strip():
        raise CommandError("the prompt is empty")
    return prompt.strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def run(args: argparse.Namespace) -> int:
    config, prompt = config_of(args), read_prompt(args)
    model, tokenizer = load_model(args)
    ids = encode(tokenizer, prompt, args.raw).to(model.device)
    live = args.stream and is_live(sys.stdout)
    view: Any = nullcontext()
    if live:
        view = LiveView(tokenizer, model.config.mask_token_id)
    elif args.stream:
        view = nullcontext(transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    started = time.perf_counter()
    with reported(ValueError, FloatingPointError, torch.OutOfMemoryError), view as streamer:
        out: Any = model.generate(ids, generation_config=config, streamer=streamer)
    seconds = time.perf_counter() - started
    if live or not args.stream:
        print(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip(), flush=True)
    nfe = int(out.nfe)
    tokens = round(float(out.tokens_per_forward) * nfe)
    figures = f"{tokens} tokens, {nfe} forwards (NFE), {tokens / nfe:.2f} tokens per forward"
    print(f"{figures}, {tokens / seconds:.0f} tok/s", file=sys.stderr)
    if out.acceptance is not None:
        shares = ", ".join(f"{share:.0%}" for share in out.acceptance.tolist() if share == share)
        print(
            f"{int(out.query_tokens)} positions evaluated; drafts accepted, by depth: {shares or 'none offered'}",
            file=sys.stderr,
        )
    return 0
