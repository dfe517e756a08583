"""The oracle itself, against published vectors, numbers worked out by hand, and plain Python."""

import math

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels import eager
from nlhf_kernels.testing.draw import kept_ids

ONES = 0xFFFFFFFF
# Random123's known answers for philox4x32-10: counter, key, words
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_known_answers(counter, key, words):
    assert tuple(int(w) for w in eager.philox(counter, key)) == words
    batch = tuple(torch.full((3, 2), c) for c in counter)
    assert all((w == known).all() for w, known in zip(eager.philox(batch, key), words, strict=True))


def test_fold_in_is_the_first_two_words_of_its_own_block():
    for seed, k in ((0, 0), (5, 3), (-1, 2**40 + 7), (2**63 - 1, -(2**63))):
        low, high = seed & ONES, (seed >> 32) & ONES
        words = eager.philox((k & ONES, (k >> 32) & ONES, 0, 1 << 31), (low, high))
        want = int(words[0]) | int(words[1]) << 32
        want -= (want >> 63) << 64
        assert nk.fold_in(seed, k) == want
        assert isinstance(nk.fold_in(seed, k), int)
        assert nk.fold_in(torch.tensor([seed]), k).tolist() == [want]
    assert len({nk.fold_in(s, k) for s in range(30) for k in range(30)}) == 900


def test_gumbel_range_and_moments():
    ends = eager.gumbel(torch.tensor([0, ONES]), torch.float64)
    assert ends[0] == pytest.approx(33 * math.log(2), abs=1e-9)
    assert ends[1] == pytest.approx(-math.log(24 * math.log(2)), abs=1e-6)
    words = torch.cat(eager.philox((torch.arange(50_000), 0, 0, 0), (1, 2)))
    noise = eager.gumbel(words, torch.float64)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    # float32 has few u left just below 1, which is where the lower tail comes from
    body = noise > -1
    assert (eager.gumbel(words, torch.float32) - noise)[body].abs().max() < 3e-6


def test_token_logprobs_by_hand():
    # probabilities 1/4, 1/4, 1/2
    logits = torch.tensor([[0.0, 0.0, math.log(2.0)]], dtype=torch.float64)
    out = eager.token_logprobs(logits, torch.tensor([2]))
    assert out.logprobs.item() == pytest.approx(math.log(0.5))
    assert out.entropy.item() == pytest.approx(1.5 * math.log(2))
    # temperature 1/2 squares them: 1/6, 1/6, 2/3
    out = eager.token_logprobs(logits, torch.tensor([0]), temperature=0.5)
    assert out.logprobs.item() == pytest.approx(math.log(1 / 6))
    # a soft cap bounds the logits: tanh(1000) = 1
    logits = torch.tensor([[3000.0, 0.0]], dtype=torch.float64)
    out = eager.token_logprobs(logits, torch.tensor([1]), softcap=3.0)
    assert out.logprobs.item() == pytest.approx(-math.log1p(math.exp(3)))


def test_entropy_ignores_what_cannot_happen():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    out = eager.token_logprobs(logits, torch.tensor([0]))
    assert out.entropy.item() == pytest.approx(math.log(2))
    (out.entropy + out.logprobs).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2] == 0


HAND = {
    # p - 1/2 = 0.25; ell = (0.1, -0.2, 0.4); tau = 0.5
    "reward_to_go": (0.25 - 0.15, 0.25 - 0.1, 0.25 - 0.2),
    "sequence": (0.1, 0.1, 0.1),
    "token": (0.2, 0.35, 0.05),
}


@pytest.mark.parametrize("kl", HAND)
@pytest.mark.parametrize("packed", [False, True])
def test_loss_by_hand(kl, packed):
    ell = torch.tensor([0.1, -0.2, 0.4], dtype=torch.float64)
    # the second sequence has one token, ell = 0, and p = 1/2: nothing to learn
    logits = torch.zeros(2, 3, 2, dtype=torch.float64, requires_grad=True)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[True] * 3, [True, False, False]])
    ref = torch.stack([-math.log(2) - ell, torch.full_like(ell, -math.log(2))])
    preference = torch.tensor([0.75, 0.5], dtype=torch.float64)
    inputs, extra = (logits, tokens, mask, ref), {}
    if packed:
        inputs = tuple(x[mask] for x in inputs)
        extra = {"cu_seqlens": torch.tensor([0, 3, 4])}
    out = eager.pairwise_pg_loss(
        *inputs[:3],
        preference,
        tau=0.5,
        kl=kl,
        ref_logprobs=inputs[3],
        **extra,
    )
    assert out.loss.item() == pytest.approx(sum(HAND[kl]) * math.log(2) / 2)
    out.loss.backward()
    # the gradient of -log pi of one of two equal logits is -1/2 for it
    want = torch.tensor([-c / 4 for c in HAND[kl]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad[0, :, 0], want)
    assert logits.grad[1].abs().max() < 1e-15


def test_filters_against_plain_python():
    generator = torch.Generator().manual_seed(3)
    for trial in range(200):
        V = int(torch.randint(1, 30, (), generator=generator))
        # few levels, so that ties are common
        logits = torch.randint(-3, 4, (1, V), generator=generator).double()
        k = int(torch.randint(0, V + 3, (), generator=generator))
        p, least = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if trial % 3 == 0:
            p = 1.0
        settings = {"top_k": k, "top_p": p, "min_p": least}
        draw = nk.mixture_sample(logits, seed=trial, position=0, **settings)
        scores = (logits - logits.max())[0]
        ids = kept_ids(scores.tolist(), [k], [p], [least])
        assert draw.tokens.item() in ids
        kept = scores[ids].logsumexp(0) - scores.logsumexp(0)
        assert draw.log_kept_mass.item() == pytest.approx(kept.item(), abs=1e-12)
        whole = scores.log_softmax(0)[draw.tokens.item()]
        both = draw.sampling_logprobs + draw.log_kept_mass
        assert both.item() == pytest.approx(whole.item(), abs=1e-12)


def test_exactly_k_survive_ties_lowest_id_first():
    logits = torch.zeros(4000, 10)
    draw = nk.mixture_sample(logits, seed=0, position=0, top_k=3)
    assert draw.tokens.unique().tolist() == [0, 1, 2]
    greedy = nk.mixture_sample(logits[:1], seed=0, position=0, temperature=0.0)
    assert greedy.tokens.item() == 0
