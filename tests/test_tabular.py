"""Matrix games: what they accept, their measures, fixtures, equilibria and rewards."""

import itertools
import json
import math
import os
import subprocess
import sys
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from nlhf import tabular
from nlhf.tabular import equilibrium, fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def policy_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_policy(seed, *shape, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tabular.normalise(scale * logits)


def random_game(actions, tau, seed=0, contexts=None):
    shape = (actions,) if contexts is None else (contexts, actions)
    ref = random_policy(seed + 100, *shape).exp()
    return fixtures.random(actions, contexts, seed, tau=tau, ref=ref)


# what a game accepts


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ([[0.5, 0.7], [0.4, 0.5]], r"preference\[0, 1\] = 0.7 and its mirror 0.4 must sum to 1"),
        ([[0.5, 0.7], [0.3, 0.6]], r"preference\[1, 1\] = 0.6 and its mirror 0.6"),
        ([[0.5, 1.2], [-0.2, 0.5]], r"preference\[0, 1\] must be a probability .* got 1.2"),
        ([[0.5, math.nan], [0.5, 0.5]], r"preference\[0, 1\] must be a probability .* got nan"),
        ([[0.5, 0.5]], r"must be \(..., Y, Y\), got shape \(1, 2\)"),
        ([], "must be"),
        (np.zeros((2, 0, 0)), "needs at least one context and one action"),
    ],
)
def test_what_is_no_preference_is_named(preference, message):
    with pytest.raises(ValueError, match=message):
        tabular.MatrixGame(preference)


def test_a_bad_entry_far_down_a_batch_is_named(monkeypatch):
    # several blocks of rows
    monkeypatch.setattr("nlhf.tabular.matrix_game._BLOCK", 64)
    preference = fixtures.random(9, 3).preference
    preference[2, 7, 4] += 1e-9
    with pytest.raises(ValueError, match=r"preference\[2, 4, 7\]"):
        tabular.MatrixGame(preference)
    preference[2, 7, 4] = 3.0
    with pytest.raises(ValueError, match=r"preference\[2, 7, 4\] must .* got 3.0|\[2, 4, 7\] = "):
        tabular.MatrixGame(preference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": -0.1}, "tau must be a number, at least 0 and finite, got -0.1"),
        ({"tau": math.nan}, "tau must be"),
        ({"tau": "0.1"}, "tau must be a number"),
        ({"ref": [0.5, 0.5]}, r"ref must have one probability for each of the 3 actions"),
        ({"ref": [0.5, 0.5, 0.0]}, r"ref must be above 0 and at most 1, got 0.0 at \[2\]"),
        ({"ref": [0.5, 0.4, 0.2]}, "ref must sum to 1, it is off by 0.1"),
        ({"names": ["a"]}, "names must be 3"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    preference = fixtures.population().preference
    with pytest.raises(ValueError, match=message):
        tabular.MatrixGame(preference, **settings)


def test_float64_is_not_copied_and_replace_shares_it():
    preference = fixtures.random(5).preference
    game = tabular.MatrixGame(preference)
    other = game.replace(tau=2.0, ref=[0.1, 0.2, 0.3, 0.2, 0.2])
    assert game.preference.data_ptr() == other.preference.data_ptr() == preference.data_ptr()
    assert (game.tau, other.tau) == (0.1, 2.0)
    torch.testing.assert_close(game.log_ref.exp(), torch.full((5,), 0.2).double())
    torch.testing.assert_close(other.ref[2].item(), 0.3)


def test_policies_of_another_kind_are_refused():
    game = fixtures.dice()
    with pytest.raises(ValueError, match=r"float64 log-probabilities \(..., 3\)"):
        game.wins(torch.zeros(3))
    with pytest.raises(ValueError, match="wins: a policy"):
        game.wins(torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("contexts", [None, 4])
def test_wins_take_policies_with_more_dimensions(contexts):
    game = random_game(6, 0.1, contexts=contexts)
    policies = random_policy(1, 5, *game.log_ref.shape)
    wins = game.wins(policies)
    for policy, won in zip(policies, wins, strict=True):
        expected = (game.preference * policy.exp()[..., None, :]).sum(-1)
        torch.testing.assert_close(won, expected, rtol=1e-14, atol=0)


# measures


def test_value_is_the_definition():
    game = random_game(5, 0.3)
    policy, other = random_policy(1, 5), random_policy(2, 5)
    total = 0.0
    for i, j in itertools.product(range(5), repeat=2):
        gain = game.preference[i, j] - 0.3 * (policy[i] - game.log_ref[i])
        total += policy[i].exp() * other[j].exp() * (gain + 0.3 * (other[j] - game.log_ref[j]))
    torch.testing.assert_close(game.value(policy, other), total)
    torch.testing.assert_close(game.value(policy, policy).item(), 0.5)
    torch.testing.assert_close(
        game.value(policy, other) + game.value(other, policy), torch.ones(()).double()
    )


@pytest.mark.parametrize("tau", [0.0, 0.05, 2.0])
def test_exploitability_is_the_best_any_policy_can_do(tau):
    game = random_game(6, 0.1)
    policy = random_policy(1, 6)
    gap = tabular.exploitability(game, policy, tau)
    if tau:
        best = tabular.best_response(game.replace(tau=tau), policy)
    else:
        best = policy_of(*torch.eye(6)[game.wins(policy).argmax()].tolist())
    torch.testing.assert_close(game.value(best, policy, tau) - 0.5, gap)
    others = [best + 0.3 * random_policy(s, 6) for s in range(20)] + [
        random_policy(s, 6) for s in range(20)
    ]
    for other in map(tabular.normalise, others):
        assert game.value(other, policy, tau) - 0.5 <= gap + 1e-12
    # against itself twice, and in general the sum of the two sides
    torch.testing.assert_close(tabular.duality_gap(game, policy, tau=tau), 2 * gap)
    other = random_policy(7, 6)
    both = tabular.duality_gap(game, policy, other, tau)
    torch.testing.assert_close(both, gap + tabular.exploitability(game, other, tau))


def test_the_gap_is_the_maximum_less_the_minimum():
    game, tau = random_game(4, 0.2), 0.2
    policy, other = random_policy(1, 4), random_policy(2, 4)
    up = game.value(tabular.best_response(game, other), other)
    down = game.value(policy, tabular.best_response(game, policy))
    torch.testing.assert_close(tabular.duality_gap(game, policy, other, tau), up - down)


def test_pure_policies_are_as_exploitable_as_their_one_hot_vectors():
    game = random_game(7, 0.1, contexts=3)
    pure = torch.stack(
        [
            tabular.exploitability(game, torch.eye(7)[i].log().double().expand(3, 7), 0.0)
            for i in range(7)
        ],
        -1,
    )
    torch.testing.assert_close(tabular.pure_exploitability(game), pure)


def test_kl_keeps_its_relative_precision_near_zero():
    p = random_policy(3, 8)
    direction = random_policy(4, 8) - random_policy(5, 8)
    for size in (1.0, 1e-3, 1e-6, 1e-9):
        q = tabular.normalise(p + size * direction)
        with localcontext() as context:
            context.prec = 60
            exact_p, exact_q = ([Decimal(x).exp() for x in v.tolist()] for v in (p, q))
            exact_p, exact_q = ([x / sum(v) for x in v] for v in (exact_p, exact_q))
            exact = sum(a * (a / b).ln() for a, b in zip(exact_p, exact_q, strict=True))
        # log-probabilities are themselves rounded to 1e-16
        assert tabular.kl(p, q).item() == pytest.approx(
            float(exact), rel=1e-13 + 1e-14 / size, abs=0
        )


def test_kl_of_policies_with_zeros():
    pure, half = policy_of(1.0, 0.0), policy_of(0.5, 0.5)
    assert tabular.kl(pure, half).item() == pytest.approx(math.log(2))
    assert tabular.kl(pure, pure).item() == 0
    assert tabular.kl(half, pure).item() == math.inf


# equilibria


def exact_equilibrium(game, digits=40):
    """Mirror prox in decimal arithmetic, far below the rounding of float64."""
    with localcontext() as context:
        context.prec = digits
        P = [[Decimal(v) for v in row] for row in game.preference.tolist()]
        tau, ref = Decimal(game.tau), [Decimal(v) for v in game.ref.tolist()]
        Y = len(P)
        # exactly antisymmetric, as the theory has it
        P = [[(P[i][j] - P[j][i] + 1) / 2 for j in range(Y)] for i in range(Y)]
        pi = [r / sum(ref) for r in ref]
        log_ref = [p.ln() for p in pi]
        log_pi, eta = log_ref, 2 * tau

        def step(log_pi, pi):
            gain = [sum(a * b for a, b in zip(row, pi, strict=True)) for row in P]
            z = [
                (lp + eta * lr + eta / tau * g) / (1 + eta)
                for lp, lr, g in zip(log_pi, log_ref, gain, strict=True)
            ]
            weights = [(v - max(z)).exp() for v in z]
            return [w / sum(weights) for w in weights]

        while True:
            new = step(log_pi, step(log_pi, pi))
            change = max(abs(a / b - 1) for a, b in zip(new, pi, strict=True))
            pi, log_pi = new, [p.ln() for p in new]
            if change < Decimal(10) ** (5 - digits):
                return pi


def distance_to(exact, log_policy):
    with localcontext() as context:
        context.prec = 40
        weights = [Decimal(x).exp() for x in log_policy.tolist()]
        return float(
            sum(abs(w / sum(weights) - e) for w, e in zip(weights, exact, strict=True)) / 2
        )


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.03])
def test_the_certificate_holds_in_exact_arithmetic(tau):
    game = random_game(4, tau, seed=5)
    exact = exact_equilibrium(game)
    solution = tabular.solve(game)
    assert distance_to(exact, solution.policy) <= solution.distance <= 1e-12
    # and for policies that are no solution, near and far
    for size in (1e-14, 1e-10, 1e-5, 0.1, 3.0):
        policy = tabular.normalise(solution.policy + size * random_policy(2, 4))
        bound = equilibrium._certified(game, policy, 0)[0].distance.item()
        assert distance_to(exact, policy) <= bound <= 1e-15 + 20 * size / tau


def test_two_actions_have_a_closed_form():
    # P(1 > pi) - P(2 > pi) is p - 1/2 whatever pi is
    for tau, p, r in itertools.product((10.0, 0.1, 1e-3), (0.0, 0.3, 1.0), (0.5, 0.9)):
        game = tabular.MatrixGame([[0.5, p], [1 - p, 0.5]], ref=[r, 1 - r], tau=tau)
        expected = game.log_ref + torch.tensor([p - 0.5, 0.0], dtype=torch.float64) / tau
        found = tabular.solve(game).policy
        torch.testing.assert_close(found, tabular.normalise(expected), rtol=1e-13, atol=1e-13)


def hard_games():
    ones = torch.ones(9, 9, dtype=torch.float64)
    transitive = ones.triu(1) + 0.5 * torch.eye(9)
    generator = torch.Generator().manual_seed(0)
    coins = (torch.rand(16, 16, generator=generator) < 0.5).double().tril(-1)
    coins = coins + (1 - coins).mT.triu(1) + 0.5 * torch.eye(16)
    twins = coins.repeat_interleave(2, 0).repeat_interleave(2, 1)
    twins = torch.where(torch.block_diag(*[torch.ones(2, 2)] * 16) > 0, 0.5, twins)
    reward = random_policy(0, 30)
    scored = (reward[:, None] - reward).sigmoid().tril(-1)
    scored = scored + (1 - scored).mT.triu(1) + 0.5 * torch.eye(30)
    return {
        "ties": 0.5 * ones,
        "transitive": transitive,
        "coins": coins,
        "twins": twins,
        "scored": scored,
        "uniform noise": fixtures.random(24).preference,
        "cycle": fixtures.rock_paper_scissors().preference,
        "batch": fixtures.random(8, 6).preference,
        "one action": torch.full((1, 1), 0.5),
    }


@pytest.mark.parametrize("tau", [10.0, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", hard_games())
def test_every_game_is_solved_at_every_tau(name, tau):
    preference = hard_games()[name]
    for seed in (None, 1):
        ref = None if seed is None else random_policy(seed, preference.shape[-1]).exp()
        game = tabular.MatrixGame(preference, ref=ref, tau=tau)
        solution = tabular.solve(game)
        assert solution.distance.max() <= 1e-12
        assert solution.policy.shape == preference.shape[:-1]
        torch.testing.assert_close(
            solution.policy.exp().sum(-1), torch.ones(()).double().expand(preference.shape[:-2])
        )
        again = tabular.best_response(game, solution.policy)
        # one more response turns rounding by 1 / tau
        assert (again.exp() - solution.policy.exp()).abs().max() <= 1e-14 / tau + 1e-13


def test_a_distance_that_rounding_forbids_is_refused():
    with pytest.raises(ValueError, match=r"solve: within .* of the equilibrium, above .* 1e-20"):
        tabular.solve(fixtures.elo(), tolerance=1e-20)
    with pytest.raises(ValueError, match="tau must be above 0, got"):
        tabular.solve(fixtures.elo(tau=0.0))
    with pytest.raises(ValueError, match="tolerance must be above 0"):
        tabular.solve(fixtures.elo(), tolerance=0.0)


@pytest.mark.parametrize("mixture_coef", [0.0, 0.125, 0.5, 0.9, 1.0])
def test_the_mixture_is_an_equilibrium_and_the_policy_is_not(mixture_coef):
    game = random_game(6, 0.1, contexts=2)
    policy = tabular.nash_md_pg_limit(game, mixture_coef)
    mix = tabular.normalise((1 - mixture_coef) * policy + mixture_coef * game.log_ref)
    # it is stationary
    assert tabular.span(policy, tabular.best_response(game, mix)).max() < 1e-12
    if mixture_coef < 1:
        at = tabular.solve(game.replace(tau=game.tau / (1 - mixture_coef))).policy
        assert tabular.span(mix, at).max() < 1e-11
    off = tabular.kl(tabular.solve(game).policy, policy)
    assert (off < 1e-25).all() if mixture_coef == 0 else (off > 1e-7).all()


def test_a_mixture_outside_of_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"mixture_coef must be in \[0, 1\], got 1.5"):
        tabular.nash_md_pg_limit(fixtures.elo(), 1.5)


# memory

GROWTH = """
import json, resource, sys, torch
torch.set_num_threads(1)
from nlhf import tabular
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
small = tabular.game("random", actions=50)
tabular.solve(small), [next(s.run(small)) for s in tabular.SOLVERS.values()]
preference = tabular.game("random", actions=2500).preference
before = rss()
game = tabular.MatrixGame(preference, tau=1.0)
made = rss()
tabular.solve(game)
solved = rss()
many = tabular.game("random", actions=10, contexts=1500)

def walk(count):
    for solver in tabular.SOLVERS.values():
        policies = solver.run(many)
        for _ in range(count):
            next(policies)
    return rss()

print(json.dumps([made - before, solved - before, -walk(5) + walk(100)]))
"""


def test_memory_grows_with_the_game_and_not_with_the_iterations():
    result = subprocess.run(
        [sys.executable, "-c", GROWTH],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    made, solved, iterated = json.loads(result.stdout)
    # a copy of the matrix would take 48 MiB, and the iterates of one solver 11
    assert made < 30
    assert solved < 30
    assert iterated < 7
