"""``nlhf algorithms``."""

import argparse
import sys


def add(commands) -> None:
    parser = commands.add_parser(
        "algorithms",
        help="list the algorithms of nlhf train",
        description="Every algorithm with its opponent, anchors, loss, limit and source.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    # torch takes seconds to import
    from nlhf import algorithms

    sys.stdout.write(algorithms.table())
