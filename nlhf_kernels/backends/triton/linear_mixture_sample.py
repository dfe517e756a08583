"""``linear_mixture_sample`` on Triton: the LM head, and of its logits only what a draw needs.

A program of the first kernel multiplies a block of rows with the weights of BLOCK_V ids, a span,
and keeps of their logits the maximum and sum of each distribution and the winner of the span's part
of the second race: whoever wins the tile will have won its span. So weights are read once, logits
never leave the registers, and a span is a few numbers. The second kernel merges a row's spans in a
fixed order, draws the tile, and takes the best of its spans.
"""

import torch
import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common
from nlhf_kernels.backends.triton.common import TILE

# ids of a span, a part of a tile: enough for tensor cores, few enough that programs fill the device
BLOCK_V = 128
# bytes of a row that one step of a product takes
STEP_BYTES = 128
DRAW_OPTIONS = {"num_warps": 4}

# what is kept of a span, by model: its maximum, the sum of its exponentials, the winner's logit
MIXTURE, POLICY, REF = (tl.constexpr(3 * i) for i in range(3))
TOP, TOTAL, AT = (tl.constexpr(i) for i in range(3))
# and the winner's score
SCORE = tl.constexpr(9)
FIELDS = tl.constexpr(10)


def span_settings(B, itemsize):
    """(constants, options) of the first kernel: rows beyond a block read the weights again."""
    # logits of a thread and model: more of them, with their noise, would need all its registers
    each, most = (16, 64) if itemsize == 2 else (8, 32)
    rows = min(most, max(16, triton.next_power_of_2(B)))
    constants = {"BLOCK_B": rows, "BLOCK_V": BLOCK_V, "BLOCK_D": STEP_BYTES // itemsize}
    return constants, {"num_warps": rows * BLOCK_V // (32 * each), "num_stages": 4}


def linear_mixture_sample_fwd(
    policy_hidden,
    policy_weight,
    policy_bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    softcap,
    mixture_coef,
    mixture_coef_rows,
    temperature,
    temperature_rows,
    seed,
    seed_rows,
    position,
    position_rows,
):
    B, vocab = policy_hidden.shape[0], policy_weight.shape[0]
    new = {"dtype": torch.float32, "device": policy_hidden.device}
    tokens = torch.empty(B, dtype=torch.int64, device=policy_hidden.device)
    policy, sampling, kept_mass = (torch.empty(B, **new) for _ in range(3))
    ref = torch.empty(0 if ref_hidden is None else B, **new)
    outputs = tokens, policy, ref, sampling, kept_mass
    if B == 0:
        return outputs

    shared = ref_weight is None
    wider = max(x.dtype.itemsize for x in (policy_hidden, ref_hidden) if x is not None)
    constants, options = span_settings(B, wider)
    spans = triton.cdiv(vocab, BLOCK_V)
    found = torch.empty((B, FIELDS.value, spans), **new)
    lanes = torch.empty((B, spans), dtype=torch.int32, device=policy_hidden.device)
    policy_bias, ref_bias, *parameters = (
        None if x is None else x.contiguous()
        for x in (
            policy_bias,
            ref_bias,
            mixture_coef_rows,
            temperature_rows,
            seed_rows,
            position_rows,
        )
    )
    coef_rows, *draw_rows = parameters
    noise = (common.signed_word(x) for x in (seed, seed >> 32, position))
    drawing = (*draw_rows, temperature, *noise)
    common.launch(
        linear_span_kernel,
        # rows first: blocks that need the same weights run side by side
        (triton.cdiv(B, constants["BLOCK_B"]), spans),
        policy_hidden,
        policy_hidden,
        policy_weight,
        policy_bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        found,
        lanes,
        policy_hidden.stride(0),
        policy_weight.stride(0),
        0 if ref_hidden is None else ref_hidden.stride(0),
        0 if shared else ref_weight.stride(0),
        B,
        vocab,
        policy_hidden.shape[1],
        0 if ref_hidden is None else ref_hidden.shape[1],
        spans,
        softcap,
        coef_rows,
        mixture_coef,
        *drawing,
        SOFTCAP=softcap != 0,
        **constants,
        **options,
    )
    common.launch(
        linear_draw_kernel,
        (B,),
        policy_hidden,
        found,
        lanes,
        *outputs,
        spans,
        *drawing,
        REFERENCE=ref_hidden is not None,
        BLOCK_V=BLOCK_V,
        TILES=triton.next_power_of_2(triton.cdiv(vocab, TILE.value)),
        **DRAW_OPTIONS,
    )
    return outputs


# ---- parameters of rows


@triton.jit
def of_rows(rows_ptr, row, scalar):
    """The parameter of each row in float32: its entry, or the scalar of all rows."""
    if rows_ptr is not None:
        return tl.load(rows_ptr + row).to(tl.float32)
    else:
        return (row * 0).to(tl.float32) + tl.full((), scalar, tl.float64).to(tl.float32)


@triton.jit
def inverse_of(heat):
    """1 / temperature; 1 where that is 0. Never 0: times -inf that would be NaN."""
    return tl.maximum(1.0 / tl.where(heat == 0, 1.0, heat), 1.17549435e-38)


@triton.jit
def noise_of(seed_rows_ptr, position_rows_ptr, row, seed_low, seed_high, position):
    """(key low, key high, position) of the noise of each row, as uint32."""
    zero = common.word(row * 0)
    if seed_rows_ptr is not None:
        seed = tl.load(seed_rows_ptr + row)
        key_low = common.word(seed)
        key_high = common.word(seed >> 32)
    else:
        last = zero + tl.full((), 0x80000000, tl.uint32)
        low, high = zero + common.word(seed_low), zero + common.word(seed_high)
        key_low, key_high, _, _ = common.philox(
            low, high, common.word(row), common.word(row >> 32), zero, last
        )
    if position_rows_ptr is not None:
        place = common.word(tl.load(position_rows_ptr + row))
    else:
        place = zero + common.word(position)
    return key_low, key_high, place


# ---- the products


@triton.jit
def columns_of(ptr, row, stride, start, depth, BLOCK_D: tl.constexpr):
    """BLOCK_D columns of some rows of a matrix, 0 beyond its width."""
    column = start + tl.arange(0, BLOCK_D)
    inside = column[None, :] < depth
    x = tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0)
    if common.INTERPRETED:
        # its products of 16-bit numbers are wrong
        x = x.to(tl.float32)
    return x


@triton.jit
def product(
    hidden_ptr,
    weight_ptr,
    row,
    ids,
    hidden_stride,
    weight_stride,
    depth,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_B, BLOCK_V) of hidden @ weight.T."""
    sums = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for start in range(0, depth, BLOCK_D):
        weight = columns_of(weight_ptr, ids, weight_stride, start, depth, BLOCK_D)
        hidden = columns_of(hidden_ptr, row, hidden_stride, start, depth, BLOCK_D)
        sums = tl.dot(hidden, tl.trans(weight), sums, input_precision="ieee")
    return sums


@triton.jit
def products(
    policy_ptr,
    ref_ptr,
    weight_ptr,
    row,
    ids,
    policy_stride,
    ref_stride,
    weight_stride,
    depth,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same of two hidden states and one weight, which is read once."""
    policy = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    ref = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for start in range(0, depth, BLOCK_D):
        weight = columns_of(weight_ptr, ids, weight_stride, start, depth, BLOCK_D)
        one = columns_of(policy_ptr, row, policy_stride, start, depth, BLOCK_D)
        other = columns_of(ref_ptr, row, ref_stride, start, depth, BLOCK_D)
        policy = tl.dot(one, tl.trans(weight), policy, input_precision="ieee")
        ref = tl.dot(other, tl.trans(weight), ref, input_precision="ieee")
    return policy, ref


# ---- the logits of a span


@triton.jit
def finished(x, bias_ptr, ids, inside, cap, SOFTCAP: tl.constexpr):
    """The logits of these products."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + ids).to(tl.float32)[None, :]
    if SOFTCAP:
        x = common.soft_capped(x, cap)
    return tl.where(inside[None, :], x, float("-inf"))


@triton.jit
def mixture_of(policy, ref, coef):
    """(1 - coef) policy + coef ref; a coefficient of 0 leaves its model out, infinities too."""
    rest = 1.0 - coef
    policy = tl.where(rest == 0, 0.0, policy)
    ref = tl.where(coef == 0, 0.0, ref)
    # for a negative coefficient -inf would come out as inf
    never = (policy == float("-inf")) | (ref == float("-inf"))
    return tl.where(never, float("-inf"), rest * policy + coef * ref)


@triton.jit
def race_noise(key_low, key_high, place, span, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_B, BLOCK_V) noise of the second race: one call of Philox for four ids."""
    first = span * BLOCK_V
    zero = tl.zeros((BLOCK_B, BLOCK_V // 4), tl.uint32)
    quad = common.word(first % TILE // 4 + tl.arange(0, BLOCK_V // 4))
    w0, w1, w2, w3 = common.philox(
        zero + key_low[:, None],
        zero + key_high[:, None],
        zero + place[:, None],
        zero + common.word(first // TILE),
        zero + 2,
        zero + quad[None, :],
    )
    # word k belongs to the k-th id of the four
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return common.gumbel(tl.reshape(words, (BLOCK_B, BLOCK_V)), tl.float32)


@triton.jit
def keep_model(found_ptr, x, chosen, inverse, known, spans, model: tl.constexpr):
    """What a span keeps of a model: NaN or +inf anywhere makes the sum NaN, which is for good."""
    top = common.largest(x, 1)
    total = tl.sum(tl.exp((x - common.shift_of(top)[:, None]) * inverse[:, None]), 1)
    at = common.largest(tl.where(chosen, x, float("-inf")), 1)
    tl.store(found_ptr + (model + TOP) * spans, top, mask=known)
    tl.store(found_ptr + (model + TOTAL) * spans, total, mask=known)
    tl.store(found_ptr + (model + AT) * spans, at, mask=known)


@triton.jit(do_not_specialize=["batch", "spans", "seed_low", "seed_high", "position"])
def linear_span_kernel(
    policy_hidden_ptr,
    policy_weight_ptr,
    policy_bias_ptr,
    ref_hidden_ptr,
    ref_weight_ptr,
    ref_bias_ptr,
    found_ptr,
    lanes_ptr,
    policy_hidden_stride,
    policy_weight_stride,
    ref_hidden_stride,
    ref_weight_stride,
    batch,
    vocab,
    policy_depth,
    ref_depth,
    spans,
    softcap: tl.float64,
    coef_rows_ptr,
    coef: tl.float64,
    temperature_rows_ptr,
    seed_rows_ptr,
    position_rows_ptr,
    temperature: tl.float64,
    seed_low: tl.int32,
    seed_high: tl.int32,
    position: tl.int32,
    SOFTCAP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_B rows and BLOCK_V ids per program."""
    span = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    known = row < batch
    # beyond the last row, and the last id, that one is taken again and the result dropped
    row = tl.minimum(row, batch - 1).to(tl.int64)
    ids = span * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = ids < vocab
    ids = tl.minimum(ids, vocab - 1).to(tl.int64)

    if ref_hidden_ptr is not None and ref_weight_ptr is None:
        policy, ref = products(
            policy_hidden_ptr, ref_hidden_ptr, policy_weight_ptr, row, ids,
            policy_hidden_stride, ref_hidden_stride, policy_weight_stride, policy_depth,
            BLOCK_B, BLOCK_V, BLOCK_D,
        )  # fmt: skip
    else:
        policy = product(
            policy_hidden_ptr, policy_weight_ptr, row, ids, policy_hidden_stride,
            policy_weight_stride, policy_depth, BLOCK_B, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if ref_hidden_ptr is not None:
            ref = product(
                ref_hidden_ptr, ref_weight_ptr, row, ids, ref_hidden_stride, ref_weight_stride,
                ref_depth, BLOCK_B, BLOCK_V, BLOCK_D,
            )  # fmt: skip
    cap = tl.full((), softcap, tl.float64).to(tl.float32)
    policy = finished(policy, policy_bias_ptr, ids, inside, cap, SOFTCAP)
    mixture = policy
    if ref_hidden_ptr is not None:
        ref = finished(ref, ref_bias_ptr, ids, inside, cap, SOFTCAP)
        mixture = mixture_of(policy, ref, of_rows(coef_rows_ptr, row, coef)[:, None])
        # a coefficient that leaves a model out leaves out that the id is beyond the vocabulary
        mixture = tl.where(inside[None, :], mixture, float("-inf"))

    heat = of_rows(temperature_rows_ptr, row, temperature)
    inverse = inverse_of(heat)
    key_low, key_high, place = noise_of(
        seed_rows_ptr, position_rows_ptr, row, seed_low, seed_high, position
    )
    noise = race_noise(key_low, key_high, place, span, BLOCK_B, BLOCK_V)
    shift = common.shift_of(common.largest(mixture, 1))
    score = (mixture - shift[:, None]) * inverse[:, None] + noise
    score = tl.where(heat[:, None] == 0, mixture, score)
    # argmax of NaN is nobody's; the row is bad by then
    best, lane = tl.max(tl.where(score == score, score, float("-inf")), 1, return_indices=True)

    chosen = tl.arange(0, BLOCK_V)[None, :] == lane[:, None]
    tl.store(lanes_ptr + row * spans + span, lane, mask=known)
    found_ptr += row * FIELDS * spans + span
    tl.store(found_ptr + SCORE * spans, best, mask=known)
    keep_model(found_ptr, mixture, chosen, inverse, known, spans, MIXTURE)
    if ref_hidden_ptr is not None:
        keep_model(found_ptr, policy, chosen, inverse, known, spans, POLICY)
        keep_model(found_ptr, ref, chosen, inverse, known, spans, REF)


# ---- the draw


@triton.jit
def merge_spans(
    found_ptr, spans, inverse, model: tl.constexpr, TILES: tl.constexpr, SPANS: tl.constexpr
):
    """(maximum, log of the shifted sum) of a row, and per tile its maximum and its part of the sum.

    The second is NaN for a row with NaN, inf or no finite logit.
    """
    span = tl.arange(0, TILES)[:, None] * SPANS + tl.arange(0, SPANS)[None, :]
    some = span < spans
    top = tl.load(found_ptr + (model + TOP) * spans + span, mask=some, other=float("-inf"))
    total = tl.load(found_ptr + (model + TOTAL) * spans + span, mask=some, other=0)
    tops = common.largest(top, 1)
    highest = common.largest(tops, 0)
    sums = tl.sum(total * tl.exp((top - common.shift_of(highest)) * inverse), 1)
    log_total = tl.log(tl.sum(sums, 0))
    log_total = tl.where(highest == float("-inf"), float("nan"), log_total)
    return highest, log_total, tops, sums


@triton.jit(do_not_specialize=["spans", "seed_low", "seed_high", "position"])
def linear_draw_kernel(
    found_ptr,
    lanes_ptr,
    tokens_ptr,
    policy_logprobs_ptr,
    ref_logprobs_ptr,
    sampling_logprobs_ptr,
    log_kept_mass_ptr,
    spans,
    temperature_rows_ptr,
    seed_rows_ptr,
    position_rows_ptr,
    temperature: tl.float64,
    seed_low: tl.int32,
    seed_high: tl.int32,
    position: tl.int32,
    REFERENCE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
):
    """One row per program: the race of the tiles, then the best of the winner's spans."""
    SPANS: tl.constexpr = TILE // BLOCK_V
    row = tl.program_id(0).to(tl.int64)
    found_ptr += row * FIELDS * spans
    heat = of_rows(temperature_rows_ptr, row, temperature)
    inverse = inverse_of(heat)
    greedy = heat == 0
    mixture_top, mixture_log, tops, sums = merge_spans(
        found_ptr, spans, inverse, MIXTURE, TILES, SPANS
    )

    key_low, key_high, place = noise_of(
        seed_rows_ptr, position_rows_ptr, row, seed_low, seed_high, position
    )
    tile = common.word(tl.arange(0, TILES))
    zero, one = tile * 0, tile * 0 + 1
    words, _, _, _ = common.philox(zero + key_low, zero + key_high, zero + place, tile, one, zero)
    score = tl.where(greedy, tops, tl.log(sums) + common.gumbel(words, tl.float32))
    winner = tl.argmax(tl.where(score == score, score, float("-inf")), 0)

    span = winner * SPANS + tl.arange(0, SPANS)
    some = span < spans
    best = tl.load(found_ptr + SCORE * spans + span, mask=some, other=float("-inf"))
    top = tl.load(found_ptr + (MIXTURE + TOP) * spans + span, mask=some, other=float("-inf"))
    # scores are relative to the maximum of their span
    down = (top - common.shift_of(mixture_top)) * inverse
    score = tl.where(greedy, best, best + down)
    drawn = winner * SPANS + tl.argmax(tl.where(score == score, score, float("-inf")), 0)

    bad = (mixture_log != mixture_log) | (heat < 0) | (heat == float("inf")) | (heat != heat)
    at = tl.load(found_ptr + (MIXTURE + AT) * spans + drawn)
    sampling = (at - common.shift_of(mixture_top)) * inverse - mixture_log
    if REFERENCE:
        policy_top, policy_log, _, _ = merge_spans(found_ptr, spans, inverse, POLICY, TILES, SPANS)
        ref_top, ref_log, _, _ = merge_spans(found_ptr, spans, inverse, REF, TILES, SPANS)
        bad = bad | (policy_log != policy_log) | (ref_log != ref_log)
        at = tl.load(found_ptr + (REF + AT) * spans + drawn)
        logprob = (at - common.shift_of(ref_top)) * inverse - ref_log
        tl.store(ref_logprobs_ptr + row, tl.where(bad, float("nan"), logprob))
        at = tl.load(found_ptr + (POLICY + AT) * spans + drawn)
        policy = (at - common.shift_of(policy_top)) * inverse - policy_log
    else:
        policy = sampling
    tl.store(policy_logprobs_ptr + row, tl.where(bad, float("nan"), policy))
    sampling = tl.where(greedy, 0.0, sampling)
    tl.store(sampling_logprobs_ptr + row, tl.where(bad, float("nan"), sampling))
    tl.store(log_kept_mass_ptr + row, tl.where(bad, float("nan"), 0.0))
    token = drawn.to(tl.int64) * BLOCK_V + tl.load(lanes_ptr + row * spans + drawn)
    tl.store(tokens_ptr + row, tl.where(bad, -1, token))
