"""Log-probability and entropy of tokens, from logits or from hidden states."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels.eager.logits import (
    SumOfGradients,
    linear_logits,
    scores,
    statistics_dtype,
    whole_vocabulary,
)


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> TokenLogprobs:
    """Log-probability of each token and entropy of its distribution, both differentiable.

    Formula::

        s = softcap * tanh(logits / softcap) / temperature   (softcap=None: logits / temperature)
        logprobs = s[tokens] - logsumexp(s)
        entropy = logsumexp(s) - sum_i softmax(s)_i s_i

    Args:
        logits: (N, V) or (B, T, V) float16, bfloat16, float32 or float64; any row strides (so
            ``full[:, :-1]`` costs no copy), last stride 1.
        tokens: (N,) or (B, T) int64 in [0, V). Outside: ``ValueError`` on the CPU; elsewhere, where
            looking would stall the device, a NaN log-probability without a gradient.
        mask: bool or integer, the shape of ``tokens``: rows where it is 0 are never read and give
            0, with a gradient of 0; ``None``: every row counts.
        temperature: above 0 (at least 1e-30).
        softcap: above 0 (at least 1e-30), or ``None``.
        inplace_backward: let the backward write the gradient over ``logits``: no other use of them
            may follow, and a second backward raises. Ignored under torch.compile.
        group: the ranks that share the vocabulary, each with the logits (..., V_rank) of its ids,
            in the order of the ranks; tokens and results are those of the whole. Not under
            torch.compile.
        backend: "", "eager", "cpp", "triton" or "cuda".

    Returns:
        ``TokenLogprobs``: ``logprobs`` and ``entropy``, the shape of ``tokens``, in nats.

    Raises:
        ValueError: wrong shapes, dtypes or devices, parameters out of range.

    Numerics: float32 accumulation and outputs (float64 for float64); the gradient is rounded once
    to the dtype of the logits. 0 * -inf counts as 0 in the entropy. But for "eager" the backward
    makes probabilities of the log-sum-exp as the forward rounded it: where scores, that is logits
    over the temperature, are of size 2^k, they err by about 2^(k - 24), in float64 2^(k - 53).
    """
    keep = None if mask is None else mask != 0
    logs = log_softmax(whole_vocabulary(logits, group), keep, temperature, softcap)
    return TokenLogprobs(at_tokens(logs, tokens, keep), masked(entropies(logs), keep))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> TokenLogprobs:
    """``token_logprobs`` from hidden states, with never more than a chunk of logits.

    Formula::

        logits = logit_scale * (hidden @ weight.T + bias)

    and the rest is that of ``token_logprobs``.

    Args:
        hidden: (N, D) or (B, T, D) float16, bfloat16, float32 or float64; any strides of rows, last
            stride 1.
        weight: (V, D), the LM head, in the dtype of ``hidden``. It gets a gradient if it requires
            one. An adapter on the head: give ``weight + scale * B @ A``.
        tokens: (N,) or (B, T) int64 in [0, V), as in ``token_logprobs``.
        bias: (V,), the dtype of the weight, or ``None``; -inf bans a token.
        mask: as in ``token_logprobs``; rows under it are left out before the product.
        temperature, softcap, backend: as in ``token_logprobs``.
        logit_scale: what the model multiplies its logits with, before the soft cap.
        memory_budget: bytes for a chunk of logits. It decides how many tokens there are in one:
            2,048 to 8,192 on a GPU, 128 to 4,096 on a CPU. ``None``: 3 GiB, on a CPU 64 MiB.
        group: the ranks that share the vocabulary, each with the weight (V_rank, D) of its ids, in
            the order of the ranks; all else, and results, are the same on each. Not under
            torch.compile.

    Returns:
        ``TokenLogprobs``, as ``token_logprobs`` gives it.

    Raises:
        ValueError: as in ``token_logprobs``.

    Numerics: logits are float32 (float64 for float64), never rounded to the dtype of the inputs. On
    a GPU the gradient of 16-bit logits is rounded to that dtype before it is multiplied with the
    weights. Gradients are summed in float32, over all chunks, and rounded once. The backward makes
    the logits again.
    """
    keep = None if mask is None else mask != 0
    settings = (softcap, logit_scale)
    logits = head_logits(hidden, weight, bias, keep, *settings, statistics_dtype(hidden), group)
    result = token_logprobs(logits, tokens, mask=mask, temperature=temperature, group=group)
    return TokenLogprobs(*result)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
    group: ProcessGroup | None,
) -> Tensor:
    """This rank's logits; hidden states under the mask are cut, or NaN comes back through them."""
    if keep is not None:
        hidden = torch.where(keep[..., None], hidden, 0)
    # widened before: what the ranks add up to is rounded once
    hidden = SumOfGradients.apply(hidden.to(dtype), group)
    # autocast would round them
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_logits(hidden, weight, bias, softcap, dtype, logit_scale)


def log_softmax(
    logits: Tensor, keep: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """Log-probabilities of all ids; a row under the mask may hold anything, so it is cut before."""
    if keep is not None:
        logits = torch.where(keep[..., None], logits, 0)
    return scores(logits, temperature, softcap).log_softmax(-1)


def at_tokens(logs: Tensor, tokens: Tensor, keep: Tensor | None) -> Tensor:
    """The log-probability of each token, NaN for an id outside the vocabulary."""
    inside = (tokens >= 0) & (tokens < logs.shape[-1])
    chosen = logs.gather(-1, torch.where(inside, tokens, 0)[..., None])[..., 0]
    return masked(torch.where(inside, chosen, torch.nan), keep)


def entropies(logs: Tensor) -> Tensor:
    # the product is cut where p = 0 before it is made: 0 * -inf would poison the gradient as well
    finite = torch.where(logs == -torch.inf, 0, logs)
    return -(logs.exp() * finite).sum(-1)


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0)
