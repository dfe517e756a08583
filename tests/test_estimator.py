"""The estimator is right: its expectation is the exact gradient, by enumeration, on every backend.

A game small enough to list: V = 3 with an end of sequence, T = 3, so lengths differ; a policy and a
reference with a distribution of their own after every prefix; any antisymmetric preference. The
opponent is the one-step-at-a-time mixture, held constant.
"""

import itertools

import pytest
import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf_kernels.testing.check import compare

EOS, V, T = 2, 3, 3
MIXTURE_COEF, TAU, TEMPERATURE = 0.25, 0.3, 0.8
BIASED = 1e-3


class Game:
    """Every sequence as padded ids (S, T), its mask, and the row of ``theta`` behind each token."""

    def __init__(self):
        self.prefixes = [p for n in range(T) for p in itertools.product(range(EOS), repeat=n)]
        sequences = [
            y
            for n in range(1, T + 1)
            for y in itertools.product(range(V), repeat=n)
            if EOS not in y[:-1] and (y[-1] == EOS or n == T)
        ]
        S = len(sequences)
        self.tokens = torch.full((S, T), -1)
        self.mask = torch.zeros(S, T, dtype=torch.bool)
        self.rows = torch.zeros(S, T, dtype=torch.int64)
        for s, y in enumerate(sequences):
            for n, token in enumerate(y):
                self.tokens[s, n], self.mask[s, n] = token, True
                self.rows[s, n] = self.prefixes.index(y[:n])
        generator = torch.Generator().manual_seed(0)
        shape = (len(self.prefixes), V)
        self.theta, self.ref = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        above = torch.rand(S, S, generator=generator, dtype=torch.float64).triu(1)
        self.preference = above + (1 - above).T.tril(-1) + 0.5 * torch.eye(S)

    def token_logprobs(self, theta: Tensor) -> Tensor:
        """(S, T), 0 under the mask; tempered."""
        logs = (theta / TEMPERATURE).log_softmax(-1)[self.rows]
        chosen = logs.gather(-1, self.tokens.clamp(min=0)[..., None])[..., 0]
        return torch.where(self.mask, chosen, 0)

    def logprobs(self, theta: Tensor) -> Tensor:
        return self.token_logprobs(theta).sum(-1)

    def opponent(self) -> Tensor:
        return self.logprobs((1 - MIXTURE_COEF) * self.theta + MIXTURE_COEF * self.ref).exp()

    def exact_gradient(self) -> Tensor:
        """Of P(pi > pi') - tau KL(pi, ref), pi' constant."""
        theta = self.theta.clone().requires_grad_()
        logs = self.logprobs(theta)
        wins = logs.exp() @ self.preference @ self.opponent()
        kl = (logs.exp() * (logs - self.logprobs(self.ref))).sum()
        (gradient,) = torch.autograd.grad(wins - TAU * kl, theta)
        return gradient

    def expected_gradient(self, kl: str, dtype: torch.dtype, backend: str, device: str) -> Tensor:
        """Of minus the op's loss, over y from the policy and y' from the opponent: all pairs."""
        S = len(self.tokens)
        first, second = (x.flatten() for x in torch.meshgrid(*[torch.arange(S)] * 2, indexing="ij"))
        logits = self.theta[self.rows][first].to(device, dtype).requires_grad_()
        # garbage under the mask must not matter
        ref = torch.where(self.mask, self.token_logprobs(self.ref), torch.nan)[first]
        loss = nk.pairwise_pg_loss(
            logits,
            self.tokens[first].to(device),
            self.mask[first].to(device),
            self.preference[first, second].to(device, dtype),
            tau=TAU,
            ref_logprobs=ref.to(device, dtype),
            kl=kl,
            temperature=TEMPERATURE,
            backend=backend,
        ).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        # the op takes the mean over pairs; the expectation weighs each by its probability
        weight = self.logprobs(self.theta).exp()[first] * self.opponent()[second]
        gradient = -len(first) * gradient.cpu().double() * weight[:, None, None]
        total = torch.zeros_like(self.theta)
        return total.index_add_(0, self.rows[first].flatten(), gradient.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_expected_gradient_is_the_exact_one(target, dtype):
    game = Game()
    assert len(game.tokens) == 15
    assert game.mask.sum(-1).unique().tolist() == [1, 2, 3]
    torch.testing.assert_close(game.logprobs(game.theta).exp().sum().item(), 1.0)
    exact = game.exact_gradient()
    for kl in ("reward_to_go", "sequence"):
        found = game.expected_gradient(kl, dtype, *target)
        if target.backend == "eager" and dtype == torch.float64:
            assert (found - exact).abs().max() < 1e-10
        else:
            compare(kl, found.to(dtype), exact, dtype)
    biased = game.expected_gradient("token", dtype, *target)
    assert (biased - exact).abs().max() > BIASED


def test_the_proof_can_fail(target):
    """It is of this game: a shift of all logits changes nothing, another reference does."""
    game = Game()
    exact = game.exact_gradient()
    game.theta = game.theta + 0.05
    assert (game.exact_gradient() - exact).abs().max() < 1e-12
    game.ref = game.ref.flip(-1)
    found = game.expected_gradient("reward_to_go", torch.float64, *target)
    assert (found - exact).abs().max() > BIASED
