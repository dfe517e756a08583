"""The equilibrium of the regularised game, with a certificate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nlhf.tabular.matrix_game import MatrixGame, row_blocks
from nlhf.tabular.measures import best_response
from nlhf.tabular.policies import kl, normalise

_UNIT = 2.0**-53
# tau of the first game on the path: so strong a regularisation that the reference nearly solves it
_EASY = 16.0
_CLOSE = 1e-6
_NEWTON_STEPS = 10_000
_CG_STEPS = 1000
_POLISH_STEPS = 8


@dataclass(frozen=True, eq=False)
class Solution:
    """What ``solve`` found, for every context."""

    policy: Tensor
    """(..., Y) log-probabilities"""
    residual: Tensor
    """(...,) span of log policy - log best_response(policy)"""
    distance: Tensor
    """(...,) upper bound of the total variation distance to the exact equilibrium"""
    iterations: int
    """Newton steps"""


def solve(game: MatrixGame, tolerance: float = 1e-12) -> Solution:
    """The unique equilibrium of the regularised game (Munos et al. 2023, prop. 1).

    It is the fixed point pi* ~ ref exp(P(y > pi*) / tau) = BR(pi*). Newton's method on
    log pi = log BR(pi), matrix-free: with D = diag(pi) - pi pi^T its linear systems are I minus a
    skew-symmetric matrix, D^(1/2) P D^(1/2) / tau, never singular, and conjugate gradients solve
    their normal equations. A path of games leads from a large tau to the one asked for.

    The certificate. For any pi, P_tau(rho > pi) is a constant - tau KL(rho, BR(pi)), so that

        tau KL(pi, BR(pi)) = max_rho P_tau(rho > pi) - 1/2 >= P_tau(pi* > pi) - 1/2
                           = 1/2 - P_tau(pi > pi*) = tau KL(pi, pi*),

    the last since BR(pi*) = pi*. With f = log pi - log BR(pi), of span r (``residual``) and
    standard deviation s under pi, E_pi exp(-f) = 1 gives E_pi f = KL(pi, BR(pi)) <= r^2 / 8
    (Hoeffding's lemma), and also <= exp(r) s^2 / 2, where actions of no probability count for
    nothing. By Pinsker's inequality the total variation distance of pi to pi* is at most r / 4, and
    at most exp(r / 2) s / 2. ``distance`` is the smaller of the two, with bounds added for the
    rounding of f and for what P + P^T differs from 1.

    Args:
        game: tau above 0.
        tolerance: of ``distance``.

    Returns:
        The policy, its certificate and the number of Newton steps; O(game) memory.

    Raises:
        ValueError: tau is 0; the distance that was reached is above the tolerance (rounding
            grows as tau falls).
    """
    game.positive_tau("solve")
    if not tolerance > 0:
        raise ValueError(f"solve: tolerance must be above 0, got {tolerance!r}")
    policy, steps = _path(game)
    best, wrong = _certified(game, policy, steps)
    for _ in range(_POLISH_STEPS):
        if (best.distance <= tolerance).all():
            break
        policy = _newton(game, policy, wrong, game.tau, torch.zeros_like(best.distance))
        steps += 1
        new, wrong = _certified(game, policy, steps)
        better = new.distance < best.distance
        best = Solution(
            torch.where(better[..., None], new.policy, best.policy),
            torch.where(better, new.residual, best.residual),
            torch.where(better, new.distance, best.distance),
            steps,
        )
    if (best.distance <= tolerance).all():
        return best
    raise ValueError(
        f"solve: within {best.distance.amax().item():.2g} of the equilibrium, above the tolerance "
        f"{tolerance:.2g}; raise it, or tau (now {game.tau:.6g}), whose inverse multiplies rounding"
    )


def nash_md_pg_limit(game: MatrixGame, mixture_coef: float) -> Tensor:
    """The stationary policy of Nash-MD-PG, pi ~ ref exp(P(y > mix) / tau), (..., Y).

    mix = pi^(1 - b) ref^b, b = ``mixture_coef`` in [0, 1], is the equilibrium at tau / (1 - b), as
    its own fixed-point equation shows; so pi is the equilibrium at tau only if b is 0. For b = 1 it
    is the best response to the reference (Munos et al. 2023, section 7).
    """
    tau = game.positive_tau("nash_md_pg_limit")
    if not 0 <= mixture_coef <= 1:
        raise ValueError(f"nash_md_pg_limit: mixture_coef must be in [0, 1], got {mixture_coef!r}")
    if mixture_coef == 1:
        return best_response(game)
    mixture = solve(game.replace(tau=tau / (1 - mixture_coef))).policy
    return best_response(game, mixture)


def _path(game: MatrixGame) -> tuple[Tensor, int]:
    """A policy near the equilibrium, by Newton's method along a path of falling tau.

    Each context has its own place on the path: it goes on where the last solution leads to the
    next in a few steps, in strides that grow, and goes back, to shorter ones, where it does not.
    """

    def gap_of(policy, tau):
        return kl(policy, normalise(game.log_ref + game.wins(policy) / tau[..., None]))

    solved = policy = game.log_ref
    solved_tau = torch.full_like(policy[..., 0], _EASY)
    stride = torch.full_like(solved_tau, min(1.0, max(game.tau, 0.1) / _EASY))
    tau = (solved_tau * stride).clamp(min=game.tau)
    if game.tau >= _EASY:
        tau = torch.full_like(tau, game.tau)
    gap = gap_of(policy, tau)
    done = torch.zeros_like(tau, dtype=torch.bool)
    for step in range(1, _NEWTON_STEPS):
        wrong = policy - game.log_ref - game.wins(policy) / tau[..., None]
        new = _newton(game, policy, wrong, tau[..., None], gap)
        new_gap = gap_of(new, tau)
        close = new_gap < _CLOSE
        stuck = ~close & ~(new_gap < gap / 2)
        at_end = tau == game.tau
        # rounding ends it: good, and no better than before. once is enough: from then on it wobbles
        done |= at_end & close & ((new_gap < 1e-27) | (new_gap > gap / 2))
        if done.all():
            return new, step
        solved = torch.where(close[..., None], new, solved)
        solved_tau = torch.where(close, tau, solved_tau)
        onwards = close & ~at_end
        stride = torch.where(onwards, (stride**1.5).clamp(min=0.05), stride)
        stride = torch.where(stuck, stride.sqrt(), stride)
        policy = torch.where(stuck[..., None], solved, new)
        tau = torch.where(onwards | stuck, (solved_tau * stride).clamp(min=game.tau), tau)
        gap = gap_of(policy, tau)
    raise ValueError(
        f"solve: no equilibrium after {_NEWTON_STEPS} Newton steps at tau {game.tau:.6g}; raise tau"
    )


def _newton(game: MatrixGame, policy: Tensor, wrong: Tensor, tau, gap: Tensor) -> Tensor:
    """One Newton step on ``wrong`` = log policy - log ref - P policy / tau = 0, up to constants.

    The change of the log-probabilities is x = P v / tau - wrong, v = D x being the first-order
    change of the probabilities. So the step is semi-implicit: the result is the best response to
    policy + v, right also for actions without any probability. With v = S w, S S^T = D, it is
    (I - K) w = -S^T wrong, K = S^T P S / tau skew-symmetric; conjugate gradients on (I - K^2) w =
    -(I + K) S^T wrong. ``gap`` is the KL divergence to the best response: it sets how exactly.
    """
    p = policy.exp()
    root = p.sqrt()

    def product(v):
        return game.product(v) / tau

    def spread(x):
        return root * (x - (p * x).sum(-1, keepdim=True))

    def change(w):
        return root * (w - root * (root * w).sum(-1, keepdim=True))

    def skew(w):
        return spread(product(change(w)))

    def square(w):
        return (w * w).sum(-1, keepdim=True)

    right = -spread(wrong)
    residual = right + skew(right)
    w = torch.zeros_like(residual)
    direction = residual
    energy = square(residual)
    stop = energy * (gap[..., None].clamp(max=1e-2) * 1e-2 + 1e-24)
    for _ in range(_CG_STEPS):
        if (energy <= stop).all():
            break
        image = skew(direction)
        curvature = square(direction) + square(image)
        size = torch.where(curvature > 0, energy / curvature, 0.0)
        w = w + size * direction
        residual = residual - size * (direction - skew(image))
        before, energy = energy, square(residual)
        direction = residual + torch.where(before > 0, energy / before, 0.0) * direction
    return normalise(policy - wrong + product(change(w)))


def _lead(game: MatrixGame, p: Tensor) -> Tensor:
    """(P - 1/2) p to nearly full relative precision, (..., Y), where p are about probabilities.

    Both factors are split at 24 and 27 bits behind the point. The products of the upper halves and
    all their sums are exact, so the cancellation against 1/2 is too; the others are 2^-24 smaller.
    """
    high = (p * 2**27).round() / 2**27
    low = p - high
    out = torch.empty(torch.broadcast_shapes(game.preference.shape[:-1], p.shape)).to(p)
    total_high, total_low = high.sum(-1, keepdim=True) / 2, low.sum(-1, keepdim=True) / 2
    for rows in row_blocks(game.preference):
        block = game.preference[..., rows, :]
        upper = (block * 2**24).round_().div_(2**24)
        exact = (upper @ high[..., None])[..., 0] - total_high
        small = (upper @ low[..., None])[..., 0] - total_low
        rest = ((block - upper) @ p[..., None])[..., 0]
        out[..., rows] = exact + (small + rest)
    return out


def _residual(game: MatrixGame, policy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, log p - log ref - P p / tau up to a constant, and a bound of its rounding; each (..., Y).

    p is the policy as a vector of float64, of which the sums are exact to a few units.
    """
    p = policy.exp()
    p = p / p.sum(-1, keepdim=True)
    # of these p, not of those before rounding; what underflows weighs nothing
    log_p = torch.where(p > 1e-300, p.log(), policy)
    gain = _lead(game, p) / game.tau
    low = (p - (p * 2**27).round() / 2**27).abs().sum(-1, keepdim=True)
    # of the sums in _lead that are not exact
    sums = game.actions * _UNIT * (2 * low + 2**-25)
    rounding = (sums + game.asymmetry / 2) / game.tau
    rounding = rounding + 8 * _UNIT * (1 + log_p.abs() + game.log_ref.abs() + gain.abs())
    return p, log_p - game.log_ref - gain, rounding


def _certified(game: MatrixGame, policy: Tensor, steps: int) -> tuple[Solution, Tensor]:
    """The policy with its certificate, and what a Newton step needs to improve it."""
    p, wrong, rounding = _residual(game, policy)
    mean = (p * wrong).sum(-1, keepdim=True)
    deviation = (p * (wrong - mean).square()).sum(-1).sqrt()
    deviation = deviation + (p * rounding.square()).sum(-1).sqrt()
    residual = wrong.amax(-1) - wrong.amin(-1)
    widest = residual + 2 * rounding.amax(-1)
    distance = torch.minimum(widest / 4, (widest / 2).exp() * deviation / 2)
    # and p is exp(policy), but for rounding
    return Solution(policy, residual, distance + 8 * _UNIT, steps), wrong
