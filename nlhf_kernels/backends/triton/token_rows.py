"""The two row kernels: statistics of a row at its token, and the gradient of their sum.

Both work with exponents of 2: score = logit * scale, log2(e) / temperature folded into one number,
so that an element costs one multiply-add before its power. Under a soft cap a place between 0 and 1
stands for the logit: with y = 1 / (1 + exp(2 x / cap)), cap * tanh(x / cap) = cap - 2 cap y, which
is as linear in y as it is in x without a cap. All but ``lse`` ignores the constant.
"""

import torch
import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common
from nlhf_kernels.backends.triton.common import INTERPRETED

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# a power of 2 that is 0, subnormal numbers and float64 included: stands for -inf in products
NEVER = tl.constexpr(-1100.0)
# a token of another part of the vocabulary: no logit here, but a gradient
ELSEWHERE = tl.constexpr(-(2**62))
# what the sum of a row, relative to its anchor, must stay below
MANY = tl.constexpr(2.0**20)

# ids that the program of a row reads at a time, and that one of the gradient has: 16 a thread
BLOCK = 2048
ROW_OPTIONS = {"num_warps": common.WARPS, "enable_fp_fusion": True}
# of the second axis of a grid
MOST_PROGRAMS = 65_535


# ---- the host's side


def row_statistics(logits, ref_logits, tokens, mask, temperature, softcap):
    """Each of tokens' shape, 0 in the rows that ``mask`` leaves out.

    (logprobs, entropy, lse), or with a reference (logprobs, ref_logprobs, entropy, kl, lse,
    ref_lse).
    """
    rows, length, batch_stride, row_stride = common.row_layout(logits)
    dtype = common.statistics_dtype(logits, ref_logits)
    ref_strides = (0, 0) if ref_logits is None else common.row_layout(ref_logits)[2:]

    def output(wanted=True):
        return torch.empty(tokens.shape, dtype=dtype, device=logits.device) if wanted else None

    with_ref = ref_logits is not None
    logprobs, entropy, lse = output(), output(), output()
    ref_logprobs, kl, ref_lse = output(with_ref), output(with_ref), output(with_ref)
    if rows:
        common.launch(
            row_statistics_kernel,
            (rows,),
            logits,
            logits,
            ref_logits,
            tokens.contiguous(),
            bytes_of(mask),
            logprobs,
            ref_logprobs,
            entropy,
            kl,
            lse,
            ref_lse,
            batch_stride,
            row_stride,
            *ref_strides,
            length,
            logits.shape[-1],
            *scaling(dtype, temperature, softcap),
            SOFTCAP=softcap != 0,
            BLOCK=BLOCK,
            **ROW_OPTIONS,
        )
    if with_ref:
        return logprobs, ref_logprobs, entropy, kl, lse, ref_lse
    return logprobs, entropy, lse


def row_gradient(
    grad_logits,
    logits,
    ref_logits,
    tokens,
    mask,
    lse,
    ref_lse,
    entropy,
    kl,
    grad_logprobs,
    grad_entropy,
    grad_kl,
    temperature,
    softcap,
):
    """Write the gradient of the sum of each output, times its gradient, to ``grad_logits``."""
    rows, length, batch_stride, row_stride = common.row_layout(logits)
    _, _, *grad_strides = common.row_layout(grad_logits)
    ref_strides = (0, 0) if ref_logits is None else common.row_layout(ref_logits)[2:]
    if not rows:
        return
    vocab = logits.shape[-1]
    slabs = triton.cdiv(rows, MOST_PROGRAMS)
    common.launch(
        row_gradient_kernel,
        # blocks of a row side by side: neighbours in time are neighbours in memory
        (triton.cdiv(vocab, BLOCK), triton.cdiv(rows, slabs), slabs),
        logits,
        grad_logits,
        logits,
        ref_logits,
        tokens.contiguous(),
        bytes_of(mask),
        *map(plain, (lse, ref_lse, entropy, kl, grad_logprobs, grad_entropy, grad_kl)),
        *grad_strides,
        batch_stride,
        row_stride,
        *ref_strides,
        length,
        rows,
        vocab,
        *scaling(lse.dtype, temperature, softcap),
        (4 if softcap else 1) / temperature,
        SOFTCAP=softcap != 0,
        BLOCK=BLOCK,
        **ROW_OPTIONS,
    )


def scaling(dtype, temperature, softcap):
    """(scale, offset, rate): score = scale * x + offset; rate is 2 / cap, for a power of 2."""
    # finite, or 0 times it were NaN
    scale = min(LOG2_E / temperature, torch.finfo(dtype).max)
    if not softcap:
        return scale, 0.0, 0.0
    return -2 * softcap * scale, softcap * scale, 2 * LOG2_E / softcap


def bytes_of(mask):
    return None if mask is None else mask.contiguous().view(torch.uint8)


def plain(x):
    return None if x is None else x.contiguous()


# ---- arithmetic


@triton.jit
def place_of(x, rate, SOFTCAP: tl.constexpr):
    """What the score is linear in: the logit, or 1 / (1 + exp(2 x / cap))."""
    if SOFTCAP:
        return 1.0 / (1.0 + tl.exp2(x * rate))
    else:
        return x


@triton.jit
def score(y, scale, shift):
    """y * scale - shift, rounded once: a shift that is large leaves the rest its digits."""
    if INTERPRETED and y.dtype == tl.float32:
        # compiled code has an instruction for it
        return (y.to(tl.float64) * scale.to(tl.float64) - shift.to(tl.float64)).to(tl.float32)
    else:
        return y * scale - shift


@triton.jit
def scores_of(x, scale, shift, rate, SOFTCAP: tl.constexpr):
    return score(place_of(x.to(shift.dtype), rate, SOFTCAP), scale, shift)


@triton.jit
def load_scores(logits_ptr, ids, stop, scale, shift, rate, SOFTCAP: tl.constexpr):
    """What does not come before ``stop`` is -inf."""
    x = tl.load(logits_ptr + ids, mask=ids < stop, other=0)
    return tl.where(ids < stop, scores_of(x, scale, shift, rate, SOFTCAP), float("-inf"))


@triton.jit
def folded(x):
    """Sums of what a thread has side by side: fewer registers, and more rows at a time."""
    WIDTH: tl.constexpr = 128 // x.dtype.primitive_bitwidth
    return tl.sum(tl.reshape(x, (x.shape[0] // WIDTH, WIDTH)), 1)


@triton.jit
def add(total, weighted, ref_total, apart, t, u):
    """Sums per lane of e, e t, of ref's and of e (t - u): t, u the scores, e the power of t."""
    e = tl.exp2(t)
    if u is None:
        return (total + folded(e), weighted + folded(e * tl.maximum(t, NEVER)), ref_total, apart)
    else:
        # what has no probability counts nothing, and what ref alone leaves out is infinitely far
        never = e == 0
        return (
            total + folded(e),
            weighted + folded(e * tl.where(never, 0.0, t)),
            ref_total + folded(tl.exp2(u)),
            apart + folded(e * tl.where(never, 0.0, t - u)),
        )


@triton.jit
def add_rest(
    total, weighted, ref_total, apart, logits_ptr, ref_ptr, start, stop, scale, shift, ref_shift,
    rate, SOFTCAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sums with all ids from ``start`` to ``stop``."""
    for first in range(start, stop, LANES):
        ids = first + tl.arange(0, LANES)
        t = load_scores(logits_ptr, ids, stop, scale, shift, rate, SOFTCAP)
        u = None
        if ref_ptr is not None:
            u = load_scores(ref_ptr, ids, stop, scale, ref_shift, rate, SOFTCAP)
        total, weighted, ref_total, apart = add(total, weighted, ref_total, apart, t, u)
    return total, weighted, ref_total, apart


@triton.jit
def anchor_of(y, logits_ptr, ids, stop, zero, scale, rate, SOFTCAP: tl.constexpr):
    """The largest score of a row's first ids and its token, which is likely to have much mass."""
    first = load_scores(logits_ptr, ids, stop, scale, zero, rate, SOFTCAP)
    top = score(y, scale, zero)
    top = tl.where(top == top, top, float("-inf"))
    return common.shift_of(tl.maximum(top, common.largest(first, 0)))


@triton.jit
def row_top(logits_ptr, stop, zero, scale, rate, SOFTCAP: tl.constexpr, LANES: tl.constexpr):
    """The largest score of a row."""
    top = tl.full((LANES,), float("-inf"), zero.dtype)
    for start in range(0, stop, LANES):
        ids = start + tl.arange(0, LANES)
        t = load_scores(logits_ptr, ids, stop, scale, zero, rate, SOFTCAP)
        top = tl.maximum(top, tl.where(t == t, t, float("-inf")))
    return common.shift_of(common.largest(top, 0))


@triton.jit
def token_place(logits_ptr, token, known, rate, dtype: tl.constexpr, SOFTCAP: tl.constexpr):
    """What the score of the token is linear in; NaN for one outside of the vocabulary."""
    x = tl.load(logits_ptr + tl.where(known, token, 0), mask=known, other=0).to(dtype)
    return tl.where(known, place_of(x, rate, SOFTCAP), float("nan"))


@triton.jit
def exponent_level(lse, offset):
    """(level, rest): log2 p = scale * y - level + rest. The rest is what rounding took away."""
    exact = lse.to(tl.float64) * 1.4426950408889634 - offset
    level = exact.to(lse.dtype)
    return level, (level.to(tl.float64) - exact).to(lse.dtype)


# ---- the kernels


@triton.jit(do_not_specialize=["length"])
def row_statistics_kernel(
    logits_ptr,
    ref_ptr,
    tokens_ptr,
    mask_ptr,
    logprobs_ptr,
    ref_logprobs_ptr,
    entropy_ptr,
    kl_ptr,
    lse_ptr,
    ref_lse_ptr,
    batch_stride,
    row_stride,
    ref_batch_stride,
    ref_row_stride,
    length,
    vocab,
    scale: tl.float64,
    offset: tl.float64,
    rate: tl.float64,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program, in one read: log-probability of its token, entropy, log-sum-exp, KL.

    Scores are shifted by an anchor near the maximum, so that sums need no rescaling and lanes none
    of each other; a row that outgrows its anchor is read again, from its maximum.
    """
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0)
    scale = tl.full((), scale, tl.float64).to(dtype)
    rate = tl.full((), rate, tl.float64).to(dtype)
    zero = tl.full((), 0.0, dtype)
    keep = True
    stop = vocab
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + row) != 0
        # nothing of a row under the mask is read
        stop = tl.where(keep, vocab, 0)
    logits_ptr += common.row_offset(row, length, batch_stride, row_stride)
    token = tl.load(tokens_ptr + row, mask=keep, other=-1)
    known = (token >= 0) & (token < vocab)
    # half as many numbers of twice the width
    LANES: tl.constexpr = BLOCK * 32 // dtype.primitive_bitwidth
    lane = tl.arange(0, LANES)

    y = token_place(logits_ptr, token, known, rate, dtype, SOFTCAP)
    shift = anchor_of(y, logits_ptr, lane, stop, zero, scale, rate, SOFTCAP)
    ref_y, ref_shift = y, zero
    if ref_ptr is not None:
        ref_ptr += common.row_offset(row, length, ref_batch_stride, ref_row_stride)
        ref_y = token_place(ref_ptr, token, known, rate, dtype, SOFTCAP)
        ref_shift = anchor_of(ref_y, ref_ptr, lane, stop, zero, scale, rate, SOFTCAP)

    none = tl.full((BLOCK // 4,), 0.0, dtype)
    total, weighted, ref_total, apart = none, none, none, none
    whole = stop // LANES * LANES
    for start in range(0, whole, LANES):
        t = scores_of(tl.load(logits_ptr + start + lane), scale, shift, rate, SOFTCAP)
        u = None
        if ref_ptr is not None:
            u = scores_of(tl.load(ref_ptr + start + lane), scale, ref_shift, rate, SOFTCAP)
        total, weighted, ref_total, apart = add(total, weighted, ref_total, apart, t, u)
    total, weighted, ref_total, apart = add_rest(
        total, weighted, ref_total, apart, logits_ptr, ref_ptr, whole, stop, scale, shift,
        ref_shift, rate, SOFTCAP, LANES,
    )  # fmt: skip
    mass, ref_mass = tl.sum(total, 0), tl.sum(ref_total, 0)

    # of NaN and infinities too
    if ~((mass < MANY) & (ref_mass < MANY)):
        shift = row_top(logits_ptr, stop, zero, scale, rate, SOFTCAP, LANES)
        if ref_ptr is not None:
            ref_shift = row_top(ref_ptr, stop, zero, scale, rate, SOFTCAP, LANES)
        total, weighted, ref_total, apart = add_rest(
            none, none, none, none, logits_ptr, ref_ptr, 0, stop, scale, shift, ref_shift, rate,
            SOFTCAP, LANES,
        )  # fmt: skip
        mass, ref_mass = tl.sum(total, 0), tl.sum(ref_total, 0)

    offset = tl.full((), offset, tl.float64).to(dtype)
    log_mass = tl.log(mass)
    logprob = score(y, scale, shift) * LN_2 - log_mass
    tl.store(logprobs_ptr + row, tl.where(keep, logprob, 0.0))
    entropy = log_mass - tl.sum(weighted, 0) * LN_2 / mass
    tl.store(entropy_ptr + row, tl.where(keep, entropy, 0.0))
    tl.store(lse_ptr + row, tl.where(keep, (shift + offset) * LN_2 + log_mass, 0.0))
    if ref_ptr is not None:
        ref_log_mass = tl.log(ref_mass)
        logprob = score(ref_y, scale, ref_shift) * LN_2 - ref_log_mass
        tl.store(ref_logprobs_ptr + row, tl.where(keep, logprob, 0.0))
        kl = tl.sum(apart, 0) * LN_2 / mass + (ref_log_mass - log_mass)
        tl.store(kl_ptr + row, tl.where(keep, kl, 0.0))
        ref_lse = (ref_shift + offset) * LN_2 + ref_log_mass
        tl.store(ref_lse_ptr + row, tl.where(keep, ref_lse, 0.0))


@triton.jit(do_not_specialize=["length", "rows"])
def row_gradient_kernel(
    grad_ptr,
    logits_ptr,
    ref_ptr,
    tokens_ptr,
    mask_ptr,
    lse_ptr,
    ref_lse_ptr,
    entropy_ptr,
    kl_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    grad_kl_ptr,
    grad_batch_stride,
    grad_row_stride,
    batch_stride,
    row_stride,
    ref_batch_stride,
    ref_row_stride,
    length,
    rows,
    vocab,
    scale: tl.float64,
    offset: tl.float64,
    rate: tl.float64,
    slope: tl.float64,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row: g (delta - p) - h p (log p + H) + k p (log p - log q - KL), scaled.

    As g delta - p (a + b log2 p + c log2 (p / q)), a, b, c of the row. No program reads what
    another writes, so the gradient may overwrite the logits.
    """
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.full((), scale, tl.float64).to(dtype)
    offset = tl.full((), offset, tl.float64)
    rate = tl.full((), rate, tl.float64).to(dtype)
    slope = tl.full((), slope, tl.float64).to(dtype)
    keep = row < rows
    last = tl.where(keep, vocab, 0)
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + row, mask=keep, other=0) != 0
    # nothing of a row under the mask is read
    wanted = ids < tl.where(keep, vocab, 0)
    logits_ptr += common.row_offset(row, length, batch_stride, row_stride)
    grad_ptr += common.row_offset(row, length, grad_batch_stride, grad_row_stride)

    x = tl.load(logits_ptr + ids, mask=wanted, other=0).to(dtype)
    y = place_of(x, rate, SOFTCAP)
    token = tl.load(tokens_ptr + row, mask=keep, other=-1)
    known = (token >= 0) & (token < vocab)
    counts = known | (token == ELSEWHERE)
    g = tl.where(counts, tl.load(grad_logprobs_ptr + row, mask=keep, other=0), 0.0) * slope
    level, rest = exponent_level(tl.load(lse_ptr + row, mask=keep, other=0), offset)
    t = score(y, scale, level)
    p = tl.exp2(t)
    # what rounding took from p
    factor = tl.exp2(rest)
    a = g
    if grad_entropy_ptr is not None:
        h = tl.load(grad_entropy_ptr + row, mask=keep, other=0) * slope
        b = h * LN_2
        a += h * tl.load(entropy_ptr + row, mask=keep, other=0) + b * rest
    if grad_kl_ptr is not None:
        k = tl.load(grad_kl_ptr + row, mask=keep, other=0) * slope
        c = k * LN_2
        ref_lse = tl.load(ref_lse_ptr + row, mask=keep, other=0)
        ref_level, ref_rest = exponent_level(ref_lse, offset)
        ref_ptr += common.row_offset(row, length, ref_batch_stride, ref_row_stride)
        r = tl.load(ref_ptr + ids, mask=wanted, other=0).to(dtype)
        u = score(place_of(r, rate, SOFTCAP), scale, ref_level)
        kl = tl.load(kl_ptr + row, mask=keep, other=0)
        # 0 times an infinity must not be formed: neither where p is 0 nor where k is
        a += tl.where(k == 0, 0.0, k * kl - c * (rest - ref_rest))
        nothing = tl.where(k == 0, float("inf"), 0.0)
    each = 0.0 - a * factor
    if grad_entropy_ptr is not None:
        each -= (b * factor) * tl.maximum(t, NEVER)
    if grad_kl_ptr is not None:
        each += (c * factor) * tl.where(p <= nothing, 0.0, t - u)
    grad = p * each
    # 32 bits: comparisons of 64 cost as much as the rest
    grad = tl.where(ids == tl.where(known, token, -1).to(tl.int32), grad + g, grad)
    if SOFTCAP:
        grad *= y - y * y
    tl.store(grad_ptr + ids, common.rounded_to(grad, grad_ptr.dtype.element_ty), mask=ids < last)
