"""``nlhf train``."""

import argparse
import sys

from nlhf import config


def add(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a policy",
        description="Train a policy by Nash learning (nlhf algorithms lists the algorithms). "
        "Flags override the file.",
    )
    names = ", ".join(config.built_in())
    parser.add_argument("--config", default="", help=f"a YAML file, or a built-in name: {names}")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in the output folder, if there is one",
    )
    config.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    known = vars(arguments)
    overrides = {k: v for k, v in known.items() if k not in ("command", "config", "resume", "run")}
    settings = config.load(arguments.config, overrides)
    # after the flags are known to be right: torch and transformers take seconds to import
    from nlhf import distributed, evaluate, train

    result = train.run(settings, arguments.resume)
    distributed.leave()
    if result:
        sys.stdout.write("\n" + evaluate.table(result))
    sys.stdout.write(f"\nThe run is in {settings.output}: model/, report.md, curves.png\n")
