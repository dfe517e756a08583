"""Contract of ``token_logprobs``."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import TokenLogprobs
from nlhf_kernels.ops import common, vocabulary

OP = "token_logprobs"


def _forward(*arguments):
    *arguments, backend = arguments
    return registry.load(f"{OP}_fwd", backend)(*arguments)


def _forward_fake(logits, tokens, *_):
    dtype = eager.statistics_dtype(logits)
    return tuple(logits.new_empty(tokens.shape, dtype=dtype) for _ in range(3))


common.define(
    f"{OP}_fwd(Tensor logits, Tensor tokens, Tensor? mask, float temperature, float softcap,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
common.define_backward(
    OP,
    "Tensor tokens, Tensor? mask, Tensor lse, Tensor? entropy, Tensor grad_logprobs,"
    " Tensor? grad_entropy, float temperature, float softcap, str backend",
)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tokens, mask, part, inplace, *settings):
        ids = tokens if part is None else part.ids(tokens)
        found = torch.ops.nlhf.token_logprobs_fwd(logits, ids, mask, *settings)
        logprobs, entropy, lse = vocabulary.whole(part, tokens, mask, *found)
        ctx.save_for_backward(logits, ids, mask, lse, entropy)
        ctx.settings = settings
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, tokens, mask, lse, entropy = ctx.saved_tensors
        grads = (common.given(grad_logprobs, lse), common.given(grad_entropy))
        # without it the gradient takes a third of the arithmetic
        entropy = None if grad_entropy is None else entropy
        arguments = (tokens, mask, lse, entropy, *grads, *ctx.settings)
        grad = common.backward(OP, ctx.inplace, logits, *arguments)
        return grad, *[None] * (4 + len(ctx.settings))


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
    common.check_logits(OP, "logits", logits, dims=(2, 3))
    common.check_tokens(OP, tokens, mask, logits)
    common.check_scaling(OP, temperature, softcap)
    inplace = common.wants_inplace(OP, logits, inplace_backward)
    backend = common.resolve(OP, logits, backend)
    part = vocabulary.part_of(OP, group, logits)
    common.check_token_ids(OP, tokens, mask, part.V if part else logits.shape[-1])
    if backend == "eager":
        return common.run_eager(
            OP,
            common.WriteBack.apply(logits) if inplace else logits,
            tokens,
            mask=mask,
            temperature=temperature,
            softcap=softcap,
            group=group,
        )
    settings = (float(temperature), float(softcap or 0), backend)
    return TokenLogprobs(
        *_TokenLogprobs.apply(
            logits, tokens.contiguous(), common.kept(mask), part, inplace, *settings
        )
    )


token_logprobs.__doc__ = eager.token_logprobs.__doc__
