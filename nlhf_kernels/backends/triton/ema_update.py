"""``ema_update_`` on Triton: one launch over a table of addresses on the device.

The table is made once for the same tensors at the same addresses, so that a step copies nothing to
the device and a CUDA graph can hold it.
"""

import collections
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common

# elements of a program, a multiple of what one batch of words serves
BLOCK = 4096
# a product and the sum around it must not become one instruction: the bits are part of the contract
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
# columns of the table
EMA, PARAM, SIZE, KIND, FIRST = (tl.constexpr(i) for i in range(5))
COLUMNS = tl.constexpr(5)
# of a kind, 4 * code of the average + code of the parameter: both addresses take wide loads
ALIGNED = tl.constexpr(16)
KINDS = tl.constexpr(16)
# tables of tensors that are no longer updated go
MOST_TABLES = 16


@dataclass(frozen=True)
class Table:
    """What the kernel is told of the tensors."""

    # (tensors, columns) int64
    rows: torch.Tensor
    # (blocks,) int32: the tensor of each
    owners: torch.Tensor
    # a bit for each kind that occurs
    kinds: int


_tables: collections.OrderedDict[tuple, Table] = collections.OrderedDict()
# those that a graph has in it are never given back
_captured: dict[tuple, Table] = {}


def ema_update__fwd(ema, params, decay, decay_tensor, seed, seed_tensor):
    table = table_of(ema, params)
    if not table.owners.numel():
        return
    number = 0 if seed is None else seed
    common.launch(
        ema_kernel,
        (table.owners.numel(),),
        table.rows,
        table.rows,
        table.owners,
        decay_tensor,
        seed_tensor,
        decay,
        common.signed_word(number),
        common.signed_word(number >> 32),
        PRESENT=table.kinds,
        STOCHASTIC=seed is not None,
        BLOCK=BLOCK,
        **OPTIONS,
    )


def table_of(ema: list, params: list) -> Table:
    device = ema[0].device
    capturing, stream = False, 0
    if device.type == "cuda":
        # memory given back on one stream may still be read on another
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    key = (
        device,
        stream,
        *((x.data_ptr(), x.numel(), x.dtype) for x in ema),
        *((x.data_ptr(), x.dtype) for x in params),
    )
    if key in _captured:
        return _captured[key]
    if capturing:
        # a graph is captured on a stream of its own
        table = next((t for k, t in _tables.items() if k[0] == device and k[2:] == key[2:]), None)
        if table is None:
            raise RuntimeError(
                "ema_update_: call it once with these tensors before a CUDA graph is captured"
            )
        _captured[key] = table
        return table
    if key not in _tables:
        _tables[key] = build(ema, params)
        if len(_tables) > MOST_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def build(ema: list, params: list) -> Table:
    rows, owners, kinds = [], [], 0
    for k, (x, p) in enumerate(zip(ema, params, strict=True)):
        kind = 4 * CODES[x.dtype] + CODES[p.dtype]
        aligned = x.data_ptr() % 16 == 0 and p.data_ptr() % 16 == 0
        rows.append(
            (x.data_ptr(), p.data_ptr(), x.numel(), kind + ALIGNED.value * aligned, len(owners))
        )
        blocks = triton.cdiv(x.numel(), BLOCK)
        owners += [k] * blocks
        kinds |= (1 << kind) if blocks else 0
    device = ema[0].device
    return Table(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(owners, dtype=torch.int32).to(device),
        kinds,
    )


@triton.jit
def pointer(address, CODE: tl.constexpr):
    if CODE == 0:
        return address.to(tl.pointer_type(tl.float16))
    elif CODE == 1:
        return address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == 2:
        return address.to(tl.pointer_type(tl.float32))
    else:
        return address.to(tl.pointer_type(tl.float64))


@triton.jit
def words_of(seed_low, seed_high, tensor, start, BLOCK: tl.constexpr):
    """The random words of elements start, start + 1, ... of a tensor; start divides by BLOCK."""
    zero = tl.full((), 0, tl.uint32)
    last = tl.full((), 0x80000000, tl.uint32)
    key_low, key_high, _, _ = common.philox(
        seed_low, seed_high, common.word(tensor), zero, zero, last
    )
    # no carry: the blocks of a program share the upper word of their number
    first = start >> 2
    low = common.word(first) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    none = low * 0
    w0, w1, w2, w3 = common.philox(
        key_low, key_high, low, none + common.word(first >> 32), none, none + 3
    )
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def stochastically_rounded(x, words):
    """The bfloat16 above or below, with the probability that keeps the mean; float32 ``x``."""
    bits = x.to(tl.uint32, bitcast=True)
    drawn = ((bits + (words & 0xFFFF)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, drawn, common.rounded_to(x, tl.bfloat16))


@triton.jit
def update_block(
    ema_address,
    param_address,
    start,
    size,
    decay,
    seed_low,
    seed_high,
    tensor,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block; ``WHOLE``: nothing of it lies beyond the end, and the addresses are aligned."""
    ema_ptr = pointer(ema_address, KIND // 4) + start
    param_ptr = pointer(param_address, KIND % 4) + start
    place = tl.arange(0, BLOCK)
    inside = None
    if WHOLE:
        ema_ptr = tl.multiple_of(ema_ptr, 16)
        param_ptr = tl.multiple_of(param_ptr, 16)
    else:
        inside = place < size - start
    old = tl.load(ema_ptr + place, mask=inside)
    new = tl.load(param_ptr + place, mask=inside)
    dtype: tl.constexpr = tl.float64 if KIND // 4 == 3 or KIND % 4 == 3 else tl.float32
    old = old.to(dtype)
    new = new.to(dtype)

    near = 1.0 - decay < 0.5
    coef = tl.where(near, 1.0 - decay, -decay).to(dtype)
    base = tl.where(near, old, new)
    # 0 * inf must not be formed
    value = tl.where(coef == 0, base, base + coef * (new - old))
    if KIND // 4 == 3:
        result = value
    elif STOCHASTIC and KIND // 4 == 1:
        words = words_of(seed_low, seed_high, tensor, start, BLOCK)
        result = stochastically_rounded(value.to(tl.float32), words)
    else:
        result = common.rounded_to(value.to(tl.float32), ema_ptr.dtype.element_ty)
    tl.store(ema_ptr + place, result, mask=inside)


@triton.jit
def update_of_kind(
    ema_address,
    param_address,
    start,
    size,
    decay,
    seed_low,
    seed_high,
    tensor,
    chosen,
    whole,
    KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block if it is of this kind: whole, or by a way that is slower and always right."""
    if chosen & whole:
        update_block(
            ema_address, param_address, start, size, decay, seed_low, seed_high, tensor,
            KIND, True, STOCHASTIC, BLOCK,
        )  # fmt: skip
    if chosen & ~whole:
        update_block(
            ema_address, param_address, start, size, decay, seed_low, seed_high, tensor,
            KIND, False, STOCHASTIC, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def ema_kernel(
    table_ptr,
    owners_ptr,
    decay_ptr,
    seed_ptr,
    decay: tl.float64,
    seed_low,
    seed_high,
    PRESENT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor per program, in the dtypes that the table names."""
    block = tl.program_id(0)
    tensor = tl.load(owners_ptr + block)
    row = table_ptr + tensor.to(tl.int64) * COLUMNS
    ema_address = tl.load(row + EMA)
    param_address = tl.load(row + PARAM)
    size = tl.load(row + SIZE)
    kind = tl.load(row + KIND)
    start = (block - tl.load(row + FIRST)) * BLOCK

    share = tl.full((), decay, tl.float64)
    if decay_ptr is not None:
        share = tl.load(decay_ptr).to(tl.float64)
    low, high = common.word(seed_low), common.word(seed_high)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        low, high = common.word(seed), common.word(seed >> 32)

    whole = (kind >= ALIGNED) & (start + BLOCK <= size)
    kind = kind % ALIGNED
    for K in tl.static_range(KINDS):
        if (PRESENT >> K) & 1 == 1:
            update_of_kind(
                ema_address, param_address, start, size, share, low, high, tensor,
                kind == K, whole, K, STOCHASTIC, BLOCK,
            )  # fmt: skip
