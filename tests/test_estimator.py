"""The loss's expected gradient is that of P(pi > pi') - tau KL(pi, ref): proved by enumeration.

A small game: three tokens, the last ends a sequence, at most three tokens, so that there are 15
sequences of lengths 1 to 3, eight of them cut off without an end. The policy is a table of logits
per prefix. The opponent is the one-step-at-a-time mixture, held constant.
"""

import functools
import itertools

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels.testing import TOLERANCE

V, T, EOS = 3, 3, 2
TAU, COEF, TEMPERATURE = 0.3, 0.25, 0.8
PREFIXES = [p for n in range(T) for p in itertools.product((0, 1), repeat=n)]
SEQUENCES = [(*p, EOS) for p in PREFIXES] + list(itertools.product((0, 1), repeat=T))


def padded(default: int, of) -> torch.Tensor:
    """(sequence, T) of ``of(sequence, step)``, ``default`` after the end."""
    rows = [[of(y, n) if n < len(y) else default for n in range(T)] for y in SEQUENCES]
    return torch.tensor(rows)


# under the mask: an id that must not be read
TOKENS = padded(-(2**60), lambda y, n: y[n])
WHERE = padded(0, lambda y, n: PREFIXES.index(y[:n]))
MASK = TOKENS >= 0


def logprobs(table: torch.Tensor) -> torch.Tensor:
    """(sequence, T) log-probability of each token at the temperature, 0 after the end."""
    of_prefix = (table / TEMPERATURE).log_softmax(-1)[WHERE]
    return torch.where(MASK, of_prefix.gather(-1, TOKENS.clamp(min=0)[..., None])[..., 0], 0)


@functools.cache
def game():
    """Logits of policy and reference, the opponent's probabilities, P(y > y'), the gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = len(PREFIXES), V
    policy, ref = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    opponent = logprobs((1 - COEF) * policy + COEF * ref).sum(1).exp()
    scores = torch.randn(len(SEQUENCES), len(SEQUENCES), generator=generator, dtype=torch.float64)
    # antisymmetric, and far from transitive
    preference = torch.sigmoid(2 * (scores - scores.T))

    policy.requires_grad_()
    log_pi = logprobs(policy).sum(1)
    pi = log_pi.exp()
    kl = (pi * (log_pi - logprobs(ref).sum(1))).sum()
    objective = pi @ preference @ opponent - TAU * kl
    (gradient,) = torch.autograd.grad(objective, policy)
    return policy.detach(), ref, opponent, preference, gradient


def expected_gradient(weights, preference, rows, kl, dtype, target):
    """Sum over sequences ``rows`` of weight times the op's gradient, with respect to the table."""
    policy, ref, *_ = game()
    ref_logprobs = torch.where(MASK, logprobs(ref), torch.nan)
    table = policy.to(target.device, dtype).requires_grad_()
    logits = table[WHERE[rows].to(target.device)]
    loss = nk.pairwise_pg_loss(
        logits,
        TOKENS[rows].to(target.device),
        MASK[rows].to(target.device),
        preference.to(target.device, dtype),
        tau=TAU,
        ref_logprobs=ref_logprobs[rows].to(target.device, dtype),
        kl=kl,
        temperature=TEMPERATURE,
        backend=target.backend,
    ).loss
    (per_row,) = torch.autograd.grad(loss, logits, retain_graph=True)
    # the loss is a mean over sequences, the expectation has a weight for each
    weights = weights.to(target.device, dtype)[:, None, None] * len(rows)
    (gradient,) = torch.autograd.grad(logits, table, per_row * weights)
    return gradient.detach().cpu().double()


def test_the_game_is_whole():
    *_, opponent, preference, _ = game()
    policy = logprobs(game()[0]).sum(1).exp()
    assert len(SEQUENCES) == 15
    assert {len(y) for y in SEQUENCES} == {1, 2, 3}
    for x in (policy, opponent):
        torch.testing.assert_close(x.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(preference + preference.T, torch.ones_like(preference))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_expected_gradient_is_exact_and_token_is_biased(dtype, target):
    policy, _, opponent, preference, exact = game()
    weights = logprobs(policy).sum(1).exp()
    rows = torch.arange(len(SEQUENCES))
    errors = {}
    for kl in ("reward_to_go", "sequence", "token"):
        # the loss falls where the objective rises
        ascent = -expected_gradient(weights, preference @ opponent, rows, kl, dtype, target)
        errors[kl] = (ascent - exact).abs()
    for kl in ("reward_to_go", "sequence"):
        if dtype == torch.float64:
            assert errors[kl].max() < 1e-10
        rtol, atol = TOLERANCE[dtype]
        assert (errors[kl] <= atol + rtol * exact.abs()).all()
    assert errors["token"].max() > 1e-2


def test_all_pairs(target):
    """y' drawn, not averaged: the expectation over both, weighted pair by pair."""
    policy, _, opponent, preference, exact = game()
    rows, others = torch.cartesian_prod(*[torch.arange(len(SEQUENCES))] * 2).T
    weights = logprobs(policy).sum(1).exp()[rows] * opponent[others]
    for kl in ("reward_to_go",) if target.interpreted else ("reward_to_go", "sequence"):
        ascent = -expected_gradient(
            weights, preference[rows, others], rows, kl, torch.float64, target
        )
        assert (ascent - exact).abs().max() < 1e-10


def test_the_proof_can_fail(target):
    """With another opponent than the mixture the two gradients are apart."""
    policy, ref, _, preference, exact = game()
    weights = logprobs(policy).sum(1).exp()
    rows = torch.arange(len(SEQUENCES))
    self_play = logprobs(policy).sum(1).exp()
    for other in (self_play, logprobs(ref).sum(1).exp()):
        ascent = -expected_gradient(
            weights, preference @ other, rows, "reward_to_go", torch.float64, target
        )
        assert (ascent - exact).abs().max() > 1e-3
