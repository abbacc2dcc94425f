"""The command line: `fdpp COMMAND`, or `python -m fdpp COMMAND`.

A command is a module whose `add` makes its parser and names the function that runs it; `COMMANDS` lists them.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import fdpp
from fdpp.cli import chat, demo, eval, generate, trace
from fdpp.cli.options import CommandError, Parser

COMMANDS = (demo, generate, chat, trace, eval)


def build_parser() -> Parser:
    parser = Parser(prog="fdpp", description="Fast decoding for masked-diffusion language models (LLaDA, Dream).")
    parser.add_argument("--version", action="version", version=f"fdpp {fdpp.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        command.add(commands)
    return parser


def run(argv: list[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as shown:
        # --help and --version
        return int(shown.code or 0)
    return args.run(args)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a user error, 130 for Ctrl-C, 141 for a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"fdpp: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter flushes at exit.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
