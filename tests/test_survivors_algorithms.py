"""What mutants of ``nlhf.algorithms`` got past every other test."""

import dataclasses

import pytest
import torch
from torch import nn

from nlhf import algorithms, config, players, tabular
from nlhf.algorithms import ALGORITHMS, LIMITS, REF, Algorithm, Phase
from nlhf.config import Config
from tests.test_tabular import random_game

pytestmark = pytest.mark.usefixtures("one_thread")

# after each step: whom y is compared with, then what policy and copies hold, as the step that made
# it: 0 at the start, k after the k-th. two steps make a phase where phases are repeated
SCHEDULES = {
    "nash_prox": [
        ("policy", {"policy": 1, "previous": 0}),
        ("policy", {"policy": 2, "previous": 2}),
        ("policy", {"policy": 3, "previous": 2}),
        ("policy", {"policy": 4, "previous": 4}),
    ],
    "mpo": [
        ("policy", {"policy": 1, "magnet": 0}),
        ("policy", {"policy": 2, "magnet": 2}),
        ("policy", {"policy": 3, "magnet": 2}),
        ("policy", {"policy": 4, "magnet": 4}),
    ],
    # the second step starts from where the first did, against what the first reached
    "egpo": [
        ("policy", {"policy": 0, "half": 1, "start": 0}),
        ("half", {"policy": 2, "half": 1, "start": 2}),
        ("policy", {"policy": 2, "half": 3, "start": 2}),
        ("half", {"policy": 4, "half": 3, "start": 4}),
    ],
    "inpo": [
        ("previous", {"policy": 1, "previous": 0}),
        ("previous", {"policy": 2, "previous": 2}),
        ("previous", {"policy": 3, "previous": 2}),
        ("previous", {"policy": 4, "previous": 4}),
    ],
    # the base after every first phase, the opponent after every second
    "onpo": [
        ("previous", {"policy": 1, "previous": 0, "base": 0}),
        ("previous", {"policy": 2, "previous": 0, "base": 2}),
        ("previous", {"policy": 3, "previous": 0, "base": 2}),
        ("previous", {"policy": 4, "previous": 4, "base": 2}),
        ("previous", {"policy": 5, "previous": 4, "base": 2}),
        ("previous", {"policy": 6, "previous": 4, "base": 6}),
    ],
    "mnpo": [
        ("previous", {"policy": 1, "previous": 0, "older": 0}),
        ("previous", {"policy": 2, "previous": 2, "older": 0}),
        ("previous", {"policy": 3, "previous": 2, "older": 0}),
        ("previous", {"policy": 4, "previous": 4, "older": 2}),
    ],
}
SCHEDULES |= dict.fromkeys(["sppo", "dno"], SCHEDULES["inpo"])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_policy_and_copies_hold_what_the_papers_say_after_every_step(name):
    algorithm, policy = ALGORITHMS[name], nn.Linear(1, 1, bias=False)
    nn.init.zeros_(policy.weight)
    kept = players.Players(algorithm, policy)
    # without a schedule of copies there are none, but for an average
    assert bool(set(kept.copies) - {"ema"}) == (name in SCHEDULES)
    for step, (opponent, wanted) in enumerate(SCHEDULES.get(name, [])):
        phase, ended = algorithm.phase(step, 2)
        assert phase.opponent == opponent
        nn.init.constant_(policy.weight, step + 1)
        kept.advance(phase, ended, 0.0, 0)
        found = {"policy": policy.weight.item()}
        found |= {copy: kept.copies[copy].weights[0].item() for copy in kept.copies}
        assert found == wanted


def test_the_strengths_of_anchors_are_those_of_the_table():
    c = Config(tau=0.2, eta=0.8)
    found = {name: strength(c) for name, strength in algorithms.STRENGTHS.items()}
    wanted = {"1": 1, "tau": 0.2, "tau/eta": 0.25, "1 - tau/eta": 0.75, "(1 - tau/eta)/2": 0.375}
    assert found == pytest.approx(wanted)


def test_the_limits_are_the_fixed_points_that_their_names_say():
    game, b = random_game(4, 0.3), 0.25
    found = {name: limit(game, b) for name, (_, limit) in LIMITS.items() if limit is not None}
    mixture = tabular.normalise((1 - b) * found["mixture"] + b * game.log_ref)
    gains = {
        "equilibrium": game.wins(found["equilibrium"]),
        "mixture": game.wins(mixture),
        "best_response": game.wins(game.log_ref),
        "bradley_terry": tabular.bradley_terry(game),
    }
    assert found.keys() == gains.keys()
    for name, gain in gains.items():
        wanted = tabular.normalise(game.log_ref + gain / game.tau)
        torch.testing.assert_close(found[name], wanted)


def test_tau_may_be_eta_where_a_step_is_bounded_by_it():
    for name in ("inpo", "mnpo"):
        algorithms.check(config.Config(algorithm=name, tau=0.2, eta=0.2, inner_steps=1))


def test_the_copies_are_those_of_every_phase_and_of_who_answers():
    phases = (
        Phase("b", anchors=(REF, ("c", "1"))),
        Phase("policy", anchors=(("mixture", "1"),), then=(("d", "policy"),)),
    )
    made = Algorithm(phases, "mixture", "nobody", sampler="a")
    assert made.copies == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_phase_names_strengths_and_players_that_there_are(name):
    algorithm = ALGORITHMS[name]
    players_of = {"policy", "mixture", "ref", *algorithm.copies}
    for phase in algorithm.phases:
        assert {strength for _, strength in phase.anchors} <= algorithms.STRENGTHS.keys()
        named = {phase.opponent, algorithm.sampler, *(player for player, _ in phase.anchors)}
        assert named <= players_of
        # what a copy is made of is there as well
        assert {source for _, source in phase.then} <= players_of
    assert algorithm.limit in LIMITS
    assert set(algorithm.needs) <= {field.name for field in dataclasses.fields(Config)}


def test_the_mixture_coefficient_may_fall_to_nothing_and_does_so_in_two_steps():
    falling = Config(mixture_coef=0.5, mixture_coef_last=0.0, steps=2)
    assert [algorithms.mixture_coef(falling, k) for k in range(2)] == [0.5, 0.0]
