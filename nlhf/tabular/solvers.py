"""Every algorithm of Nash learning as an endless generator of policies, exact in a table.

A solver first yields the policy that it starts from (default the reference), then one policy an
iteration. It keeps no history beyond what its update reads, has no randomness and no global state:
the same inputs give the same bits. mu is the reference, P(y > pi) is ``game.wins(pi)``, and c a
constant that normalises. Policies are log-probabilities (..., Y).

Arguments are checked when the solver is called, not when its first policy is asked for; a missing,
unknown or wrong one raises ValueError.
"""

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nlhf.names import nearest
from nlhf.tabular import measures, reward
from nlhf.tabular.matrix_game import MatrixGame
from nlhf.tabular.policies import normalise

Policies = Iterator[Tensor]


def _solver(function: Callable[..., Policies]) -> Callable[..., Policies]:
    """Arguments are checked at once, and a wrong call is a ValueError in one line."""
    signature = inspect.signature(function)
    name = function.__name__

    @functools.wraps(function)
    def checked(*args, **settings) -> Policies:
        known = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        names = [p.name for p in known]
        for given in settings:
            if given not in signature.parameters:
                raise ValueError(
                    f"{name}: unknown argument {given!r}, it takes {', '.join(names)}"
                    f"{nearest(given, names)}"
                )
        missing = [p.name for p in known if p.default is p.empty and p.name not in settings]
        if missing:
            raise ValueError(f"{name}: needs {' and '.join(missing)}, got no value")
        policies = function(*args, **settings)
        # to its first policy, past all checks
        first = next(policies)
        return _rest(first, policies)

    return checked


def _rest(first: Tensor, policies: Policies) -> Policies:
    yield first
    del first
    yield from policies


def _start(game: MatrixGame, start: Tensor | None, caller: str) -> Tensor:
    return game.log_ref if start is None else normalise(game.checked(start, caller))


def _positive(caller: str, **values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{caller}: {name} must be above 0 and finite, got {value!r}")


def _share(caller: str, **values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ValueError(f"{caller}: {name} must be in [0, 1], got {value!r}")


def _count(caller: str, **values: int) -> None:
    for name, value in values.items():
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{caller}: {name} must be an integer, at least 1, got {value!r}")


def _steps(caller: str, tau: float, step: float | None) -> Iterator[float]:
    """eta_t tau in (0, 1]: of a constant step, or 2 / (t + 2) for eta_t = 2 / (tau (t + 2))."""
    if step is None:
        t = 0
        while True:
            yield 2 / (t + 2)
            t += 1
    _positive(caller, step=step)
    if not step * tau <= 1:
        raise ValueError(
            f"{caller}: step * tau must be at most 1, got step {step!r} and tau {tau!r}; "
            f"use a step of at most {1 / tau:.6g}"
        )
    while True:
        yield step * tau


@_solver
def nash_md(
    game: MatrixGame, *, start: Tensor | None = None, step: float | None = None
) -> Policies:
    """Nash-MD (Munos et al. 2023, eq. 3 to 5); one query an iteration.

    mix = pi^(1 - eta tau) mu^(eta tau), log pi' = log mix + eta P(y > mix) + c.
    step: eta, eta tau <= 1; None: 2 / (tau (t + 2)), for which theorem 1 promises
    KL(pi*, pi_T) <= 8 / (tau^2 (T + 1)). A constant step stalls: its limit is
    ``nash_md_pg_limit(game, eta tau)``, whose mixture is the equilibrium at tau / (1 - eta tau).
    """
    tau = game.positive_tau("nash_md")
    weights = _steps("nash_md", tau, step)
    policy = _start(game, start, "nash_md")
    for weight in weights:
        yield policy
        mix = normalise((1 - weight) * policy + weight * game.log_ref)
        policy = normalise(mix + weight / tau * game.wins(mix))


@_solver
def omd(game: MatrixGame, *, start: Tensor | None = None, step: float | None = None) -> Policies:
    """Self-play by online mirror descent (Munos et al. 2023, eq. 8); one query an iteration.

    log pi' = (1 - eta tau) log pi + eta tau log mu + eta P(y > pi) + c; steps as in ``nash_md``.
    A constant step converges if it is small enough, without the bias of Nash-MD.
    """
    tau = game.positive_tau("omd")
    weights = _steps("omd", tau, step)
    policy = _start(game, start, "omd")
    for weight in weights:
        yield policy
        policy = _proximal(game, policy, policy, weight)


def _proximal(game: MatrixGame, policy: Tensor, opponent: Tensor, weight: float) -> Tensor:
    """The mirror step from the mixture with the reference, weight = eta tau."""
    mix = (1 - weight) * policy + weight * game.log_ref
    return normalise(mix + weight / game.tau * game.wins(opponent))


@_solver
def nash_ema(
    game: MatrixGame, *, start: Tensor | None = None, step: float | None, decay: float
) -> Policies:
    """Nash-EMA (Munos et al. 2023, section 7): ``omd`` against an average of its past.

    The opponent is the geometric moving average of the iterates,
    log pi_bar' = decay log pi_bar + (1 - decay) log pi' + c, and starts as the start.
    decay in [0, 1]: 0 is ``omd``, 1 a best response to the start. One query an iteration.
    """
    tau = game.positive_tau("nash_ema")
    _share("nash_ema", decay=decay)
    weights = _steps("nash_ema", tau, step)
    policy = opponent = _start(game, start, "nash_ema")
    for weight in weights:
        yield policy
        policy = _proximal(game, policy, opponent, weight)
        opponent = normalise(decay * opponent + (1 - decay) * policy)


@_solver
def nash_mp(
    game: MatrixGame, *, start: Tensor | None = None, step: float | None = None
) -> Policies:
    """Nash-MP, mirror prox (Tiapkin et al. 2025, arXiv 2505.19731v1); two queries an iteration.

    Both half steps start from pi: log pi_half = (log pi + eta log mu + (eta / tau) P(y > pi)) /
    (1 + eta) + c, and log pi' the same with P(y > pi_half). step: eta, default 2 tau, for which
    KL(pi*, pi) falls by 1 / (1 + 2 tau) or faster every iteration.
    """
    tau = game.positive_tau("nash_mp")
    eta = 2 * tau if step is None else step
    _positive("nash_mp", step=eta)
    # eta / (1 + eta) is the eta tau of a proximal step
    weight = eta / (1 + eta)
    policy = _start(game, start, "nash_mp")
    while True:
        yield policy
        policy = _proximal(game, policy, _proximal(game, policy, policy, weight), weight)


@_solver
def nash_prox(
    game: MatrixGame,
    *,
    start: Tensor | None = None,
    step: float,
    inner_steps: int,
    inner_step: float,
) -> Policies:
    """Nash Prox, a proximal point method (Tiapkin et al. 2026, arXiv 2505.19731v2).

    pi' is the equilibrium of the game with two anchors, P(pi > pi') - tau KL(pi, mu) -
    (tau / step) KL(pi, pi_k) and the mirror for pi'. With tau_k = tau (1 + 1 / step) that is a game
    with the one anchor mu_k = (mu^step pi_k)^(1 / (1 + step)), which ``inner_steps`` iterations of
    self-play (``omd``) from pi_k with the constant ``inner_step`` solve; inner_step * tau_k <= 1.
    inner_steps queries an iteration.
    """
    tau = game.positive_tau("nash_prox")
    _positive("nash_prox", step=step)
    _count("nash_prox", inner_steps=inner_steps)
    weight = next(_steps("nash_prox: inner self-play", tau * (1 + 1 / step), inner_step))
    policy = _start(game, start, "nash_prox")
    while True:
        yield policy
        anchor = (step * game.log_ref + policy) / (1 + step)
        for _ in range(inner_steps):
            gain = inner_step * game.wins(policy)
            policy = normalise((1 - weight) * policy + weight * anchor + gain)


@_solver
def egpo(game: MatrixGame, *, start: Tensor | None = None, step: float) -> Policies:
    """EGPO, extragradient (Zhou, Fazel and Du 2025, arXiv 2503.08942); two queries an iteration.

    log pi_half = (1 - eta tau) log pi + eta tau log mu + eta P(y > pi) + c, and log pi' the same
    with P(y > pi_half). step: eta, eta tau <= 1. As ``nash_mp`` with eta tau for eta / (1 + eta).
    """
    tau = game.positive_tau("egpo")
    weight = next(_steps("egpo", tau, step))
    policy = _start(game, start, "egpo")
    while True:
        yield policy
        policy = _proximal(game, policy, _proximal(game, policy, policy, weight), weight)


@_solver
def inpo(game: MatrixGame, *, start: Tensor | None = None, eta: float | None = None) -> Policies:
    """INPO (Zhang et al. 2024, arXiv 2407.00617); one query an iteration.

    pi' ~ exp(P(y > pi) / eta) mu^(tau / eta) pi^(1 - tau / eta): ``omd`` with the step 1 / eta.
    eta: the INVERSE step as in the paper, at least tau; None: tau (t + 2) / 2.
    """
    tau = game.positive_tau("inpo")
    if eta is not None:
        _positive("inpo", eta=eta)
        if not tau <= eta:
            raise ValueError(f"inpo: eta must be at least tau, got eta {eta!r} and tau {tau!r}")
    weights = _steps("inpo", tau, None if eta is None else 1 / eta)
    policy = _start(game, start, "inpo")
    for weight in weights:
        yield policy
        policy = _proximal(game, policy, policy, weight)


@_solver
def nash_md_pg(
    game: MatrixGame, *, start: Tensor | None = None, mixture_coef: float, step: float
) -> Policies:
    """The exact natural policy gradient of Nash-MD-PG (Munos et al. 2023, eq. 13 and 15).

    mix = pi^(1 - mixture_coef) mu^mixture_coef,
    log pi' = (1 - step tau) log pi + step tau log mu + step P(y > mix) + c. Its fixed point is
    ``nash_md_pg_limit(game, mixture_coef)`` whatever the step, step * tau <= 1.
    """
    tau = game.positive_tau("nash_md_pg")
    _share("nash_md_pg", mixture_coef=mixture_coef)
    weight = next(_steps("nash_md_pg", tau, step))
    policy = _start(game, start, "nash_md_pg")
    while True:
        yield policy
        mix = normalise((1 - mixture_coef) * policy + mixture_coef * game.log_ref)
        policy = _proximal(game, policy, mix, weight)


@_solver
def onpo(game: MatrixGame, *, start: Tensor | None = None, step: float) -> Policies:
    """ONPO, optimistic mirror descent (Zhang et al. 2025, arXiv 2502.16852); the original game.

    With a second sequence pi_hat, log pi_hat' = log pi_hat + step P(y > pi) + c and
    log pi' = log pi_hat' + step P(y > pi) + c: the last payoff predicts the next. One query.
    """
    _positive("onpo", step=step)
    policy = hidden = _start(game, start, "onpo")
    while True:
        yield policy
        gain = step * game.wins(policy)
        hidden = normalise(hidden + gain)
        policy = normalise(hidden + gain)


@_solver
def mpo(
    game: MatrixGame, *, start: Tensor | None = None, step: float, alpha: float, period: int
) -> Policies:
    """MPO, magnetic mirror descent (Wang et al. 2024, arXiv 2410.16714); the original game.

    pi' ~ (pi magnet^(step alpha) exp(step P(y > pi)))^(1 / (1 + step alpha)); every ``period``
    iterations the magnet becomes the policy. It starts as the start. One query an iteration.
    """
    _positive("mpo", step=step, alpha=alpha)
    _count("mpo", period=period)
    policy = _start(game, start, "mpo")
    while True:
        magnet = policy
        for _ in range(period):
            yield policy
            pull = step * alpha
            policy = normalise((policy + pull * magnet + step * game.wins(policy)) / (1 + pull))


@_solver
def sppo(game: MatrixGame, *, start: Tensor | None = None, eta: float) -> Policies:
    """SPPO (Wu et al. 2024, arXiv 2405.00675): multiplicative weights in the original game.

    log pi' = log pi + eta P(y > pi) + c; one query an iteration. Where preferences are cyclic the
    iterates circle, and only their average approaches an equilibrium.
    """
    _positive("sppo", eta=eta)
    policy = _start(game, start, "sppo")
    while True:
        yield policy
        policy = normalise(policy + eta * game.wins(policy))


@_solver
def dno(game: MatrixGame, *, start: Tensor | None = None, eta: float) -> Policies:
    """DNO (Rosset et al. 2024, arXiv 2404.03715, algorithm 1), its regression solved exactly.

    With r(y) = P(y > pi), sigmoid(r(y) - r(y')) = sigmoid(eta (log pi'/pi (y) - log pi'/pi (y')))
    for all pairs has the solution log pi' = log pi + r / eta + c. One query an iteration.
    """
    _positive("dno", eta=eta)
    policy = _start(game, start, "dno")
    while True:
        yield policy
        policy = normalise(policy + game.wins(policy) / eta)


@_solver
def mnpo(game: MatrixGame, *, start: Tensor | None = None, eta: float, history: int) -> Policies:
    """MNPO against its own past (Wu et al. 2025, arXiv 2509.23102, TD-MNPO); the original game.

    The opponents are the last ``history`` iterates with equal weights (fewer at the beginning):
    log pi' = mean_j log pi_j + mean_j P(y > pi_j) / eta + c. eta is the inverse step. One query an
    iteration: those of the past are kept.
    """
    _positive("mnpo", eta=eta)
    _count("mnpo", history=history)
    policy = _start(game, start, "mnpo")
    terms: deque[Tensor] = deque(maxlen=history)
    while True:
        yield policy
        terms.append(policy + game.wins(policy) / eta)
        policy = normalise(sum(terms) / len(terms))


@_solver
def mnpo_players(
    games: MatrixGame | Sequence[MatrixGame],
    *,
    start: Tensor | None = None,
    eta: float,
    n: int,
) -> Policies:
    """MNPO with n players (Wu et al. 2025, arXiv 2509.23102): yields (n, ..., Y).

    log pi_i' = mean_{j != i} (log pi_j + P_i(y > pi_j) / eta) + c, all at once; eta is the inverse
    step. games: one for all, or one per player, whose preference is the oracle of that player.
    start: (n, ..., Y), default each player's reference. n queries an iteration.
    """
    _positive("mnpo_players", eta=eta)
    if not (isinstance(n, int) and n >= 2):
        raise ValueError(f"mnpo_players: n must be an integer, at least 2, got {n!r}")
    games = [games] * n if isinstance(games, MatrixGame) else list(games)
    if len(games) != n or len({game.preference.shape for game in games}) != 1:
        raise ValueError(f"mnpo_players: games must be one, or {n} of one shape, got {len(games)}")
    if start is None:
        start = torch.stack([game.log_ref for game in games])
    policies = normalise(games[0].checked(start, "mnpo_players"))
    if policies.shape[0] != n:
        raise ValueError(f"mnpo_players: start must be ({n}, ..., Y), got {tuple(start.shape)}")
    while True:
        yield policies
        others = (policies.sum(0) - policies) / (n - 1)
        # P is linear in the opponent, so the mean over opponents is one product
        probabilities = policies.exp()
        opponents = ((probabilities.sum(0) - probabilities) / (n - 1)).clamp(min=0).log()
        gains = torch.stack([game.wins(o) for game, o in zip(games, opponents, strict=True)])
        policies = normalise(others + gains / eta)


@_solver
def best_response(game: MatrixGame, *, start: Tensor | None = None) -> Policies:
    """The best response to the start, from the first iteration on (Munos et al. 2023, beta = 1)."""
    policy = _start(game, start, "best_response")
    game.positive_tau("best_response")
    yield policy
    policy = measures.best_response(game, policy)
    while True:
        yield policy


@_solver
def rlhf(game: MatrixGame, *, start: Tensor | None = None) -> Policies:
    """RLHF: the Bradley-Terry fit to pairs from the start, and its optimum from then on."""
    policy = _start(game, start, "rlhf")
    game.positive_tau("rlhf")
    yield policy
    policy = reward.rlhf(game, policy)
    while True:
        yield policy
