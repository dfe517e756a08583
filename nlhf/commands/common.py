"""What the commands share: help that teaches, settings from a file and flags."""

import argparse
import textwrap

from nlhf import config

_WIDTH = 80


def add_parser(
    commands, name: str, summary: str, description: str, examples: str, docs: str
) -> argparse.ArgumentParser:
    """A command: a line in the list of all, and a page of its own that ends with examples."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, _WIDTH),
        epilog=f"examples:\n{examples}\n\nmore: {docs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_config(parser: argparse.ArgumentParser, kind: type, positional: str = "") -> None:
    """``--config``, and a usage that does not name every flag."""
    known = ", ".join(config.built_in(kind))
    named = f", or a built-in name: {known}" if known else ""
    parser.usage = " ".join(f"{parser.prog} {positional} [--config FILE] [--FLAG ...]".split())
    parser.add_argument(
        "--config",
        default="",
        metavar="FILE",
        help=f"a YAML file of settings, named as the flags with _ for -{named}",
    )


def settings(arguments: argparse.Namespace, kind: type):
    """The settings of the file, where there is one, under those of the flags."""
    names = config.field_help(kind)
    overrides = {name: value for name, value in vars(arguments).items() if name in names}
    return config.load(arguments.config, overrides, kind)
