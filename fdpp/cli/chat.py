"""`fdpp chat`: several turns with a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from fdpp import tiny
from fdpp.cli.options import (
    add_decoding_options,
    add_model_options,
    add_rule_options,
    add_stop_option,
    config_of,
    hint_for,
    load_model,
)
from fdpp.cli.terminal import is_live, paint

if TYPE_CHECKING:
    from fdpp.cli.conversation import Chat

ASK = "> "

EXAMPLES = """examples:
  fdpp chat
  fdpp chat --model tiny:stories
  fdpp chat --model GSAI-ML/LLaDA-8B-Instruct --gen-length 256
  printf 'Why is the sky blue?\\nAnd at dusk?\\n' | fdpp chat --model GSAI-ML/LLaDA-8B-Instruct
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model, turn by turn",
        description="Read questions, a line each, and answer them in turn; in a terminal the answers are unmasked "
        "before your eyes. /new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer or, between answers, ends.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_rule_options(parser)
    add_decoding_options(parser)
    add_stop_option(parser)
    parser.set_defaults(run=run)


def greet(chat: Chat, model: str) -> None:
    print("/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer.", file=sys.stderr)
    task = tiny.task_of(model)
    if task is not None:
        problem = task.generate("held-out", 1)[0].prompt
        text = f"The small model {task.name} solves problems like this one, each by itself:\n{problem}"
        print(text, file=sys.stderr)
    elif not chat.remembers:
        print("This model has no chat template: every line is answered by itself.", file=sys.stderr)


def lines() -> Iterator[str]:
    """Lines of standard input until its end; in a terminal with a prompt and line editing."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    # Importing it gives `input` line editing and a history, where Python has it.
    with suppress(ImportError):
        import readline  # noqa: F401
    ask = ASK if sys.stdout.isatty() else ""
    while True:
        try:
            yield input(ask)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


def tell(text: str) -> None:
    """Print a line that is not part of the conversation."""
    print(paint(text, "2") if is_live(sys.stderr) else text, file=sys.stderr, flush=True)


def respond(chat: Chat, question: str) -> bool:
    """Answer one question; returns whether the answer was finished."""
    try:
        prompt = chat.prepare(question)
        if prompt.dropped:
            tell(f"(the oldest {prompt.dropped} of your questions no longer fit the model's window and are forgotten)")
        if prompt.unknown:
            tell(f"({prompt.unknown} of {prompt.ids.shape[1]} words are unknown to the model)")
        tell(f"({chat.answer(prompt, sys.stdout).figures()})")
    except (ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"fdpp: error: {shorten(str(error), 300, placeholder=' ...')}", file=sys.stderr)
        return False
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(flush=True)
        tell("(stopped; this turn is forgotten)")
        return False
    return True


def run(args: argparse.Namespace) -> int:
    from fdpp.cli.conversation import Chat

    config = config_of(args)
    model, tokenizer = load_model(args)
    chat = Chat(model, tokenizer, config)
    interactive = sys.stdin.isatty()
    if interactive:
        greet(chat, args.model)
    failed = hinted = False
    for line in lines():
        match line.strip():
            case "":
                continue
            case "/quit":
                break
            case "/new":
                chat.forget()
                tell("(a new conversation)")
            case question if question.startswith("/") and question[1:].isalpha():
                tell(f"({question} is no command; there are /new and /quit)")
            case question:
                hint = None if hinted else hint_for(args.model, question)
                if hint:
                    hinted = True
                    tell(f"({hint})")
                failed |= not respond(chat, question)
    return 2 if failed and not interactive else 0
