"""Contract of ``linear_token_kl``: chunks of logits of both models, made again in the backward."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import TokenKL
from nlhf_kernels.ops import common, heads, vocabulary

OP = "linear_token_kl"


def _two_heads(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, logit_scale, wanted, mask, budget,
    part, backend,
):  # fmt: skip
    dtype = eager.statistics_dtype(hidden, ref_hidden)
    head = heads.Head(hidden, weight, bias, logit_scale, dtype, wanted)
    ref_head = heads.Head(ref_hidden, ref_weight, ref_bias, logit_scale, dtype)
    return head, ref_head, heads.Chunks(head, mask, budget, 2, part, backend)


def _forward(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, tokens, mask, logit_scale,
    temperature, softcap, budget, backend, part=None,
):  # fmt: skip
    registry.count(OP, backend)
    head, ref_head, chunks = _two_heads(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, logit_scale, (False,) * 3, mask,
        budget, part, backend,
    )  # fmt: skip
    outputs = [hidden.new_zeros(tokens.shape, dtype=head.dtype) for _ in range(6)]
    with common.plain(hidden):
        for _, places in chunks:
            refs = ref_head.logits(ref_head.rows(places), chunks.buffers[1])
            logits = head.logits(head.rows(places), chunks.buffers[0])
            found = chunks.kl(logits, refs, tokens.view(-1)[places], (temperature, softcap))
            for x, some in zip(outputs, found, strict=True):
                x.view(-1)[places] = some
    return tuple(outputs)


def _forward_fake(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, tokens, *_):
    dtype = eager.statistics_dtype(hidden, ref_hidden)
    return tuple(hidden.new_empty(tokens.shape, dtype=dtype) for _ in range(6))


def _backward(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, tokens, mask, lse, ref_lse, entropy,
    kl, grad_logprobs, grad_entropy, grad_kl, logit_scale, temperature, softcap, budget,
    to_hidden, to_weight, to_bias, backend, part=None,
):  # fmt: skip
    registry.count(f"{OP}_bwd", backend)
    head, ref_head, chunks = _two_heads(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, logit_scale,
        (to_hidden, to_weight, to_bias), mask, budget, part, backend,
    )  # fmt: skip
    per_token = (tokens, lse, ref_lse, entropy, kl, grad_logprobs, grad_entropy, grad_kl)
    with common.plain(hidden):
        for _, places in chunks:
            refs = ref_head.logits(ref_head.rows(places), chunks.buffers[1])
            rows = head.rows(places)
            logits = head.logits(rows, chunks.buffers[0])
            ids, *rest = (None if x is None else x.view(-1)[places] for x in per_token)
            arguments = (refs, chunks.ids(ids), None, *rest, temperature, softcap)
            head.backward(chunks.gradient("token_kl_bwd", logits, *arguments), rows, places)
    return head.gradients(part)


def _backward_fake(hidden, weight, *arguments):
    lse = arguments[6]
    return heads.fake_gradients(hidden, weight, lse.dtype, arguments[-4:-1])


_HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight,"
    " Tensor? ref_bias, Tensor tokens, Tensor? mask"
)
_SETTINGS = "float logit_scale, float temperature, float softcap, int budget"
common.define(
    f"{OP}_fwd({_HEADS}, {_SETTINGS}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
common.define(
    f"{OP}_bwd({_HEADS}, Tensor lse, Tensor ref_lse, Tensor? entropy, Tensor kl,"
    f" Tensor grad_logprobs, Tensor? grad_entropy, Tensor grad_kl, {_SETTINGS}, bool to_hidden,"
    " bool to_weight, bool to_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _LinearTokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, tokens, mask, part, wanted,
        *settings,
    ):  # fmt: skip
        saved = hidden, weight, bias, ref_hidden, ref_weight, ref_bias, tokens, mask
        found = common.call(f"{OP}_fwd", _forward, part, *saved, *settings)
        logprobs, ref_logprobs, entropy, kl, lse, ref_lse = found
        ctx.save_for_backward(*saved, lse, ref_lse, entropy, kl)
        ctx.settings, ctx.part, ctx.wanted = settings, part, wanted
        ctx.mark_non_differentiable(ref_logprobs)
        ctx.set_materialize_grads(False)
        return logprobs, ref_logprobs, entropy, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, _, grad_entropy, grad_kl):
        *saved, lse, ref_lse, entropy, kl = ctx.saved_tensors
        grads = (common.given(grad_logprobs, lse), common.given(grad_entropy))
        grads += (common.given(grad_kl, lse),)
        entropy = None if grad_entropy is None else entropy
        *settings, backend = ctx.settings
        arguments = (*saved, lse, ref_lse, entropy, kl, *grads, *settings, *ctx.wanted, backend)
        made = common.call(f"{OP}_bwd", _backward, ctx.part, *arguments)
        grads = heads.rounded(made, ctx.wanted, saved[0].dtype)
        return *grads, *[None] * (7 + len(ctx.settings))


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
    heads.check_head(OP, hidden, weight, bias)
    heads.check_ref_head(OP, hidden, weight, ref_hidden, ref_weight, ref_bias)
    common.check_tokens(OP, tokens, mask, hidden)
    common.check_scaling(OP, temperature, softcap)
    heads.check_chunks(OP, logit_scale, memory_budget)
    backend = common.resolve(OP, hidden, backend)
    part = vocabulary.part_of(OP, group, weight, 0)
    common.check_token_ids(OP, tokens, mask, part.V if part else len(weight))
    ref = heads.reference(weight, bias, ref_hidden, ref_weight, ref_bias)
    if backend == "eager":
        return common.run_eager(
            OP,
            hidden,
            weight,
            ref[0],
            ref[1],
            tokens,
            bias=bias,
            ref_bias=ref[2],
            mask=mask,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            group=group,
        )
    return TokenKL(
        *_LinearTokenKL.apply(
            hidden,
            weight,
            bias,
            *ref,
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


linear_token_kl.__doc__ = eager.linear_token_kl.__doc__
