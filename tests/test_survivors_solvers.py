"""What mutants of the solvers of ``nlhf.tabular`` got past every other test."""

import math
import re

import pytest
import torch

from nlhf import tabular
from nlhf.tabular import fixtures, solvers
from tests.test_tabular import random_game, random_policy
from tests.test_tabular_solvers import last

pytestmark = pytest.mark.usefixtures("one_thread")


# arguments at the ends of what they may be

# and the solver that does the same
ENDS = {
    "no memory": ("nash_ema", {"step": 1.0, "decay": 0.0}, "omd", {"step": 1.0}),
    "no mixture": ("nash_md_pg", {"step": 1.0, "mixture_coef": 0.0}, "omd", {"step": 1.0}),
    "one policy back": ("mnpo", {"eta": 2.0, "history": 1}, "dno", {"eta": 2.0}),
    # (2 pi exp(P))^(1/2)
    "a magnet that follows": (
        "mpo",
        {"step": 1.0, "alpha": 1.0, "period": 1},
        "sppo",
        {"eta": 0.5},
    ),
    "tau itself": ("inpo", {"eta": 0.2}, "omd", {"step": 5.0}),
}


@pytest.mark.parametrize("name", ENDS)
def test_arguments_may_be_at_the_ends_of_their_ranges(name):
    solver, settings, other, like = ENDS[name]
    game, start = random_game(4, 0.2), random_policy(2, 4)
    found = last(getattr(solvers, solver)(game, start=start, **settings), 3)
    wanted = last(getattr(solvers, other)(game, start=start, **like), 3)
    torch.testing.assert_close(found, wanted)


def test_the_largest_step_of_self_play_is_a_best_response():
    game = random_game(4, 0.2)
    before, after = (last(solvers.omd(game, step=5.0), k) for k in (3, 4))
    torch.testing.assert_close(after, tabular.best_response(game, before))


# every solver with arguments that it takes, and the kind of each
CALLS = {
    "nash_md": {"step": 1.0},
    "omd": {"step": 1.0},
    "nash_ema": {"step": 1.0, "decay": 0.5},
    "nash_mp": {"step": 1.0},
    "nash_prox": {"step": 1.0, "inner_steps": 1, "inner_step": 0.1},
    "egpo": {"step": 1.0},
    "inpo": {"eta": 1.0},
    "nash_md_pg": {"step": 1.0, "mixture_coef": 0.5},
    "onpo": {"step": 1.0},
    "mpo": {"step": 1.0, "alpha": 1.0, "period": 1},
    "sppo": {"eta": 1.0},
    "dno": {"eta": 1.0},
    "mnpo": {"eta": 1.0, "history": 1},
    "mnpo_players": {"eta": 1.0, "n": 2},
    "best_response": {},
    "rlhf": {},
}
POSITIVE = ("must be above 0 and finite, got", [0, -1.0, math.inf, math.nan, "1"])
SHARE = (r"must be in \[0, 1\], got", [-0.1, 1.1, math.nan, "0"])
COUNT = ("must be an integer, at least 1, got", [0, 1.5])
KINDS = dict.fromkeys(["step", "eta", "alpha"], POSITIVE)
KINDS |= dict.fromkeys(["decay", "mixture_coef"], SHARE)
KINDS |= dict.fromkeys(["inner_steps", "period", "history"], COUNT)
KINDS |= {"n": ("must be an integer, at least 2, got", [1, 2.5])}
# step * tau is at most 1
BOUNDED = ("nash_md", "omd", "nash_ema", "egpo", "nash_md_pg")
ORIGINAL = ("onpo", "mpo", "sppo", "dno", "mnpo", "mnpo_players")


@pytest.mark.parametrize("name", CALLS)
def test_what_is_wrong_with_a_call_is_said_at_once_in_the_name_of_the_solver(name):
    game, good = random_game(3, 0.2), CALLS[name]
    call = getattr(solvers, name)
    call(game, **good)
    for argument in good.keys() & KINDS.keys():
        message, values = KINDS[argument]
        for wrong in values:
            with pytest.raises(ValueError, match=f"^{name}: {argument} {message} {wrong!r}"):
                call(game, **good | {argument: wrong})
    with pytest.raises(ValueError, match=rf"^{name}: a policy must be float64 .*, 3\), got"):
        call(game, start=torch.zeros(2, 3), **good)
    if name in BOUNDED:
        with pytest.raises(ValueError, match=rf"^{name}: step \* tau .* a step of at most 5$"):
            call(game, **good | {"step": 5.1})
    if name in ORIGINAL:
        call(game.replace(tau=0.0), **good)
    else:
        with pytest.raises(ValueError, match=f"^{name}: tau must be above 0, got 0.0"):
            call(game.replace(tau=0.0), **good)


def test_the_inner_steps_of_nash_prox_are_bounded_by_their_own_tau():
    game = random_game(3, 0.2)
    # two anchors of one strength
    solvers.nash_prox(game, step=1.0, inner_steps=1, inner_step=2.5)
    for wrong, message in ((2.6, r"step \* tau must be at most 1"), (0.0, "step must be above 0")):
        with pytest.raises(ValueError, match=f"^nash_prox: inner self-play: {message}"):
            solvers.nash_prox(game, step=1.0, inner_steps=1, inner_step=wrong)


def test_players_need_a_start_and_a_game_of_one_shape_each():
    game = random_game(3, 0.2)
    for n, given in ((2, 3), (3, 2)):
        message = rf"start must be \({n}, ..., Y\), got \({given}, 3\)"
        with pytest.raises(ValueError, match=message):
            solvers.mnpo_players(game, eta=1.0, n=n, start=random_policy(0, given, 3))
    with pytest.raises(ValueError, match="games must be one, or 2 of one shape, got 2"):
        solvers.mnpo_players([game, random_game(4, 0.2)], eta=1.0, n=2)


@pytest.mark.parametrize("name", tabular.SOLVERS)
def test_the_table_of_solvers_says_what_they_are(name, monkeypatch):
    asked = []
    wins = tabular.MatrixGame.wins

    def counted(self, policy):
        asked.append(policy)
        return wins(self, policy)

    solver = tabular.solver(name)
    assert solver.name == name
    assert solver.function.__name__ == name.removesuffix("_constant")
    assert solver.limit in tabular.LIMITS
    assert re.fullmatch(r".*(19|20)\d\d\b.*", solver.citation)
    policies = solver.run(random_game(4, 0.2))
    next(policies)
    monkeypatch.setattr(tabular.MatrixGame, "wins", counted)
    next(policies)
    assert len(asked) == solver.queries


def test_games_and_solvers_are_called_what_the_page_calls_them():
    names = {"dice", "population", "three-types", "elo", "rock-paper-scissors", "random"}
    assert set(tabular.GAMES) == names
    assert set(tabular.SOLVERS) == CALLS.keys() - {"mnpo_players"} | {"nash_md_constant"}
    unsettled = {name for name, s in tabular.SOLVERS.items() if s.target(fixtures.elo()) is None}
    assert unsettled == {"onpo", "mpo", "sppo", "dno", "mnpo"}


@pytest.mark.parametrize("tau", [0.02, 0.3, 2.0])
def test_the_default_step_of_self_play_is_the_best_in_the_worst_game(tau):
    game = fixtures.dice(tau=tau)
    best = tabular.SOLVERS["omd"].defaults(game)["step"]

    def rate(step):
        # one step near the equilibrium, where the payoffs turn the policy the most
        return abs(1 - step * tau + 1j * step / 8**0.5)

    assert rate(best) < min(rate(0.99 * best), rate(1.01 * best))
    # the inner game of Nash Prox has two anchors
    prox = tabular.SOLVERS["nash_prox"].defaults(game)
    inner = game.replace(tau=tau * (1 + 1 / prox["step"]))
    assert prox["inner_step"] == pytest.approx(tabular.SOLVERS["omd"].defaults(inner)["step"])


def test_best_response_and_rlhf_answer_the_start_that_is_given():
    game, start = random_game(4, 0.2), random_policy(2, 4)
    for name in ("best_response", "rlhf"):
        solver, wanted = getattr(solvers, name), getattr(tabular, name)
        torch.testing.assert_close(last(solver(game, start=start), 2), wanted(game, start))
        assert tabular.span(wanted(game, start), wanted(game, game.log_ref)) > 0.1
