"""Contract of ``pairwise_pg_loss``: statistics of the rows, coefficients per token, gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import PairwisePGLoss
from nlhf_kernels.ops import common, pg, vocabulary

OP = "pairwise_pg_loss"


def _coef(*arguments):
    *arguments, backend = arguments
    # what makes a loss of statistics: one call of the op
    registry.count(OP, backend)
    return registry.load("pairwise_pg_coef_fwd", backend)(*arguments)


def _coef_fake(logprobs, cost, mask, preference, *_):
    return logprobs.new_empty(()), torch.empty_like(logprobs), torch.empty_like(preference)


# loss, coef, sums of the cost of each sequence
common.define(
    "pairwise_pg_coef_fwd(Tensor logprobs, Tensor? cost, Tensor? mask, Tensor preference,"
    " Tensor? cu_seqlens, Tensor? later, str kl, float baseline, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _coef,
    _coef_fake,
)


class _PairwisePGLoss(torch.autograd.Function):
    """With the exact KL if there are logits of the reference, else with log-ratios."""

    @staticmethod
    def forward(
        ctx, logits, ref_logits, tokens, mask, preference, refs, policy_logprobs, cu_seqlens,
        terms, part, inplace, *settings,
    ):  # fmt: skip
        ids = tokens if part is None else part.ids(tokens)
        exact = ref_logits is not None
        ref_lse = None
        if exact:
            found = torch.ops.nlhf.token_kl_fwd(logits, ref_logits, ids, mask, *settings)
            found = vocabulary.whole_kl(part, tokens, mask, *found)
            logprobs, refs, entropy, kl, lse, ref_lse = found
        else:
            found = torch.ops.nlhf.token_logprobs_fwd(logits, ids, mask, *settings)
            logprobs, entropy, lse = vocabulary.whole(part, tokens, mask, *found)
            current = logprobs if policy_logprobs is None else policy_logprobs
            kl = None if refs is None else torch.where(mask, current - refs, 0)
        loss, coef, _ = torch.ops.nlhf.pairwise_pg_coef_fwd(
            logprobs, terms.cost(kl), mask, preference, cu_seqlens, None, terms.kl,
            terms.baseline, settings[-1],
        )  # fmt: skip
        weight = terms.kl_weight(len(preference))
        if weight:
            loss = loss + weight * kl.sum()
        ctx.save_for_backward(logits, ref_logits, ids, mask, lse, ref_lse, coef, kl)
        ctx.settings = settings
        ctx.inplace, ctx.weight = inplace, weight
        # two, as torch.compile cannot trace one tensor that is returned twice
        refs = refs if exact else logprobs.new_empty(0)
        results = (logprobs, refs, entropy, logprobs.new_empty(0) if kl is None else kl)
        ctx.mark_non_differentiable(*results)
        return loss, *results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        logits, ref_logits, tokens, mask, lse, ref_lse, coef, kl = ctx.saved_tensors
        grads = (coef * grad_loss, None)
        if ctx.weight:
            grad_kl = (ctx.weight * grad_loss).expand_as(kl).contiguous()
            arguments = (ref_logits, tokens, mask, lse, ref_lse, None, kl, *grads, grad_kl)
            grad = common.backward("token_kl", ctx.inplace, logits, *arguments, *ctx.settings)
        else:
            arguments = (tokens, mask, lse, None, *grads, *ctx.settings)
            grad = common.backward("token_logprobs", ctx.inplace, logits, *arguments)
        return grad, *[None] * (10 + len(ctx.settings))


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
    common.check_logits(OP, "logits", logits, dims=(2, 3))
    pg.check(
        OP, "logits", logits, tokens, mask, preference, cu_seqlens, tau, ref_logprobs,
        "ref_logits", ref_logits is not None, policy_logprobs, kl, baseline,
    )  # fmt: skip
    common.check_scaling(OP, temperature, softcap)
    if ref_logits is not None:
        common.check_ref_logits(OP, ref_logits, logits)
        ref_logits = ref_logits.detach()
    inplace = common.wants_inplace(OP, logits, inplace_backward)
    backend = common.resolve(OP, logits, backend)
    part = vocabulary.part_of(OP, group, logits)
    common.check_token_ids(OP, tokens, mask, part.V if part else logits.shape[-1])
    if backend == "eager":
        return common.run_eager(
            OP,
            common.WriteBack.apply(logits) if inplace else logits,
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
            softcap=softcap,
            cu_seqlens=cu_seqlens,
            group=group,
        )

    exact = kl == "exact"
    dtype = eager.statistics_dtype(logits, ref_logits if exact else None)
    mask, tokens = common.kept(mask), tokens.contiguous()
    settings = (float(temperature), float(softcap or 0), backend)
    if ref_logits is not None and not exact:
        ids = tokens if part is None else part.ids(tokens)
        if dtype == torch.float64:
            # beside float64 a narrower reference counts as exact; rows that overlap would be laid
            # out in any order
            ref_logits = ref_logits.to(dtype, memory_format=torch.contiguous_format)
        found = torch.ops.nlhf.token_logprobs_fwd(ref_logits, ids, mask, *settings)
        ref_logprobs = vocabulary.whole(part, tokens, mask, *found)[0]
    refs = pg.prepared(ref_logprobs, mask, dtype)
    loss, logprobs, ref_logprobs, entropy, ell = _PairwisePGLoss.apply(
        logits,
        ref_logits if exact else None,
        tokens,
        mask,
        preference.detach().to(dtype).contiguous(),
        refs,
        pg.prepared(policy_logprobs, mask, dtype),
        None if cu_seqlens is None else cu_seqlens.to(torch.int64),
        pg.Terms(kl, tau, float(baseline)),
        part,
        inplace,
        *settings,
    )
    return PairwisePGLoss(loss, logprobs, ref_logprobs if refs is None else refs, entropy, ell)


pairwise_pg_loss.__doc__ = eager.pairwise_pg_loss.__doc__
