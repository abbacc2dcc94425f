"""`fdpp demo`: an embedded model on held-out problems."""

from __future__ import annotations

import argparse
from typing import Any

from fdpp import tiny
from fdpp.cli import held_out
from fdpp.cli.options import reported, whole
from fdpp.decoding.settings import CACHES


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch an embedded model solve problems it has not seen, then compare the rules",
        description="Decode problems held out from an embedded model's training: the first ones live, then all of them "
        f"with every rule, in a table: {', '.join(rule.label() for rule in held_out.RULES)}.",
    )
    text = "sudoku: 6 x 6 grids, on which rules differ; sums; stories, also by block diffusion (default: %(default)s)"
    parser.add_argument("--task", choices=tuple(tiny.MODELS), default="sudoku", help=text)
    text = "problems of the table (default: %(default)s)"
    parser.add_argument("--problems", type=whole(1), default=held_out.PROBLEMS, metavar="N", help=text)
    parser.add_argument("--cache", choices=CACHES, default="dual", help="see `fdpp generate` (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with reported(FileNotFoundError):
        return held_out.run(args.task, args.problems, args.cache)
