"""The compiled module's own parts: random words, number formats, threads, bad offsets."""

import math

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels import eager
from nlhf_kernels.testing import OPS, Case
from nlhf_kernels.testing.check import check
from tests.conftest import why_not

if why := why_not("cpp"):
    pytest.skip(f"cpp: {why}", allow_module_level=True)

from nlhf_kernels.backends import native

_native = native._native


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, words):
    arguments = [int(word, 16) for word in f"{counter} {key}".split()]
    assert _native.philox4x32(*arguments) == tuple(int(word, 16) for word in words.split())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("k", [0, 1, -1, 2**32, 2**63 - 1])
def test_fold_in_is_the_oracles(seed, k):
    assert _native.fold_in(seed, k) == eager.fold_in(seed, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_exactly(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    # the log-sum-exp of one number is that number, but for the last digit of its float32
    lse = native.token_logprobs_fwd(
        x[:, None], torch.zeros(len(x), dtype=torch.int64), None, 1.0, 0.0
    )[2]
    finite = x > -math.inf
    finite &= x < math.inf
    assert torch.equal(lse[finite].to(dtype), x[finite])
    torch.testing.assert_close(lse[finite], x[finite].float(), rtol=2.0**-23, atol=0)
    assert lse[x.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_stores_round_to_nearest_even(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    # exact ties and their neighbours, which random bits would miss
    ties = (halves[:-1].double() + halves[1:].double()).div(2).float()
    near = [torch.nextafter(ties, torch.tensor(side)) for side in (-math.inf, math.inf)]
    special = torch.tensor([math.nan, 65519.996, 65520.0, 3.4e38])
    x = torch.cat([bits.to(torch.int32).view(torch.float32), halves, ties, *near, special])
    # an infinite gradient has none: it is multiplied with a probability of 0
    x = x[~x.isinf()]

    # the token has probability 0, so the gradient of its logit is the incoming gradient, as rounded
    N = len(x)
    logits = torch.tensor([0.0, -math.inf], dtype=dtype).repeat(N, 1)
    zeros, ones = torch.zeros(N), torch.ones(N, dtype=torch.int64)
    grad = torch.empty_like(logits)
    native.token_logprobs_bwd(grad, logits, ones, None, zeros, zeros, x, zeros, 1.0, 0.0)
    torch.testing.assert_close(grad[:, 1], x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", ["avx512", "avx2", "plain"])
def test_every_level_of_the_instruction_set_samples_right(level):
    """The machines of others: the harness runs on the best level alone."""
    levels = _native.tile_levels()
    if level not in levels:
        pytest.skip(f"this machine's instruction set has no {level}")
    _native.use_tile_level(level)
    try:
        for op in ("mixture_sample", "linear_mixture_sample"):
            for case in OPS[op].tests:
                check(case, "cpp")
        # enough for a sample to say where the prefix ends, and too many of one value
        asked = (1, {"top_p": 0.9}), (4, {"top_p": 0.9, "top_k": 2000}), (0, {"top_k": 40_000})
        for scale, filters in asked:
            options = {"filters": filters, "scale": scale}
            check(Case("mixture_sample", "many", (2, 50_000), torch.float32, options), "cpp")
        # zeros of both signs are one value
        zeros = torch.tensor([[-0.0, -0.0, -1.0]])
        draw = nk.mixture_sample(zeros, top_p=0.5, seed=0, position=0, backend="cpp")
        assert draw.tokens.item() == 0
    finally:
        _native.use_tile_level(levels[0])


def test_a_level_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match='use_tile_level: this machine has no level "mmx"'):
        _native.use_tile_level("mmx")


def test_results_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    policy, ref = torch.randn(2, 9, 5000, generator=generator)
    tokens = torch.arange(9)

    def results():
        draw = native.mixture_sample_fwd(
            policy, ref, 0.3, None, 0.9, None, 0, None, 1.0, None, 0.0, None, 5, None, 1, None
        )
        scaling = (0.9, 0.0)
        logprobs, entropy, lse = native.token_logprobs_fwd(policy, tokens, None, *scaling)
        grad, of_kl = torch.empty_like(policy), torch.empty_like(policy)
        rest = (lse, entropy, entropy, lse)
        native.token_logprobs_bwd(grad, policy, tokens, None, *rest, *scaling)
        found = native.token_kl_fwd(policy, ref, tokens, None, *scaling)
        rest = (*found[4:], *found[2:4], entropy, lse, lse)
        native.token_kl_bwd(of_kl, policy, ref, tokens, None, *rest, *scaling)
        preference = torch.ones(3)
        offsets = torch.tensor([0, 4, 4, 9])
        coefs = native.pairwise_pg_coef_fwd(
            logprobs, entropy, None, preference, offsets, None, "exact", 0.5
        )
        return *draw, logprobs, entropy, lse, grad, *found, of_kl, *coefs

    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("offsets", [[1, 3], [0, 4], [0, -1, 3], [0, 5, 3]])
def test_offsets_outside_the_tokens_are_refused(offsets):
    preference = torch.zeros(len(offsets) - 1)
    with pytest.raises(ValueError, match="pairwise_pg_loss: cu_seqlens must"):
        native.pairwise_pg_coef_fwd(
            torch.zeros(3), None, None, preference, torch.tensor(offsets), None, "token", 0.5
        )
