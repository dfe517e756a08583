"""The trainer on tabular softmax policies lands where each algorithm says that it does.

With exact gradients every pair of responses of every context is enumerated, and the gradient of a
row weighted by its probability; with sampled ones the whole loop runs, rollout included.
"""

import itertools

import pytest
import torch

from nlhf import tabular
from nlhf.algorithms import ALGORITHMS, LIMITS
from nlhf.learner import Learner
from tests import softmax

pytestmark = pytest.mark.usefixtures("one_thread")

BETA = 0.3
# two contexts: a cycle that is not symmetric, and an order; references that are not uniform
CYCLE = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]]
ORDER = [[0.5, 0.8, 0.9], [0.2, 0.5, 0.6], [0.1, 0.4, 0.5]]
GAME = tabular.MatrixGame(
    torch.tensor([CYCLE, ORDER], dtype=torch.float64),
    torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], dtype=torch.float64),
    tau=0.4,
)

# settings of each, steps and rate of plain gradient descent with exact gradients
EXACT = {
    "nash_md_pg": ({"mixture_coef": BETA}, 100, 2.0),
    "self_play": ({}, 100, 2.0),
    "best_response": ({}, 100, 2.0),
    "nash_ema_pg": ({"ema_decay": 0.5}, 100, 2.0),
    "rlhf": ({}, 250, 10.0),
    "nash_mp": ({"ema_decay": 0.5, "eta": 1.0}, 120, 2.0),
    "nash_prox": ({"inner_steps": 10, "eta": 1.0}, 250, 2.0),
    "online_ipo": ({}, 50, 0.4),
    "ipo_md": ({"mixture_coef": BETA}, 50, 0.4),
    "egpo": ({}, 80, 0.4),
    "inpo": ({"inner_steps": 5, "eta": 1.0}, 200, 0.4),
    "mnpo": ({"inner_steps": 5, "eta": 1.0}, 250, 0.4),
}


def distance(a, b) -> float:
    """Largest total variation over the contexts."""
    return ((a.exp() - b.exp()).abs().sum(-1) / 2).max().item()


def descend(name, cls, steps, rate, game=GAME, **changes):
    """The policy after each of ``steps`` of plain gradient descent."""
    reward = tabular.bradley_terry(game) if ALGORITHMS[name].reward else None
    settings = {"algorithm": name, "steps": steps, "learning_rate": rate}
    learner = cls(softmax.pieces(game, reward, **settings | changes))
    learner.optimizer = torch.optim.SGD(learner.policy.parameters(), lr=rate)
    for step in range(steps):
        learner.step(step)
        yield softmax.log_policy(learner.policy, 2)


@pytest.mark.parametrize("name", EXACT)
def test_exact_gradients_lead_to_the_limit_of_the_table(name):
    changes, steps, rate = EXACT[name]
    *_, found = descend(name, softmax.Exact, steps, rate, batch_size=2, **changes)
    limit = LIMITS[ALGORITHMS[name].limit][1](GAME, BETA)
    assert distance(found, limit) < 1e-5
    # the limits differ, so that landing on one of them says something
    for other in {a.limit for a in ALGORITHMS.values()} - {ALGORITHMS[name].limit}:
        if LIMITS[other][1] is not None:
            assert distance(limit, LIMITS[other][1](GAME, BETA)) > 0.01


# settings, steps, rate; 256 prompts a step
SAMPLED = {
    "nash_md_pg": ({"mixture_coef": BETA}, 60, 2.0),
    "self_play": ({}, 60, 2.0),
    "best_response": ({}, 60, 2.0),
    "nash_ema_pg": ({"ema_decay": 0.5}, 60, 2.0),
    "rlhf": ({}, 60, 2.0),
    "nash_mp": ({"ema_decay": 0.5, "eta": 1.0}, 80, 2.0),
    "nash_prox": ({"inner_steps": 10, "eta": 1.0}, 80, 2.0),
    "online_ipo": ({}, 60, 0.3),
    "ipo_md": ({"mixture_coef": BETA}, 60, 0.3),
    "egpo": ({"opponent_samples": 2}, 120, 0.3),
    "inpo": ({"inner_steps": 15, "eta": 0.8}, 120, 0.3),
    "mnpo": ({"inner_steps": 15, "eta": 0.8}, 150, 0.3),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_gradients_lead_to_the_limit_of_the_table(name):
    changes, steps, rate = SAMPLED[name]
    iterates = descend(name, Learner, steps, rate, batch_size=256, **changes)
    # the mean of the last iterates has less noise than one
    last = list(iterates)[-20:]
    found = torch.stack(last).exp().mean(0).log()
    limit = LIMITS[ALGORITHMS[name].limit][1](GAME, BETA)
    assert distance(found, limit) < 0.05
    assert distance(GAME.log_ref, limit) > 0.1


@pytest.mark.parametrize(
    ("name", "eta", "tolerance"),
    [("inpo", 1.0, 1e-4), ("dno", 1.0, 1e-4), ("onpo", 1.0, 1e-4), ("sppo", 0.5, 2e-3)],
)
def test_each_outer_iterate_is_the_tabular_update(name, eta, tolerance):
    """SPPO's squares leave out the normaliser: its minimum is the update to second order."""
    solver = {
        "inpo": lambda: tabular.solvers.inpo(GAME, eta=eta),
        "dno": lambda: tabular.solvers.dno(GAME, eta=eta),
        "onpo": lambda: tabular.solvers.onpo(GAME, step=1 / eta),
        "sppo": lambda: tabular.solvers.sppo(GAME, eta=eta),
    }[name]()
    phases, inner, outer = len(ALGORITHMS[name].phases), 40, 3
    rate = 8.0 if name == "dno" else 1.2
    changes = {"inner_steps": inner, "eta": eta, "batch_size": 2}
    found = descend(name, softmax.Exact, outer * phases * inner, rate, **changes)
    ends = itertools.islice(found, phases * inner - 1, None, phases * inner)
    next(solver)
    moved = GAME.log_ref
    for policy in ends:
        wanted = next(solver)
        assert distance(policy, wanted) < tolerance
        assert distance(wanted, moved) > 10 * tolerance
        moved = wanted


@pytest.mark.parametrize(
    ("name", "changes", "steps", "rate"),
    [
        ("mpo", {"inner_steps": 10}, 600, 10.0),
        ("onpo", {"inner_steps": 5, "eta": 0.3}, 600, 1.0),
    ],
)
def test_the_unregularised_equilibrium_is_approached(name, changes, steps, rate):
    *_, found = descend(name, softmax.Exact, steps, rate, batch_size=2, **changes)
    assert tabular.exploitability(GAME, found, tau=0).max() < 0.01
    assert tabular.exploitability(GAME, tabular.solve(GAME).policy, tau=0).max() > 0.05


@pytest.mark.parametrize(
    ("name", "changes", "rate"),
    [
        ("sppo", {"eta": 0.8, "opponent_samples": 4}, 0.3),
        ("dno", {"eta": 1.0, "opponent_samples": 8}, 2.0),
        ("onpo", {"eta": 1.0}, 0.3),
    ],
)
def test_sampled_gradients_lead_to_the_tabular_update(name, changes, rate):
    """DNO's soft labels are curved in the estimated win rates, so several responses make one."""
    inner = 40 * len(ALGORITHMS[name].phases)
    found = descend(name, Learner, 2 * inner, rate, batch_size=128, inner_steps=40, **changes)
    arguments = {"step": 1 / changes["eta"]} if name == "onpo" else {"eta": changes["eta"]}
    solver = getattr(tabular.solvers, name)(GAME, **arguments)
    next(solver)
    for policy in itertools.islice(found, inner - 1, None, inner):
        assert distance(policy, next(solver)) < 0.05
    assert distance(policy, GAME.log_ref) > 0.1


def test_sampled_gradients_approach_the_unregularised_equilibrium():
    """MPO; ONPO, whose way is long, is held to its updates."""
    weak = GAME.replace(tau=0.1)
    *_, found = descend("mpo", Learner, 160, 4.0, game=weak, batch_size=256, inner_steps=20)
    assert tabular.exploitability(GAME, found, tau=0).max() < 0.03
    assert tabular.exploitability(GAME, tabular.solve(weak).policy, tau=0).max() > 0.06


def test_the_mixture_of_where_nash_md_pg_settles_is_the_equilibrium_at_another_temperature():
    *_, found = descend("nash_md_pg", softmax.Exact, 100, 2.0, batch_size=2, mixture_coef=BETA)
    mixture = ((1 - BETA) * found + BETA * GAME.log_ref).log_softmax(-1)
    hotter = tabular.solve(GAME.replace(tau=GAME.tau / (1 - BETA))).policy
    assert distance(mixture, hotter) < 1e-5
    assert distance(found, tabular.solve(GAME).policy) > 0.01
