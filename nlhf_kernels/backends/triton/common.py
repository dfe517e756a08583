"""What the Triton kernels share: launching, arithmetic, searching, random numbers.

Conventions of every kernel here: logits are converted to the statistics dtype (float32, or float64
for float64) right after the load, statistics are shifted by a maximum before the division by the
temperature, and a row's offset is int64 before it is multiplied. Scalars arrive as float64, so that
float64 statistics lose nothing, and are rounded to the statistics dtype inside.
"""

import contextlib
import warnings

import torch
import triton
import triton.language as tl

# fixed when triton is imported, like the mode itself
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TILE = tl.constexpr(1024)
UINT32 = 0xFFFFFFFF
# of a search: a round narrows the range to a part
PIVOTS = tl.constexpr(8)

# of the row kernels
WARPS = 4


# ---- the host's side


def statistics_dtype(*logits):
    wide = any(x is not None and x.dtype == torch.float64 for x in logits)
    return torch.float64 if wide else torch.float32


def signed_word(word):
    """The low 32 bits of an int as the int32 that holds them."""
    word &= UINT32
    return word - (1 << 32) if word >> 31 else word


def launch(kernel, grid, anchor, *arguments, **options):
    """Run a kernel on the device of the tensor ``anchor``; the caller excludes empty grids."""
    with _scope(anchor):
        kernel[grid](*arguments, **options)


def _scope(anchor):
    if anchor.is_cuda:
        return torch.cuda.device_of(anchor)
    return _interpreter_scope() if INTERPRETED.value else contextlib.nullcontext()


@contextlib.contextmanager
def _interpreter_scope():
    # numpy stands in for the device and would warn of infinities that are meant
    import numpy

    with numpy.errstate(all="ignore"), warnings.catch_warnings():
        # triton 3.6 turns loop bounds into indices in a way that numpy has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def row_layout(logits):
    """(rows, rows per batch entry, batch stride, row stride) of logits (N, V) or (B, T, V)."""
    if logits.dim() == 2:
        return logits.shape[0], max(logits.shape[0], 1), 0, logits.stride(0)
    B, T, _ = logits.shape
    return B * T, max(T, 1), logits.stride(0), logits.stride(1)


# ---- arithmetic


@triton.jit
def row_offset(row, length, batch_stride, row_stride):
    """Where row ``row`` of (B, T, V) logits starts, in elements."""
    # a division of 64 bits costs as much as several ids
    entry = row // length
    return entry.to(tl.int64) * batch_stride + (row - entry * length).to(tl.int64) * row_stride


@triton.jit
def largest(x, axis: tl.constexpr):
    """The maximum of what is not NaN, -inf if nothing is left."""
    if INTERPRETED:
        # numpy warns of a slice that holds nothing else; compiled code leaves NaN out by itself
        x = tl.where(x == x, x, float("-inf"))
    return tl.max(x, axis)


@triton.jit
def shift_of(top):
    """What to subtract where the maximum is ``top``: -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def soft_capped(x, cap):
    """cap * tanh(x / cap): within 2 ulp of cap in float32, where libdevice is out of reach."""
    y = x / cap
    t = tl.exp(-2.0 * tl.abs(y))
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(y < 0, -far, far)
    if x.dtype == tl.float64:
        return cap * far
    # 1 - t cancels near 0, so the Taylor series up to y^11 takes over
    s = y * y
    near = -1382.0 / 155925.0
    near = near * s + 62.0 / 2835.0
    near = near * s - 17.0 / 315.0
    near = near * s + 2.0 / 15.0
    near = near * s - 1.0 / 3.0
    near = y + y * s * near
    return cap * tl.where(s < 0.0625, near, far)


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """``x`` in the dtype of the output, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter truncates, and loses subnormal numbers: round the bits by hand
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # a NaN's payload must not carry into the sign or vanish
        up = tl.where(x == x, up, 0x7FC0)
        return up.to(tl.uint16).to(dtype, bitcast=True)
    else:
        return x.to(dtype)


# ---- searching


@triton.jit
def order_of(x):
    """Where a number stands among all of its dtype: uint64, increasing, from -inf to inf."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        # of negative numbers the magnitude counts backwards
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        return bits.to(tl.uint64, bitcast=True) ^ 0x8000000000000000
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return (bits.to(tl.int64) + 0x80000000).to(tl.uint64)


@triton.jit
def number_at(order, dtype: tl.constexpr):
    """The number that stands there."""
    if dtype == tl.float64:
        bits = (order ^ 0x8000000000000000).to(tl.int64, bitcast=True)
        return (bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)).to(dtype, bitcast=True)
    else:
        bits = (order.to(tl.int64) - 0x80000000).to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(dtype, bitcast=True)


@triton.jit
def pivots(low, high, dtype: tl.constexpr):
    """(PIVOTS,) numbers, increasing, that divide what lies above ``low``, up to ``high``."""
    number = (tl.arange(0, PIVOTS) + 1).to(tl.uint64)
    step = (high - low) // PIVOTS + 1
    return number_at(tl.minimum(low + step * number, high), dtype)


@triton.jit
def narrowed(low, high, reached):
    """What is left of the range from ``low`` to ``high`` when that many pivots are reached."""
    step = (high - low) // PIVOTS + 1
    number = reached.to(tl.uint64)
    below = tl.minimum(low + step * (number + 1), high) - 1
    return tl.minimum(low + step * number, high), tl.where(reached == PIVOTS, high, below)


# ---- random numbers


@triton.jit
def word(x):
    """The bits of an integer's low half as uint32."""
    return (x.to(tl.int64) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def philox(key_low, key_high, c0, c1, c2, c3):
    """Four words of Philox 4x32-10; all arguments are uint32 and broadcast."""
    # tl.philox turns into Philox 4x64, another stream, as soon as its first counter is wider
    tl.static_assert(c0.dtype == tl.uint32)
    seed = (key_high.to(tl.uint64) << 32) | key_low.to(tl.uint64)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def gumbel(x, dtype: tl.constexpr):
    """Standard Gumbel noise from uint32 words: -log(-log1p(-u)), u = (x + 0.5) / 2^32."""
    u = (x.to(dtype) + 0.5) * (1.0 / 4294967296.0)
    u = tl.minimum(u, 1.0 - 1.0 / 16777216.0)
    # 33 bits: exact in float64
    exponential = -tl.log(1.0 - u)
    if dtype == tl.float32:
        # the compiled log has an absolute error of 2^-22 near 1, which is where the tail comes
        # from; below u = 1/8 eight terms of the series of log1p have a relative error of 7e-9
        series = u / 8.0 + 1.0 / 7.0
        series = series * u + 1.0 / 6.0
        series = series * u + 1.0 / 5.0
        series = series * u + 1.0 / 4.0
        series = series * u + 1.0 / 3.0
        series = series * u + 1.0 / 2.0
        series = series * u + 1.0
        exponential = tl.where(u < 0.125, series * u, exponential)
    return -tl.log(exponential)
