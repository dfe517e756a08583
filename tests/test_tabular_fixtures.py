"""The counter-examples of Munos et al. 2023 with their numbers, and rewards in such games."""

import math

import pytest
import torch

from nlhf import tabular
from nlhf.tabular import fixtures
from tests.test_tabular import policy_of, random_game, random_policy

pytestmark = pytest.mark.usefixtures("one_thread")

UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)


@pytest.mark.parametrize(("name", "win"), [("dice", 5 / 9), ("population", 2 / 3)])
def test_a_cycle_of_three_has_the_uniform_equilibrium(name, win):
    game = tabular.game(name)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        assert game.preference[i, j].item() == pytest.approx(win, abs=1e-15)
    for tau in (1.0, 0.1, 1e-3):
        solution = tabular.solve(game.replace(tau=tau))
        torch.testing.assert_close(solution.policy.exp(), UNIFORM, rtol=0, atol=1e-12)
    assert tabular.exploitability(game, UNIFORM.log(), 0.0).item() == pytest.approx(0, abs=1e-15)
    # every pure policy loses to the one that beats it
    torch.testing.assert_close(
        tabular.pure_exploitability(game), torch.full_like(UNIFORM, win - 0.5)
    )


@pytest.mark.parametrize("epsilon", [-1 / 3, -0.1, 0.0, 0.1, 0.3])
def test_three_types(epsilon):
    game = fixtures.three_types(epsilon)
    P = game.preference
    assert P[1, 0].item() == pytest.approx(2 / 3 - epsilon / 2, abs=1e-15)
    assert P[2, 0].item() == pytest.approx(1 / 3 - epsilon / 4, abs=1e-15)
    assert P[2, 1].item() == pytest.approx(2 / 3 + epsilon / 4, abs=1e-15)
    nash = [1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2, 1 / 3 - epsilon]
    nash = torch.tensor(nash, dtype=torch.float64).clamp(min=0)
    # every action does 1/2 against it, and so no policy gains anything
    torch.testing.assert_close(game.wins(nash.log()), torch.full_like(nash, 0.5), rtol=0, atol=1e-7)
    assert tabular.exploitability(game, nash.log(), 0.0) < 1e-15
    # and it is what the regularised equilibria approach
    near = [tabular.solve(game.replace(tau=tau)).policy.exp() for tau in (1e-2, 1e-4)]
    assert (near[1] - nash).abs().max() < 1e-3
    assert (near[1] - nash).abs().sum() < (near[0] - nash).abs().sum() / 20 + 1e-12


@pytest.mark.parametrize(("epsilon", "best"), [(0.1, 0), (1e-4, 0), (-1e-4, 1), (-0.1, 1)])
def test_the_best_reward_flips_with_a_small_change_and_the_equilibrium_does_not(epsilon, best):
    game = fixtures.three_types(epsilon, tau=1e-6)
    assert tabular.bradley_terry(game).argmax() == best
    assert tabular.rlhf(game).exp()[best] > 0.99
    assert (tabular.solve(game.replace(tau=0.01)).policy.exp() - UNIFORM).abs().max() < 0.11


@pytest.mark.parametrize("epsilon", [0.5, -0.4, math.nan])
def test_shares_of_types_outside_of_the_range_are_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon must be in"):
        fixtures.three_types(epsilon)


def test_elo_is_fitted_exactly_whatever_is_sampled_and_still_loses():
    game = fixtures.elo()
    for log_sampling in (None, random_policy(1, 3), random_policy(2, 3)):
        reward = tabular.bradley_terry(game, log_sampling)
        wanted = torch.tensor([0, math.log(9), math.log(2)], dtype=torch.float64)
        torch.testing.assert_close(reward - reward[0], wanted, rtol=0, atol=1e-12)
    # among the policies with pi(y1) = 2 pi(y2): the best by reward, and the one that beats it
    by_reward, by_preference = policy_of(2 / 3, 1 / 3, 0), policy_of(0, 0, 1)
    rewards = [(p.exp() * wanted).sum() for p in (by_reward, by_preference)]
    assert rewards[0] > rewards[1]
    assert game.value(by_preference, by_reward, 0.0).item() == pytest.approx(50 / 99, abs=1e-15)


def test_rock_paper_scissors_and_random_games():
    game = fixtures.rock_paper_scissors(0.8)
    assert game.preference[1, 0] == game.preference[2, 1] == game.preference[0, 2] == 0.8
    one, two = fixtures.random(6, seed=3), fixtures.random(6, seed=3)
    assert torch.equal(one.preference, two.preference)
    assert not torch.equal(one.preference, fixtures.random(6, seed=4).preference)
    assert fixtures.random(6, 2).preference.shape == (2, 6, 6)
    with pytest.raises(ValueError, match="at least 1"):
        fixtures.random(0)


# rewards


def assert_is_the_fit(game, reward, log_sampling):
    """Munos et al. 2023, proposition 2: right on average against the sampling distribution."""
    model = (reward[..., :, None] - reward[..., None, :]).sigmoid()
    against = (model * log_sampling.exp()[..., None, :]).sum(-1)
    torch.testing.assert_close(against, game.wins(log_sampling), rtol=0, atol=1e-12)
    mean = (log_sampling.exp() * reward).sum(-1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)


@pytest.mark.parametrize("contexts", [None, 3])
@pytest.mark.parametrize("actions", [2, 9, 60])
def test_proposition_2_characterises_the_fit(actions, contexts):
    game = random_game(actions, 0.1, contexts=contexts)
    assert_is_the_fit(game, tabular.bradley_terry(game), game.log_ref)
    sampling = random_policy(8, *game.log_ref.shape, scale=3.0)
    assert_is_the_fit(game, tabular.bradley_terry(game, sampling), sampling)


def test_the_fit_is_the_most_likely_reward():
    game = random_game(5, 0.1)
    w, P = game.ref, game.preference

    def loss(r):
        return -(w[:, None] * w * P * torch.nn.functional.logsigmoid(r[:, None] - r)).sum()

    reward = tabular.bradley_terry(game)
    for seed in range(20):
        assert loss(reward + 0.01 * random_policy(seed, 5)) > loss(reward)


def test_theorem_2_the_fit_depends_on_the_sampling_where_it_is_not_exact():
    game = fixtures.random(4)
    moved = game.log_ref.exp() / 2
    moved[0] = 1 - moved[1:].sum()
    first, second = (tabular.bradley_terry(game, p) for p in (game.log_ref, moved.log()))
    assert tabular.span(first, second) > 0.1
    # the policy of RLHF inherits it; the equilibrium has no sampling to depend on
    assert tabular.span(tabular.rlhf(game), tabular.rlhf(game, moved.log())) > 1


def test_rlhf_is_the_best_policy_by_its_reward():
    game = random_game(5, 0.2)
    reward, best = tabular.bradley_terry(game), tabular.rlhf(game)

    def objective(policy):
        return (policy.exp() * reward).sum() - 0.2 * tabular.kl(policy, game.log_ref)

    for seed in range(20):
        assert objective(tabular.normalise(best + 0.1 * random_policy(seed, 5))) < objective(best)


def test_nearly_sure_preferences_are_fitted():
    reward = torch.tensor([0.0, 12.0, 25.0], dtype=torch.float64)
    wins = (reward[:, None] - reward).sigmoid()
    found = tabular.bradley_terry(tabular.MatrixGame(wins))
    torch.testing.assert_close(found - found[0], reward, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0.5, 1.0], [0.0, 0.5]], "'0' and 0 more always win against the other 1"),
        # 0 and 1 trade wins, and always win against 2 and 3
        (
            [[0.5, 0.3, 1, 1], [0.7, 0.5, 1, 1], [0, 0, 0.5, 0.6], [0, 0, 0.4, 0.5]],
            "1 more always win against the other 2",
        ),
    ],
)
def test_a_fit_that_diverges_is_refused(wins, message):
    with pytest.raises(ValueError, match=f"the fit diverges: .*{message}"):
        tabular.bradley_terry(tabular.MatrixGame(wins))
    sure = torch.tensor(wins, dtype=torch.float64)
    both = torch.stack([torch.full_like(sure, 0.5), sure])
    with pytest.raises(ValueError, match="in context 1"):
        tabular.bradley_terry(tabular.MatrixGame(both))


def test_sure_wins_in_a_cycle_are_no_obstacle():
    reward = tabular.bradley_terry(fixtures.rock_paper_scissors())
    torch.testing.assert_close(reward, torch.zeros(3).double())


def test_sampling_must_reach_every_action():
    with pytest.raises(ValueError, match="must be above 0 for every action, got"):
        tabular.bradley_terry(fixtures.dice(), policy_of(0.5, 0.5, 0.0))
