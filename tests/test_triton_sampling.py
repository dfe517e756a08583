"""What is particular to ``mixture_sample`` on Triton: its search for a threshold, its counters."""

import math

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels.testing.compare import compare
from nlhf_kernels.testing.draw import FIELDS, Draw, kept_ids
from tests.conftest import why_not

if why := why_not("triton"):
    pytest.skip(f"triton: {why}", allow_module_level=True)

import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common, mixture_sample

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
INF = math.inf


def judged(policy, ref=None, **settings):
    """The draw, after the plainest oracle has agreed with it."""
    models = [None if x is None else x.to(DEVICE) for x in (policy, ref)]
    settings = {"position": 5, "seed": 77} | settings
    settings = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in settings.items()}
    got = nk.mixture_sample(*models, **settings, backend="triton")
    draw = Draw(*models, **settings)
    draw.require_winners(got.tokens)
    want = draw.logprobs(got.tokens)
    for name in FIELDS:
        compare(name, getattr(got, name), want[name], draw.dtype)
    return got


def rows_of_every_kind(V: int) -> torch.Tensor:
    """(7, V): flat, two values, ties at random, peaked, -inf in places, one finite, ordinary."""
    generator = torch.Generator().manual_seed(V)
    x = torch.randn(7, V, generator=generator).mul(3)
    x[0] = -1.5
    x[1] = (torch.arange(V) % 3 == 0).float()
    x[2] = x[2].div(2).round()
    x[3] *= 6
    x[4, torch.rand(V, generator=generator) < 0.6] = -INF
    x[5, torch.arange(V) != V // 2] = -INF
    x[4, -1] = 0.0
    return x


FILTERS = {
    "top-k": {"top_k": 7},
    "top-k of 1": {"top_k": 1},
    "top-k of more than there are tiles": {"top_k": 300},
    "top-p": {"top_p": 0.83},
    "top-p, nearly all": {"top_p": 0.9999},
    "min-p": {"min_p": 0.03},
    "min-p of 1": {"min_p": 1.0},
    "all": {"top_k": 40, "top_p": 0.77, "min_p": 0.02},
    "top-k and min-p": {"top_k": 40, "min_p": 0.2},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=list(FILTERS))
def test_every_filter_on_rows_of_every_kind(filters):
    judged(rows_of_every_kind(1100), temperature=0.7, **filters)


@pytest.mark.parametrize("V", [1, 2, 1023, 1024, 1025, 5121])
def test_ends_of_tiles_and_of_groups(V):
    x = rows_of_every_kind(V)[2:5]
    judged(x, x.roll(1, 0), mixture_coef=0.4, top_k=9, top_p=0.9)


def test_float64_and_16_bits():
    x = rows_of_every_kind(1100)[2:4]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        judged(x.to(dtype), top_k=20, top_p=0.8, min_p=0.01)
    # values that only float64 tells apart
    close = (1 + torch.arange(50, dtype=torch.float64) * 1e-12)[None].flip(1)
    got = judged(close.repeat(2, 1), top_k=3)
    assert set(got.tokens.tolist()) <= {0, 1, 2}


def test_a_mix_of_filters_per_row():
    policy = rows_of_every_kind(1030)
    settings = {
        "mixture_coef": torch.tensor([0.3, 0.0, 1.0, 0.3, 0.0, 1.0, 0.6]),
        "temperature": torch.tensor([1.0, 0.5, 0.0, 1e-30, 1e4, 1.0, 0.8]),
        "top_k": torch.tensor([0, 5, 3, 2**40, 0, 1, 17]),
        "top_p": torch.tensor([1.0, 1.0, 0.2, 0.9, 0.6, 1.0, 0.95]),
        "min_p": torch.tensor([0.0, 0.3, 0.5, 0.0, 0.01, 0.0, 0.0]),
        "seed": torch.arange(7) - 3,
    }
    got = judged(policy, policy, **settings)
    # no filter, a temperature of 0: exactly nothing is cut
    assert got.log_kept_mass[[0, 2]].tolist() == [0, 0]


def test_a_threshold_inside_a_tie_keeps_the_lowest_ids():
    """A tie that runs over three tiles, cut in the second."""
    x = torch.full((2500,), -2.0)
    tie = torch.tensor([3, 900, 1023, 1024, 1500, 2100, 2499])
    x[tie] = 1.0
    x[1400] = 2.0
    weights = [1.0, math.exp(-1)]
    top_p = (weights[0] + 3.5 * weights[1]) / (weights[0] + 7 * weights[1] + 2492 * math.exp(-4))
    for filters in ({"top_k": 5}, {"top_p": top_p}):
        assert kept_ids(x.tolist(), *([filters.get(name, off)] for name, off in
                        (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)))) == [
            1400, *tie[:4].tolist()
        ]  # fmt: skip
        got = judged(x.expand(6, -1), **filters)
        assert set(got.tokens.tolist()) <= {1400, *tie[:4].tolist()}
        kept = weights[0] + 4 * weights[1]
        logprobs = torch.where(got.tokens == 1400, 0.0, -1.0) - math.log(kept)
        compare("sampling", got.sampling_logprobs, logprobs.double(), torch.float32)


def test_zeros_of_both_signs_are_a_tie():
    x = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0, -1.0]).repeat(6, 1)
    assert set(judged(x, top_k=2).tokens.tolist()) <= {1, 2}
    assert set(judged(x, top_p=0.3).tokens.tolist()) <= {1, 2}
    assert set(judged(-x - 2 * (x < 0), top_k=3).tokens.tolist()) <= {1, 2, 3}


def test_a_bad_row_beside_filtered_ones():
    x = rows_of_every_kind(40)[2:6]
    x[0, 3], x[1, 0], x[2] = math.nan, INF, -INF
    got = nk.mixture_sample(x.to(DEVICE), top_k=2, top_p=0.5, min_p=0.1, seed=0, position=0,
                            backend="triton")  # fmt: skip
    assert (got.tokens == -1).tolist() == [True] * 3 + [False]
    assert got.log_kept_mass.isnan().tolist() == [True] * 3 + [False]


def test_a_temperature_must_be_finite():
    """Without a tail of -inf, an infinite one leaves no NaN by itself."""
    heat = torch.tensor([1.0, INF, math.nan, -1.0], device=DEVICE)
    x = torch.zeros(4, 1024, device=DEVICE)
    settings = {"temperature": heat, "seed": 0, "position": 0, "backend": "triton"}
    for filters in ({}, {"top_k": 2}):
        got = nk.mixture_sample(x, **settings, **filters)
        assert (got.tokens >= 0).tolist() == [True, False, False, False]
        assert got.policy_logprobs.isnan().tolist() == [False, True, True, True]


def test_counters_are_zero_after_every_launch(monkeypatch):
    monkeypatch.setattr(mixture_sample, "_counters", {})
    x = torch.randn(3, 9000, device=DEVICE)
    settings = {"seed": 1, "position": 0, "backend": "triton"}
    first = nk.mixture_sample(x, **settings)
    (counters,) = mixture_sample._counters.values()
    assert not counters.any()
    for one, two in zip(first, nk.mixture_sample(x, **settings), strict=True):
        assert torch.equal(one, two)
    # they are what decides: from another start nobody is the last, nor sets them back
    counters += 100
    nk.mixture_sample(x, **settings)
    assert (counters[:3] > 100).all()
    # with filters nobody counts
    mixture_sample._counters.clear()
    nk.mixture_sample(x[:1, :50], top_k=2, **settings)
    assert not mixture_sample._counters


def test_a_row_may_have_several_groups_for_a_program(monkeypatch):
    x = torch.randn(2, 9000, device=DEVICE)
    settings = {"seed": 1, "position": 0, "backend": "triton"}
    one = nk.mixture_sample(x, **settings)
    monkeypatch.setattr(mixture_sample, "PROGRAMS", 2)
    monkeypatch.setattr(mixture_sample, "SLOTS", 1)
    for a, b in zip(one, nk.mixture_sample(x, **settings), strict=True):
        assert torch.equal(a, b)
    judged(x, top_k=50)


# ---- the order of numbers


@triton.jit
def order_kernel(in_ptr, back_ptr, low_ptr, high_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    x = tl.load(in_ptr + lane)
    order = common.order_of(x)
    tl.store(back_ptr + lane, common.number_at(order, x.dtype))
    # in halves: torch knows no order of unsigned words
    tl.store(low_ptr + lane, (order & 0xFFFFFFFF).to(tl.int64))
    tl.store(high_ptr + lane, (order >> 32).to(tl.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_order_is_that_of_numbers(dtype):
    finite = torch.finfo(dtype)
    ends = [finite.tiny, finite.max, finite.eps, 1.0, 3.0, 1e-5, finite.tiny / 8, INF]
    x = torch.cat([torch.randn(47, dtype=dtype), torch.tensor([0.0, *ends], dtype=dtype)])
    x = torch.cat([x, -torch.tensor(ends, dtype=dtype)]).to(DEVICE)
    back, low, high = torch.empty(64, dtype=dtype), torch.empty(64).long(), torch.empty(64).long()
    back, low, high = (y.to(DEVICE) for y in (back, low, high))
    common.launch(order_kernel, (1,), x, x, back, low, high, SIZE=64)
    assert torch.equal(back, x)
    order = sorted(range(64), key=lambda i: (int(high[i]), int(low[i])))
    assert order == sorted(range(64), key=lambda i: float(x[i]))
