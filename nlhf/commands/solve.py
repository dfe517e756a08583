"""``nlhf solve``."""

import argparse
import sys
from pathlib import Path

from nlhf import config
from nlhf.commands import common
from nlhf.commands.settings import SolveConfig

DESCRIPTION = (
    "Solve a matrix game exactly: P(i > j) is the probability that action i is preferred to j. "
    "Prints the regularised equilibrium with a certificate, the exploitability of every action, "
    "and all solvers of Nash learning side by side, as a table and a plot."
)
EXAMPLES = """\
  nlhf solve rock-paper-scissors --tau 0.05
  nlhf solve game.csv --ref 0.5,0.25,0.25 --solvers nash_mp,omd --output game.svg"""


def add(commands) -> None:
    parser = common.add_parser(
        commands,
        "solve",
        "solve a matrix game exactly, and compare every solver on it",
        DESCRIPTION,
        EXAMPLES,
        "docs/tabular.md",
    )
    common.add_config(parser, SolveConfig, "GAME")
    parser.add_argument(
        "game",
        metavar="GAME",
        help="a .csv or .npy file of P(i > j), or a named game: dice, population, elo, ...",
    )
    config.add_arguments(parser, SolveConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    chosen = common.settings(arguments, SolveConfig)
    output = Path(chosen.output)
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"solve: --output must end in .png, .pdf or .svg, got {output}")
    if not output.parent.is_dir():
        raise ValueError(f"solve: --output: there is no folder {output.parent}; make it first")
    # after the flags are known to be right: torch takes seconds to import
    from nlhf import tabular

    names = chosen.solvers.split(",")
    everything = list(tabular.SOLVERS.values())
    solvers = everything if names == ["all"] else [tabular.solver(name.strip()) for name in names]
    settings = {"tau": chosen.tau}
    if chosen.ref:
        settings["ref"] = _numbers(chosen.ref)
    game = _game(arguments.game, settings)
    solution = tabular.solve(game)
    _write(tabular.describe(game, solution))
    curves = tabular.compare(game, solution.policy, solvers, chosen.iterations)
    _write(tabular.summary(game, curves))
    tabular.plot(curves, f"{arguments.game}, tau {game.tau:g}", output)
    sys.stdout.write(f"The plot is in {output}\n")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"solve: --ref must be numbers with commas between, got {text!r}"
        ) from None


def _game(name: str, settings: dict):
    from nlhf import tabular

    if name not in tabular.GAMES and (Path(name).suffix in tabular.SUFFIXES or Path(name).exists()):
        return tabular.read(name, **settings)
    return tabular.game(name, **settings)


def _write(lines) -> None:
    sys.stdout.write("\n".join(lines) + "\n\n")
