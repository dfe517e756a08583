"""The command ``nlhf``. Bad input ends in one line and exit status 2."""

import argparse
import logging
import os
import sys

from nlhf.commands import algorithms, evaluate, fit_preference, reproduce, solve, train

COMMANDS = (algorithms, evaluate, fit_preference, reproduce, solve, train)
EXIT_BAD_INPUT = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlhf", description="Nash learning from human feedback on transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:
        # who reads has read enough, as head does; what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.stderr.write(f"nlhf: {error}\n")
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
