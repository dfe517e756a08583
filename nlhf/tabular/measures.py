"""How far a policy is from an equilibrium: every measure is one number per context."""

from torch import Tensor

from nlhf.tabular.matrix_game import MatrixGame
from nlhf.tabular.policies import kl, normalise


def best_response(game: MatrixGame, log_opponent: Tensor | None = None) -> Tensor:
    """The policy that maximises P_tau(. > opponent): ref exp(P(y > opponent) / tau), normalised.

    ``log_opponent`` (..., Y) defaults to the reference. ValueError if tau is 0.
    """
    tau = game.positive_tau("best_response")
    opponent = game.log_ref if log_opponent is None else log_opponent
    return normalise(game.log_ref + game.wins(opponent) / tau)


def exploitability(game: MatrixGame, log_policy: Tensor, tau: float | None = None) -> Tensor:
    """max_pi P_tau(pi > policy) - 1/2 per context, at least 0.

    tau: None is the game's, 0 the original game, where it is max_y P(y > policy) - 1/2.
    For tau > 0 it is tau KL(policy, best response to policy): with Z the sum of ref(y)
    exp(P(y > policy) / tau), the maximum is tau log Z + tau KL(policy, ref), and
    log best_response = log ref + P(y > policy) / tau - log Z, whose mean under the policy has
    P(policy > policy) = 1/2. So nothing cancels near the equilibrium.
    """
    if tau is not None:
        game = game.replace(tau=tau)
    if game.tau == 0:
        return (game.wins(log_policy).amax(-1) - 0.5).clamp(min=0)
    return game.tau * kl(log_policy, best_response(game, log_policy))


def pure_exploitability(game: MatrixGame) -> Tensor:
    """The exploitability in the original game of each pure policy: (..., Y)."""
    return 0.5 - game.preference.amin(-1)


def duality_gap(
    game: MatrixGame, log_policy: Tensor, log_other: Tensor | None = None, tau: float | None = None
) -> Tensor:
    """max_pi P_tau(pi > other) - min_pi P_tau(policy > pi) per context, at least 0.

    ``log_other`` defaults to the policy; then it is twice the exploitability. By antisymmetry the
    minimum is 1 - max_pi P_tau(pi > policy), so the gap is the sum of two exploitabilities.
    """
    own = exploitability(game, log_policy, tau)
    return own + (own if log_other is None else exploitability(game, log_other, tau))
