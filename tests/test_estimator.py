"""The loss's expected gradient is that of P(pi > pi') - tau KL(pi, ref): proved by enumeration.

And its variance, which is what the four estimators of the KL differ in, is worked out likewise.
A small game: three tokens, the last ends a sequence, at most three tokens, so that there are 15
sequences of lengths 1 to 3, eight of them cut off without an end. The policy is a table of logits
per prefix. The opponent is the one-step-at-a-time mixture, held constant.
"""

import functools
import itertools

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels.ops import heads
from nlhf_kernels.testing import TOLERANCE
from tests.conftest import Target

V, T, EOS = 3, 3, 2
TAU, COEF, TEMPERATURE = 0.3, 0.25, 0.8
# of a second anchor
OTHER_TAU = 0.2
UNBIASED = ("reward_to_go", "sequence", "exact")
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
    gradient = ascent(policy, preference @ opponent, (TAU,), (ref,))
    return policy, ref, opponent, preference, gradient


def ascent(policy, value, taus, refs) -> torch.Tensor:
    """The gradient of E[value(y)] - sum_j tau_j KL(pi, ref_j)."""
    policy = policy.detach().requires_grad_()
    log_pi = logprobs(policy).sum(1)
    pi = log_pi.exp()
    objective = pi @ value
    for tau, ref in zip(taus, refs, strict=True):
        objective = objective - tau * (pi * (log_pi - logprobs(ref).sum(1))).sum()
    return torch.autograd.grad(objective, policy)[0]


@functools.cache
def second_anchor() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(PREFIXES), V, generator=generator, dtype=torch.float64)


def from_hidden(logits, ref_logits, *arguments, **settings):
    """The same loss, each token's hidden state a unit vector of its own, chunk by chunk."""
    D = logits.shape[:-1].numel()
    # under the mask there is nothing to read
    hidden = torch.eye(D, dtype=logits.dtype, device=logits.device).view(*logits.shape[:-1], D)
    hidden = torch.where(arguments[1][..., None], hidden, torch.nan)
    if ref_logits is not None:
        ref_weight = ref_logits.nan_to_num().reshape(D, V).T.contiguous()
        settings |= {"ref_hidden": hidden, "ref_weight": ref_weight}
    weight = logits.reshape(D, V).T.contiguous()
    return nk.linear_pairwise_pg_loss(hidden, weight, *arguments, **settings)


def from_logits(logits, ref_logits, *arguments, **settings):
    if ref_logits is not None:
        settings["ref_logits"] = ref_logits
    return nk.pairwise_pg_loss(logits, *arguments, **settings)


def gradients(policy, preference, rows, kl, dtype, target, loss=from_logits, anchors=1):
    """The op's gradient with respect to the table for each of the sequences ``rows`` alone."""
    ref = game()[1]
    where = {"device": target.device, "dtype": dtype}
    refs = [torch.where(MASK, logprobs(x), torch.nan) for x in (ref, second_anchor())]
    refs = tuple(x[rows].to(**where) for x in refs[:anchors])
    extra = {"ref_logprobs": refs[0], "tau": TAU}
    if anchors == 2:
        extra = {"ref_logprobs": refs, "tau": (TAU, OTHER_TAU)}
    ref_logits = None
    if kl == "exact":
        del extra["ref_logprobs"]
        ref_logits = torch.where(MASK[..., None], ref[WHERE], torch.nan)[rows].to(**where)
    logits = policy.to(**where)[WHERE[rows].to(target.device)].requires_grad_()
    result = loss(
        logits,
        ref_logits,
        TOKENS[rows].to(target.device),
        MASK[rows].to(target.device),
        preference.to(**where),
        kl=kl,
        temperature=TEMPERATURE,
        backend=target.backend,
        **extra,
    )
    (per_token,) = torch.autograd.grad(result.loss, logits)
    # the loss is a mean over sequences; no prefix is twice in one of them, but for the padding's
    per_token = torch.where(MASK[rows][..., None], per_token.cpu().double() * len(rows), 0)
    tables = torch.zeros(len(rows), len(PREFIXES), V, dtype=torch.float64)
    return tables.scatter_add_(1, WHERE[rows][..., None].expand_as(per_token), per_token)


def expected_gradient(weights, *arguments, **settings):
    policy = game()[0]
    return (weights[:, None, None] * gradients(policy, *arguments, **settings)).sum(0)


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
    estimators = UNBIASED
    if target.interpreted and dtype == torch.float32:
        # seconds each
        estimators = ("exact",)
    for kl in (*estimators, "token"):
        # the loss falls where the objective rises
        found = -expected_gradient(weights, preference @ opponent, rows, kl, dtype, target)
        errors[kl] = (found - exact).abs()
    for kl in estimators:
        if dtype == torch.float64:
            assert errors[kl].max() < 1e-10
        rtol, atol = TOLERANCE[dtype]
        assert (errors[kl] <= atol + rtol * exact.abs()).all()
    assert errors["token"].max() > 1e-2


def test_expected_gradient_from_hidden_states(target, monkeypatch):
    """In chunks of a few tokens, sequences across them."""
    monkeypatch.setitem(heads.FEWEST, target.device, 8)
    policy, _, opponent, preference, exact = game()
    weights = logprobs(policy).sum(1).exp()
    rows = torch.arange(len(SEQUENCES))
    for kl in ("exact",) if target.interpreted else UNBIASED:
        found = -expected_gradient(
            weights, preference @ opponent, rows, kl, torch.float64, target, loss=in_chunks
        )
        assert (found - exact).abs().max() < 1e-10


def in_chunks(*arguments, **settings):
    return from_hidden(*arguments, **settings, memory_budget=1)


def test_expected_gradient_of_two_anchors(target, monkeypatch):
    monkeypatch.setitem(heads.FEWEST, target.device, 8)
    policy, ref, opponent, preference, _ = game()
    value = preference @ opponent
    exact = ascent(policy, value, (TAU, OTHER_TAU), (ref, second_anchor()))
    weights = logprobs(policy).sum(1).exp()
    rows = torch.arange(len(SEQUENCES))
    losses = (from_logits,) if target.interpreted else (from_logits, in_chunks)
    for loss, kl in itertools.product(losses, UNBIASED[:1] if target.interpreted else UNBIASED[:2]):
        found = -expected_gradient(
            weights, value, rows, kl, torch.float64, target, loss=loss, anchors=2
        )
        assert (found - exact).abs().max() < 1e-10


def pairs(policy, opponent):
    """All pairs and their probabilities."""
    rows, others = torch.cartesian_prod(*[torch.arange(len(SEQUENCES))] * 2).T
    return rows, others, logprobs(policy).sum(1).exp()[rows] * opponent[others]


def test_all_pairs(target):
    """y' drawn, not averaged: the expectation over both, weighted pair by pair."""
    policy, _, opponent, preference, exact = game()
    rows, others, weights = pairs(policy, opponent)
    for kl in UNBIASED[:1] if target.interpreted else UNBIASED:
        found = -expected_gradient(
            weights, preference[rows, others], rows, kl, torch.float64, target
        )
        assert (found - exact).abs().max() < 1e-10


def test_the_proof_can_fail(target):
    """With another opponent than the mixture the two gradients are apart."""
    policy, ref, _, preference, exact = game()
    weights = logprobs(policy).sum(1).exp()
    rows = torch.arange(len(SEQUENCES))
    self_play = logprobs(policy).sum(1).exp()
    others = self_play, logprobs(ref).sum(1).exp()
    for other in others[:1] if target.interpreted else others:
        found = -expected_gradient(
            weights, preference @ other, rows, "reward_to_go", torch.float64, target
        )
        assert (found - exact).abs().max() > 1e-3


# ---- variance


def equilibrium() -> torch.Tensor:
    """The policy that no other beats: pi = ref exp(P(y > pi) / tau), normalised; as a table."""
    _, ref, _, preference, _ = game()
    log_ref = logprobs(ref).sum(1)
    log_pi = log_ref
    for _ in range(1000):
        best = (log_ref + preference @ log_pi.exp() / TAU).log_softmax(0)
        log_pi = (0.9 * log_pi + 0.1 * best).log_softmax(0)
    table = torch.zeros(len(PREFIXES), V, dtype=torch.float64)
    for i, v in itertools.product(range(len(PREFIXES)), range(V)):
        start = (*PREFIXES[i], v)
        through = [j for j, y in enumerate(SEQUENCES) if y[: len(start)] == start]
        table[i, v] = TEMPERATURE * log_pi[through].logsumexp(0)
    return table


@functools.cache
def variances() -> dict[str, dict[str, tuple[float, float]]]:
    """Regime -> estimator -> trace of the covariance of one pair's gradient, and of its bias.

    The preference is that of the pair. Squared bias: the distance of the mean from the gradient.
    """
    policy, ref, opponent, preference, _ = game()
    nash = equilibrium()
    regimes = {"far": (policy, opponent), "near": (nash, logprobs(nash).sum(1).exp())}
    found = {}
    for regime, (table, other) in regimes.items():
        rows, others, weights = pairs(table, other)
        exact = ascent(table, preference @ other, (TAU,), (ref,))
        found[regime] = {}
        for kl in (*UNBIASED, "token"):
            eager = Target("eager", "cpu")
            each = -gradients(table, preference[rows, others], rows, kl, torch.float64, eager)
            mean = (weights[:, None, None] * each).sum(0)
            trace = (weights * each.pow(2).sum((1, 2))).sum() - mean.pow(2).sum()
            found[regime][kl] = float(trace), float((mean - exact).pow(2).sum())
    return found


def variance_table() -> str:
    """For the lab book."""
    lines = ["| kl | far: variance | bias^2 | near: variance | bias^2 |", "|---|---|---|---|---|"]
    for kl in (*UNBIASED, "token"):
        numbers = [x for regime in ("far", "near") for x in variances()[regime][kl]]
        cells = [f"{x:.4f}" if x > 1e-12 else "0" for x in numbers]
        lines.append(f"| {kl} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_nobody_beats_the_equilibrium():
    nash = equilibrium()
    _, ref, _, preference, _ = game()
    value = preference @ logprobs(nash).sum(1).exp()
    assert ascent(nash, value, (TAU,), (ref,)).abs().max() < 1e-10
    # and it is not the reference
    assert (logprobs(nash) - logprobs(ref)).abs().max() > 0.1


def test_variances_of_the_four_estimators():
    """ "exact" pays where the log-ratios are large; where they cancel the preference it costs."""
    far, near = variances()["far"], variances()["near"]
    for regime in (far, near):
        assert all(regime[kl][1] < 1e-20 for kl in UNBIASED)
        assert regime["token"][1] > 1e-5
    assert far["exact"][0] < 0.6 * far["reward_to_go"][0]
    assert far["reward_to_go"][0] < 0.8 * far["sequence"][0]
    assert near["exact"][0] > 1.03 * near["reward_to_go"][0]
    assert variance_table().count("\n") == 5
