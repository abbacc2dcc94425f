"""`fdpp demo`: the embedded model on held-out problems."""

from __future__ import annotations

import argparse
from typing import Any

from fdpp.cli import held_out
from fdpp.cli.options import reported, whole
from fdpp.decoding.settings import CACHES


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch the embedded model solve problems it has not seen, then compare the rules",
        description="Decode problems held out from the embedded model's training: the first ones live, then all of "
        "them with one token per step, threshold 0.9, factor 0.75 and Fréchet 0.25, in a table.",
    )
    text = "problems of the table (default: %(default)s)"
    parser.add_argument("--problems", type=whole(1), default=24, metavar="N", help=text)
    parser.add_argument("--cache", choices=CACHES, default="dual", help="see `fdpp generate` (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with reported(FileNotFoundError):
        return held_out.run(args.problems, args.cache)
