"""Solvers on matrix games: each against its formula in the papers, its theorem and its limit."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlhf import tabular
from nlhf.tabular import fixtures, solvers
from tests.test_tabular import random_game, random_policy

pytestmark = pytest.mark.usefixtures("one_thread")


def take(policies, count):
    """The start and the next ``count`` policies."""
    return list(itertools.islice(policies, count + 1))


def last(policies, count):
    return next(itertools.islice(policies, count, None))


# each update as it is printed, in probabilities


def share(x):
    return x / x.sum(-1, keepdim=True)


def won(game, p):
    return game.preference @ p


def printed_nash_md(g, history, t, eta=None):
    eta = 2 / (g.tau * (t + 2)) if eta is None else eta
    mix = share(history[-1] ** (1 - eta * g.tau) * g.ref ** (eta * g.tau))
    return share(mix * (eta * won(g, mix)).exp())


def printed_omd(g, history, t, eta=None, opponent=None):
    eta = 2 / (g.tau * (t + 2)) if eta is None else eta
    mix = share(history[-1] ** (1 - eta * g.tau) * g.ref ** (eta * g.tau))
    return share(mix * (eta * won(g, history[-1] if opponent is None else opponent)).exp())


def printed_nash_ema(g, history, t, eta, decay):
    bar = history[0]
    for p in history[1:]:
        bar = share(bar**decay * p ** (1 - decay))
    return printed_omd(g, history, t, eta, bar)


def printed_nash_mp(g, history, t, eta):
    pi = history[-1]

    def step(opponent):
        power = 1 / (1 + eta)
        pull = pi**power * g.ref ** (eta * power)
        return share(pull * (eta * power / g.tau * won(g, opponent)).exp())

    return step(step(pi))


def printed_egpo(g, history, t, eta):
    theta, theta_ref = history[-1].log(), g.ref.log()

    def step(opponent):
        pull = (1 - eta * g.tau) * theta + eta * g.tau * theta_ref
        return (pull + eta * won(g, opponent)).softmax(-1)

    return step(step(history[-1]))


def printed_inpo(g, history, t, eta=None):
    eta = g.tau * (t + 2) / 2 if eta is None else eta
    pi, power = history[-1], g.tau / eta
    return share((won(g, pi) / eta).exp() * g.ref**power * pi ** (1 - power))


def printed_nash_prox(g, history, t, step, inner_steps, inner_step):
    # gradient ascent of the objective with two anchors, in mirror form
    anchor = pi = history[-1]
    for _ in range(inner_steps):
        gradient = won(g, pi) - g.tau * (pi / g.ref).log() - g.tau / step * (pi / anchor).log()
        pi = share(pi * (inner_step * gradient).exp())
    return pi


def printed_nash_md_pg(g, history, t, mixture_coef, step):
    pi = history[-1]
    mix = share(pi ** (1 - mixture_coef) * g.ref**mixture_coef)
    return share(pi * (step * (won(g, mix) - 0.5 - g.tau * (pi / g.ref).log())).exp())


def printed_onpo(g, history, t, step):
    # the hidden sequence has all past payoffs, the played one the last twice
    total = sum(won(g, p) for p in history)
    return share(history[0] * (step * (total + won(g, history[-1]))).exp())


def printed_mpo(g, history, t, step, alpha, period):
    magnet, pi = history[t // period * period], history[-1]
    weight = pi * magnet ** (step * alpha) * (step * won(g, pi)).exp()
    return share(weight ** (1 / (1 + step * alpha)))


def printed_sppo(g, history, t, eta):
    return share(history[-1] * (eta * won(g, history[-1])).exp())


def printed_dno(g, history, t, eta):
    return share(history[-1] * (won(g, history[-1]) / eta).exp())


def printed_mnpo(g, history, t, eta, history_length):
    past = history[-history_length:]
    logs = sum(p.log() + won(g, p) / eta for p in past) / len(past)
    return logs.softmax(-1)


PRINTED = [
    ("nash_md", {}, printed_nash_md, {}),
    ("nash_md", {"step": 3.0}, printed_nash_md, {"eta": 3.0}),
    ("omd", {}, printed_omd, {}),
    ("omd", {"step": 0.7}, printed_omd, {"eta": 0.7}),
    ("nash_ema", {"step": 0.7, "decay": 0.6}, printed_nash_ema, {"eta": 0.7, "decay": 0.6}),
    ("nash_ema", {"step": 0.7, "decay": 1.0}, printed_nash_ema, {"eta": 0.7, "decay": 1.0}),
    ("nash_mp", {}, printed_nash_mp, {"eta": 0.4}),
    ("nash_mp", {"step": 1.5}, printed_nash_mp, {"eta": 1.5}),
    ("egpo", {"step": 0.9}, printed_egpo, {"eta": 0.9}),
    ("inpo", {}, printed_inpo, {}),
    ("inpo", {"eta": 2.0}, printed_inpo, {"eta": 2.0}),
    ("nash_prox", {"step": 2.0, "inner_steps": 3, "inner_step": 0.5}, printed_nash_prox, None),
    ("nash_md_pg", {"mixture_coef": 0.3, "step": 0.8}, printed_nash_md_pg, None),
    ("onpo", {"step": 0.4}, printed_onpo, None),
    ("mpo", {"step": 0.5, "alpha": 0.3, "period": 3}, printed_mpo, None),
    ("sppo", {"eta": 0.5}, printed_sppo, None),
    ("dno", {"eta": 2.0}, printed_dno, None),
    ("mnpo", {"eta": 2.0, "history": 3}, printed_mnpo, {"eta": 2.0, "history_length": 3}),
]


@pytest.mark.parametrize(("name", "given_settings", "printed", "printed_settings"), PRINTED)
@pytest.mark.parametrize("from_ref", [True, False])
def test_every_update_is_the_printed_one(name, given_settings, printed, printed_settings, from_ref):
    game = random_game(5, 0.2)
    start = None if from_ref else random_policy(9, 5)
    policies = take(getattr(solvers, name)(game, start=start, **given_settings), 7)
    history = [(game.log_ref if from_ref else start).exp()]
    for t in range(7):
        history.append(printed(game, history, t, **(printed_settings or given_settings)))
    for found, wanted in zip(policies, history, strict=True):
        torch.testing.assert_close(found.exp(), wanted, rtol=1e-12, atol=1e-14)


def test_the_regression_of_dno_is_solved():
    game = random_game(5, 0.2)
    before, after = take(solvers.dno(game, eta=0.3, start=random_policy(1, 5)), 1)
    payoff, ratio = game.wins(before), 0.3 * (after - before)
    soft = (payoff[:, None] - payoff).sigmoid()
    torch.testing.assert_close((ratio[:, None] - ratio).sigmoid(), soft)


def test_the_outer_step_of_nash_prox_is_an_equilibrium_with_two_anchors():
    game, start = random_game(5, 0.2), random_policy(1, 5)
    found = last(solvers.nash_prox(game, start=start, step=0.5, inner_steps=400, inner_step=0.8), 1)
    # no policy gains against it in the game with both penalties

    def value(pi, other):
        def penalty(p):
            return 0.2 * tabular.kl(p, game.log_ref) + 0.2 / 0.5 * tabular.kl(p, start)

        return game.value(pi, other, 0.0) - penalty(pi) + penalty(other)

    for seed, size in itertools.product(range(10), (1.0, 0.1, 0.01)):
        other = tabular.normalise(found + size * random_policy(seed, 5))
        assert value(other, found) < 0.5 - 1e-9


def test_n_players_of_one_game_play_multiplicative_weights_from_one_start():
    game = random_game(4, 0.2)
    alone = take(solvers.dno(game, eta=2.0), 5)
    together = take(solvers.mnpo_players(game, eta=2.0, n=3), 5)
    for one, all_of_them in zip(alone, together, strict=True):
        torch.testing.assert_close(all_of_them, one.expand(3, 4))


def test_players_answer_the_others_by_their_own_oracle():
    games = [random_game(4, 0.2, seed) for seed in range(3)]
    start = torch.stack([random_policy(seed, 4) for seed in range(3)])
    found = last(solvers.mnpo_players(games, start=start, eta=2.0, n=3), 1)
    for i, game in enumerate(games):
        j, k = (m for m in range(3) if m != i)
        wins = (game.wins(start[j]) + game.wins(start[k])) / 2
        wanted = tabular.normalise((start[j] + start[k]) / 2 + wins / 2.0)
        torch.testing.assert_close(found[i], wanted)


# theorems


@pytest.mark.parametrize("name", ["dice", "three-types", "elo", "random"])
@pytest.mark.parametrize("tau", [0.3, 0.1, 0.02])
def test_theorem_1_holds_at_every_step(name, tau):
    game = tabular.game(name, tau=tau)
    game = game.replace(ref=random_policy(3, game.actions).exp())
    exact = tabular.solve(game).policy
    start = random_policy(4, game.actions, scale=5.0)
    before = None
    for t, policy in enumerate(take(solvers.nash_md(game, start=start), 400)):
        off = tabular.kl(exact, policy).item()
        if t:
            eta = 2 / (tau * (t + 1))
            assert off <= (1 - eta * tau) * before + 2 * eta**2
            assert off <= 8 / (tau**2 * (t + 1))
        before = off


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0.001, 5), st.floats(0, 1))
def test_lemma_1(seed, actions, tau, weight):
    game = fixtures.random(actions, seed=seed, tau=tau, ref=random_policy(seed, actions).exp())
    pi, pi_t = random_policy(seed + 1, actions), random_policy(seed + 2, actions, scale=4.0)
    mix = tabular.normalise((1 - weight) * pi_t + weight * game.log_ref)
    right = weight * tabular.kl(pi, game.log_ref) + (1 - weight) * tabular.kl(pi, pi_t)
    right = right - weight * tabular.kl(mix, game.log_ref)
    assert tabular.kl(pi, mix) <= right + 1e-12 * (1 + right.abs())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0.001, 5), st.floats(1e-6, 1))
def test_lemma_2(seed, actions, tau, weight):
    game = fixtures.random(actions, seed=seed, tau=tau, ref=random_policy(seed, actions).exp())
    pi, pi_t = random_policy(seed + 1, actions), random_policy(seed + 2, actions, scale=4.0)
    eta = weight / tau
    mix = tabular.normalise((1 - weight) * pi_t + weight * game.log_ref)
    after = last(solvers.nash_md(game, start=pi_t, step=eta), 1)
    gain = ((mix.exp() - pi.exp()) * game.wins(mix)).sum()
    bound = tabular.kl(pi, mix) + eta * gain + 2 * eta**2
    assert tabular.kl(pi, after) <= bound + 1e-12 * (1 + bound.abs())


@pytest.mark.parametrize("name", ["dice", "population", "three-types", "elo", "random"])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.02])
def test_nash_mp_converges_at_its_linear_rate(name, tau):
    game = tabular.game(name, tau=tau)
    game = game.replace(ref=random_policy(3, game.actions).exp())
    exact = tabular.solve(game).policy
    off = [tabular.kl(exact, p).item() for p in take(solvers.nash_mp(game), int(35 / tau) + 40)]
    # kl of 1e-20 is a distance of 1e-10, where the exact solution's own rounding is nothing yet
    pairs = [(a, b) for a, b in itertools.pairwise(off) if b > 1e-20]
    assert len(pairs) >= 3
    assert all(b <= a / (1 + 2 * tau) for a, b in pairs)
    assert off[-1] < 1e-20


def test_constant_nash_md_stalls_where_theory_has_it_and_nash_mp_does_not():
    game = fixtures.random(tau=0.1)
    exact = tabular.solve(game).policy
    stalled, later = (last(solvers.nash_md(game, step=1.0), k) for k in (2000, 4000))
    assert tabular.kl(exact, later) > 1e-4
    assert tabular.span(stalled, later) < 1e-12
    assert tabular.span(tabular.nash_md_pg_limit(game, 0.1), later) < 1e-11
    # what stands still is not the equilibrium, but its mixture is one, at a larger tau
    mix = tabular.normalise(0.9 * later + 0.1 * game.log_ref)
    assert tabular.span(tabular.solve(game.replace(tau=0.1 / 0.9)).policy, mix) < 1e-11
    for found in (solvers.nash_mp(game), solvers.omd(game, step=0.5)):
        assert tabular.kl(exact, last(found, 1000)) < 1e-24


SINGLE = [s.name for s in tabular.SOLVERS.values() if s.limit not in ("unregularised", "iterates")]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_solver_lands_on_its_declared_limit(name, seed):
    game = random_game(6, 0.15, seed, contexts=3)
    solver = tabular.SOLVERS[name]
    target = solver.target(game)
    # steps that shrink converge like a power of t
    slow = {"nash_md": 1e-6, "inpo": 1e-6}.get(name, 1e-20)
    assert tabular.kl(target, last(solver.run(game), 1500)).max() < slow
    assert tabular.kl(target, last(solver.run(game), 0)).max() > 1e-3


@pytest.mark.parametrize("name", ["onpo", "mpo"])
def test_the_last_iterate_solves_the_original_game(name):
    game = fixtures.three_types()
    exploited = [
        tabular.exploitability(game, last(tabular.SOLVERS[name].run(game), k), 0.0).item()
        for k in (0, 20_000)
    ]
    assert exploited[0] > 1e-2
    assert exploited[1] < 1e-5


@pytest.mark.parametrize("name", ["sppo", "dno", "mnpo"])
def test_iterates_circle_and_only_their_average_comes_near(name):
    game = fixtures.three_types()
    policies = take(tabular.SOLVERS[name].run(game), 3000)
    mean = torch.stack(policies).exp().mean(0).log()
    late = max(tabular.exploitability(game, p, 0.0) for p in policies[-500:])
    assert late > 0.05
    assert tabular.exploitability(game, mean, 0.0) < 0.02


# how they are called


@pytest.mark.parametrize("name", tabular.SOLVERS)
def test_the_same_inputs_give_the_same_bits_in_every_context(name):
    game = random_game(4, 0.3, contexts=3)
    solver = tabular.SOLVERS[name]
    first, second = (last(solver.run(game), 6) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (3, 4)
    torch.testing.assert_close(first.exp().sum(-1), torch.ones(3).double())
    alone = tabular.MatrixGame(game.preference[1], ref=game.ref[1], tau=0.3)
    torch.testing.assert_close(last(solver.run(alone), 6), first[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: solvers.nash_ema(g, step=0.1), "nash_ema: needs decay, got no value"),
        (lambda g: solvers.nash_prox(g, step=1.0), "needs inner_steps and inner_step"),
        (lambda g: solvers.mpo(g, alhpa=1.0), "unknown argument 'alhpa'.*do you mean alpha"),
        (lambda g: solvers.nash_md(g, step=11.0), r"step \* tau must be at most 1"),
        (lambda g: solvers.omd(g, step=-1.0), "omd: step must be above 0 and finite, got -1.0"),
        (lambda g: solvers.inpo(g, eta=0.01), "eta must be at least tau, got eta 0.01"),
        (lambda g: solvers.nash_ema(g, step=0.1, decay=2.0), r"decay must be in \[0, 1\]"),
        (lambda g: solvers.mpo(g, step=0.1, alpha=1.0, period=0), "period must be an integer"),
        (lambda g: solvers.nash_mp(g, step=0.0), "nash_mp: step must be above 0"),
        (lambda g: solvers.mnpo(g, eta=1.0, history=0), "history must be an integer"),
        (lambda g: solvers.mnpo_players(g, eta=1.0, n=1), "n must be an integer, at least 2"),
        (lambda g: solvers.mnpo_players([g], eta=1.0, n=2), "games must be one, or 2"),
        (lambda g: solvers.nash_mp(g.replace(tau=0.0)), "tau must be above 0, got 0.0"),
        (lambda g: solvers.omd(g, start=torch.zeros(3)), "omd: a policy must be float64"),
        (lambda g: tabular.solver("nash_mq"), "unknown name 'nash_mq'.*do you mean nash_m[dp]"),
        (lambda g: tabular.game("dise"), "unknown name 'dise'.*do you mean dice"),
    ],
)
def test_a_wrong_call_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(fixtures.dice())
    assert "\n" not in str(error.value)
