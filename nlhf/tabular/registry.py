"""The solvers by name: what they default to, where they are from and what they converge to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nlhf.names import nearest
from nlhf.tabular import solvers
from nlhf.tabular.equilibrium import nash_md_pg_limit, solve
from nlhf.tabular.matrix_game import MatrixGame
from nlhf.tabular.measures import best_response
from nlhf.tabular.reward import rlhf

# what the last iterate approaches, if it is started from the reference
LIMITS = {
    "equilibrium": "the equilibrium of the regularised game",
    "mixture": "the policy whose mixture with the reference is the equilibrium at tau / (1 - b)",
    "best_response": "the best response to the reference",
    "bradley_terry": "the optimum of RLHF on the Bradley-Terry fit",
    "unregularised": "an equilibrium of the original game",
    "iterates": "no policy where preferences are cyclic: only the average nears an equilibrium",
}


@dataclass(frozen=True)
class Solver:
    """One solver of ``nlhf.tabular.solvers``."""

    name: str
    function: Callable[..., solvers.Policies]
    limit: str
    """a key of ``LIMITS``"""
    citation: str
    defaults: Callable[[MatrixGame], dict[str, Any]] = lambda game: {}
    """sensible arguments for a game"""
    queries: int = 1
    """how often an iteration asks for P(y > pi), with the default arguments"""

    def run(self, game: MatrixGame, **settings: Any) -> solvers.Policies:
        """The policies, with the default arguments where ``settings`` has none."""
        return self.function(game, **self.defaults(game) | settings)

    def target(self, game: MatrixGame, **settings: Any) -> Tensor | None:
        """The policy (..., Y) that ``run`` approaches from the reference; None: no single one."""
        settings = self.defaults(game) | settings
        if self.limit == "equilibrium":
            return solve(game).policy
        if self.limit == "mixture":
            # a constant step of Nash-MD mixes by step * tau
            coef = settings.get("mixture_coef")
            return nash_md_pg_limit(game, settings["step"] * game.tau if coef is None else coef)
        if self.limit == "best_response":
            return best_response(game)
        return rlhf(game) if self.limit == "bradley_terry" else None


def _self_play(game: MatrixGame) -> float:
    """The step of self-play that is best near the equilibrium of the worst game.

    There the payoffs turn the policy at the rate k / tau, k <= 1 / sqrt(8) being the norm of
    D^(1/2) P D^(1/2), and a step is 1 - w + i w k / tau, w = step * tau, smallest for this w.
    """
    w = 8 * game.tau**2 / (1 + 8 * game.tau**2)
    return w / game.tau


def _prox(game: MatrixGame) -> dict[str, Any]:
    # with step 1 the inner game has twice the tau
    return {
        "step": 1.0,
        "inner_steps": 10,
        "inner_step": _self_play(game.replace(tau=2 * game.tau)),
    }


_ALL = (
    Solver("nash_md", solvers.nash_md, "equilibrium", "Munos et al. 2023, eq. 3-5"),
    Solver(
        "nash_md_constant",
        solvers.nash_md,
        "mixture",
        "Munos et al. 2023, eq. 3-5, constant step",
        lambda game: {"step": _self_play(game)},
    ),
    Solver(
        "omd",
        solvers.omd,
        "equilibrium",
        "Munos et al. 2023, eq. 8",
        lambda game: {"step": _self_play(game)},
    ),
    Solver(
        "nash_ema",
        solvers.nash_ema,
        "equilibrium",
        "Munos et al. 2023, section 7",
        lambda game: {"step": _self_play(game) / 4, "decay": 0.5},
    ),
    Solver("nash_mp", solvers.nash_mp, "equilibrium", "Tiapkin et al. 2025, v1", queries=2),
    Solver(
        "nash_prox", solvers.nash_prox, "equilibrium", "Tiapkin et al. 2026, v2", _prox, queries=10
    ),
    Solver(
        "egpo",
        solvers.egpo,
        "equilibrium",
        "Zhou, Fazel and Du 2025",
        lambda game: {"step": 1 / (1 + game.tau)},
        queries=2,
    ),
    Solver("inpo", solvers.inpo, "equilibrium", "Zhang et al. 2024"),
    Solver(
        "nash_md_pg",
        solvers.nash_md_pg,
        "mixture",
        "Munos et al. 2023, eq. 13 and 15",
        lambda game: {"mixture_coef": 0.125, "step": _self_play(game)},
    ),
    Solver("onpo", solvers.onpo, "unregularised", "Zhang et al. 2025", lambda game: {"step": 0.5}),
    Solver(
        "mpo",
        solvers.mpo,
        "unregularised",
        "Wang et al. 2024",
        lambda game: {"step": 0.5, "alpha": 0.1, "period": 50},
    ),
    Solver(
        "mnpo",
        solvers.mnpo,
        "iterates",
        "Wu et al. 2025",
        lambda game: {"eta": 2.0, "history": 2},
    ),
    Solver("sppo", solvers.sppo, "iterates", "Wu et al. 2024", lambda game: {"eta": 0.5}),
    Solver("dno", solvers.dno, "iterates", "Rosset et al. 2024", lambda game: {"eta": 2.0}),
    Solver("best_response", solvers.best_response, "best_response", "Munos et al. 2023, section 7"),
    Solver("rlhf", solvers.rlhf, "bradley_terry", "Bradley and Terry 1952"),
)
SOLVERS: dict[str, Solver] = {solver.name: solver for solver in _ALL}


def solver(name: str) -> Solver:
    """The entry of ``SOLVERS``. ValueError: an unknown name; the nearest is suggested."""
    if name not in SOLVERS:
        raise ValueError(
            f"solver: unknown name {name!r}, known are {', '.join(SOLVERS)}{nearest(name, SOLVERS)}"
        )
    return SOLVERS[name]
