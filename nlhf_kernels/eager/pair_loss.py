"""``pair_loss`` as plain PyTorch, and the table of its methods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nlhf_kernels.eager.logits import statistics_dtype


class PairLoss(NamedTuple):
    loss: Tensor
    margins: Tensor


@dataclass(frozen=True)
class PairMethod:
    """One member of the family: what distinguishes it from the others, and where it is from."""

    # "label": p (h - s)^2 + (1 - p) (-h - s)^2, s the scale
    # "difference": (h - s (p - p'))^2
    # "response": 1/2 [(u - s (p - 1/2))^2 + (u' - s (p' - 1/2))^2], u and u' the log-ratios
    # "logistic": -q log sigma(s h) - (1 - q) log sigma(-s h), q = sigma(p - p'), or p without p'
    form: str
    # what they are, in their order; empty: one or more of any kind
    anchors: tuple[str, ...]
    # hyper-parameters that it takes, of tau and eta
    parameters: tuple[str, ...]
    # of tau, eta and the number of anchors
    weights: Callable[..., tuple[float, ...]]
    # of tau and eta
    scale: Callable[..., float]
    # whether it takes other_preference beside preference
    two_preferences: bool
    citation: str


def _one(tau, eta, count):
    return (1.0,)


PAIR_METHODS = {
    "online_ipo": PairMethod(
        form="label",
        anchors=("ref",),
        parameters=("tau",),
        weights=_one,
        scale=lambda tau, eta: 1 / (2 * tau),
        two_preferences=False,
        citation="Calandriello et al. 2024, arXiv 2403.08635, section 4",
    ),
    # the same loss: its responses are both drawn from the geometric mixture
    "ipo_md": PairMethod(
        form="label",
        anchors=("ref",),
        parameters=("tau",),
        weights=_one,
        scale=lambda tau, eta: 1 / (2 * tau),
        two_preferences=False,
        citation="Calandriello et al. 2024, arXiv 2403.08635, section 5",
    ),
    "inpo": PairMethod(
        form="label",
        anchors=("ref", "previous policy"),
        parameters=("tau", "eta"),
        weights=lambda tau, eta, count: (tau / eta, 1 - tau / eta),
        scale=lambda tau, eta: 1 / (2 * eta),
        two_preferences=False,
        citation="Zhang et al. 2024, arXiv 2407.00617",
    ),
    "mnpo": PairMethod(
        form="label",
        anchors=(),
        parameters=("eta",),
        weights=lambda tau, eta, count: (1 / count,) * count,
        scale=lambda tau, eta: 1 / (2 * eta),
        two_preferences=False,
        citation="Wu et al. 2025, arXiv 2509.23102",
    ),
    "sppo": PairMethod(
        form="response",
        anchors=("previous policy",),
        parameters=("eta",),
        weights=_one,
        scale=lambda tau, eta: eta,
        two_preferences=True,
        citation="Wu et al. 2024, arXiv 2405.00675",
    ),
    "dno": PairMethod(
        form="logistic",
        anchors=("previous policy",),
        parameters=("eta",),
        weights=_one,
        scale=lambda tau, eta: eta,
        two_preferences=True,
        citation="Rosset et al. 2024, arXiv 2404.03715, algorithm 1",
    ),
    # with the reference policy as its anchor and eta the strength of the KL it is DPO
    "dno_prct": PairMethod(
        form="logistic",
        anchors=("previous policy",),
        parameters=("eta",),
        weights=_one,
        scale=lambda tau, eta: eta,
        two_preferences=False,
        citation="Rosset et al. 2024, arXiv 2404.03715, equation 13",
    ),
    "egpo": PairMethod(
        form="difference",
        anchors=("ref",),
        parameters=("tau",),
        weights=_one,
        scale=lambda tau, eta: 1 / tau,
        two_preferences=True,
        citation="Zhou, Fazel and Du 2025, arXiv 2503.08942",
    ),
}


def pair_loss(
    logprobs: Tensor,
    other_logprobs: Tensor,
    anchor_logprobs: Tensor,
    other_anchor_logprobs: Tensor,
    preference: Tensor,
    other_preference: Tensor | None = None,
    *,
    method: str,
    tau: float | None = None,
    eta: float | None = None,
    weights: Sequence[float] | None = None,
    backend: str = "",
) -> PairLoss:
    """Contrastive losses over differences of log-ratios: IPO, INPO, MNPO, SPPO, DNO, EGPO.

    Formula, with the log-ratios of y and y' and their margin over weighted frozen anchors::

        u  = logprobs - sum_j w_j anchor_logprobs[j],   u' = the same of y',   h = u - u'

    and p = ``preference``, p' = ``other_preference``, of a pair and averaged over the batch:

    ==================  ==========================================  ====================  =========
    method              loss of a pair                              anchors: weights      takes
    ==================  ==========================================  ====================  =========
    online_ipo, ipo_md  p (h - 1/(2 tau))^2                         ref: 1                tau
                        + (1 - p) (-h - 1/(2 tau))^2
    inpo                the same with 1/(2 eta)                     ref: tau/eta,         tau, eta
                                                                    previous policy:
                                                                    1 - tau/eta
    mnpo                the same with 1/(2 eta)                     n - 1 other players:  eta,
                                                                    1/(n - 1) each        weights
    sppo                1/2 (u - eta (p - 1/2))^2                   previous policy: 1    eta, p'
                        + 1/2 (u' - eta (p' - 1/2))^2
    dno                 -q log sigma(eta h)                         previous policy: 1    eta, p'
                        - (1 - q) log sigma(-eta h),
                        q = sigma(p - p')
    dno_prct            the same with q = p                         previous policy: 1    eta
    egpo                (h - (p - p')/tau)^2                        ref: 1                tau, p'
    ==================  ==========================================  ====================  =========

    ``PAIR_METHODS`` has them with their papers. ``dno_prct`` is DPO if the anchor is the reference
    policy and eta the strength of the KL. COMAL is INPO with a reference that moves.

    Args:
        logprobs: (B,) log-probabilities of whole responses y under the policy, differentiable;
            float16, bfloat16, float32 or float64, as are all tensors.
        other_logprobs: (B,) of the other responses y', differentiable.
        anchor_logprobs: (J, B) of y under J frozen policies in the order of the table, at most 8,
            or (B,) of the only one; no gradient.
        other_anchor_logprobs: of y', same shape.
        preference: (B,) in [0, 1]. For the methods that take one, P(y > y'), a soft label that
            weights both orders, 1 or 0 if it is hard. For the others the win rate of y: against
            the previous policy (sppo, dno), against the opponent's response (egpo).
        other_preference: (B,) in [0, 1], the win rate of y', where the method takes it.
        method: a key of ``PAIR_METHODS``.
        tau: above 0, strength of the KL to the reference policy. inpo: at most eta.
        eta: above 0, as each paper has it. inpo, mnpo: the inverse of a step size. sppo: a step
            size, of the order of 1000. dno, dno_prct: what multiplies the margin.
        weights: of the anchors of mnpo, J numbers; ``None`` is 1/J each. An anchor of weight 0
            counts for nothing, even where it is infinite.
        backend: "", "eager", "cpp", "triton" or "cuda".

    Returns:
        ``PairLoss(loss, margins)``: a scalar, 0 if B = 0, and h (B,) without a gradient.

    Raises:
        ValueError: unknown method, wrong number of anchors or weights, a hyper-parameter or a
            preference that is missing or that the method does not take, wrong shapes or dtypes, and
            on the CPU preferences outside [0, 1].

    Numerics: float32, or float64 if any tensor is. Gradients reach logprobs and other_logprobs
    only. A pair whose margin is infinite or NaN makes the loss NaN, and its own gradients.
    """
    tensors = (logprobs, other_logprobs, anchor_logprobs, other_anchor_logprobs, preference)
    dtype = statistics_dtype(*tensors, other_preference)
    y, y_other, *frozen = (x.to(dtype) for x in tensors)
    anchors, other_anchors, p = (x.detach() for x in frozen)
    if anchors.dim() == 1:
        anchors, other_anchors = anchors[None], other_anchors[None]
    p_other = None if other_preference is None else other_preference.detach().to(dtype)
    form, numbers, scale = pair_settings(method, tau, eta, weights, len(anchors))

    h, u, u_other = y - y_other, y, y_other
    for weight, anchor, other_anchor in zip(numbers, anchors, other_anchors, strict=True):
        # 0 * inf must not be formed
        if weight != 0:
            h = h - weight * (anchor - other_anchor)
            u = u - weight * anchor
            u_other = u_other - weight * other_anchor
    margins = h.detach()
    # a factor, because where() would give the pair the gradient 0
    usable = torch.where(margins.isfinite(), 1.0, torch.nan)
    h, u, u_other = h * usable, u * usable, u_other * usable

    if form == "label":
        near, far = h - scale, h + scale
        # the weight first: 0 times a square that overflows would be NaN
        losses = p * near * near + (1 - p) * far * far
    elif form == "difference":
        losses = (h - scale * (p - p_other)) ** 2
    elif form == "response":
        losses = (u - scale * (p - 0.5)) ** 2 + (u_other - scale * (p_other - 0.5)) ** 2
        losses = losses / 2
    else:
        q = p if p_other is None else torch.sigmoid(p - p_other)
        x = scale * h
        losses = -q * torch.nn.functional.logsigmoid(x)
        losses = losses - (1 - q) * torch.nn.functional.logsigmoid(-x)
    return PairLoss(losses.sum() / max(len(logprobs), 1), margins)


def pair_settings(
    method: str,
    tau: float | None,
    eta: float | None,
    weights: Sequence[float] | None,
    anchors: int,
) -> tuple[str, tuple[float, ...], float]:
    """(form, a weight per anchor, scale) of a method."""
    entry = PAIR_METHODS[method]
    numbers = entry.weights(tau, eta, anchors) if weights is None else tuple(weights)
    return entry.form, numbers, entry.scale(tau, eta)
