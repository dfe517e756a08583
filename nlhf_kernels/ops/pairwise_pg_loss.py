"""Contract of ``pairwise_pg_loss``."""

import torch
from torch import Tensor

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import PairwisePGLoss
from nlhf_kernels.ops import common

OP = "pairwise_pg_loss"
KL = ("reward_to_go", "sequence", "token")


def _forward(*arguments):
    *arguments, backend = arguments
    return registry.load(f"{OP}_fwd", backend)(*arguments)


def _forward_fake(logits, tokens, mask, preference, ref_logprobs, *arguments):
    dtype = eager.statistics_dtype(logits)
    shape = tokens.shape
    kl_shape = (0,) if ref_logprobs is None else shape
    shapes = ((), shape, shape, kl_shape, shape, shape)
    return tuple(logits.new_empty(s, dtype=dtype) for s in shapes)


common.define(
    f"{OP}_fwd(Tensor logits, Tensor tokens, Tensor mask, Tensor preference, Tensor? ref_logprobs,"
    " Tensor? policy_logprobs, Tensor? cu_seqlens, float tau, str kl, float baseline,"
    " float temperature, float softcap, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
common.define_backward(
    OP,
    "Tensor tokens, Tensor mask, Tensor lse, Tensor coef, Tensor grad_loss,"
    " float temperature, float softcap, str backend",
)


class _PairwisePGLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inplace, logits, tokens, mask, *arguments):
        loss, logprobs, entropy, kl, lse, coef = torch.ops.nlhf.pairwise_pg_loss_fwd(
            logits, tokens, mask, *arguments
        )
        ctx.save_for_backward(logits, tokens, mask, lse, coef)
        ctx.settings = arguments[-3:]
        ctx.inplace = inplace
        ctx.others = len(arguments)
        ctx.mark_non_differentiable(logprobs, entropy, kl)
        return loss, logprobs, entropy, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        logits, *saved = ctx.saved_tensors
        if ctx.inplace:
            grad = logits.detach()
            torch.ops.nlhf.pairwise_pg_loss_bwd_(grad, *saved, grad_loss, *ctx.settings)
        else:
            grad = torch.ops.nlhf.pairwise_pg_loss_bwd(logits, *saved, grad_loss, *ctx.settings)
        return None, grad, None, None, *[None] * ctx.others


def _check(logits, tokens, mask, preference, cu_seqlens, per_token: dict) -> None:
    common.check_logits(OP, "logits", logits, dims=(2, 3))
    packed = cu_seqlens is not None
    common.require(
        packed == (logits.dim() == 2),
        OP,
        "logits must be (B, T, V), or (N, V) together with cu_seqlens, got "
        f"{common.describe(logits)} {'with' if packed else 'without'} cu_seqlens",
    )
    shape, device = logits.shape[:-1], logits.device
    ints = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    common.check_tensor(OP, "tokens", tokens, shape, (torch.int64,), device)
    common.check_tensor(OP, "mask", mask, shape, (torch.bool, *ints), device)
    for name, x in per_token.items():
        if x is not None:
            common.check_tensor(OP, name, x, shape, common.FLOATS, device)
    B = shape[0]
    if packed:
        common.require(
            isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 0,
            OP,
            f"cu_seqlens must be int32 or int64 (B + 1,), got {common.describe(cu_seqlens)}",
        )
        common.check_tensor(
            OP, "cu_seqlens", cu_seqlens, cu_seqlens.shape, (torch.int32, torch.int64), device
        )
        B = len(cu_seqlens) - 1
        _check_offsets(cu_seqlens, shape[0])
    common.check_tensor(OP, "preference", preference, (B,), common.FLOATS, device)
    common.check_token_ids(OP, tokens, mask, logits.shape[-1])


def _check_offsets(cu_seqlens: Tensor, N: int) -> None:
    """On the CPU, where looking costs nothing: the offsets rise from 0 to N."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    good = cu_seqlens[0] == 0 and cu_seqlens[-1] == N and bool((cu_seqlens.diff() >= 0).all())
    common.require(good, OP, f"cu_seqlens must rise from 0 to N = {N}, got {cu_seqlens.tolist()}")


def pairwise_pg_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    preference: Tensor,
    *,
    tau: float,
    ref_logprobs: Tensor | None = None,
    ref_logits: Tensor | None = None,
    policy_logprobs: Tensor | None = None,
    kl: str = "reward_to_go",
    baseline: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str = "",
) -> PairwisePGLoss:
    per_token = {"ref_logprobs": ref_logprobs, "policy_logprobs": policy_logprobs}
    _check(logits, tokens, mask, preference, cu_seqlens, per_token)
    common.require(kl in KL, OP, f"kl must be one of {', '.join(KL)}, got {kl!r}")
    common.check_number(OP, "tau", tau, 0, common.LARGEST, "at least 0 and finite")
    high = common.LARGEST
    common.check_number(OP, "baseline", baseline, -high, high, "a finite number")
    common.check_scaling(OP, temperature, softcap)
    common.require(
        ref_logprobs is None or ref_logits is None, OP, "give ref_logprobs or ref_logits, not both"
    )
    common.require(
        tau == 0 or ref_logprobs is not None or ref_logits is not None,
        OP,
        f"tau must be 0 without ref_logprobs or ref_logits, got {tau!r}",
    )
    if ref_logits is not None:
        common.check_logits(OP, "ref_logits", ref_logits, dims=(logits.dim(),))
        same = ref_logits.shape == logits.shape and ref_logits.device == logits.device
        common.require(
            same,
            OP,
            f"ref_logits must have the shape and device of logits, got "
            f"{common.describe(ref_logits)} beside {common.describe(logits)}",
        )
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if inplace:
        common.check_inplace(OP, logits)

    backend = common.resolve(OP, logits, backend)
    if backend == "eager":
        return eager.pairwise_pg_loss(
            common.WriteBack.apply(logits) if inplace else logits,
            tokens,
            mask,
            preference,
            tau=tau,
            ref_logprobs=ref_logprobs,
            ref_logits=None if ref_logits is None else ref_logits.detach(),
            policy_logprobs=policy_logprobs,
            kl=kl,
            baseline=baseline,
            temperature=temperature,
            softcap=softcap,
            cu_seqlens=cu_seqlens,
        )

    dtype = eager.statistics_dtype(logits)
    mask = (mask != 0).contiguous()
    tokens = tokens.contiguous()
    settings = (float(temperature), float(softcap or 0), backend)
    if ref_logits is not None:
        # ids under the mask may be anything; their rows are computed in vain and cut below
        safe = torch.where(mask, tokens, 0)
        ref_logprobs = torch.ops.nlhf.token_logprobs_fwd(ref_logits.detach(), safe, *settings)[0]

    def prepared(x):
        return None if x is None else torch.where(mask, x.detach().to(dtype), 0)

    ref_logprobs = prepared(ref_logprobs)
    loss, logprobs, entropy, kl_tokens = _PairwisePGLoss.apply(
        inplace,
        logits,
        tokens,
        mask,
        preference.detach().to(dtype).contiguous(),
        ref_logprobs,
        prepared(policy_logprobs),
        None if cu_seqlens is None else cu_seqlens.to(torch.int64),
        float(tau),
        kl,
        float(baseline),
        *settings,
    )
    if ref_logprobs is None:
        ref_logprobs = logprobs.new_empty(0)
    return PairwisePGLoss(loss, logprobs, ref_logprobs, entropy, kl_tokens)


pairwise_pg_loss.__doc__ = eager.pairwise_pg_loss.__doc__
