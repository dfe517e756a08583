"""The command ``nlhf``. Bad input ends in one line and exit status 2."""

import argparse
import logging
import os
import sys
import time

from nlhf.commands import algorithms, evaluate, fit_preference, reproduce, solve, train

COMMANDS = (algorithms, evaluate, fit_preference, reproduce, solve, train)
EXIT_BAD_INPUT = 2
# seconds from the error of one process to that of another
_PATIENCE = 5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlhf", description="Nash learning from human feedback on transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    rank = int(os.environ.get("RANK", 0))
    # of several processes the first one talks
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(message)s")
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:
        # who reads has read enough, as head does; what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if rank:
            # the launcher ends this process meanwhile if the first one has said the same
            time.sleep(_PATIENCE)
        sys.stderr.write(f"nlhf: {error}\n")
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
