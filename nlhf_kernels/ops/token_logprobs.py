"""Contract of ``token_logprobs``."""

import torch
from torch import Tensor

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import TokenLogprobs
from nlhf_kernels.ops import common

OP = "token_logprobs"


def _forward(logits, tokens, temperature, softcap, backend):
    return registry.load(f"{OP}_fwd", backend)(logits, tokens, temperature, softcap)


def _forward_fake(logits, tokens, temperature, softcap, backend):
    dtype = eager.statistics_dtype(logits)
    return tuple(logits.new_empty(tokens.shape, dtype=dtype) for _ in range(3))


common.define(
    f"{OP}_fwd(Tensor logits, Tensor tokens, float temperature, float softcap, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
common.define_backward(
    OP,
    "Tensor tokens, Tensor lse, Tensor entropy, Tensor grad_logprobs, Tensor grad_entropy,"
    " float temperature, float softcap, str backend",
)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tokens, temperature, softcap, inplace, backend):
        logprobs, entropy, lse = torch.ops.nlhf.token_logprobs_fwd(
            logits, tokens, temperature, softcap, backend
        )
        ctx.save_for_backward(logits, tokens, lse, entropy)
        ctx.settings = temperature, softcap, backend
        ctx.inplace = inplace
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, *saved = ctx.saved_tensors
        arguments = (*saved, grad_logprobs.contiguous(), grad_entropy.contiguous(), *ctx.settings)
        if ctx.inplace:
            grad = logits.detach()
            torch.ops.nlhf.token_logprobs_bwd_(grad, *arguments)
        else:
            grad = torch.ops.nlhf.token_logprobs_bwd(logits, *arguments)
        return grad, None, None, None, None, None


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str = "",
) -> TokenLogprobs:
    common.check_logits(OP, "logits", logits, dims=(2, 3))
    common.check_tensor(OP, "tokens", tokens, logits.shape[:-1], (torch.int64,), logits.device)
    common.check_scaling(OP, temperature, softcap)
    common.check_token_ids(OP, tokens, None, logits.shape[-1])
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if inplace:
        common.check_inplace(OP, logits)

    backend = common.resolve(OP, logits, backend)
    if backend == "eager":
        logits = common.WriteBack.apply(logits) if inplace else logits
        return eager.token_logprobs(logits, tokens, temperature=temperature, softcap=softcap)
    return TokenLogprobs(
        *_TokenLogprobs.apply(
            logits, tokens.contiguous(), float(temperature), float(softcap or 0), inplace, backend
        )
    )


token_logprobs.__doc__ = eager.token_logprobs.__doc__
