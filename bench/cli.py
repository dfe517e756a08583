"""What the commands of the bench share: flags, bad input in one line, rows, a table."""

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from bench import rows


class BadInput(Exception):
    """What is wrong, in one line."""


class Parser(argparse.ArgumentParser):
    """Flags of one meaning everywhere; ``parse`` raises BadInput where argparse would exit."""

    def __init__(self, command: str, description: str):
        super().__init__(
            f"python -m bench {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        self.add_argument("--json", action="store_true", help="rows as JSON lines, nothing else")
        self.add_argument(
            "--save", action="store_true", help="append the rows to bench/results/<device>.jsonl"
        )

    def error(self, message: str) -> None:
        raise BadInput(f"{self.prog}: {message} (--help lists the flags)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        arguments = self.parse_args(argv)
        if arguments.device == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: torch finds no CUDA device here")
        return arguments


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def names_of(known: Sequence[str]):
    """Argument type: some of ``known``, separated by commas."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"knows {', '.join(known)}, got {name!r}")
        return found

    return parse


def refuse(error: BadInput) -> int:
    print(error, file=sys.stderr)
    return 2


def say(line: str) -> None:
    """Progress; standard output is for the results."""
    print(line, file=sys.stderr, flush=True)


class Rows:
    """Rows as they come: printed with ``--json``, appended with ``--save``, kept for the table."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self.found: list[dict] = []

    def add(self, row: dict) -> None:
        row = rows.stamp(self._arguments.device) | row
        self.found.append(row)
        if self._arguments.json:
            print(json.dumps(row), flush=True)
        if self._arguments.save:
            rows.append(rows.results_file(self._arguments.device), [row])


def table(header: list[str], body: list[list[str]]) -> str:
    """Columns side by side: the first to the left, the others to the right."""
    lines = [header, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        [line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
