"""``nlhf train``."""

import argparse
import sys

from nlhf import config
from nlhf.commands import common

DESCRIPTION = (
    "Train a policy by Nash learning: against an opponent (by default its geometric mixture with "
    "the reference) under a preference model that says which of two responses is better. The "
    "preference is a folder that nlhf preference wrote, or a function of your own. Every setting "
    "is a flag and a line of the --config file, of which flags win; an interrupted run goes on "
    "with --resume."
)
EXAMPLES = """\
  nlhf train --config quickstart
  nlhf train --model path/or/hub-name --prompts prompts.jsonl --eval-prompts held_out.jsonl \\
      --preference my_package.judge:prefer --lora-r 16 --output runs/mine
  nlhf train --config runs/mine/config.yaml --algorithm nash_mp --eta 1 --ema-decay 0.95 \\
      --output runs/nash-mp --report-to wandb"""


def add(commands) -> None:
    parser = common.add_parser(
        commands,
        "train",
        "train a policy by any of the algorithms",
        DESCRIPTION,
        EXAMPLES,
        "docs/choosing.md (which algorithm, which values), docs/algorithms.md, docs/recipes.md",
    )
    common.add_config(parser, config.Config)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in the output folder, if there is one",
    )
    config.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    settings = common.settings(arguments, config.Config)
    # after the flags are known to be right: torch and transformers take seconds to import
    from nlhf import distributed, evaluate, model_card, stopping, train

    try:
        result = train.run(settings, arguments.resume)
    except stopping.Interrupted as stopped:
        sys.stdout.write(f"\n{stopped}\n")
        distributed.leave()
        return
    except (model_card.PushError, distributed.Lost) as error:
        sys.stderr.write(f"nlhf: {error}\n")
        sys.exit(1)
    if result:
        sys.stdout.write("\n" + evaluate.table(result))
    sys.stdout.write(f"\nThe run is in {settings.output}: model/, report.md, curves.png\n")
    distributed.leave()
