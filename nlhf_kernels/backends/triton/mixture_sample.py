"""``mixture_sample`` on Triton: statistics per tile of 1,024 ids, then one program per row.

The first kernel reads the logits once, spread over rows and groups of tiles, so that a decode step
with few rows still fills the device. The second merges a row's tiles in a fixed order, draws the
tile, reads it again and draws the token: results do not depend on how the first was scheduled.
"""

import torch
import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common
from nlhf_kernels.backends.triton.common import TILE

# tiles per program of the first kernel: with its warps, 16 ids a thread and model
GROUP = 4
# no fused multiply-add: both kernels, and eager, must see the same mixture to the last bit
TILE_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
DRAW_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def mixture_sample_fwd(
    policy_logits,
    ref_logits,
    mixture_coef,
    mixture_coef_rows,
    temperature,
    temperature_rows,
    seed,
    seed_rows,
    position,
    position_rows,
):
    B, vocab = policy_logits.shape
    dtype = common.statistics_dtype(policy_logits, ref_logits)
    new = {"dtype": dtype, "device": policy_logits.device}
    tokens = torch.empty(B, dtype=torch.int64, device=policy_logits.device)
    policy, sampling, kept_mass = (torch.empty(B, **new) for _ in range(3))
    ref = torch.empty(0 if ref_logits is None else B, **new)
    outputs = tokens, policy, ref, sampling, kept_mass
    if B == 0:
        return outputs

    tiles = triton.cdiv(vocab, TILE.value)
    # maximum and sum per tile, of the mixture, the policy and ref
    statistics = torch.empty((B, 2 if ref_logits is None else 6, tiles), **new)
    coef_rows, temperature_rows, seed_rows, position_rows = (
        None if rows is None else rows.contiguous()
        for rows in (mixture_coef_rows, temperature_rows, seed_rows, position_rows)
    )
    models = (
        policy_logits,
        ref_logits,
        statistics,
        coef_rows,
        temperature_rows,
        policy_logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        vocab,
        tiles,
        mixture_coef,
        temperature,
    )
    common.launch(
        mixture_tile_kernel,
        (B, triton.cdiv(tiles, GROUP)),
        policy_logits,
        *models,
        GROUP=GROUP,
        **TILE_OPTIONS,
    )
    common.launch(
        mixture_draw_kernel,
        (B,),
        policy_logits,
        *models,
        *outputs,
        seed_rows,
        position_rows,
        common.signed_word(seed),
        common.signed_word(seed >> 32),
        common.signed_word(position),
        TILES=triton.next_power_of_2(tiles),
        **DRAW_OPTIONS,
    )
    return outputs


@triton.jit
def row_scalar(rows_ptr, row, scalar, dtype: tl.constexpr):
    """The parameter of a row: its entry, or the scalar of all rows."""
    if rows_ptr is not None:
        return tl.load(rows_ptr + row).to(dtype)
    else:
        return tl.full((), scalar, tl.float64).to(dtype)


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
def load_logits(logits_ptr, ids, inside, dtype: tl.constexpr):
    x = tl.load(logits_ptr + ids, mask=inside, other=0).to(dtype)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def store_tiles(statistics_ptr, x, divisor, tile, tiles, stream: tl.constexpr):
    """Maximum and shifted sum of exponentials of each row of ``x``, which is a tile.

    NaN or inf anywhere makes the sum NaN, and it stays NaN to the end: that is how a bad row is
    known.
    """
    top = common.largest(x, 1)
    total = tl.sum(tl.exp((x - common.shift_of(top)[:, None]) / divisor), 1)
    place = 2 * stream * tiles + tile
    tl.store(statistics_ptr + place, top, mask=tile < tiles)
    tl.store(statistics_ptr + tiles + place, total, mask=tile < tiles)


@triton.jit
def merge_tiles(statistics_ptr, divisor, tile, tiles, stream: tl.constexpr):
    """(maximum, log of the shifted sum) of a row, and per tile the log of its mass relative to it.

    The second is NaN for a row with NaN, inf or no finite logit.
    """
    place = 2 * stream * tiles + tile
    top = tl.load(statistics_ptr + place, mask=tile < tiles, other=float("-inf"))
    total = tl.load(statistics_ptr + tiles + place, mask=tile < tiles, other=0)
    highest = common.largest(top, 0)
    down = (top - common.shift_of(highest)) / divisor
    log_total = tl.log(tl.sum(total * tl.exp(down), 0))
    log_total = tl.where(highest == float("-inf"), float("nan"), log_total)
    return highest, log_total, down + tl.log(total), top


@triton.jit(do_not_specialize=["tiles"])
def mixture_tile_kernel(
    policy_ptr,
    ref_ptr,
    statistics_ptr,
    coef_rows_ptr,
    temperature_rows_ptr,
    policy_stride,
    ref_stride,
    vocab,
    tiles,
    coef: tl.float64,
    temperature: tl.float64,
    GROUP: tl.constexpr,
):
    """GROUP tiles of one row per program: maximum and sum of the mixture, the policy and ref."""
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    divisor = row_scalar(temperature_rows_ptr, row, temperature, dtype)
    divisor = tl.where(divisor == 0, 1.0, divisor)
    tile = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    ids = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = ids < vocab
    policy = load_logits(policy_ptr + row * policy_stride, ids, inside, dtype)
    if ref_ptr is None:
        statistics_ptr += row * 2 * tiles
        store_tiles(statistics_ptr, policy, divisor, tile, tiles, 0)
    else:
        statistics_ptr += row * 6 * tiles
        ref = load_logits(ref_ptr + row * ref_stride, ids, inside, dtype)
        mixture = mixture_of(policy, ref, row_scalar(coef_rows_ptr, row, coef, dtype))
        mixture = tl.where(inside, mixture, float("-inf"))
        store_tiles(statistics_ptr, mixture, divisor, tile, tiles, 0)
        store_tiles(statistics_ptr, policy, divisor, tile, tiles, 1)
        store_tiles(statistics_ptr, ref, divisor, tile, tiles, 2)


@triton.jit(do_not_specialize=["tiles", "seed_low", "seed_high", "position"])
def mixture_draw_kernel(
    policy_ptr,
    ref_ptr,
    statistics_ptr,
    coef_rows_ptr,
    temperature_rows_ptr,
    policy_stride,
    ref_stride,
    vocab,
    tiles,
    coef: tl.float64,
    temperature: tl.float64,
    tokens_ptr,
    policy_logprobs_ptr,
    ref_logprobs_ptr,
    sampling_logprobs_ptr,
    log_kept_mass_ptr,
    seed_rows_ptr,
    position_rows_ptr,
    seed_low: tl.int32,
    seed_high: tl.int32,
    position: tl.int32,
    TILES: tl.constexpr,
):
    """One row per program: the race of the tiles, then that of the winner's ids."""
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    heat = row_scalar(temperature_rows_ptr, row, temperature, dtype)
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

    statistics_ptr += row * (2 if ref_ptr is None else 6) * tiles
    mixture_top, mixture_log, level, tops = merge_tiles(statistics_ptr, divisor, tile, tiles, 0)
    bad = (mixture_log != mixture_log) | (heat < 0)
    one = tl.full((TILES,), 1, tl.uint32)
    noise, _, _, _ = common.philox(key_low, key_high, place + one * 0, common.word(tile), one, zero)
    score = tl.where(greedy, tops, level + common.gumbel(noise, dtype))
    # argmax of NaN is nobody's; the row is bad by then
    winner = tl.argmax(tl.where(score == score, score, float("-inf")), 0)

    lane = tl.arange(0, TILE)
    ids = winner * TILE + lane
    inside = ids < vocab
    policy = load_logits(policy_ptr + row * policy_stride, ids, inside, dtype)
    mixture = policy
    if ref_ptr is not None:
        ref = load_logits(ref_ptr + row * ref_stride, ids, inside, dtype)
        mixture = mixture_of(policy, ref, row_scalar(coef_rows_ptr, row, coef, dtype))
        mixture = tl.where(inside, mixture, float("-inf"))
    block = common.word(lane // 4)
    two = tl.full((TILE,), 2, tl.uint32)
    w0, w1, w2, w3 = common.philox(
        key_low, key_high, place + two * 0, common.word(winner), two, block
    )
    which = lane % 4
    noise = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    score = (mixture - common.shift_of(mixture_top)) / divisor
    score = tl.where(greedy, mixture, score + common.gumbel(noise, dtype))
    drawn = tl.argmax(tl.where(score == score, score, float("-inf")), 0)
    chosen = lane == drawn

    if ref_ptr is not None:
        policy_top, policy_log, _, _ = merge_tiles(statistics_ptr, divisor, tile, tiles, 1)
        ref_top, ref_log, _, _ = merge_tiles(statistics_ptr, divisor, tile, tiles, 2)
        bad = bad | (policy_log != policy_log) | (ref_log != ref_log)
        at = common.largest(tl.where(chosen, ref, float("-inf")), 0)
        logprob = (at - common.shift_of(ref_top)) / divisor - ref_log
        tl.store(ref_logprobs_ptr + row, tl.where(bad, float("nan"), logprob))
    else:
        policy_top, policy_log = mixture_top, mixture_log
    at = common.largest(tl.where(chosen, policy, float("-inf")), 0)
    logprob = (at - common.shift_of(policy_top)) / divisor - policy_log
    tl.store(policy_logprobs_ptr + row, tl.where(bad, float("nan"), logprob))
    at = common.largest(tl.where(chosen, mixture, float("-inf")), 0)
    logprob = (at - common.shift_of(mixture_top)) / divisor - mixture_log
    logprob = tl.where(greedy, 0.0, logprob)
    tl.store(sampling_logprobs_ptr + row, tl.where(bad, float("nan"), logprob))
    tl.store(log_kept_mass_ptr + row, tl.where(bad, float("nan"), 0.0))
    token = (winner * TILE + drawn).to(tl.int64)
    tl.store(tokens_ptr + row, tl.where(bad, -1, token))
