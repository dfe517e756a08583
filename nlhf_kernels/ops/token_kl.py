"""Contract of ``token_kl``."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import TokenKL
from nlhf_kernels.ops import common, vocabulary

OP = "token_kl"


def _forward(*arguments):
    *arguments, backend = arguments
    return registry.load(f"{OP}_fwd", backend)(*arguments)


def _forward_fake(logits, ref_logits, tokens, *_):
    dtype = eager.statistics_dtype(logits, ref_logits)
    return tuple(logits.new_empty(tokens.shape, dtype=dtype) for _ in range(6))


# logprobs, ref_logprobs, entropy, kl, lse, ref_lse
common.define(
    f"{OP}_fwd(Tensor logits, Tensor ref_logits, Tensor tokens, Tensor? mask, float temperature,"
    " float softcap, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
common.define_backward(
    OP,
    "Tensor ref_logits, Tensor tokens, Tensor? mask, Tensor lse, Tensor ref_lse, Tensor? entropy,"
    " Tensor kl, Tensor grad_logprobs, Tensor? grad_entropy, Tensor grad_kl, float temperature,"
    " float softcap, str backend",
)


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, tokens, mask, part, inplace, *settings):
        ids = tokens if part is None else part.ids(tokens)
        found = torch.ops.nlhf.token_kl_fwd(logits, ref_logits, ids, mask, *settings)
        found = vocabulary.whole_kl(part, tokens, mask, *found)
        logprobs, ref_logprobs, entropy, kl, lse, ref_lse = found
        ctx.save_for_backward(logits, ref_logits, ids, mask, lse, ref_lse, entropy, kl)
        ctx.settings = settings
        ctx.inplace = inplace
        ctx.mark_non_differentiable(ref_logprobs)
        ctx.set_materialize_grads(False)
        return logprobs, ref_logprobs, entropy, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, _, grad_entropy, grad_kl):
        logits, ref_logits, tokens, mask, lse, ref_lse, entropy, kl = ctx.saved_tensors
        grads = (common.given(grad_logprobs, lse), common.given(grad_entropy))
        entropy = None if grad_entropy is None else entropy
        grads += (common.given(grad_kl, lse),)
        arguments = (ref_logits, tokens, mask, lse, ref_lse, entropy, kl, *grads, *ctx.settings)
        grad = common.backward(OP, ctx.inplace, logits, *arguments)
        return grad, *[None] * (5 + len(ctx.settings))


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
    common.check_logits(OP, "logits", logits, dims=(2, 3))
    common.check_ref_logits(OP, ref_logits, logits)
    common.check_tokens(OP, tokens, mask, logits)
    common.check_scaling(OP, temperature, softcap)
    inplace = common.wants_inplace(OP, logits, inplace_backward)
    backend = common.resolve(OP, logits, backend)
    part = vocabulary.part_of(OP, group, logits)
    common.check_token_ids(OP, tokens, mask, part.V if part else logits.shape[-1])
    ref_logits = ref_logits.detach()
    if backend == "eager":
        return common.run_eager(
            OP,
            common.WriteBack.apply(logits) if inplace else logits,
            ref_logits,
            tokens,
            mask=mask,
            temperature=temperature,
            softcap=softcap,
            group=group,
        )
    settings = (float(temperature), float(softcap or 0), backend)
    return TokenKL(
        *_TokenKL.apply(
            logits, ref_logits, tokens.contiguous(), common.kept(mask), part, inplace, *settings
        )
    )


token_kl.__doc__ = eager.token_kl.__doc__
