"""Rewards in a game that may have none: the Bradley-Terry fit, and the optimum of RLHF."""

import torch
from torch import Tensor
from torch.nn import functional

from nlhf.tabular.matrix_game import MatrixGame, row_blocks
from nlhf.tabular.policies import normalise

_NEWTON_STEPS = 200
_CG_STEPS = 200
# of P(y > sampling), above which a fit is none
_MISSED = 1e-9


def bradley_terry(game: MatrixGame, log_sampling: Tensor | None = None) -> Tensor:
    """The reward that fits the preferences best on pairs drawn i.i.d. from a sampling distribution.

    The maximum-likelihood fit of P(y > y') = sigmoid(r(y) - r(y')), found by Newton's method with
    conjugate gradients, in blocks of rows. It is characterised by (Munos et al. 2023, prop. 2)

        P(y > sampling) = E_{y' ~ sampling} sigmoid(r(y) - r(y'))   for every y,

    so it depends on the sampling unless the model fits every pair.

    Args:
        log_sampling: (..., Y) log-probabilities, above 0 everywhere; default the reference.

    Returns:
        r: (..., Y), mean 0 under the sampling distribution.

    Raises:
        ValueError: an action that is never sampled, or actions that always win against all others,
            for which the likelihood grows without end; a fit that rounding keeps from P(y >
            sampling) by more than 1e-9, where actions are hardly ever sampled or nearly always win.
    """
    log_sampling = game.log_ref if log_sampling is None else log_sampling
    weight = normalise(game.checked(log_sampling, "bradley_terry")).exp()
    if not (weight > 0).all():
        raise ValueError(
            "bradley_terry: the sampling distribution must be above 0 for every action, got "
            f"{weight.amin().item()!r}; mix it with the reference"
        )
    _check_overlap(game)
    target = game.wins(weight.log())
    weight, target = torch.broadcast_tensors(weight, target)
    reward = torch.zeros_like(target)
    loss, model, slope = _statistics(reward, weight, target)
    last = torch.full_like(loss, torch.inf)
    for _ in range(_NEWTON_STEPS):
        gradient = model - target
        step = -_solve(reward, weight, slope, gradient)
        # the decrease that the quadratic model promises, which is below rounding at the end
        promise = -(weight * gradient * step).sum(-1)
        # rounding may end it before: the decrease is tiny, and stays what it was
        stalled = (promise < 1e-16) & (promise > last / 4)
        if ((promise <= 1e-28) | stalled).all():
            break
        last = promise
        size = torch.ones_like(promise)
        while True:
            new = reward + size[..., None] * step
            statistics = _statistics(new, weight, target)
            worse = statistics[0] > loss - 0.1 * size * promise + 1e-14
            if not worse.any() or size.amin() < 1e-10:
                break
            size = torch.where(worse, size / 2, size)
        reward, (loss, model, slope) = new, statistics
    # the likelihood may have nothing left to gain where an action is hardly ever sampled
    missed = (model - target).abs().amax().item()
    if not missed <= _MISSED:
        raise ValueError(
            f"bradley_terry: no fit, P(y > sampling) is off by {missed:.3g} for an action; bring "
            "the preferences away from 0 and 1, and the sampling away from 0"
        )
    return reward - (weight * reward).sum(-1, keepdim=True)


def rlhf(game: MatrixGame, log_sampling: Tensor | None = None) -> Tensor:
    """The optimum of RLHF: ref exp(r / tau), normalised, r the Bradley-Terry fit; (..., Y)."""
    tau = game.positive_tau("rlhf")
    return normalise(game.log_ref + bradley_terry(game, log_sampling) / tau)


def _check_overlap(game: MatrixGame) -> None:
    """ValueError if some actions S always win against all others, Ford's condition of 1957.

    The wins sum_j P(i > j) of k such actions add up to k (k - 1) / 2 + k (Y - k), the most that any
    k can have, so S are the k actions with the most wins, and only such sets need a look.
    """
    preference = game.preference.reshape(-1, game.actions, game.actions)
    Y = game.actions
    k = torch.arange(1, Y, device=game.device, dtype=torch.float64)
    most = k * (k - 1) / 2 + k * (Y - k)
    for context, matrix in enumerate(preference):
        order = (matrix.sum(-1) - 0.5).argsort(descending=True)
        missing = most - (matrix.sum(-1) - 0.5)[order].cumsum(0)[:-1]
        # rounding: the exact look decides
        for count in (missing < 1e-6).nonzero()[:, 0] + 1:
            winners, others = order[:count], order[count:]
            if all((matrix[i, others] == 1).all() for i in winners):
                where = "" if len(preference) == 1 else f" in context {context}"
                raise ValueError(
                    f"bradley_terry: the fit diverges{where}: {game.names[int(winners[-1])]!r} and "
                    f"{int(count) - 1} more always win against the other {Y - int(count)}; "
                    "bring the preferences away from 0 and 1"
                )


def _statistics(reward: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (...,), the model's P(y > sampling) (..., Y) and its slope in r(y) (..., Y)."""
    model, slope, loss = (torch.empty_like(reward) for _ in range(3))
    for rows, margin in _margins(reward):
        wins = margin.sigmoid()
        model[..., rows] = (wins * weight[..., None, :]).sum(-1)
        slope[..., rows] = (wins * (1 - wins) * weight[..., None, :]).sum(-1)
        loss[..., rows] = (functional.softplus(margin) * weight[..., None, :]).sum(-1)
    # the labels' part: sum_ij w_i w_j P_ij (r_i - r_j)
    loss = loss - reward * (2 * target - 1)
    return (weight * loss).sum(-1), model, slope


def _margins(reward: Tensor):
    """Rows, and r(i) - r(j) for them: (..., rows, Y)."""
    whole = reward[..., None].expand(*reward.shape, reward.shape[-1])
    for rows in row_blocks(whole):
        yield rows, reward[..., rows, None] - reward[..., None, :]


def _solve(reward: Tensor, weight: Tensor, slope: Tensor, right: Tensor) -> Tensor:
    """x with sum_j w_j s_ij (x_i - x_j) = right_i, by preconditioned conjugate gradients."""

    def product(x):
        out = torch.empty_like(x)
        for rows, margin in _margins(reward):
            wins = margin.sigmoid_()
            kernel = wins * (1 - wins)
            out[..., rows] = (kernel @ (weight * x)[..., None])[..., 0]
        return slope * x - out

    def dot(a, b):
        return (weight * a * b).sum(-1, keepdim=True)

    x = torch.zeros_like(right)
    # constants are not in the image, but rounding leaves some
    residual = right - (weight * right).sum(-1, keepdim=True)
    z = residual / slope
    direction = z
    energy = start = dot(residual, z)
    for _ in range(_CG_STEPS):
        if (energy <= start.clamp(min=1e-16, max=1) * 1e-4 * start).all():
            break
        image = product(direction)
        curvature = dot(direction, image)
        alpha = torch.where(curvature > 0, energy / curvature, 0.0)
        x = x + alpha * direction
        residual = residual - alpha * image
        z = residual / slope
        before, energy = energy, dot(residual, z)
        direction = z + torch.where(before > 0, energy / before, 0.0) * direction
    return x
