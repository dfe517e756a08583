"""Arguments that nobody would write: tensors of any kind in any layout, and whatever else there is.

Strategies of hypothesis; the numbers in a tensor come from a seed that it draws, which is faster.
"""

import decimal
import fractions
import math
import warnings

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (
    *FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64,
)  # fmt: skip
# the smallest normal numbers and denormals of 16, 32 and 64 bits, and the largest
EDGES = (
    0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1e-310, 1e-45, -1e-40, 1e-38, 6e-8, 6e-5,
    1.0, -1.0, 88.8, -104.0, 700.0, 65504.0, -65504.0, 1e30, -3e38, 3.4e38, 1e39, 1e300, -1.7e308,
)  # fmt: skip
LAYOUTS = (
    "dense",
    "offset",
    "sliced",
    "transposed",
    "expanded",
    "overlapping",
    "last",
    "negated",
    "flipped",
)


def values(shape: tuple, seed: int, kind: str) -> Tensor:
    """float64: "plain" random numbers, "wild" with edges among them, or "edges" alone."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "plain":
        return x
    edges = torch.tensor(EDGES, dtype=torch.float64)
    chosen = edges[torch.randint(len(edges), shape, generator=generator)]
    if kind == "edges":
        return chosen
    return torch.where(torch.rand(shape, generator=generator) < 0.1, chosen, x)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, or with shared memory some of them, as a view of something else."""
    if layout == "dense" or not x.dim() or not x.numel():
        return x
    if layout == "offset":
        whole = x.new_zeros(x.numel() + 3)
        return whole[3:].view(x.shape).copy_(x)
    if layout == "sliced":
        return x.new_zeros(*(n + 2 for n in x.shape))[
            tuple(slice(1, n + 1) for n in x.shape)
        ].copy_(x)
    if layout == "transposed" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "flipped" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "overlapping":
        strides = [*([1] * (x.dim() - 1)), 1]
        return x.flatten().as_strided(x.shape, strides)
    if layout == "last":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "negated":
        # as the imaginary part of a conjugate is: in memory stands the opposite
        return torch._neg_view(-x)
    return x


@st.composite
def floats(draw, shape: tuple, dtypes: tuple = FLOATS, tame: bool = False) -> Tensor:
    """A tensor that an op may take; ``tame``: of finite numbers in plain layouts."""
    kinds = ["plain"] if tame else ["plain", "plain", "wild", "edges"]
    x = values(shape, draw(st.integers(0, 999)), draw(st.sampled_from(kinds)))
    layouts = LAYOUTS[:4] if tame else LAYOUTS
    return laid_out(x.to(draw(st.sampled_from(dtypes))), draw(st.sampled_from(layouts)))


def _no_arrays() -> list[Tensor]:
    """Tensors whose memory is no array of their numbers."""
    parts = [torch.ones(2, 3), torch.ones(1, 3)]
    with warnings.catch_warnings():
        # that they are prototypes
        warnings.simplefilter("ignore")
        return [
            torch.ones(3).to_sparse(),
            torch.ones(2, 3).to_sparse(),
            torch.ones(2, 3).to_sparse_csr(),
            torch.ones(2, 3).to_mkldnn(),
            torch.nested.as_nested_tensor(parts),
            torch.nested.as_nested_tensor(parts, layout=torch.jagged),
            torch.nested.as_nested_tensor([torch.tensor(1), torch.tensor(0)]),
            torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
        ]


NO_ARRAYS = _no_arrays()


def odd_tensors(shapes: tuple) -> st.SearchStrategy:
    """Other dtypes, layouts and devices than are asked for, or the right ones elsewhere."""

    def make(shape, dtype, seed, kind, device):
        x = values(shape, seed, kind).nan_to_num(0).clamp(-100, 100)
        x = x.to(dtype) if dtype.is_floating_point or dtype.is_complex else x.abs().to(dtype)
        return x.to(device)

    shape = st.sampled_from(shapes)
    plain = st.builds(
        make, shape, st.sampled_from(DTYPES), st.integers(0, 99),
        st.sampled_from(["plain", "wild"]), st.sampled_from(["cpu", "cpu", "cpu", "meta"]),
    )  # fmt: skip
    return st.one_of(plain, plain, st.sampled_from(NO_ARRAYS))


NUMBERS = (
    *EDGES, True, False, 0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1,
    10**400, 10**5000, 1e-30, 1e-31, 0.5, 0.25, 1.5, 2.5,
)  # fmt: skip
THINGS = (
    None, "", "cpp", "eager", "CPP", "nan", "a\nb", "x" * 10_000, b"cpp", 1j, [], (), {}, [0.5],
    (0.5, 0.5), [[0.0]], [None], object(), range(3), print, float, torch.float32,
    torch.device("cpu"), fractions.Fraction(1, 2), decimal.Decimal("0.5"), np.float64(0.5),
    np.float64("nan"), np.float32(0.5), np.int64(1), np.bool_(True), np.array(0.5), np.ones(3),
    torch.Generator(), {1: 2}, {"a"}, ...,
)  # fmt: skip


def numbers() -> st.SearchStrategy:
    return st.one_of(st.sampled_from(NUMBERS), st.floats(0, 2), st.integers(-3, 9))


def anything(shapes: tuple) -> st.SearchStrategy:
    several = st.lists(odd_tensors(shapes), max_size=3)
    return st.one_of(st.sampled_from(THINGS), numbers(), odd_tensors(shapes), several)
