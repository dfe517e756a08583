"""The command ``nlhf``. Bad input ends in one line and exit status 2."""

import argparse
import logging
import sys

from nlhf import config

EXIT_BAD_INPUT = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlhf", description="Nash learning from human feedback on transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a policy with Nash-MD-PG",
        description="Train a policy with Nash-MD-PG (Munos et al. 2023). Flags override the file.",
    )
    train.add_argument("--config", default="", help="a YAML file, or a built-in name: quickstart")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in the output folder, if there is one",
    )
    config.add_arguments(train)
    train.set_defaults(run=_train)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    known = vars(arguments)
    overrides = {k: v for k, v in known.items() if k not in ("command", "config", "resume", "run")}
    settings = config.load(arguments.config, overrides)
    # after the flags are known to be right: torch and transformers take seconds to import
    from nlhf import evaluate, train

    result = train.run(settings, arguments.resume)
    if result:
        sys.stdout.write("\n" + evaluate.table(result))
    sys.stdout.write(f"\nThe run is in {settings.output}: model/, report.md, curves.png\n")


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"nlhf: {error}\n")
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
