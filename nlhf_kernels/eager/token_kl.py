"""Exact KL divergence of policy and reference, token by token, from logits or hidden states."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels.eager.logits import statistics_dtype, whole_vocabulary
from nlhf_kernels.eager.token_logprobs import (
    at_tokens,
    entropies,
    head_logits,
    log_softmax,
    masked,
)


class TokenKL(NamedTuple):
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> TokenKL:
    """Both log-probabilities of each token, entropy and exact KL to the reference over all ids.

    Formula, with s the scores of the policy and r those of the reference as in
    ``token_logprobs``, p and q their softmax::

        kl = sum_i p_i (log p_i - log q_i)

    Args:
        logits: (N, V) or (B, T, V) float16, bfloat16, float32 or float64; any row strides, last
            stride 1.
        ref_logits: the shape of ``logits``; its dtype and strides may differ. No gradient.
        tokens, mask, temperature, softcap, inplace_backward, group, backend: as in
            ``token_logprobs``; temperature and softcap hold for both models.

    Returns:
        ``TokenKL``, each of the shape of ``tokens``, in nats: ``logprobs``, ``entropy`` and ``kl``,
        differentiable in ``logits``, and ``ref_logprobs``.

    Raises:
        ValueError: wrong shapes, dtypes or devices, parameters out of range.

    Numerics: float32 accumulation and outputs (float64 if one of the logits is); the gradient is
    rounded once to the dtype of the logits. Ids with p = 0 count 0, also where q = 0; an id that
    the reference alone bans (-inf) makes the KL inf, and its gradient NaN.
    """
    keep = None if mask is None else mask != 0
    dtype = statistics_dtype(logits, ref_logits)
    settings = (temperature, softcap)
    logs = log_softmax(whole_vocabulary(logits, group).to(dtype), keep, *settings)
    refs = whole_vocabulary(ref_logits, group).detach().to(dtype)
    refs = log_softmax(refs, keep, *settings)
    # cut where p = 0 before anything is made of it: 0 * inf would poison the gradient as well
    never = logs.exp() == 0
    ratio = torch.where(never, 0, logs) - torch.where(never, 0, refs)
    return TokenKL(
        at_tokens(logs, tokens, keep),
        at_tokens(refs, tokens, keep),
        masked(entropies(logs), keep),
        masked((logs.exp() * ratio).sum(-1), keep),
    )


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> TokenKL:
    """``token_kl`` from hidden states, with never more than a chunk of logits of each model.

    Formula, for each of the two models::

        logits = logit_scale * (hidden @ weight.T + bias)

    and the rest is that of ``token_kl``.

    Args:
        hidden, weight, bias: the policy's, as in ``linear_token_logprobs``.
        ref_hidden: the reference's, the shape of ``hidden`` but for D, its dtype may differ. No
            gradient goes to the reference.
        ref_weight: (V, D_ref), the dtype of ``ref_hidden``; ``None``: the policy's weight and bias.
        ref_bias: (V,), the dtype of ``ref_weight``, or ``None``.
        tokens: (N,) or (B, T) int64 in [0, V), as in ``token_logprobs``.
        mask, temperature, softcap, logit_scale, memory_budget, group, backend: as in
            ``linear_token_logprobs``.

    Returns:
        ``TokenKL``, as ``token_kl`` gives it.

    Raises:
        ValueError: as in ``token_logprobs``.

    Numerics: as in ``linear_token_logprobs``.
    """
    keep = None if mask is None else mask != 0
    dtype = statistics_dtype(hidden, ref_hidden)
    if ref_weight is None:
        ref_weight, ref_bias = weight, bias
    cap = (softcap, logit_scale, dtype, group)
    with torch.no_grad():
        ref_logits = head_logits(ref_hidden, ref_weight, ref_bias, keep, *cap)
    return token_kl(
        head_logits(hidden, weight, bias, keep, *cap),
        ref_logits,
        tokens,
        mask=mask,
        temperature=temperature,
        group=group,
    )
