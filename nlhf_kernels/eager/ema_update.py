"""``ema_update_`` as plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlhf_kernels.noise import MASK32, fold_in, philox, split


def ema_update_(
    ema: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | Tensor,
    seed: int | Tensor | None = None,
    backend: str = "",
) -> None:
    """Exponential moving averages of many tensors, in place and all at once.

    Formula, for each tensor, with w = 1 - decay::

        ema <- ema + w (param - ema)              if w < 1/2
        ema <- param - decay (param - ema)        otherwise

    that is decay * ema + w * param, in the form that has ema = param for a fixed point whatever the
    rounding of w. (With decay and w both rounded the two-product form drifts: at decay = 0.9999 by
    3e-4 of the value in float32.)

    Args:
        ema: tensors of any shapes, float16, bfloat16, float32 or float64, dense in memory (no gaps
            and no overlap: contiguous, transposed, channels last); they are overwritten.
        params: as many, of the same shapes and strides; dtypes may differ. None may share memory
            with an average.
        decay: in [0, 1], a float or a tensor () of any of the four dtypes on the device, which is
            read there.
        seed: an int64 switches stochastic rounding of the bfloat16 averages on; a new one for every
            update. A tensor () int64 on the device is read there, so that a CUDA graph can draw new
            words at every replay.
        backend: "", "eager", "cpp", "triton" or "cuda".

    Returns:
        Nothing. The averages' versions count up, as with every operation in place. No gradient is
        recorded: averages that require one are refused unless gradients are off, as under
        ``torch.no_grad()``. Before a CUDA graph is captured "triton" needs one call with the same
        tensors, which puts their addresses on the device.

    Raises:
        ValueError: other numbers of tensors, other shapes, strides, dtypes or devices, gaps or
            shared memory, decay outside [0, 1] (a tensor's value is looked at on the CPU only).

    Numerics: float32, float64 where either tensor is, every product and sum rounded on its own (no
    fused multiply-add), then one rounding to nearest even, of float64 by way of float32 if the
    average has 16 bits: the same bits on every backend. decay = 0 copies and decay = 1 changes
    nothing, exactly, infinities too.
    Stochastic rounding: element i in memory of tensor k has the word i % 4 of Philox 4x32-10, key
    ``fold_in(seed, k)``, counter (i // 4 low, i // 4 high, 0, 3). Its lower 16 bits are added to
    the bits of the float32 value before the lower half is cut off: the expectation is the value.
    Infinities and NaN stay. Without it an average in bfloat16 stalls where a step is less than half
    of its last digit: with decay = 0.999 wherever param is within twice the average of it.
    """
    if not ema:
        return
    with torch.no_grad():
        device = ema[0].device
        if not isinstance(decay, Tensor):
            decay = torch.full((), decay, dtype=torch.float64, device=device)
        decay = decay.to(torch.float64)
        seeds = None
        if seed is not None:
            seeds = fold_in(seed, torch.arange(len(ema), device=device))
        for k, (average, param) in enumerate(zip(ema, params, strict=True)):
            value = _average(average, param, decay)
            if seeds is not None and average.dtype == torch.bfloat16:
                value = _stochastically_rounded(value.float(), _places(average), seeds[k])
            elif value.dtype == torch.float64 and average.dtype.itemsize == 2:
                value = value.float()
            average.copy_(value)


def _average(average: Tensor, param: Tensor, decay: Tensor) -> Tensor:
    wide = torch.float64 in (average.dtype, param.dtype)
    dtype = torch.float64 if wide else torch.float32
    old, new = average.to(dtype), param.to(dtype)
    near = 1 - decay < 0.5
    base = torch.where(near, old, new)
    coef = torch.where(near, 1 - decay, -decay).to(dtype)
    # 0 * inf must not be formed
    return torch.where(coef == 0, base, base + coef * (new - old))


def _places(x: Tensor) -> Tensor:
    """Where each element of a dense tensor lies in memory, counted from the first."""
    places = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        places = places[..., None] + torch.arange(size, device=x.device) * stride
    return places


def _stochastically_rounded(value: Tensor, places: Tensor, seed: Tensor) -> Tensor:
    """The bfloat16 above or below each float32, with the probability that keeps the mean."""
    block = places >> 2
    words = torch.stack(philox((block & MASK32, block >> 32, 0, 3), split(seed)))
    word = words.gather(0, (places & 3)[None])[0]
    bits = value.view(torch.int32).to(torch.int64) & MASK32
    bits = bits + (word & 0xFFFF)
    # as a signed number, which is what int32 holds
    bits = (bits & ~0xFFFF) - ((bits >> 31) << 32)
    rounded = bits.to(torch.int32).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
