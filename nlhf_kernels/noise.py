"""Random numbers of the draws: Philox, seeds folded from seeds, Gumbel noise. Part of ``eager``."""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def philox(counter: tuple, key: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011, Random123) on int64 tensors that hold 32-bit words.

    ``counter`` is four, ``key`` two broadcastable tensors or ints; returns four tensors of words.
    """
    c0, c1, c2, c3 = (torch.as_tensor(c) for c in counter)
    k0, k1 = (torch.as_tensor(k) for k in key)
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def _product(word: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product, in halves: int64 must not overflow.

    An overflow is undefined in the C++ that torch.compile makes of this, and its results differ.
    """
    low = word * (x & 0xFFFF)
    high = word * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def fold_in(seed: int | Tensor, k: int | Tensor) -> int | Tensor:
    """A new independent seed from a seed and a number: the first two words of Philox.

    The key is ``seed``, the counter (k low, k high, 0, 2**31), a block that no draw uses. Both
    arguments are int64, scalars or broadcastable tensors. Returns an int if both are ints, else an
    int64 tensor.

    Raises:
        ValueError: another dtype, an integer of more than 64 bits, shapes that do not broadcast.
    """
    key, count = _integers("seed", seed), _integers("k", k)
    pairs = zip(reversed(key.shape), reversed(count.shape), strict=False)
    if not all(m == n or m == 1 or n == 1 for m, n in pairs):
        got = f"{tuple(key.shape)} and {tuple(count.shape)}"
        raise ValueError(f"fold_in: seed and k must be broadcastable, got {got}")
    # a number of the CPU's goes with tensors of any device
    if key.device != count.device and not any(x.is_cpu and not x.dim() for x in (key, count)):
        got = f"{key.device} and {count.device}"
        raise ValueError(f"fold_in: seed and k must be on one device, got {got}")
    words = philox((count & MASK32, (count >> 32) & MASK32, 0, 1 << 31), split(key))
    folded = words[0] | (words[1] << 32)
    return folded if isinstance(seed, Tensor) or isinstance(k, Tensor) else int(folded)


def _integers(name: str, x: int | Tensor) -> Tensor:
    if isinstance(x, Tensor):
        if x.dtype == torch.int64 and x.layout == torch.strided and not x.is_nested:
            return x
        raise ValueError(f"fold_in: {name} must be int64, got a tensor of {x.dtype}, {x.layout}")
    whole = isinstance(x, int | torch.SymInt) and not isinstance(x, bool)
    if not (whole and -(2**63) <= x < 2**63):
        kind = type(x).__name__
        raise ValueError(f"fold_in: {name} must be a 64-bit integer or int64, got another {kind}")
    # not as_tensor, which would make torch.compile start again for every new int
    return torch.full((), x, dtype=torch.int64)


def split(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high word."""
    return seed & MASK32, (seed >> 32) & MASK32


def gumbel(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise of ``dtype`` from 32-bit words in int64; range [-2.81, 22.87]."""
    u = ((words.to(dtype) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))
