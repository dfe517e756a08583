"""``nlhf reproduce``."""

import argparse
import importlib
import sys
import time
from pathlib import Path

from nlhf import config, experiments
from nlhf.commands import common
from nlhf.commands.settings import ReproduceConfig

DESCRIPTION = (
    "Run one of the experiments of docs/experiments.md: what the papers left open, measured on "
    "games small enough that the answer is exact. Tables, a plot, the seed and the command that "
    "repeats it are the output; it takes minutes on two CPU cores."
)
EXAMPLES = """\
  nlhf reproduce --list
  nlhf reproduce intransitive
  nlhf reproduce tau-sweep --scale 0.1 --seed 1 --output runs/small"""


def add(commands) -> None:
    parser = common.add_parser(
        commands,
        "reproduce",
        "run one of the experiments of docs/experiments.md",
        DESCRIPTION,
        EXAMPLES,
        "docs/experiments.md",
    )
    common.add_config(parser, ReproduceConfig, "[NAME]")
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="which; none: list")
    parser.add_argument("--list", action="store_true", help="name the experiments and end")
    config.add_arguments(parser, ReproduceConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.list or not arguments.name:
        sys.stdout.write(listing())
        return
    experiment = experiments.find(arguments.name)
    chosen = common.settings(arguments, ReproduceConfig)
    # after the name is known to be right: torch and transformers take seconds to import
    from nlhf.experiments import report

    output = Path(chosen.output or f"runs/reproduce/{arguments.name}")
    settings = report.Settings(chosen.seed, chosen.scale, output)
    report.claim(output, arguments.name, settings)
    module = importlib.import_module(f"nlhf.experiments.{experiment.module}")
    start = time.perf_counter()
    result = module.run(settings)
    text = report.write(result, settings, time.perf_counter() - start)
    sys.stdout.write(f"{text}\nThe report is in {output}: report.md, {arguments.name}.png\n")


def listing() -> str:
    """The experiments with their questions and minutes."""
    width = max(map(len, experiments.EXPERIMENTS), default=0)
    lines = [
        f"{name:{width}}  {experiment.question} ({experiment.minutes:g} minutes)\n"
        for name, experiment in experiments.EXPERIMENTS.items()
    ]
    return "".join(lines)
