"""What the kernels of ``mixture_sample`` share: a row's parameters, its mixture, and the draw."""

import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common
from nlhf_kernels.backends.triton.common import TILE

# ---- a row's parameters and its logits


@triton.jit
def row_scalar(rows_ptr, row, scalar, dtype: tl.constexpr):
    """The parameter of a row: its entry, or the scalar of all rows."""
    if rows_ptr is not None:
        return tl.load(rows_ptr + row).to(dtype)
    else:
        return tl.full((), scalar, tl.float64).to(dtype)


@triton.jit
def mixture_of(policy, ref, coef, ORDINARY: tl.constexpr):
    """(1 - coef) policy + coef ref; a coefficient of 0 leaves its model out, infinities too."""
    rest = 1.0 - coef
    if ORDINARY:
        return rest * policy + coef * ref
    else:
        if (coef > 0) & (rest > 0):
            mixture = rest * policy + coef * ref
        else:
            policy = tl.where(rest == 0, 0.0, policy)
            ref = tl.where(coef == 0, 0.0, ref)
            # for a negative coefficient -inf would come out as inf
            never = (policy == float("-inf")) | (ref == float("-inf"))
            mixture = tl.where(never, float("-inf"), rest * policy + coef * ref)
        return mixture


@triton.jit
def load_logits(logits_ptr, ids, vocab, whole, dtype: tl.constexpr):
    """``whole``: no id lies outside. What lies outside is -inf, and its mixture too."""
    if whole:
        x = tl.load(logits_ptr + ids)
    else:
        x = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf"))
    return x.to(dtype)


@triton.jit
def load_mixture(
    policy_ptr, ref_ptr, first, vocab, coef, SIZE: tl.constexpr, ORDINARY: tl.constexpr
):
    """(mixture, policy, ref) of the tiles from ``first`` on, ``SIZE`` ids; no ref: one for all."""
    ids = first * TILE + tl.arange(0, SIZE)
    whole = first * TILE + SIZE <= vocab
    policy = load_logits(policy_ptr, ids, vocab, whole, coef.dtype)
    if ref_ptr is None:
        return policy, policy, policy
    else:
        ref = load_logits(ref_ptr, ids, vocab, whole, coef.dtype)
        return mixture_of(policy, ref, coef, ORDINARY), policy, ref


# ---- statistics


@triton.jit
def exponent_scale(divisor):
    """What turns a difference of logits into an exponent of 2; finite, or 0 times it were NaN."""
    return tl.minimum(1.4426950408889634 / divisor, 3.4028234663852886e38)


@triton.jit
def store_tiles(statistics_ptr, x, scale, tile, tiles, stream: tl.constexpr):
    """Maximum and shifted sum of exponentials of each tile: ``x`` has parts of them in turn.

    NaN or inf anywhere makes the sum NaN, and it stays NaN to the end: that is how a bad row is
    known.
    """
    x = tl.reshape(x, (TILE // x.shape[1], tile.shape[0], x.shape[1]))
    top = common.largest(common.largest(x, 0), 1)
    shift = common.shift_of(top)[None, :, None]
    total = tl.sum(tl.sum(tl.exp2((x - shift) * scale), 0), 1)
    place = 2 * stream * tiles + tile
    tl.store(statistics_ptr + place, top, mask=tile < tiles)
    tl.store(statistics_ptr + tiles + place, total, mask=tile < tiles)


@triton.jit
def merge_tiles(statistics_ptr, divisor, tile, tiles, stream: tl.constexpr):
    """(maximum, log of the shifted sum) of a row, and per tile: shifted maximum, maximum, sum.

    The second is NaN for a row with NaN, inf or no finite logit.
    """
    place = 2 * stream * tiles + tile
    inside = tile < tiles
    # other programs wrote them: the first cache is not coherent
    top = tl.load(statistics_ptr + place, inside, float("-inf"), cache_modifier=".cg")
    total = tl.load(statistics_ptr + tiles + place, inside, 0, cache_modifier=".cg")
    highest = common.largest(top, 0)
    down = (top - common.shift_of(highest)) / divisor
    log_total = tl.log(tl.sum(total * tl.exp(down), 0))
    log_total = tl.where(highest == float("-inf"), float("nan"), log_total)
    return highest, log_total, down, top, total


# ---- the draw


@triton.jit
def log_probability(x, chosen, top, log_total, divisor):
    at = common.largest(tl.where(chosen, x, float("-inf")), 0)
    return (at - common.shift_of(top)) / divisor - log_total


@triton.jit
def draw_row(
    row, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, coef, heat, tokens_ptr,
    policy_logprobs_ptr, ref_logprobs_ptr, sampling_logprobs_ptr, log_kept_mass_ptr,
    seed_rows_ptr, position_rows_ptr, seed_low, seed_high, position, threshold, kept, kept_ties,
    TILES: tl.constexpr, ORDINARY: tl.constexpr,
):  # fmt: skip
    """The race of the tiles, then that of the winner's ids; pointers to logits are the row's.

    Filters keep what is above ``threshold`` and, of each tile, the first ``kept_ties`` equal to it:
    ``kept`` is the tile's sum of them. None: there are no filters.
    """
    dtype: tl.constexpr = coef.dtype
    greedy = heat == 0
    divisor = tl.where(greedy, 1.0, heat)
    tile = tl.arange(0, TILES)
    zero = tl.full((), 0, tl.uint32)

    if seed_rows_ptr is not None:
        seed = tl.load(seed_rows_ptr + row)
        key_low = common.word(seed)
        key_high = common.word(seed >> 32)
    else:
        last = tl.full((), 0x80000000, tl.uint32)
        low, high = common.word(seed_low), common.word(seed_high)
        key_low, key_high, _, _ = common.philox(
            low, high, common.word(row), common.word(row >> 32), zero, last
        )
    if position_rows_ptr is not None:
        place = common.word(tl.load(position_rows_ptr + row))
    else:
        place = common.word(position)

    top, whole_log, down, tops, level = merge_tiles(statistics_ptr, divisor, tile, tiles, 0)
    bad = (whole_log != whole_log) | ~((heat >= 0) & (heat < float("inf")))
    kept_log = whole_log
    if kept is not None:
        level = kept
        kept_log = tl.log(tl.sum(kept * tl.exp(down), 0))
    one = tl.full((TILES,), 1, tl.uint32)
    noise, _, _, _ = common.philox(key_low, key_high, place + one * 0, common.word(tile), one, zero)
    score = tl.where(greedy, tops, down + tl.log(level) + common.gumbel(noise, dtype))
    # argmax of NaN is nobody's; the row is bad by then
    winner = tl.argmax(tl.where(score == score, score, float("-inf")), 0)

    mixture, policy, ref = load_mixture(policy_ptr, ref_ptr, winner, vocab, coef, TILE, ORDINARY)
    lane = tl.arange(0, TILE)
    block = common.word(lane // 4)
    two = tl.full((TILE,), 2, tl.uint32)
    w0, w1, w2, w3 = common.philox(
        key_low, key_high, place + two * 0, common.word(winner), two, block
    )
    which = lane % 4
    noise = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    score = (mixture - common.shift_of(top)) / divisor
    if kept is not None:
        tie = (mixture == threshold).to(tl.int32)
        mine = tl.sum(tl.where(tile == winner, kept_ties, 0), 0)
        out = (mixture < threshold) | ((tie == 1) & (tl.cumsum(tie, 0) > mine))
        score = tl.where(out, float("-inf"), score)
    score = tl.where(greedy, mixture, score + common.gumbel(noise, dtype))
    drawn = tl.argmax(tl.where(score == score, score, float("-inf")), 0)
    chosen = lane == drawn

    policy_top, policy_log = top, whole_log
    if ref_ptr is not None:
        policy_top, policy_log, _, _, _ = merge_tiles(statistics_ptr, divisor, tile, tiles, 1)
        ref_top, ref_log, _, _, _ = merge_tiles(statistics_ptr, divisor, tile, tiles, 2)
        bad = bad | (policy_log != policy_log) | (ref_log != ref_log)
        logprob = log_probability(ref, chosen, ref_top, ref_log, divisor)
        tl.store(ref_logprobs_ptr + row, tl.where(bad, float("nan"), logprob))
    logprob = log_probability(policy, chosen, policy_top, policy_log, divisor)
    tl.store(policy_logprobs_ptr + row, tl.where(bad, float("nan"), logprob))
    logprob = log_probability(mixture, chosen, top, kept_log, divisor)
    logprob = tl.where(greedy, 0.0, logprob)
    tl.store(sampling_logprobs_ptr + row, tl.where(bad, float("nan"), logprob))
    kept_mass = tl.where(greedy, 0.0, tl.minimum(kept_log - whole_log, 0.0))
    tl.store(log_kept_mass_ptr + row, tl.where(bad, float("nan"), kept_mass))
    token = (winner * TILE + drawn).to(tl.int64)
    tl.store(tokens_ptr + row, tl.where(bad, -1, token))
