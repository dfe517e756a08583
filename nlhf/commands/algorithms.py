"""``nlhf algorithms``."""

import argparse
import sys

from nlhf.commands import common

DESCRIPTION = (
    "List what nlhf train --algorithm takes. Each line has an algorithm's opponent, its anchors, "
    "its loss, the settings that it needs, where it leads, and the paper that it is from."
)
EXAMPLES = "  nlhf algorithms\n  nlhf algorithms | grep equilibrium"


def add(commands) -> None:
    parser = common.add_parser(
        commands,
        "algorithms",
        "list the algorithms of nlhf train",
        DESCRIPTION,
        EXAMPLES,
        "docs/algorithms.md, docs/choosing.md",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    # torch takes seconds to import
    from nlhf import algorithms

    sys.stdout.write(algorithms.table())
