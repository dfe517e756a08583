"""``nlhf reproduce``."""

import argparse
import importlib
import sys
import time
from pathlib import Path

from nlhf import experiments


def add(commands) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="run one of the experiments of docs/experiments.md",
        description="Run an experiment on CPU: its tables, plot and seed are the output.",
    )
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="which; none: list")
    parser.add_argument("--list", action="store_true", help="name the experiments and end")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default: 0)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiplies the numbers of steps and seeds, above 0 (default: 1.0)",
    )
    parser.add_argument(
        "--output", default="", metavar="DIR", help="folder (default: runs/reproduce/NAME)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.list or not arguments.name:
        sys.stdout.write(listing())
        return
    experiment = experiments.find(arguments.name)
    # after the name is known to be right: torch and transformers take seconds to import
    from nlhf.experiments import report

    output = Path(arguments.output or f"runs/reproduce/{arguments.name}")
    settings = report.Settings(arguments.seed, arguments.scale, output)
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
