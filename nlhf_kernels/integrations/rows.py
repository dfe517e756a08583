"""Logits and heads of hosts, of any shape and dtype, as the ops take them."""

import torch
from torch import Tensor

import nlhf_kernels as nk


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> nk.TokenLogprobs:
    """``nk.token_logprobs`` for logits (..., V) and tokens (...), in float32 or float64."""
    shape = logits.shape[:-1]
    # rows with strides of their own, such as logits[:, :-1], cost no copy where they have B and T
    flat = logits if logits.dim() in (2, 3) else logits.reshape(-1, logits.shape[-1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    found = nk.token_logprobs(
        flat,
        tokens.long().reshape(flat.shape[:-1]),
        mask=None if mask is None else (mask != 0).reshape(flat.shape[:-1]),
        temperature=temperature,
        inplace_backward=inplace_backward,
    )
    return nk.TokenLogprobs(*(x.reshape(shape) for x in found))


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in one dtype, as a product needs them: under autocast its own, else of ``hidden``.

    float64 stays as it is, under autocast too.
    """
    dtype, kind = hidden.dtype, hidden.device.type
    if autocast and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
