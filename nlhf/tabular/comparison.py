"""The solvers side by side on one game: numbers, tables and a plot."""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nlhf.progress import Progress
from nlhf.tabular.equilibrium import Solution
from nlhf.tabular.matrix_game import MatrixGame
from nlhf.tabular.measures import exploitability, pure_exploitability
from nlhf.tabular.policies import kl
from nlhf.tabular.registry import LIMITS, Solver

SHOWN = 20
COLUMNS = (10, 100, 1000)
_POINTS = 90


@dataclass(frozen=True)
class Curve:
    """A solver's way: means over the contexts, at some of its iterations."""

    solver: Solver
    iterations: list[int]
    kl: list[float]
    """KL(equilibrium, policy)"""
    regularised: list[float]
    """exploitability in the regularised game"""
    original: list[float]
    """exploitability in the original game"""
    failure: str = ""
    """why it ended before its first iteration"""


def compare(
    game: MatrixGame, equilibrium: Tensor, solvers: list[Solver], iterations: int
) -> list[Curve]:
    """Every solver with its default arguments, from the reference, for so many iterations."""
    wanted = _points(iterations)
    # too short for lines in a log
    show = sys.stderr.isatty()
    with Progress("solvers", len(solvers) * (iterations + 1), show=show) as bar:
        return [_curve(game, equilibrium, solver, wanted, bar) for solver in solvers]


def _points(iterations: int) -> list[int]:
    """0, the columns of the table, the last, and between them evenly on a logarithmic scale."""
    even = {round(iterations ** (k / _POINTS)) for k in range(_POINTS + 1)}
    return sorted(k for k in {0, iterations, *COLUMNS, *even} if k <= iterations)


def _curve(game: MatrixGame, equilibrium: Tensor, solver: Solver, wanted: list[int], bar) -> Curve:
    rows = []
    failure = ""
    try:
        for k, policy in enumerate(itertools.islice(solver.run(game), wanted[-1] + 1)):
            bar.advance()
            if k in wanted:
                measures = (
                    kl(equilibrium, policy),
                    exploitability(game, policy),
                    exploitability(game, policy, 0.0),
                )
                rows.append((k, *(m.mean().item() for m in measures)))
    except ValueError as error:
        # a reward need not exist: that is a result, and the others go on
        failure = str(error)
    columns = [list(column) for column in zip(*rows, strict=True)]
    return Curve(solver, *columns, failure=failure)


def describe(game: MatrixGame, solution: Solution) -> Iterator[str]:
    """The lines about the equilibrium and the pure policies."""
    contexts = game.preference.shape[:-2].numel()
    yield f"{game.actions} actions, {contexts} context{'s' * (contexts > 1)}, tau {game.tau:g}"
    yield ""
    if contexts > 1:
        yield f"Over all {contexts} contexts:"
        summary = {
            "distance of the solution to the exact equilibrium, at most": solution.distance,
            "exploitability of the equilibrium, regularised game": exploitability(
                game, solution.policy
            ),
            "exploitability of the equilibrium, original game": exploitability(
                game, solution.policy, 0.0
            ),
            "exploitability of the uniform policy, original game": exploitability(
                game, _uniform(game), 0.0
            ),
            "exploitability of the best pure policy, original game": pure_exploitability(game).amin(
                -1
            ),
        }
        yield from _table(
            ("", "mean", "largest"),
            [(k, f"{v.mean().item():.6g}", f"{v.max().item():.6g}") for k, v in summary.items()],
        )
        yield ""
        yield "The first context:"
    yield from _first_context(game, solution)


def _uniform(game: MatrixGame) -> Tensor:
    return torch.full_like(game.log_ref, -math.log(game.actions))


def _first_context(game: MatrixGame, solution: Solution) -> Iterator[str]:
    first = (0,) * (game.preference.dim() - 2)
    policy, pure = solution.policy[first], pure_exploitability(game)[first]
    regularised = exploitability(game, solution.policy)[first].item()
    original = exploitability(game, solution.policy, 0.0)[first].item()
    yield f"Equilibrium, within {solution.distance[first].item():.2g} in total variation"
    yield f"(certified by the span {solution.residual[first].item():.2g} of log pi - log BR(pi),"
    yield f"{solution.iterations} Newton steps); exploitability {regularised:.3g} in the"
    yield f"regularised game, {original:.6g} in the original one."
    yield ""
    order = range(game.actions)
    if game.actions > SHOWN:
        yield f"The {SHOWN} most likely of {game.actions} actions:"
        order = policy.argsort(descending=True, stable=True)[:SHOWN].tolist()
    yield from _table(
        ("action", "equilibrium", "reference"),
        [(game.names[i], f"{policy[i].exp():.6g}", f"{game.ref[first][i]:.6g}") for i in order],
    )
    yield ""
    yield "Exploitability in the original game, max_y P(y > policy) - 1/2:"
    order = range(game.actions)
    if game.actions > SHOWN:
        yield f"(the {SHOWN} least exploitable of {game.actions} pure policies)"
        order = pure.argsort(stable=True)[:SHOWN].tolist()
    uniform = exploitability(game, _uniform(game), 0.0)[first].item()
    yield from _table(
        ("policy", "exploitability"),
        [
            *((f"always {game.names[i]}", f"{pure[i]:.6g}") for i in order),
            ("uniform", f"{uniform:.6g}"),
            ("equilibrium", f"{original:.6g}"),
        ],
    )


def summary(game: MatrixGame, curves: list[Curve]) -> Iterator[str]:
    """The table of the solvers."""
    last = max(curve.iterations[-1] for curve in curves)
    columns = [k for k in COLUMNS if k <= last]
    several = game.preference.dim() > 2
    yield f"Solvers from the reference{', means over the contexts' * several}: KL(pi*, policy)"
    yield f"after so many iterations, and exploitability after {last} (regularised, original)."
    rows = []
    for curve in curves:
        at = dict(zip(curve.iterations, curve.kl, strict=True))
        cells = [f"{at[k]:.1e}" if k in at else "-" for k in columns]
        ends = (curve.regularised[-1], curve.original[-1])
        cells += ["-", "-"] if curve.failure else [f"{end:.1e}" for end in ends]
        solver = curve.solver
        rows.append((solver.name, solver.limit, str(solver.queries), *cells, solver.citation))
    heads = ("solver", "limit", "queries", *(f"KL {k}" for k in columns))
    yield from _table((*heads, "regularised", "original", "from"), rows)
    yield ""
    for limit in dict.fromkeys(curve.solver.limit for curve in curves):
        yield f"{limit}: {LIMITS[limit]}"
    for curve in curves:
        if curve.failure:
            yield f"{curve.solver.name} has no result: {curve.failure}"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


_PANELS = (
    ("kl", "KL(equilibrium, policy)"),
    ("regularised", "exploitability, regularised game"),
    ("original", "exploitability, original game"),
)
_FLOOR = 1e-18
_DASHES = {
    "equilibrium": "-",
    "mixture": "--",
    "best_response": ":",
    "bradley_terry": ":",
    "unregularised": "-.",
    "iterates": (0, (1, 1)),
}


def plot(curves: list[Curve], title: str, path: Path) -> None:
    """The curves of all solvers over the iterations as one picture, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 6), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for axis, (name, label) in zip(axes, _PANELS, strict=True):
        for i, curve in enumerate(curves):
            # iteration 0 has no place on a logarithmic axis
            x, y = curve.iterations[1:], getattr(curve, name)[1:]
            y = [max(value, _FLOOR) for value in y]
            axis.plot(
                x,
                y,
                label=f"{curve.solver.name} ({curve.solver.limit})",
                color=colours[i % len(colours)],
                linestyle=_DASHES[curve.solver.limit],
                linewidth=1.6,
            )
        axis.set(xscale="log", yscale="log", xlabel="iteration", title=label)
        low = min(value for curve in curves for value in getattr(curve, name)[1:] or [1.0])
        axis.set_ylim(bottom=max(low, _FLOOR) / 2)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"{title} (values below {_FLOOR:g} are drawn there)", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
