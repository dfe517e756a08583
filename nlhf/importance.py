"""Policy gradients from responses that another distribution drew: truncated importance weights.

Legend: B sequences, T tokens; pi the policy, mu whom responses were drawn from. ``docs/math.md``
derives the bounds.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf import losses, responses
from nlhf.rollout import Completion, Pair

LEVELS = ("token", "sequence")
# e to this is far from the largest float64, also when it is squared and summed
_LARGEST = 300.0
_TINY = 1e-300


class ImportanceWeights(NamedTuple):
    """Detached, float64. ``weights`` (B, T): what each token's term is multiplied with.

    ``raw`` (B, T): the same without the cap; both are 0 under the mask. ``ratios`` (B,): pi/mu of
    whole sequences, without the cap: with them a mean over samples of mu is one over those of pi.
    """

    weights: Tensor
    raw: Tensor
    ratios: Tensor


def weights(
    policy_logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor,
    *,
    level: str,
    cap: float,
    other: Completion | None = None,
) -> ImportanceWeights:
    """min(cap, pi/mu), of each token or of the whole sequence (Ionides 2008).

    "sequence" is unbiased but for the cap, where mu can draw all that pi can. "token" weighs a
    token by its own ratio alone, with less variance, and is biased beside: how likely its prefix
    was, and what follows it, stay those of mu.

    Args:
        policy_logprobs: (B, T) log pi(y_n) under the current weights, at the temperature.
        sampling_logprobs: (B, T) log mu(y_n) of the distribution that was really drawn from, after
            temperature and filters: ``Completion.sampling_logprobs``. Where log-probabilities of
            the whole distribution are known, these minus ``log_kept_mass``.
        mask: (B, T), nonzero for the tokens of y.
        level: "token" or "sequence".
        cap: the largest weight, at least 1; ``math.inf`` for none.
        other: y', where it was drawn for the policy by mu too, with both log-probabilities: ratios
            are those of the pair then.

    Raises:
        ValueError: shapes that differ, an unknown level, a bad cap, unknown or non-finite
            log-probabilities.
    """
    if level not in LEVELS:
        raise ValueError(f"importance: level must be token or sequence, got {level!r}")
    if not cap >= 1:
        raise ValueError(f"importance: cap must be at least 1, got {cap!r}")
    logs = _log_ratio(policy_logprobs, sampling_logprobs, mask)
    whole = logs.sum(-1)
    if other is not None:
        theirs = (other.policy_logprobs, other.sampling_logprobs, other.mask)
        whole = whole + _log_ratio(*theirs).sum(-1)
    used = logs if level == "token" else whole[:, None].expand_as(logs)
    raw = torch.where(mask != 0, used.clamp(max=_LARGEST).exp(), 0)
    return ImportanceWeights(raw.clamp(max=cap), raw, whole.clamp(max=_LARGEST).exp())


def _log_ratio(policy_logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor) -> Tensor:
    for name, x in (("policy", policy_logprobs), ("sampling", sampling_logprobs)):
        if x is None or x.shape != mask.shape:
            got = "none" if x is None else tuple(x.shape)
            raise ValueError(
                f"importance: {name}_logprobs must be {tuple(mask.shape)} like the mask, got {got}"
            )
    log_ratio = policy_logprobs.detach().double() - sampling_logprobs.detach().double()
    log_ratio = torch.where(mask != 0, log_ratio, 0)
    # log pi of -inf, a weight of 0, is right
    if log_ratio.isnan().any() or (log_ratio == math.inf).any():
        raise ValueError("importance: log-probabilities must be finite")
    return log_ratio


class CorrectedPG(NamedTuple):
    """``loss`` (), and detached: (B, T) as ``nk.pairwise_pg_loss`` gives them; the weights.

    ``sizes`` (B,) float64: at most the norm of a sequence's gradient in the logits, unweighted.
    ``gaps`` (B,) float64: at most the norm of what its weights take from that gradient. The
    expectation of ``gaps`` over mu bounds the bias.
    """

    loss: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    mask: Tensor
    importance: ImportanceWeights
    sizes: Tensor
    gaps: Tensor


def corrected_pg(
    policy: nn.Module,
    ref: nn.Module | None,
    pair: Pair,
    preference: Tensor,
    *,
    importance: ImportanceWeights,
    tau: float,
    temperature: float = 1.0,
    kl: str = "reward_to_go",
    baseline: float = 0.5,
    anchors: Sequence[tuple[Tensor, float]] = (),
    head: str = "auto",
    packing: bool = False,
    inplace_backward: bool = True,
) -> CorrectedPG:
    """``losses.nash_md_pg`` with a weight before each token's term; equal to it for weights of 1.

    Args:
        importance: of the rows of ``pair``.
        kl: "reward_to_go", "sequence" or "token".
        policy, ref, pair, preference, tau, temperature, baseline, anchors, head, packing,
            inplace_backward: as in ``losses.nash_md_pg``.

    Raises:
        ValueError: bad shapes or parameters; no reference where one is needed.
    """
    if kl not in ("reward_to_go", "sequence", "token"):
        raise ValueError(f"corrected_pg: kl must be reward_to_go, sequence or token, got {kl!r}")
    y, B = pair.y, len(pair.y.tokens)
    preference = preference.detach().to(y.tokens.device)
    if preference.shape != (B,) or importance.weights.shape != y.tokens.shape:
        raise ValueError(
            f"corrected_pg: preference and weights must be ({B},) and {tuple(y.tokens.shape)}, got "
            f"{tuple(preference.shape)} and {tuple(importance.weights.shape)}"
        )
    keep = y.mask
    settings = {"mask": keep, "temperature": temperature}
    refs = y.ref_logprobs
    if refs is None and (tau or ref is not None):
        refs = nk.token_logprobs(losses.ref_logits(policy, ref, pair, y), y.tokens, **settings)
        refs = refs.logprobs
    if refs is None and anchors:
        raise ValueError("corrected_pg: anchors need a reference")
    reading = responses.read(policy, pair, y, head, packing)
    logprobs, entropy = reading.token_logprobs(temperature, inplace_backward)
    current = logprobs.detach()

    def ell(x: Tensor) -> Tensor:
        return torch.where(keep, current - x.to(current), 0)

    cost = torch.zeros_like(current)
    for x, strength in [(refs, tau), *anchors]:
        # 0 times an infinite log-ratio would be NaN
        if strength:
            cost = cost + strength * ell(x)
    advantage = preference.to(current)[:, None] - baseline - _sums(cost, kl)
    advantage = torch.where(keep, advantage, 0)
    coef = -importance.weights.to(current) * advantage / max(B, 1)
    # a token that is left out must not bring its own infinity
    loss = torch.where(coef == 0, 0, coef * logprobs).sum()

    # the gradient of log pi(y_n) in the logits is no longer than this
    score = math.sqrt(2) / temperature * -torch.expm1(current.double())
    size = torch.where(keep, advantage.double() * score, 0)
    gap = importance.ratios[:, None] - importance.weights
    empty = current.new_empty(0)
    return CorrectedPG(
        loss,
        current,
        empty if refs is None else torch.where(keep, refs.to(current), 0),
        entropy.detach(),
        empty if refs is None else ell(refs),
        keep,
        importance,
        size.norm(dim=-1),
        torch.where(size == 0, 0, gap * size).norm(dim=-1),
    )


def _sums(cost: Tensor, kl: str) -> Tensor:
    if kl == "token":
        return cost
    if kl == "sequence":
        return cost.sum(-1, keepdim=True).expand_as(cost)
    return cost.flip(-1).cumsum(-1).flip(-1)


def metrics(results: Sequence[Any], level: str, filtered: bool) -> dict[str, float]:
    """Of the corrected losses of a step; nothing of others.

    Of the weights, one a sequence or one a token: ``importance_mean``; ``importance_max``, without
    the cap; ``importance_truncated``, the share that the cap changed; and ``importance_ess``, the
    effective sample size as a share (Kong 1992). ``importance_bias_bound`` estimates the bound on
    the norm of the bias in the logits.

    filtered: mu could not draw every token: what pi gives to the others is added to the bound.
    """
    found = [result for result in results if isinstance(result, CorrectedPG)]
    if not found:
        return {}
    taken = [_each(result, level) for result in found]
    used, raw = (torch.cat(x).cpu() for x in zip(*taken, strict=True))
    ratios = torch.cat([result.importance.ratios for result in found])
    bound = torch.cat([result.gaps for result in found]).mean()
    if filtered:
        outside = (1 - ratios.mean()).clamp(min=0)
        bound = bound + outside * torch.cat([result.sizes for result in found]).max()
    # where no weight is left the sample size is 0
    squares = used.square().sum().clamp(min=_TINY)
    return {
        "importance_mean": used.mean().item(),
        "importance_max": raw.max().item(),
        "importance_truncated": (raw > used).double().mean().item(),
        "importance_ess": (used.sum().square() / squares / len(used)).item(),
        "importance_bias_bound": bound.item(),
    }


def _each(result: CorrectedPG, level: str) -> tuple[Tensor, Tensor]:
    """The weights and the raw ones, one a sequence or one a token."""
    both = result.importance.weights, result.importance.raw
    if level == "sequence":
        return tuple(x.amax(-1) for x in both)
    keep = result.mask
    return tuple(x[keep] for x in both)
