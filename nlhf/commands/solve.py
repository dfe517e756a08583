"""``nlhf solve``."""

import argparse
import sys
from pathlib import Path


def add(commands) -> None:
    parser = commands.add_parser(
        "solve",
        help="the equilibrium of a matrix game, and every solver on it",
        description="Solve a matrix game exactly: the regularised equilibrium with a certificate, "
        "exploitabilities, and all solvers of Nash learning side by side as a table and a plot.",
    )
    parser.add_argument(
        "game", help="a .csv or .npy file of P(i > j), or a named game: dice, population, elo, ..."
    )
    parser.add_argument(
        "--tau", type=float, default=0.1, help="regularisation, above 0 (default: 0.1)"
    )
    parser.add_argument(
        "--ref", default="", help='the reference, as "0.5,0.25,0.25" (default: uniform)'
    )
    parser.add_argument("--solvers", default="all", help="all, or names with commas between")
    parser.add_argument("--iterations", type=int, default=1000, help="of solvers (default: 1000)")
    parser.add_argument("--output", default="solve.png", help="the plot (default: solve.png)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.iterations < 1:
        raise ValueError(f"solve: --iterations must be at least 1, got {arguments.iterations}")
    output = Path(arguments.output)
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"solve: --output must end in .png, .pdf or .svg, got {output}")
    if not output.parent.is_dir():
        raise ValueError(f"solve: --output: there is no folder {output.parent}; make it first")
    # after the flags are known to be right: torch takes seconds to import
    from nlhf import tabular

    names = arguments.solvers.split(",")
    everything = list(tabular.SOLVERS.values())
    solvers = everything if names == ["all"] else [tabular.solver(name.strip()) for name in names]
    settings = {"tau": arguments.tau}
    if arguments.ref:
        settings["ref"] = _numbers(arguments.ref)
    game = _game(arguments.game, settings)
    solution = tabular.solve(game)
    _write(tabular.describe(game, solution))
    curves = tabular.compare(game, solution.policy, solvers, arguments.iterations)
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
