"""The policy-gradient loss of Nash learning, from logits or from hidden states."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels.eager.logits import statistics_dtype
from nlhf_kernels.eager.token_kl import token_kl
from nlhf_kernels.eager.token_logprobs import head_logits, token_logprobs


class PairwisePGLoss(NamedTuple):
    loss: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor


def pairwise_pg_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    preference: Tensor,
    *,
    tau: float | Sequence[float],
    ref_logprobs: Tensor | Sequence[Tensor] | None = None,
    ref_logits: Tensor | None = None,
    policy_logprobs: Tensor | None = None,
    kl: str = "reward_to_go",
    baseline: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> PairwisePGLoss:
    """The policy-gradient loss of Nash learning, whose gradient is that of tau KL - preference.

    Formula (Munos et al. 2023, equation 13, and appendix F for "reward_to_go"), with
    ell_n = log pi(y_n) - log ref(y_n), KL_n the KL divergence of the two distributions of token n
    over all ids, and p the preference of y over the opponent's answer::

        loss = -(1/B) sum_b sum_n log pi(y_n) * stop_gradient[p_b - baseline - tau * K_n]
        K_n = sum_{m >= n} ell_m   "reward_to_go": unbiased, less variance
              sum_m ell_m          "sequence": unbiased
              ell_n                "token": biased (it is TRL's; kept for comparison)
              sum_{m > n} KL_m     "exact", which adds (tau/B) sum_b sum_n KL_n: unbiased, less
                                   variance far from the equilibrium and more near it

    Several anchors (Nash-MP, Nash Prox; Tiapkin et al. 2025, 2026) add up: tau * K_n becomes
    sum_j tau_j * K_n^j.

    Args:
        logits: padded (B, T, V), or packed (N, V) with ``cu_seqlens``; float16, bfloat16, float32
            or float64; row n predicts ``tokens[n]``; any row strides, last stride 1.
        tokens: (B, T) or (N,) int64. Ids under the mask are never read; see ``token_logprobs`` for
            ids outside [0, V).
        mask: bool or integer, the shape of ``tokens``: nonzero for the tokens of y, its end of
            sequence included.
        preference: (B,) floating, P(y > y'), or any real per sequence (a reward).
        tau: strength of the KL regularisation, at least 0; 0 if there is no reference. One for each
            of several anchors.
        ref_logprobs: the shape of ``tokens``, log ref(y_n) at the same temperature, or a sequence
            of these, one for each anchor; or
        ref_logits: the shape of ``logits``, from which they are computed. At most one of the two;
            "exact" needs it.
        policy_logprobs: the shape of ``tokens``, log pi(y_n) under the current weights: taken in
            place of those of ``logits`` inside the stop_gradient only. Not with "exact".
        kl: "reward_to_go", "sequence", "token" or "exact".
        baseline: subtracted from the preference: P(y > y) = 1/2 needs no value function.
        temperature: above 0 (at least 1e-30): the rollout's.
        softcap: above 0 (at least 1e-30), or ``None``.
        cu_seqlens: (B + 1,) int32 or int64, offsets of the packed sequences, from 0 to N.
        inplace_backward: let the backward write the gradient over ``logits``: no other use of them
            may follow, and a second backward raises. Ignored under torch.compile.
        group: the ranks that share the vocabulary, as in ``token_logprobs``.
        backend: "", "eager", "cpp", "triton" or "cuda".

    Returns:
        ``PairwisePGLoss``: ``loss`` (), the sum over tokens and the mean over sequences (0 if B =
        0), and detached, the shape of ``tokens``, 0 under the mask: ``logprobs``,
        ``ref_logprobs``, ``entropy`` and ``kl`` = ell_n, with "exact" KL_n; ``ref_logprobs`` and
        ``kl`` are empty without a reference and (J, ...) for a sequence of J. In nats.

    Raises:
        ValueError: wrong shapes, dtypes or devices, parameters out of range, another ``kl``.

    Numerics: float32 accumulation and outputs (float64 for float64 logits); the gradient is
    rounded once to the dtype of the logits and exactly 0 in rows under the mask, whatever these
    hold.
    """
    dtype = statistics_dtype(logits, ref_logits if kl == "exact" else None)
    mask = mask != 0
    settings = {
        "mask": mask, "temperature": temperature, "softcap": softcap, "group": group
    }  # fmt: skip

    def masked(x):
        return torch.where(mask, x.to(dtype), 0)

    if kl == "exact":
        logprobs, refs, entropy, ell = token_kl(logits, ref_logits, tokens, **settings)
    else:
        logprobs, entropy = token_logprobs(logits, tokens, **settings)
        current = logprobs if policy_logprobs is None else policy_logprobs
        refs = ref_logprobs
        if ref_logits is not None:
            refs = token_logprobs(ref_logits.to(dtype), tokens, **settings).logprobs
        if isinstance(refs, Sequence):
            refs = torch.stack([x.to(dtype) for x in refs])
        refs = logprobs.new_empty(0) if refs is None else masked(refs).detach()
        ell = masked(current).detach() - refs if refs.numel() else logprobs.new_empty(refs.shape)

    cost = _weighted(tau, ell.detach(), logprobs)
    sequence = _sequence_ids(tokens, cu_seqlens)
    advantage = preference.detach().to(dtype)[sequence] - baseline - _sums(cost, kl, cu_seqlens)
    B = max(len(preference), 1)
    coef = masked(-advantage / B)
    # a token that the advantage leaves out must not bring its own infinity
    loss = torch.where(coef == 0, 0, coef * logprobs).sum()
    if kl == "exact" and tau:
        loss = loss + ell.sum() * (tau / B)
    return PairwisePGLoss(loss, logprobs.detach(), refs.detach(), entropy.detach(), ell.detach())


def linear_pairwise_pg_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor,
    preference: Tensor,
    *,
    tau: float | Sequence[float],
    bias: Tensor | None = None,
    ref_logprobs: Tensor | Sequence[Tensor] | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    policy_logprobs: Tensor | None = None,
    kl: str = "reward_to_go",
    baseline: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> PairwisePGLoss:
    """``pairwise_pg_loss`` from hidden states, with never more than a chunk of logits.

    Formula, for each of the two models::

        logits = logit_scale * (hidden @ weight.T + bias)

    and the rest is that of ``pairwise_pg_loss``.

    Args:
        hidden: (B, T, D), or packed (N, D) with ``cu_seqlens``; the rest of the policy's head as in
            ``linear_token_logprobs``: ``weight``, ``bias``, ``logit_scale``.
        tokens, mask, preference, tau, kl, baseline, temperature, softcap, cu_seqlens: as in
            ``pairwise_pg_loss``. Tokens under the mask are left out before the product.
        ref_logprobs: as in ``pairwise_pg_loss``; or
        ref_hidden, ref_weight, ref_bias: the reference's head, as in ``linear_token_kl``;
            ``ref_weight=None`` is the policy's head. "exact" needs them.
        policy_logprobs: as in ``pairwise_pg_loss``. "sequence" needs the sums of whole sequences
            before it starts: without this argument a pass over all logits more.
        memory_budget, group: as in ``linear_token_logprobs``.
        backend: "", "eager", "cpp", "triton" or "cuda".

    Returns:
        ``PairwisePGLoss``, as ``pairwise_pg_loss`` gives it.

    Raises:
        ValueError: as in ``pairwise_pg_loss``.

    Numerics: as in ``linear_token_logprobs``; gradients are worked out in the forward, from the
    last chunk to the first, kept in float32 (float64 for float64), and multiplied with the incoming
    gradient before they are rounded.
    """
    keep = mask != 0
    dtype = statistics_dtype(hidden, ref_hidden if kl == "exact" else None)
    cap = (softcap, logit_scale)
    ref_logits = None
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias
        with torch.no_grad():
            ref_logits = head_logits(ref_hidden, ref_weight, ref_bias, keep, *cap, dtype, group)
    return pairwise_pg_loss(
        head_logits(hidden, weight, bias, keep, *cap, dtype, group),
        tokens,
        mask,
        preference,
        tau=tau,
        ref_logprobs=ref_logprobs,
        ref_logits=ref_logits,
        policy_logprobs=policy_logprobs,
        kl=kl,
        baseline=baseline,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        group=group,
    )


def _weighted(tau: float | Sequence[float], ell: Tensor, logprobs: Tensor) -> Tensor:
    """sum_j tau_j ell^j; a tau of 0 leaves its anchor out, because 0 * inf would be NaN."""
    cost = torch.zeros_like(logprobs)
    for strength, x in zip(tau, ell, strict=True) if isinstance(tau, Sequence) else [(tau, ell)]:
        if strength:
            cost = cost + strength * x
    return cost.detach()


def _sequence_ids(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which sequence each token belongs to, broadcastable to the shape of ``tokens``."""
    if cu_seqlens is None:
        return torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    place = torch.arange(tokens.shape[0], device=tokens.device)
    return torch.searchsorted(cu_seqlens[1:].to(torch.int64), place, right=True)


def _sums(cost: Tensor, kl: str, cu_seqlens: Tensor | None) -> Tensor:
    if kl == "token":
        return cost
    if cu_seqlens is not None:
        pieces = cost.split(cu_seqlens.diff().tolist())
        return torch.cat([_sums(piece[None], kl, None)[0] for piece in pieces] or [cost])
    if kl == "sequence":
        return cost.sum(-1, keepdim=True).expand_as(cost)
    if kl == "exact":
        # without its own: a difference of sums would make inf - inf of an infinite one
        cost = torch.cat([cost[..., 1:], torch.zeros_like(cost[..., :1])], -1)
    return cost.flip(-1).cumsum(-1).flip(-1)
