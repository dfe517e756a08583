"""The sequence part of ``pairwise_pg_loss`` on Triton: one small program per sequence."""

import torch
import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common
from nlhf_kernels.backends.triton.token_rows import bytes_of, plain

# tokens per step of the walk over a sequence
STEP = 1024
SUFFIX, BEYOND, WHOLE, SINGLE = (tl.constexpr(x) for x in range(4))
_SUMS = {
    "reward_to_go": SUFFIX.value,
    "exact": BEYOND.value,
    "sequence": WHOLE.value,
    "token": SINGLE.value,
}


def pairwise_pg_coef_fwd(logprobs, cost, mask, preference, cu_seqlens, later, kl, baseline):
    B = preference.shape[0]
    # a packed batch may end before its rows do, and those rows have no coefficient
    new = torch.empty_like if cu_seqlens is None else torch.zeros_like
    coef = new(logprobs, memory_format=torch.contiguous_format)
    losses, sums = logprobs.new_empty(B), logprobs.new_empty(B)
    if B:
        common.launch(
            sequence_coefficient_kernel,
            (B,),
            logprobs,
            logprobs.contiguous(),
            plain(cost),
            bytes_of(mask),
            preference.contiguous(),
            plain(cu_seqlens),
            plain(later),
            coef,
            losses,
            sums,
            logprobs.shape[-1],
            B,
            baseline,
            SUMS=_SUMS[kl],
            STEP=STEP,
            num_warps=common.WARPS,
        )
    return losses.sum(), coef, sums


@triton.jit
def kept(mask_ptr, place, inside):
    """Which of the tokens at ``place`` count; those that are not ``inside`` do not."""
    if mask_ptr is not None:
        return tl.load(mask_ptr + place, mask=inside, other=0) != 0
    else:
        return inside


@triton.jit(do_not_specialize=["length", "batch"])
def sequence_coefficient_kernel(
    logprobs_ptr,
    cost_ptr,
    mask_ptr,
    preference_ptr,
    cu_seqlens_ptr,
    later_ptr,
    coef_ptr,
    losses_ptr,
    sums_ptr,
    length,
    batch,
    baseline: tl.float64,
    SUMS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One sequence per program: -advantage / B of its tokens, their part of the loss, its cost.

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
    value = tl.full((), baseline, tl.float64).to(dtype)
    gain = tl.load(preference_ptr + sequence) - value
    # the count of sequences, rounded to the statistics dtype
    scale = tl.full((), batch, dtype)
    steps = tl.arange(0, STEP)

    whole = tl.full((), 0.0, dtype)
    if cost_ptr is not None and SUMS == WHOLE:
        for done in range(0, count, STEP):
            back = done + steps
            place = first + (count - 1 - back)
            keep = kept(mask_ptr, place, back < count)
            whole += tl.sum(tl.load(cost_ptr + place, mask=keep, other=0), 0)

    carried = tl.full((), 0.0, dtype)
    if later_ptr is not None and SUMS != SINGLE:
        carried += tl.load(later_ptr + sequence)
    total = tl.full((), 0.0, dtype)
    loss = tl.full((), 0.0, dtype)
    for done in range(0, count, STEP):
        back = done + steps
        inside = back < count
        place = first + (count - 1 - back)
        keep = kept(mask_ptr, place, inside)
        logprob = tl.load(logprobs_ptr + place, mask=keep, other=0)
        penalty = tl.full((STEP,), 0.0, dtype) + carried
        if cost_ptr is not None:
            cost = tl.load(cost_ptr + place, mask=keep, other=0)
            total += tl.sum(cost, 0)
            if SUMS == SUFFIX:
                penalty += tl.cumsum(cost, 0)
                carried += tl.sum(cost, 0)
            elif SUMS == BEYOND:
                # of the tokens after each: a difference of two sums were NaN at an infinite cost
                beyond = kept(mask_ptr, place + 1, inside & (back > 0))
                cost = tl.load(cost_ptr + place + 1, mask=beyond, other=0)
                penalty += tl.cumsum(cost, 0)
                carried += tl.sum(cost, 0)
            elif SUMS == WHOLE:
                penalty += whole
            else:
                penalty += cost
        coef = tl.where(keep, (penalty - gain) / scale, 0.0)
        tl.store(coef_ptr + place, coef, mask=inside)
        # a token without a coefficient must not bring its own infinity
        loss += tl.sum(tl.where(coef == 0, 0.0, coef * logprob), 0)
    tl.store(losses_ptr + sequence, loss)
    tl.store(sums_ptr + sequence, total)
