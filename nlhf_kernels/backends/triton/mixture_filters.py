"""Top-k, top-p and min-p of a row: the threshold that they come to, and what each tile keeps.

The three keep a prefix of the order (logit of the mixture descending, id ascending). So what is
kept is a threshold and a number of ids equal to it, lowest first. Tiles whose maximum lies below a
bound are not read again; the others' logits from the bound on are listed, and the list is searched.
"""

import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common
from nlhf_kernels.backends.triton.common import TILE
from nlhf_kernels.backends.triton.mixture_draw import exponent_scale, load_mixture

# numbers of the list at a time: a thread adds up its own before it widens them
PART = tl.constexpr(1024)
LANES = tl.constexpr(256)


@triton.jit
def tile_bound(tops, totals, scale, top, wanted):
    """A number that at least ``wanted`` logits of the row reach, from what is known of its tiles.

    If n of a tile's 1,024 lie within d of its maximum, its sum is at most n + (1024 - n) e^-d.
    """
    low, high = common.order_of(tl.full((), float("-inf"), tops.dtype)), common.order_of(top)
    while low < high:
        at = common.pivots(low, high, tops.dtype)[:, None]
        rest = tl.exp2((at - tops[None, :]) * scale)
        # a little less: the sums are rounded
        least = (totals[None, :] * 0.999 - TILE * rest) / (1.0 - rest)
        least = tl.where(tops[None, :] >= at, tl.where(least > 1, least, 1.0), 0.0)
        reached = tl.sum((tl.sum(least, 1) >= wanted).to(tl.int32), 0)
        low, high = common.narrowed(low, high, reached)
    return common.number_at(low, tops.dtype)


@triton.jit
def list_logits(
    list_ptr, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, coef, bound, ORDINARY: tl.constexpr
):
    """Write the mixture's finite logits from ``bound`` on, in the order of ids; how many."""
    GROUP: tl.constexpr = 128 // coef.dtype.primitive_bitwidth
    count = tl.full((), 0, tl.int32)
    for first in range(0, tiles, GROUP):
        tile = first + tl.arange(0, GROUP)
        tops = tl.load(statistics_ptr + tile, mask=tile < tiles, other=float("-inf"))
        if common.largest(tops, 0) >= bound:
            x, _, _ = load_mixture(policy_ptr, ref_ptr, first, vocab, coef, GROUP * TILE, ORDINARY)
            wanted = (x >= bound) & (x > float("-inf"))
            place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(list_ptr + place, x, mask=wanted)
            count += tl.sum(wanted.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def list_part(list_ptr, start, count):
    """PART numbers of the list, those of a thread in a column; -inf behind its end."""
    place = start + tl.arange(0, PART // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return tl.load(list_ptr + place, mask=place < count, other=float("-inf"))


@triton.jit
def search_list(list_ptr, count, low, high, goal, counting: tl.constexpr, top, scale):
    """The largest number in [low, high] that enough of the list reach, ``low`` if none is.

    Enough by their number or by their mass. Each round divides what is left by the pivots.
    """
    dtype: tl.constexpr = top.dtype
    lowest, highest = common.order_of(low), common.order_of(high)
    while lowest < highest:
        at = common.pivots(lowest, highest, dtype)
        sums = tl.zeros((common.PIVOTS, LANES), tl.float64)
        for start in range(0, count, PART):
            x = list_part(list_ptr, start, count)
            amount = tl.full(x.shape, 1.0, dtype) if counting else tl.exp2((x - top) * scale)
            each = tl.where(x[None, :, :] >= at[:, None, None], amount[None, :, :], 0.0)
            sums += tl.sum(each, 1).to(tl.float64)
        reached = tl.sum(sums, 1) >= goal
        lowest, highest = common.narrowed(lowest, highest, tl.sum(reached.to(tl.int32), 0))
    return common.number_at(lowest, dtype)


@triton.jit
def above(list_ptr, count, threshold, top, scale):
    """(how many of the list are above the threshold, their mass in float64)"""
    more = tl.zeros((LANES,), tl.int32)
    mass = tl.zeros((LANES,), tl.float64)
    for start in range(0, count, PART):
        x = list_part(list_ptr, start, count)
        more += tl.sum((x > threshold).to(tl.int32), 0)
        each = tl.where(x > threshold, tl.exp2((x - top) * scale), 0.0)
        mass += tl.sum(each, 0).to(tl.float64)
    return tl.sum(more, 0), tl.sum(mass, 0)


@triton.jit
def find_threshold(
    list_ptr, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, coef, top, tops, totals, divisor,
    top_k, top_p, min_p, ORDINARY: tl.constexpr,
):  # fmt: skip
    """(threshold, how many of those equal to it are kept, by id) of a row that has a filter."""
    dtype: tl.constexpr = top.dtype
    scale = exponent_scale(divisor)
    # zeros of both signs are equal, but differ in their order
    top = tl.where(top == 0, 0.0, top)
    counted = (top_k > 0) & (top_k < vocab)
    massed = ~(top_p >= 1)
    floor = tl.minimum(top + divisor * tl.log(min_p), top)
    mass = tl.sum(totals.to(tl.float64) * tl.exp2((tops - top) * scale).to(tl.float64), 0)

    low = tl.full((), float("-inf"), dtype)
    if counted:
        low = tile_bound(tops, totals, scale, top, top_k)
    elif massed:
        # all below it together are less than top-p leaves out
        rare = tl.log((1.0 - top_p.to(tl.float64)) * mass / vocab) - 0.001
        low = tl.minimum(top + (divisor.to(tl.float64) * rare).to(dtype), top)
    if ~(counted & massed):
        low = tl.maximum(low, floor)
    low = tl.where(low == 0, 0.0, low)

    threshold, last = low, vocab
    if counted | massed:
        count = list_logits(
            list_ptr, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, coef, low, ORDINARY
        )
        if counted:
            goal = top_k.to(tl.float64)
            threshold = search_list(list_ptr, count, low, top, goal, True, top, scale)
            more, mass = above(list_ptr, count, threshold, top, scale)
            last = (top_k - more).to(tl.int32)
            mass += last * tl.exp2((threshold - top) * scale).to(tl.float64)
        if massed:
            goal = top_p.to(tl.float64) * mass
            found = search_list(list_ptr, count, threshold, top, goal, False, top, scale)
            more, mass = above(list_ptr, count, found, top, scale)
            each = tl.exp2((found - top) * scale).to(tl.float64)
            needed = tl.ceil((goal - mass) / each)
            # a row keeps one at least; where each is nothing they do not matter
            needed = tl.where(needed < vocab, tl.maximum(needed, 1.0), vocab).to(tl.int32)
            last = tl.where(counted & (found == threshold), tl.minimum(needed, last), needed)
            threshold = found
    if floor > threshold:
        threshold, last = floor, vocab
    return threshold, last


@triton.jit
def sum_kept(
    kept_ptr, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, coef, divisor, threshold, last,
    TILES: tl.constexpr, ORDINARY: tl.constexpr,
):  # fmt: skip
    """Per tile: the sum of what is kept, and how many of it are equal to the threshold."""
    GROUP: tl.constexpr = 128 // coef.dtype.primitive_bitwidth
    scale = exponent_scale(divisor)
    for first in range(0, tiles, GROUP):
        tile = first + tl.arange(0, GROUP)
        tops = tl.load(statistics_ptr + tile, mask=tile < tiles, other=float("-inf"))
        total = tl.zeros((GROUP,), coef.dtype)
        ties = tl.zeros((GROUP,), coef.dtype)
        if common.largest(tops, 0) >= threshold:
            x, _, _ = load_mixture(policy_ptr, ref_ptr, first, vocab, coef, GROUP * TILE, ORDINARY)
            x = tl.reshape(x, (GROUP, TILE))
            e = tl.exp2((x - common.shift_of(tops)[:, None]) * scale)
            total = tl.sum(tl.where(x > threshold, e, 0.0), 1)
            ties = tl.sum((x == threshold).to(coef.dtype), 1)
        tl.store(kept_ptr + tile, total, mask=tile < tiles)
        tl.store(kept_ptr + tiles + tile, ties, mask=tile < tiles)
    tl.debug_barrier()
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    tops = tl.load(statistics_ptr + tile, mask=inside, other=float("-inf"))
    total = tl.load(kept_ptr + tile, mask=inside, other=0)
    ties = tl.load(kept_ptr + tiles + tile, mask=inside, other=0).to(tl.int32)
    before = tl.cumsum(ties, 0) - ties
    ties = tl.minimum(tl.maximum(last - before, 0), ties)
    each = tl.exp2((threshold - common.shift_of(tops)) * scale)
    return total + tl.where(ties > 0, ties * each, 0.0), ties
