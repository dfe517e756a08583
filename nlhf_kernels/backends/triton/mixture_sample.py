"""``mixture_sample`` on Triton: statistics per tile of 1,024 ids, then the two races of each row.

``mixture_tile_kernel`` reads the logits once, spread over rows and tiles, so that a decode step
with few rows still fills the device; the last program of a row to finish merges the row's tiles in
a fixed order, draws the tile, reads it again and draws the token. Results do not depend on who is
last. With filters it only leaves the statistics, and ``mixture_filter_kernel`` goes on, one program
for a row: it finds the threshold, sums up what is kept, and draws.
"""

import torch
import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common
from nlhf_kernels.backends.triton.common import TILE
from nlhf_kernels.backends.triton.mixture_draw import (
    draw_row,
    exponent_scale,
    load_logits,
    merge_tiles,
    mixture_of,
    row_scalar,
    store_tiles,
)
from nlhf_kernels.backends.triton.mixture_filters import find_threshold, sum_kept

# no fused multiply-add: whoever reads a tile again must see the same mixture to the last bit
TILE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
FILTER_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# programs of the tile kernel beyond which each takes several groups of tiles
PROGRAMS = 8192
# rows of a launch of the filter kernel, each with room for a list of its logits
SLOTS = 256

# arrivals of the programs of each row, all zero between launches: (device, stream) -> (rows,) int32
_counters: dict[tuple, torch.Tensor] = {}


def mixture_sample_fwd(
    policy_logits,
    ref_logits,
    mixture_coef,
    mixture_coef_rows,
    temperature,
    temperature_rows,
    top_k,
    top_k_rows,
    top_p,
    top_p_rows,
    min_p,
    min_p_rows,
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

    filter_rows = (top_k_rows, top_p_rows, min_p_rows)
    # the values of a tensor are not looked at: that would stall the device
    filters = any(x is not None for x in filter_rows) or (top_k, top_p, min_p) != (0, 1, 0)
    tiles = triton.cdiv(vocab, TILE.value)
    # maximum and sum per tile, of the mixture, the policy and ref
    statistics = torch.empty((B, 2 if ref_logits is None else 6, tiles), **new)
    coef_rows, temperature_rows, seed_rows, position_rows, *filter_rows = (
        None if rows is None else rows.contiguous()
        for rows in (mixture_coef_rows, temperature_rows, seed_rows, position_rows, *filter_rows)
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
    draw = (
        *outputs,
        seed_rows,
        position_rows,
        common.signed_word(seed),
        common.signed_word(seed >> 32),
        common.signed_word(position),
    )
    constants = {
        "TILES": triton.next_power_of_2(tiles),
        # neither coefficient is rounded to 0
        "ORDINARY": mixture_coef_rows is None and 1e-37 < mixture_coef < 1 - 2.0**-24,
    }
    groups = triton.cdiv(tiles, group(dtype))
    programs = triton.cdiv(groups, max(1, B * groups // PROGRAMS))
    common.launch(
        mixture_tile_kernel,
        (B, programs),
        policy_logits,
        *models,
        *draw,
        None if filters else counters(policy_logits, B),
        **constants,
        **TILE_OPTIONS,
    )
    if filters:
        lists = torch.empty((min(B, SLOTS), vocab + 2 * tiles), **new)
        for first_row in range(0, B, SLOTS):
            common.launch(
                mixture_filter_kernel,
                (min(B - first_row, SLOTS),),
                policy_logits,
                *models,
                *draw,
                *filter_rows,
                min(top_k, vocab),
                top_p,
                min_p,
                lists,
                first_row,
                **constants,
                **FILTER_OPTIONS,
            )
    return outputs


def group(dtype):
    """Tiles that a program of the tile kernel reads at a time: a warp each, or two in float64."""
    return 16 // dtype.itemsize


def counters(logits, rows):
    """(rows,) zeros that the launch leaves zero: no two launches may use them at a time."""
    device, stream = logits.device, 0
    if device.type != "cpu":
        with torch.cuda.device_of(logits):
            # a replay may run beside anything: a graph has its own
            own = device.type != "cuda" or torch.cuda.is_current_stream_capturing()
        if own:
            return torch.zeros(rows, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    found = _counters.get((device, stream))
    if found is None or len(found) < rows:
        size = max(1024, triton.next_power_of_2(rows))
        found = torch.zeros(size, dtype=torch.int32, device=device)
        _counters[device, stream] = found
    return found


@triton.jit(do_not_specialize=["tiles", "seed_low", "seed_high", "position"])
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
    arrived_ptr,
    TILES: tl.constexpr,
    ORDINARY: tl.constexpr,
):
    """Maximum and sum of the mixture, the policy and ref, for some of a row's tiles.

    Without ``arrived_ptr`` that is all; else the last program of the row draws.
    """
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    GROUP: tl.constexpr = 128 // dtype.primitive_bitwidth
    # 128 bits a thread at a time, so that one warp, or two, have a tile to themselves
    NARROW: tl.constexpr = (
        ref_ptr is None or ref_ptr.dtype.element_ty.primitive_bitwidth == 16
    ) and policy_ptr.dtype.element_ty.primitive_bitwidth == 16
    LANES: tl.constexpr = 256 if NARROW else 128
    row = tl.program_id(0).to(tl.int64)
    heat = row_scalar(temperature_rows_ptr, row, temperature, dtype)
    scale = exponent_scale(tl.where(heat == 0, 1.0, heat))
    b = row_scalar(coef_rows_ptr, row, coef, dtype)
    policy_ptr += row * policy_stride
    if ref_ptr is not None:
        ref_ptr += row * ref_stride
    statistics_ptr += row * (2 if ref_ptr is None else 6) * tiles
    # the parts of tiles in turn: rows of a block are dealt out to the warps one by one
    part = tl.arange(0, GROUP * TILE // LANES)[:, None]
    lane = part % GROUP * TILE + part // GROUP * LANES + tl.arange(0, LANES)[None, :]
    for first in range(tl.program_id(1) * GROUP, tiles, tl.num_programs(1) * GROUP):
        tile = first + tl.arange(0, GROUP)
        ids = first * TILE + lane
        whole = (first + GROUP) * TILE <= vocab
        policy = load_logits(policy_ptr, ids, vocab, whole, dtype)
        if ref_ptr is None:
            store_tiles(statistics_ptr, policy, scale, tile, tiles, 0)
        else:
            ref = load_logits(ref_ptr, ids, vocab, whole, dtype)
            mixture = mixture_of(policy, ref, b, ORDINARY)
            store_tiles(statistics_ptr, mixture, scale, tile, tiles, 0)
            store_tiles(statistics_ptr, policy, scale, tile, tiles, 1)
            store_tiles(statistics_ptr, ref, scale, tile, tiles, 2)
    if arrived_ptr is not None:
        # every thread's statistics come before the one arrival
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu")
        if arrived == tl.num_programs(1) - 1:
            tl.store(arrived_ptr + row, 0)
            draw_row(
                row, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, b, heat, tokens_ptr,
                policy_logprobs_ptr, ref_logprobs_ptr, sampling_logprobs_ptr, log_kept_mass_ptr,
                seed_rows_ptr, position_rows_ptr, seed_low, seed_high, position, None, None, None,
                TILES, ORDINARY,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "seed_low", "seed_high", "position", "top_k", "first_row"])
def mixture_filter_kernel(
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
    top_k_rows_ptr,
    top_p_rows_ptr,
    min_p_rows_ptr,
    top_k: tl.int32,
    top_p: tl.float64,
    min_p: tl.float64,
    lists_ptr,
    first_row,
    TILES: tl.constexpr,
    ORDINARY: tl.constexpr,
):
    """One row per program: the threshold of the three filters, what they keep, and the draw."""
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    list_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * (vocab + 2 * tiles)
    row = tl.program_id(0).to(tl.int64) + first_row
    heat = row_scalar(temperature_rows_ptr, row, temperature, dtype)
    divisor = tl.where(heat == 0, 1.0, heat)
    b = row_scalar(coef_rows_ptr, row, coef, dtype)
    p = row_scalar(top_p_rows_ptr, row, top_p, dtype)
    least = row_scalar(min_p_rows_ptr, row, min_p, dtype)
    if top_k_rows_ptr is not None:
        # beyond the vocabulary it may be beyond 32 bits
        k = tl.minimum(tl.load(top_k_rows_ptr + row), vocab).to(tl.int32)
    else:
        k = tl.full((), top_k, tl.int32)
    policy_ptr += row * policy_stride
    if ref_ptr is not None:
        ref_ptr += row * ref_stride
    statistics_ptr += row * (2 if ref_ptr is None else 6) * tiles
    top, log_total, _, tops, kept = merge_tiles(
        statistics_ptr, divisor, tl.arange(0, TILES), tiles, 0
    )
    threshold = tl.full((), float("-inf"), dtype)
    ties = tl.full((TILES,), TILE, tl.int32)
    asked = ((k > 0) & (k < vocab)) | ~(p >= 1) | (least > 0)
    # of a bad row nothing is drawn, and of a cold one the maximum
    if asked & (log_total == log_total) & (heat > 0) & (heat < float("inf")):
        threshold, last = find_threshold(
            list_ptr, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, b, top, tops, kept,
            divisor, k, p, least, ORDINARY,
        )  # fmt: skip
        kept, ties = sum_kept(
            list_ptr + vocab, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, b, divisor,
            threshold, last, TILES, ORDINARY,
        )  # fmt: skip
    draw_row(
        row, policy_ptr, ref_ptr, statistics_ptr, vocab, tiles, b, heat, tokens_ptr,
        policy_logprobs_ptr, ref_logprobs_ptr, sampling_logprobs_ptr, log_kept_mass_ptr,
        seed_rows_ptr, position_rows_ptr, seed_low, seed_high, position, threshold, kept, ties,
        TILES, ORDINARY,
    )  # fmt: skip
