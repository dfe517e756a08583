"""Every algorithm of Nash learning on an exact matrix game: the oracle of the training loop."""

from nlhf.tabular.comparison import Curve, compare, describe, plot, summary
from nlhf.tabular.equilibrium import Solution, nash_md_pg_limit, solve
from nlhf.tabular.files import SUFFIXES, read
from nlhf.tabular.fixtures import GAMES, game
from nlhf.tabular.matrix_game import MatrixGame
from nlhf.tabular.measures import (
    best_response,
    duality_gap,
    exploitability,
    pure_exploitability,
)
from nlhf.tabular.policies import kl, normalise, span
from nlhf.tabular.registry import LIMITS, SOLVERS, Solver, solver
from nlhf.tabular.reward import bradley_terry, rlhf

__all__ = [
    "GAMES",
    "LIMITS",
    "SOLVERS",
    "SUFFIXES",
    "Curve",
    "MatrixGame",
    "Solution",
    "Solver",
    "best_response",
    "bradley_terry",
    "compare",
    "describe",
    "duality_gap",
    "exploitability",
    "game",
    "kl",
    "nash_md_pg_limit",
    "normalise",
    "plot",
    "pure_exploitability",
    "read",
    "rlhf",
    "solve",
    "solver",
    "span",
    "summary",
]
