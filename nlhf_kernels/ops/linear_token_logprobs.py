"""Contract of ``linear_token_logprobs``: chunks of logits, made again in the backward."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import TokenLogprobs
from nlhf_kernels.ops import common, heads, vocabulary

OP = "linear_token_logprobs"


def _forward(
    hidden, weight, bias, tokens, mask, logit_scale, temperature, softcap, budget, backend,
    part=None,
):  # fmt: skip
    registry.count(OP, backend)
    dtype = eager.statistics_dtype(hidden)
    head = heads.Head(hidden, weight, bias, logit_scale, dtype)
    chunks = heads.Chunks(head, mask, budget, 1, part, backend)
    outputs = [hidden.new_zeros(tokens.shape, dtype=dtype) for _ in range(3)]
    with common.plain(hidden):
        for _, places in chunks:
            logits = head.logits(head.rows(places), chunks.buffers[0])
            tokens_here = tokens.view(-1)[places]
            found = chunks.logprobs(logits, tokens_here, (temperature, softcap))
            for x, some in zip(outputs, found, strict=True):
                x.view(-1)[places] = some
    return tuple(outputs)


def _forward_fake(hidden, weight, bias, tokens, *_):
    dtype = eager.statistics_dtype(hidden)
    return tuple(hidden.new_empty(tokens.shape, dtype=dtype) for _ in range(3))


def _backward(
    hidden, weight, bias, tokens, mask, lse, entropy, grad_logprobs, grad_entropy, logit_scale,
    temperature, softcap, budget, to_hidden, to_weight, to_bias, backend, part=None,
):  # fmt: skip
    registry.count(f"{OP}_bwd", backend)
    wanted = to_hidden, to_weight, to_bias
    head = heads.Head(hidden, weight, bias, logit_scale, lse.dtype, wanted)
    chunks = heads.Chunks(head, mask, budget, 1, part, backend)
    with common.plain(hidden):
        for _, places in chunks:
            rows = head.rows(places)
            logits = head.logits(rows, chunks.buffers[0])
            per_token = (tokens, lse, entropy, grad_logprobs, grad_entropy)
            ids, *rest = (None if x is None else x.view(-1)[places] for x in per_token)
            arguments = (chunks.ids(ids), None, *rest, temperature, softcap)
            grad = chunks.gradient("token_logprobs_bwd", logits, *arguments)
            head.backward(grad, rows, places)
    return head.gradients(part)


def _backward_fake(hidden, weight, bias, tokens, mask, lse, *arguments):
    return heads.fake_gradients(hidden, weight, lse.dtype, arguments[-4:-1])


common.define(
    f"{OP}_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask,"
    " float logit_scale, float temperature, float softcap, int budget, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
common.define(
    f"{OP}_bwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask, Tensor lse,"
    " Tensor? entropy, Tensor grad_logprobs, Tensor? grad_entropy, float logit_scale,"
    " float temperature, float softcap, int budget, bool to_hidden, bool to_weight, bool to_bias,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, mask, part, wanted, *settings):
        found = common.call(
            f"{OP}_fwd", _forward, part, hidden, weight, bias, tokens, mask, *settings
        )
        logprobs, entropy, lse = found
        ctx.save_for_backward(hidden, weight, bias, tokens, mask, lse, entropy)
        ctx.settings, ctx.part, ctx.wanted = settings, part, wanted
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        *saved, lse, entropy = ctx.saved_tensors
        grads = (common.given(grad_logprobs, lse), common.given(grad_entropy))
        entropy = None if grad_entropy is None else entropy
        *settings, backend = ctx.settings
        arguments = (*saved, lse, entropy, *grads, *settings, *ctx.wanted, backend)
        made = common.call(f"{OP}_bwd", _backward, ctx.part, *arguments)
        grads = heads.rounded(made, ctx.wanted, saved[0].dtype)
        return *grads, *[None] * (4 + len(ctx.settings))


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
    heads.check_head(OP, hidden, weight, bias)
    common.check_tokens(OP, tokens, mask, hidden)
    common.check_scaling(OP, temperature, softcap)
    heads.check_chunks(OP, logit_scale, memory_budget)
    backend = common.resolve(OP, hidden, backend)
    part = vocabulary.part_of(OP, group, weight, 0)
    common.check_token_ids(OP, tokens, mask, part.V if part else len(weight))
    if backend == "eager":
        return common.run_eager(
            OP,
            hidden,
            weight,
            tokens,
            bias=bias,
            mask=mask,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            group=group,
        )
    return TokenLogprobs(
        *_LinearTokenLogprobs.apply(
            hidden,
            weight,
            bias,
            tokens.contiguous(),
            common.kept(mask),
            part,
            heads.wanted(hidden, weight, bias),
            float(logit_scale),
            float(temperature),
            float(softcap or 0),
            memory_budget or 0,
            backend,
        )
    )


linear_token_logprobs.__doc__ = eager.linear_token_logprobs.__doc__
