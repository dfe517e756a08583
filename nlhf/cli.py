"""The command ``nlhf``. Bad input ends in one line and exit status 2."""

import argparse
import logging
import os
import sys
import time

from nlhf.commands import (
    algorithms,
    evaluate,
    generate,
    info,
    preference,
    reproduce,
    solve,
    train,
)
from nlhf.names import nearest, shown, unusable

COMMANDS = (train, preference, generate, evaluate, solve, reproduce, algorithms, info)
EXIT_BAD_INPUT = 2
# seconds from the error of one process to that of another
_PATIENCE = 5
# characters of an error, which may quote what was given
_LONGEST = 2000


class _OneLine(argparse.HelpFormatter):
    """A command and what it does on one line, also those whose names are long."""

    def __init__(self, prog: str):
        super().__init__(prog)
        # argparse forgets the indentation of commands when it looks for the widest
        names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
        self._action_max_length = 4 + max(map(len, names))


class _Parser(argparse.ArgumentParser):
    """An unknown flag is answered with the nearest, under the usage of its command."""

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            hint = nearest(unknown[0].partition("=")[0], known)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str):
        super().error(_line(message))


def _line(message: str) -> str:
    """On one line whatever it quotes, and no longer than can be read."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]}...{message[-_LONGEST // 2 :]}"
    whole = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    return "".join(whole)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="nlhf",
        description="Nash learning from human feedback on transformers.",
        epilog="nlhf COMMAND --help says what a command does, with examples. Where to begin: "
        "README.md, docs/choosing.md.",
        formatter_class=_OneLine,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    for word in words:
        if wrong := unusable(word):
            parser.error(f"an argument must be text, got {wrong} in {shown(word)}")
    if words and not words[0].startswith("-") and words[0] not in commands.choices:
        hint = nearest(words[0], commands.choices) or "; nlhf --help lists them"
        parser.error(f"unknown command {shown(words[0])}{hint}")
    return parser.parse_args(words)


def main(argv: list[str] | None = None) -> None:
    if not sys.stderr.isatty():
        # bars of other packages; both read this when they are imported
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    # one that is no number is distributed's to name
    rank = os.environ.get("RANK", "")
    rank = int(rank) if rank.isdecimal() else 0
    # of several processes the first one talks
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(message)s")
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    # a module:function may lie here, as with python -m; last, so that it hides nothing
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        arguments.run(arguments)
    except BrokenPipeError:
        # who reads has read enough, as head does; what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        _end(str(error), rank)
    except (RuntimeError, MemoryError) as error:
        # torch has no class of its own for it on the CPU
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        _end("not enough memory; take shorter texts or smaller batches", rank)


def _end(message: str, rank: int) -> None:
    if rank:
        # the launcher ends this process meanwhile if the first one has said the same
        time.sleep(_PATIENCE)
    sys.stderr.write(f"nlhf: {_line(message)}\n")
    sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
