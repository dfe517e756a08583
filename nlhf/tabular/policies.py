"""Policies are normalised log-probabilities (..., Y) in float64; -inf is probability 0."""

import torch
from torch import Tensor

_SERIES = 0.03


def normalise(logits: Tensor) -> Tensor:
    """Log-probabilities (..., Y) from logits that are known up to a constant."""
    return logits.log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) = sum_y p log(p / q), (...,), for normalised log-probabilities (..., Y).

    Added up as sum_y p (q / p - 1 - log(q / p)), which is the same since p and q sum to 1, and has
    no negative term: so it is right to a relative 1e-12 or so even where it is 1e-28. -inf is
    probability 0.
    """
    x = log_q - log_p
    p, q = log_p.exp(), log_q.exp()
    small = x.clamp(-_SERIES, _SERIES)
    series = 1.0
    for k in (8, 7, 6, 5, 4, 3):
        series = 1 + small * series / k
    near = p * small.square() / 2 * series
    # 0 log 0 is 0, though x is infinite or no number there
    far = q - p - torch.where(p > 0, p * x, 0.0)
    return torch.where(x.abs() < _SERIES, near, far).sum(-1)


def span(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The span semi-norm max - min of log p - log q, (...,); constants do not count."""
    difference = log_p - log_q
    return difference.amax(-1) - difference.amin(-1)
