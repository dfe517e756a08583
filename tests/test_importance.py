"""Importance weights: exact without a cap, and with one within the bound, proved by enumeration.

A game of four tokens, the last ends a response, and at most three: 40 responses. The policy is a
table of logits per prefix, behind the interface of a language model; mu, who draws, is another.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nlhf import config, importance, losses, rollout
from nlhf.algorithms import check
from nlhf.rollout import Completion, Pair
from tests import tiny
from tests.test_losses import gradients, made

V, T, EOS = 4, 3, 3
TAU, TEMPERATURE = 0.3, 0.8
PREFIXES = [p for n in range(T) for p in itertools.product(range(EOS), repeat=n)]
SEQUENCES = [(*p, EOS) for p in PREFIXES] + list(itertools.product(range(EOS), repeat=T))
KLS = ("reward_to_go", "sequence")

pytestmark = pytest.mark.usefixtures("one_thread")


class Table(nn.Module):
    """Logits (prefix, V) as a causal language model; the prompt is one token."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(logits.clone())
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=V))

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, **_):
        rows = input_ids.tolist()
        # after an end token nothing is asked for
        where = [
            [PREFIXES.index(p) if (p := tuple(r[1 : n + 1])) in PREFIXES else 0 for n in range(T)]
            for r in rows
        ]
        return SimpleNamespace(logits=self.table[torch.tensor(where)])


def padded(default, of):
    return torch.tensor(
        [[of(y, n) if n < len(y) else default for n in range(T)] for y in SEQUENCES]
    )


TOKENS = padded(0, lambda y, n: y[n])
WHERE = padded(0, lambda y, n: PREFIXES.index(y[:n]))
MASK = padded(False, lambda y, n: True)


def logprobs(table, temperature=TEMPERATURE):
    """(sequence, T) log-probability of each token, 0 after the end."""
    found = (table / temperature).log_softmax(-1)[WHERE].gather(-1, TOKENS[..., None])[..., 0]
    return torch.where(MASK, found, 0)


def game(distance=0.7, top_k=0):
    """Tables of policy, reference and mu, and P(y > y')."""
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(3, len(PREFIXES), V, generator=generator, dtype=torch.float64)
    policy, ref, noise = tables
    mu = policy + distance * noise
    if top_k:
        least = mu.topk(top_k).values[:, -1:]
        mu = torch.where(mu >= least, mu, -math.inf)
    scores = torch.randn(len(SEQUENCES), len(SEQUENCES), generator=generator, dtype=torch.float64)
    return policy, ref, mu, torch.sigmoid(2 * (scores - scores.T))


def truth(policy, ref, value):
    """The gradient of tau KL(pi, ref) - E[value(y)], in closed form."""
    table = policy.clone().requires_grad_()
    log_pi = logprobs(table).sum(1)
    kl = (log_pi.exp() * (log_pi - logprobs(ref).sum(1))).sum()
    return torch.autograd.grad(TAU * kl - log_pi.exp() @ value, table)[0]


def drawn(rows, policy, ref, mu) -> Completion:
    return Completion(
        TOKENS[rows],
        MASK[rows],
        logprobs(policy)[rows],
        logprobs(ref)[rows],
        logprobs(mu)[rows],
    )


def each(rows, others, policy, ref, mu, value, level, cap, kl="reward_to_go", joint=False):
    """Gradient of each row alone (n, prefix, V), and the results."""
    found, results = [], []
    for i, p in zip(rows, value, strict=True):
        y = drawn(i[None], policy, ref, mu)
        other = None
        if joint:
            other = drawn(others[len(found)][None], policy, ref, mu)
        prompt = torch.zeros(1, 1, dtype=torch.int64)
        model = Table(policy)
        weights = importance.weights(
            y.policy_logprobs, y.sampling_logprobs, y.mask, level=level, cap=cap, other=other
        )
        result = importance.corrected_pg(
            model,
            None,
            Pair(prompt, torch.ones_like(prompt), y, y),
            p[None],
            importance=weights,
            tau=TAU,
            temperature=TEMPERATURE,
            kl=kl,
        )
        result.loss.backward()
        found.append(model.table.grad)
        results.append(result)
    return torch.stack(found), results


def expected(weights, found):
    return (weights[:, None, None] * found).sum(0)


def setting(level, cap, kl="reward_to_go", **changes):
    """Expected gradient under mu, the true one, the rows' gradients, mu, and the results."""
    policy, ref, mu, preference = game(**changes)
    value = preference @ logprobs(policy).sum(1).exp()
    # what mu cannot draw it does not draw
    rows = (logprobs(mu).sum(1) > -math.inf).nonzero()[:, 0]
    found, results = each(rows, rows, policy, ref, mu, value[rows], level, cap, kl)
    probability = logprobs(mu).sum(1).exp()[rows]
    assert probability.sum() == pytest.approx(1)
    exact = truth(policy, ref, value)
    return expected(probability, found), exact, found, probability, results


@pytest.mark.parametrize("kl", KLS)
def test_without_a_cap_the_expected_gradient_is_that_of_the_policy(kl):
    mean, exact, *_ = setting("sequence", math.inf, kl)
    assert (mean - exact).abs().max() < 1e-12
    assert exact.abs().max() > 1e-2


def test_without_weights_it_is_not():
    policy, ref, mu, preference = game()
    value = preference @ logprobs(policy).sum(1).exp()
    rows = torch.arange(len(SEQUENCES))
    # the policy for mu: every ratio is 1
    found, _ = each(rows, rows, policy, ref, policy, value, "sequence", 2.0)
    mean = expected(logprobs(mu).sum(1).exp(), found)
    assert (mean - truth(policy, ref, value)).norm() > 1e-2


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("cap", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("distance", [0.2, 0.7, 2.0])
def test_the_bias_of_the_cap_is_within_its_bound(distance, cap, kl):
    mean, exact, _, probability, results = setting("sequence", cap, kl, distance=distance)
    bias = (mean - exact).norm()
    gaps = torch.cat([result.gaps for result in results])
    bound = probability @ gaps
    assert bias <= bound + 1e-12
    # which is no empty one
    assert bound < 4 * bias + 1e-12
    # and the largest size times the mass that is cut off bounds that
    ratios = torch.cat([result.importance.ratios for result in results])
    sizes = torch.cat([result.sizes for result in results])
    cut = probability @ (ratios - cap).clamp(min=0)
    assert bound <= sizes.max() * cut + 1e-12
    # one minus the mean weight is that mass: what a run can see
    weights = torch.cat([result.importance.weights.amax(-1) for result in results])
    assert cut == pytest.approx(float(1 - probability @ weights), abs=1e-12)


@pytest.mark.parametrize("cap", [1.5, 4.0])
def test_a_gradient_is_no_longer_than_its_size_and_its_second_moment_than_the_cap_allows(cap):
    _, _, found, probability, results = setting("sequence", cap, distance=2.0)
    sizes = torch.cat([result.sizes for result in results])
    ratios = torch.cat([result.importance.ratios for result in results])
    weights = ratios.clamp(max=cap)
    norms = found.flatten(1).norm(dim=1)
    assert (norms <= weights * sizes + 1e-12).all()
    assert (norms >= 0.3 * weights * sizes).all()
    # of the policy's own samples, at most cap times
    plain = norms / weights
    assert probability @ norms.square() <= cap * (probability * ratios) @ plain.square()


@pytest.mark.parametrize("cap", [1.5, math.inf])
def test_token_weights_are_biased_within_the_bound_too(cap):
    mean, exact, _, probability, results = setting("token", cap)
    bias = (mean - exact).norm()
    assert bias > 1e-3
    assert bias <= probability @ torch.cat([result.gaps for result in results])


@pytest.mark.parametrize("cap", [1.5, math.inf])
def test_what_the_sampler_cannot_draw_is_in_the_bound(cap):
    mean, exact, _, probability, results = setting("sequence", cap, top_k=2)
    gaps = probability @ torch.cat([result.gaps for result in results])
    outside = 1 - probability @ torch.cat([result.importance.ratios for result in results])
    assert outside > 0.05
    # the sizes of all, also of those that mu cannot draw
    policy, ref, _, preference = game()
    value = preference @ logprobs(policy).sum(1).exp()
    rows = torch.arange(len(SEQUENCES))
    _, all_results = each(rows, rows, policy, ref, policy, value, "sequence", cap)
    largest = torch.cat([result.sizes for result in all_results]).max()
    bias = (mean - exact).norm()
    assert bias <= gaps + outside * largest
    if cap == math.inf:
        # no weight brings back what cannot be drawn
        assert gaps == 0
        assert bias > 1e-2


def test_both_responses_of_another_are_weighted_as_a_pair():
    """y' of self-play is the policy's as well: its ratio belongs to the weight."""
    policy, ref, mu, preference = game()
    keep = torch.tensor([i for i, y in enumerate(SEQUENCES) if len(y) < T or y[-1] != EOS])
    rows, others = torch.cartesian_prod(torch.arange(len(SEQUENCES)), keep[::3]).T
    # y' is drawn among some only, by both
    other = [logprobs(x).sum(1)[keep[::3]].exp() for x in (policy, mu)]
    value = preference[rows, others]
    found, _ = each(rows, others, policy, ref, mu, value, "sequence", math.inf, joint=True)
    place = torch.arange(len(keep[::3])).repeat(len(SEQUENCES))
    mean = expected(logprobs(mu).sum(1).exp()[rows] * other[1][place], found)
    total = other[0].sum()
    exact = total * truth(policy, ref, preference[:, keep[::3]] @ other[0] / total)
    assert (mean - exact).abs().max() < 1e-12


@pytest.mark.parametrize("kl", ["reward_to_go", "sequence", "token"])
@pytest.mark.parametrize("build", ["anchors", "lora", "plain"])
def test_weights_of_one_give_the_loss_of_the_op(kl, build):
    model, ref = tiny.llama(), tiny.llama(seed=1)
    if build == "lora":
        model, ref = tiny.with_lora(model), None
    pair, preference = made(model, ref, temperature=0.7)
    settings = {"tau": 0.2, "kl": kl, "baseline": 0.4, "temperature": 0.7}
    if build == "anchors":
        settings["anchors"] = [(pair.y_other.policy_logprobs * 0 - 1.5, 0.3)]
    ones = importance.weights(
        pair.y.policy_logprobs, pair.y.policy_logprobs, pair.y.mask, level="token", cap=1.0
    )
    found = importance.corrected_pg(model, ref, pair, preference, importance=ones, **settings)
    got = gradients(model, found.loss)
    wanted = losses.nash_md_pg(model, ref, pair, preference, **settings)
    torch.testing.assert_close(found.loss, wanted.loss)
    for name in ("logprobs", "ref_logprobs", "entropy", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    for name, gradient in gradients(model, wanted.loss).items():
        torch.testing.assert_close(got[name], gradient)
    assert found.gaps.abs().max() == 0


def test_each_token_s_term_is_multiplied_with_its_weight():
    model, ref = tiny.llama(), tiny.llama(seed=1)
    pair, preference = made(model, ref)
    other = losses.frozen_logprobs(tiny.llama(seed=2), pair, pair.y, 1.0)
    y, tau = pair.y, 0.3
    for level in importance.LEVELS:
        weights = importance.weights(y.policy_logprobs, other, y.mask, level=level, cap=3.0)
        settings = {"importance": weights, "tau": tau}
        found = importance.corrected_pg(model, ref, pair, preference, **settings).loss.detach()
        total = 0.0
        for b in range(len(preference)):
            n = int(y.mask[b].sum())
            pi, mu = y.policy_logprobs[b, :n], other[b, :n]
            ell = (pi - y.ref_logprobs[b, :n]).tolist()
            for i in range(n):
                ratio = math.exp((pi - mu).sum() if level == "sequence" else pi[i] - mu[i])
                advantage = float(preference[b]) - 0.5 - tau * sum(ell[i:])
                total -= min(3.0, ratio) * advantage * float(pi[i]) / len(preference)
        assert float(found) == pytest.approx(total, rel=1e-10)


def test_the_ratio_is_to_what_was_really_drawn_from():
    """With a filter mu is what the filter left: forgetting its mass would be off by that factor."""
    model = tiny.llama()
    ids, mask = tiny.prompts([3, 5])
    side = [rollout.Side(model)]
    settings = {"max_new_tokens": 4, "seed": 0, "eos_token_id": 2, "with_ref": False}
    (y,) = rollout.generate(side, None, ids, mask, top_k=3, **settings)
    found = importance.weights(
        y.policy_logprobs, y.sampling_logprobs, y.mask, level="sequence", cap=2.0
    )
    torch.testing.assert_close(found.ratios, y.log_kept_mass.sum(-1).exp())
    assert (found.ratios < 0.999).all()


def test_metrics_of_a_step_are_those_of_its_micro_batches_together():
    model, ref = tiny.llama(), tiny.llama(seed=1)
    pair, preference = made(model, ref)
    other = pair.y.policy_logprobs + 0.3 * torch.randn_like(pair.y.policy_logprobs)

    def of(pieces, level, filtered=False):
        results = []
        for piece in pieces:
            y, given = pair.y.rows(piece), other[piece]
            weights = importance.weights(y.policy_logprobs, given, y.mask, level=level, cap=1.2)
            arguments = pair.rows(piece), preference[piece]
            results.append(
                importance.corrected_pg(model, ref, *arguments, importance=weights, tau=0.1)
            )
        return importance.metrics(results, level, filtered), results

    for level in importance.LEVELS:
        whole, (result,) = of([slice(0, 4)], level)
        assert whole == pytest.approx(of([slice(0, 1), slice(1, 4)], level)[0])
        used = result.importance.ratios.clamp(max=1.2)
        if level == "token":
            used = (pair.y.policy_logprobs - other)[pair.y.mask].exp().clamp(max=1.2)
        assert whole["importance_mean"] == pytest.approx(float(used.mean()))
        share = float((used == 1.2).double().mean())
        assert whole["importance_truncated"] == pytest.approx(share)
        assert 0 < share < 1
        ess = float(used.sum() ** 2 / (used**2).sum() / len(used))
        assert whole["importance_ess"] == pytest.approx(ess)
        assert whole["importance_max"] > 1.2
        assert whole["importance_bias_bound"] == pytest.approx(float(result.gaps.mean()))
    # half of the policy's mass is out of reach
    other = pair.y.policy_logprobs - math.log(0.5) / pair.y.mask.sum(-1, keepdim=True)
    plain, filtered = (of([slice(0, 4)], "sequence", x)[0] for x in (False, True))
    assert filtered["importance_bias_bound"] > plain["importance_bias_bound"]
    assert (
        importance.metrics([losses.nash_md_pg(model, ref, pair, preference, tau=0.1)], "", 0) == {}
    )


def test_weights_that_have_all_vanished_are_no_sample():
    model, ref = tiny.llama(), tiny.llama(seed=1)
    pair, preference = made(model, ref)
    y = pair.y
    far = importance.weights(
        y.policy_logprobs - 1000, y.policy_logprobs, y.mask, level="sequence", cap=2.0
    )
    result = importance.corrected_pg(model, ref, pair, preference, importance=far, tau=0.1)
    assert result.loss == 0
    found = importance.metrics([result], "sequence", False)
    assert found["importance_ess"] == found["importance_mean"] == 0


def test_bad_input_is_refused_in_one_line():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    good = {"level": "token", "cap": 2.0}
    with pytest.raises(ValueError, match="level must be token or sequence, got 'row'"):
        importance.weights(x, x, mask, level="row", cap=2.0)
    for cap in (0.5, math.nan):
        with pytest.raises(ValueError, match="cap must be at least 1"):
            importance.weights(x, x, mask, level="token", cap=cap)
    with pytest.raises(ValueError, match=r"sampling_logprobs must be \(2, 3\).*got none"):
        importance.weights(x, None, mask, **good)
    with pytest.raises(ValueError, match="must be finite"):
        importance.weights(x, x - math.inf, mask, **good)
    model = tiny.llama()
    pair, preference = made(model, tiny.llama(seed=1))
    y = pair.y
    weights = importance.weights(y.policy_logprobs, y.policy_logprobs, y.mask, **good)
    with pytest.raises(ValueError, match="kl must be"):
        importance.corrected_pg(
            model, None, pair, preference, importance=weights, tau=0.1, kl="exact"
        )
    with pytest.raises(ValueError, match="preference and weights must be"):
        importance.corrected_pg(model, None, pair, preference[:1], importance=weights, tau=0.1)


def test_a_configuration_that_cannot_be_corrected_is_refused():
    base = {"importance": "sequence", "server": "http://127.0.0.1:1"}
    check(config.Config(**base))
    check(config.Config(**base, temperature=0.7, server_engine="sglang"))
    check(config.Config(**base, temperature=0.7, top_p=0.9, server_logprobs="processed"))
    for changes, match in (
        ({"temperature": 0.7}, "those of vllm are raw"),
        ({"top_p": 0.9, "server_engine": "sglang"}, "those of sglang are scaled"),
        ({"kl": "exact"}, "kl other than 'exact'"),
        ({"algorithm": "online_ipo"}, "needs a policy gradient"),
    ):
        with pytest.raises(ValueError, match=match):
            check(config.Config(**base | changes))
    with pytest.raises(ValueError, match=r"server: url must be http\(s\)://"):
        check(config.Config(server="somewhere:8000"))
    with pytest.raises(ValueError, match="NLHF_NO_SUCH_KEY holds no key"):
        check(config.Config(server="http://x", server_key_env="NLHF_NO_SUCH_KEY"))
    with pytest.raises(ValueError, match="learns from those of previous"):
        check(config.Config(server="http://x", algorithm="inpo", tau=0.1, eta=0.2, inner_steps=2))
