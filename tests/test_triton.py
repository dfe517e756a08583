"""The pieces of the Triton backend that the harness cannot see, in the interpreter."""

import math

import pytest
import torch

from tests.conftest import why_not

if why := why_not("triton"):
    pytest.skip(f"triton: {why}", allow_module_level=True)

import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common, token_rows

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"


@triton.jit
def words_kernel(counter_ptr, key_ptr, out_ptr):
    c0 = common.word(tl.load(counter_ptr))
    c1 = common.word(tl.load(counter_ptr + 1))
    c2 = common.word(tl.load(counter_ptr + 2))
    c3 = common.word(tl.load(counter_ptr + 3))
    key = common.word(tl.load(key_ptr)), common.word(tl.load(key_ptr + 1))
    w0, w1, w2, w3 = common.philox(key[0], key[1], c0, c1, c2, c3)
    tl.store(out_ptr, w0.to(tl.int64))
    tl.store(out_ptr + 1, w1.to(tl.int64))
    tl.store(out_ptr + 2, w2.to(tl.int64))
    tl.store(out_ptr + 3, w3.to(tl.int64))


@triton.jit
def gumbel_kernel(words_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    x = common.word(tl.load(words_ptr + lane))
    tl.store(out_ptr + lane, common.gumbel(x, out_ptr.dtype.element_ty))


@triton.jit
def round_kernel(in_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    x = common.rounded_to(tl.load(in_ptr + lane), out_ptr.dtype.element_ty)
    tl.store(out_ptr + lane, x)


@triton.jit
def softcap_kernel(in_ptr, out_ptr, cap: tl.float64, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    limit = tl.full((), cap, tl.float64).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + lane, common.soft_capped(tl.load(in_ptr + lane), limit))


@triton.jit
def place_kernel(in_ptr, out_ptr, rate: tl.float64, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    rate = tl.full((), rate, tl.float64).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + lane, token_rows.place_of(tl.load(in_ptr + lane), rate, True))


def test_philox_known_answers():
    # kat_vectors of Random123: philox4x32, 10 rounds
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    published = [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, words in published:
        out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        arguments = (torch.tensor(x, device=DEVICE) for x in (counter, key))
        common.launch(words_kernel, (1,), out, *arguments, out)
        assert tuple(out.tolist()) == words


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)], ids=str
)
def test_gumbel_over_its_whole_range(dtype, tolerance):
    # both ends, the joint at u = 1/8, and every magnitude between
    edges = [0, 1, 2, 2**29 - 1, 2**29, 2**29 + 1, 2**31 - 1, 2**31, 2**32 - 2**8, 2**32 - 1]
    words = edges + [int(2 ** (i / 2)) for i in range(1, 64)]
    words = torch.tensor(words + [3] * (128 - len(words)), device=DEVICE)
    out = torch.empty(128, dtype=dtype, device=DEVICE)
    common.launch(gumbel_kernel, (1,), out, words, out, SIZE=128)

    # the uniform is rounded to the dtype by definition; everything after it is not
    u = ((words.to(dtype) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    exact = torch.tensor([-math.log(-math.log1p(-x)) for x in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=tolerance, atol=tolerance)
    assert out.max() > 22.87
    assert out.min() < -2.81


def test_bfloat16_rounds_to_nearest_even():
    bits = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x80000001, 0xFF7FFFFF]
    special = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -3.3e38]
    x = torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32)
    # NaN with a payload that rounding would carry out of the number
    payload = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32)
    x = torch.cat([x, payload]).view(torch.float32)
    x = torch.cat([x, torch.tensor(special), torch.randn(111)]).to(DEVICE)
    out = torch.empty(128, dtype=torch.bfloat16, device=DEVICE)
    common.launch(round_kernel, (1,), out, x, out, SIZE=128)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)], ids=str
)
def test_softcap(dtype, tolerance):
    x = torch.cat([torch.linspace(-40, 40, 64), torch.linspace(-1e-2, 1e-2, 60)])
    x = torch.cat([x, torch.tensor([0.0, math.inf, -math.inf, math.nan])]).to(dtype)
    x = x.to(DEVICE)
    out, place = torch.empty_like(x), torch.empty_like(x)
    common.launch(softcap_kernel, (1,), out, x, out, 3.0, SIZE=128)
    tanh = torch.tanh(x.double() / 3)
    close = {"rtol": tolerance, "atol": 3 * tolerance, "equal_nan": True}
    torch.testing.assert_close(out.double(), 3 * tanh, **close)

    # where a row's kernels find the same number and its slope
    scale, offset, rate = token_rows.scaling(dtype, 1.0, 3.0)
    common.launch(place_kernel, (1,), place, x, place, rate, SIZE=128)
    capped = (scale * place.double() + offset) * math.log(2)
    torch.testing.assert_close(capped, 3 * tanh, **close)
    slope = 4 * (place - place * place).double()
    torch.testing.assert_close(slope, 1 - tanh**2, **close)


def test_rows_that_outgrow_their_anchor():
    """Nothing finite in the first ids, or all mass beyond them: such rows are read again."""
    ramp = torch.linspace(-100, 100, 4500)
    gap = torch.randn(4500)
    gap[:4400] = -torch.inf
    logits = torch.stack([ramp, ramp.flip(0), gap])
    ref_logits = torch.stack([ramp.flip(0) / 50, ramp, gap + torch.randn(4500)])
    tokens = torch.tensor([3, 4400, 4450])
    logprobs, ref_logprobs, _, kl, lse, ref_lse = token_rows.row_statistics(
        logits.to(DEVICE), ref_logits.to(DEVICE), tokens.to(DEVICE), None, 0.5, 0.0
    )
    policy, ref = logits.double() / 0.5, ref_logits.double() / 0.5
    p, log_p, log_q = policy.softmax(-1), policy.log_softmax(-1), ref.log_softmax(-1)
    close = {"rtol": 1e-5, "atol": 5e-6, "check_dtype": False, "check_device": False}
    torch.testing.assert_close(lse, policy.logsumexp(-1), **close)
    torch.testing.assert_close(ref_lse, ref.logsumexp(-1), **close)
    torch.testing.assert_close(kl, (p * (log_p - log_q)).nan_to_num().sum(-1), **close)
    for got, want in (logprobs, log_p), (ref_logprobs, log_q):
        torch.testing.assert_close(got, want.gather(-1, tokens[:, None])[:, 0], **close)


def test_more_rows_than_an_axis_of_the_grid_takes(monkeypatch):
    logits, tokens = torch.randn(7, 50, device=DEVICE), torch.arange(7, device=DEVICE)
    _, entropy, lse = token_rows.row_statistics(logits, None, tokens, None, 1.0, 0.0)
    found = []
    for most in (token_rows.MOST_PROGRAMS, 3, 2):
        monkeypatch.setattr(token_rows, "MOST_PROGRAMS", most)
        grad = torch.full_like(logits, torch.nan)
        token_rows.row_gradient(
            grad, logits, None, tokens, None, lse, None, entropy, None, lse, lse, None, 1.0, 0.0
        )
        found.append(grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


def test_row_offsets_are_64_bit():
    """Rows further apart than 2^31 elements, without the memory: strides lie, offsets are read."""
    far = torch.empty_strided((2, 2, 3), (5 << 31, 3 << 31, 1), device="meta")
    assert common.row_layout(far) == (4, 2, 5 << 31, 3 << 31)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    common.launch(offsets_kernel, (4,), out, out, 2, 5 << 31, 3 << 31)
    assert out.tolist() == [0, 3 << 31, 5 << 31, 8 << 31]


@triton.jit
def offsets_kernel(out_ptr, length, batch_stride, row_stride):
    row = tl.program_id(0)
    tl.store(out_ptr + row, common.row_offset(row, length, batch_stride, row_stride))
