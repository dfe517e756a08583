"""``pairwise_pg_loss`` on Triton: row statistics, one small program per sequence, row gradient."""

import torch
import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common

# tokens per step of the walk over a sequence
STEP = 1024
SUFFIX, WHOLE, SINGLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_SUMS = {"reward_to_go": SUFFIX.value, "sequence": WHOLE.value, "token": SINGLE.value}


def pairwise_pg_loss_fwd(
    logits,
    tokens,
    mask,
    preference,
    ref_logprobs,
    policy_logprobs,
    cu_seqlens,
    tau,
    kl,
    baseline,
    temperature,
    softcap,
):
    logprobs, entropy, lse = common.row_statistics(logits, tokens, mask, temperature, softcap)
    B = preference.shape[0]
    # a packed batch may end before its rows do, and those rows have no coefficient
    coef = torch.zeros_like(lse) if cu_seqlens is not None else torch.empty_like(lse)
    ell = lse.new_empty(0) if ref_logprobs is None else torch.zeros_like(lse)
    losses = lse.new_empty(B)
    if B:
        common.launch(
            sequence_coefficient_kernel,
            (B,),
            logits,
            logprobs,
            _plain(policy_logprobs),
            _plain(ref_logprobs),
            mask.contiguous().view(torch.uint8),
            preference.contiguous(),
            _plain(cu_seqlens),
            coef,
            ell,
            losses,
            tokens.shape[-1],
            B,
            tau,
            baseline,
            SUMS=_SUMS[kl],
            STEP=STEP,
            num_warps=common.WARPS,
        )
    return losses.sum(), logprobs, entropy, ell, lse, coef


def _plain(x):
    return None if x is None else x.contiguous()


def pairwise_pg_loss_bwd(
    grad_logits, logits, tokens, mask, lse, coef, grad_loss, temperature, softcap
):
    common.row_gradient(
        grad_logits, logits, tokens, mask, lse, None, coef, None, grad_loss, temperature, softcap
    )


@triton.jit
def log_ratio(logprobs_ptr, policy_ptr, ref_ptr, place, keep):
    """log policy - log ref of the tokens at ``place``, 0 for those that are not kept."""
    if policy_ptr is not None:
        policy = tl.load(policy_ptr + place, mask=keep, other=0)
    else:
        policy = tl.load(logprobs_ptr + place, mask=keep, other=0)
    return tl.where(keep, policy - tl.load(ref_ptr + place, mask=keep, other=0), 0.0)


@triton.jit(do_not_specialize=["length", "batch"])
def sequence_coefficient_kernel(
    logprobs_ptr,
    policy_ptr,
    ref_ptr,
    mask_ptr,
    preference_ptr,
    cu_seqlens_ptr,
    coef_ptr,
    kl_ptr,
    losses_ptr,
    length,
    batch,
    tau: tl.float64,
    baseline: tl.float64,
    SUMS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One sequence per program: -advantage / B of its tokens, and their part of the loss.

    It walks from the last token to the first, so that a running sum is a suffix sum.
    """
    dtype: tl.constexpr = coef_ptr.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + sequence)
        count = (tl.load(cu_seqlens_ptr + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence * length
        count = length
    strength = tl.full((), tau, tl.float64).to(dtype)
    value = tl.full((), baseline, tl.float64).to(dtype)
    gain = tl.load(preference_ptr + sequence) - value
    # the count of sequences, rounded to the statistics dtype
    scale = tl.full((), batch, dtype)
    steps = tl.arange(0, STEP)

    whole = tl.full((), 0.0, dtype)
    if ref_ptr is not None and SUMS == WHOLE:
        for done in range(0, count, STEP):
            back = done + steps
            place = first + (count - 1 - back)
            keep = tl.load(mask_ptr + place, mask=back < count, other=0) != 0
            whole += tl.sum(log_ratio(logprobs_ptr, policy_ptr, ref_ptr, place, keep), 0)

    suffix = tl.full((), 0.0, dtype)
    loss = tl.full((), 0.0, dtype)
    for done in range(0, count, STEP):
        back = done + steps
        inside = back < count
        place = first + (count - 1 - back)
        keep = tl.load(mask_ptr + place, mask=inside, other=0) != 0
        logprob = tl.load(logprobs_ptr + place, mask=keep, other=0)
        advantage = tl.full((STEP,), 0.0, dtype) + gain
        if ref_ptr is not None:
            ell = log_ratio(logprobs_ptr, policy_ptr, ref_ptr, place, keep)
            tl.store(kl_ptr + place, ell, mask=inside)
            cost = ell
            if SUMS == SUFFIX:
                cost = tl.cumsum(ell, 0) + suffix
                suffix += tl.sum(ell, 0)
            elif SUMS == WHOLE:
                cost = ell * 0.0 + whole
            # 0 * inf must not be formed
            advantage -= tl.where(strength == 0, 0.0, strength * cost)
        coef = tl.where(keep, -advantage / scale, 0.0)
        tl.store(coef_ptr + place, coef, mask=inside)
        # a token that the advantage leaves out must not bring its own infinity
        loss += tl.sum(tl.where(coef == 0, 0.0, coef * logprob), 0)
    tl.store(losses_ptr + sequence, loss)
