"""`fdpp generate`: answer a prompt, or fill the blanks of a text."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch

from fdpp.cli.options import (
    CommandError,
    add_decoding_options,
    add_model_options,
    add_rule_options,
    add_stop_option,
    config_of,
    encode,
    ended_by_turn,
    give_hint,
    ids_of,
    load_model,
    reported,
    whole,
)
from fdpp.cli.terminal import is_live, word_wrap

EXAMPLES = """examples:
  fdpp generate --stream --cache none --prompt 'Mia has 12 apples . In May she finds 5 . In June she loses 3 .
    In July she buys 4 . In August she sells 6 . How many apples now ?'
  echo 'Why is the sky blue?' | fdpp generate --model GSAI-ML/LLaDA-8B-Instruct --prompt - --margin 0.2
  fdpp generate --fill 'Mia has 12 apples . In May she finds 5 . In June she loses 3 . In July she buys 4 .
    In August she sells 6 . How many apples now ? In May she <mask> 5 , so Mia has <mask> apples .'
"""

BLANK = "<mask>"
"""Stands for masks in the text of `--fill`, whatever the model's own mask is written as."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a prompt, or fill the blanks of a text",
        description="Answer a prompt, or fill the blanks of a text. The answer, or the whole text, goes to standard "
        "output, its figures to standard error.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="the prompt; -: read it from standard input")
    what.add_argument(
        "--fill", metavar="TEXT", help=f"a text with {BLANK} at its blanks; -: read it from standard input"
    )
    text = f"masks in the place of every {BLANK}; a word may take several (default: 1)"
    parser.add_argument("--fill-length", type=whole(1), metavar="N", help=text)
    parser.add_argument("--raw", action="store_true", help="pass the prompt as it is, not as a turn of a chat")
    text = "show the answer while it is unmasked; where there is no terminal, print it block by block"
    parser.add_argument("--stream", action="store_true", help=text)
    add_model_options(parser)
    add_rule_options(parser)
    add_decoding_options(parser)
    add_stop_option(parser)
    parser.set_defaults(run=run)


def read_text(text: str, option: str) -> str:
    """The text given as `option`, from standard input if it is "-"."""
    if text == "-":
        with reported(ValueError, about=f"{option} -: "):
            text = sys.stdin.read()
    if not text.strip():
        raise CommandError(f"{option}: the text is empty" if option == "--fill" else "the prompt is empty")
    return text.strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def with_masks(tokenizer: Any, text: str, mask_id: int, each: int) -> torch.Tensor:
    """The ids `[1, P]` of `text`, with `each` masks in the place of every blank."""
    blanks = text.count(BLANK)
    if not blanks:
        raise CommandError(f"--fill: expected {BLANK} at the blanks of the text, got none")
    written = text.replace(BLANK, tokenizer.convert_ids_to_tokens(mask_id) * each)
    ids = ids_of(tokenizer, written)
    found = int((ids == mask_id).sum())
    if found != blanks * each:
        raise CommandError(f"--fill: expected {blanks * each} masks, the tokenizer makes {found} of them")
    return ids


def run(args: argparse.Namespace) -> int:
    from fdpp.cli.live import LiveView, PlainView

    fills = args.fill is not None
    config = config_of(args)
    if args.fill_length and not fills:
        raise CommandError("--fill-length belongs to --fill")
    text = read_text(args.fill, "--fill") if fills else read_text(args.prompt, "--prompt")
    model, tokenizer = load_model(args)
    if fills:
        ids = with_masks(tokenizer, text, model.config.mask_token_id, args.fill_length or 1).to(model.device)
    else:
        ids = encode(tokenizer, text, args.raw).to(model.device)
        config = config if args.raw else ended_by_turn(config, model, tokenizer)
        give_hint(args.model, text)
    live = args.stream and is_live(sys.stdout)
    view: Any = nullcontext()
    if live:
        view = LiveView(tokenizer, model.config.mask_token_id)
    elif args.stream:
        view = nullcontext(PlainView(tokenizer, sys.stdout, skip_prompt=not fills))
    started = time.perf_counter()
    with reported(ValueError, FloatingPointError, torch.OutOfMemoryError), view as streamer:
        decode = model.infill if fills else model.generate
        out: Any = decode(ids, generation_config=config, streamer=streamer, tokenizer=tokenizer)
    seconds = time.perf_counter() - started
    if live or not args.stream:
        answer = out.sequences[0, 0 if fills else ids.shape[1] :]
        print(word_wrap(sys.stdout)(tokenizer.decode(answer, skip_special_tokens=True).strip()), flush=True)
    nfe = int(out.nfe)
    tokens = round(float(out.tokens_per_forward) * nfe)
    figures = f"{tokens} tokens, {nfe} forwards (NFE), {tokens / nfe:.2f} tokens per forward"
    print(f"{figures}, {tokens / seconds:.0f} tok/s", file=sys.stderr)
    if out.acceptance is not None:
        shares = ", ".join(f"{share:.0%}" for share in out.acceptance[0].tolist() if share == share)
        print(
            f"{int(out.query_tokens)} positions evaluated; drafts accepted, by depth: {shares or 'none offered'}",
            file=sys.stderr,
        )
    return 0
