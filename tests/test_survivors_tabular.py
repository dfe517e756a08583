"""What mutants of ``nlhf.tabular`` got past every other test."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from nlhf import tabular
from nlhf.tabular import equilibrium, fixtures, matrix_game
from tests.test_tabular import hard_games, random_game, random_policy
from tests.test_tabular_solvers import last

pytestmark = pytest.mark.usefixtures("one_thread")


def lead(game, p):
    """(P - 1/2) p in fractions."""
    q = [Fraction(x) for x in p.tolist()]
    rows = [[Fraction(w) - Fraction(1, 2) for w in row] for row in game.preference.tolist()]
    return [sum(w * x for w, x in zip(row, q, strict=True)) for row in rows]


@pytest.mark.parametrize("actions", [3, 40])
def test_the_cancellation_against_one_half_is_nearly_exact(actions):
    """Against fractions, which round nothing; near an equilibrium what is left is tiny."""
    game = random_game(actions, 0.1)
    p = tabular.solve(game).policy.exp()
    p = p / p.sum()
    found = equilibrium._lead(game, p)
    exact = lead(game, p)
    low = (p - (p * 2**27).round() / 2**27).abs().sum()
    bound = actions * 2.0**-53 * (2 * low + 2.0**-25)
    assert bound < 1e-21
    off = (found - torch.tensor([float(x) for x in exact], dtype=torch.float64)).abs()
    assert (off <= bound + 2.0**-53 * found.abs()).all()


def test_the_rounding_of_the_residual_is_bounded():
    """Also where an action has next to no probability."""
    game = random_game(6, 0.05)
    policy = tabular.normalise(tabular.solve(game).policy - torch.tensor([0, 0, 0, 0, 0, 600.0]))
    p, found, rounding = equilibrium._residual(game, policy)
    with localcontext() as context:
        context.prec = 50
        exact = [
            Decimal(a).ln()
            - Decimal(b).ln()
            - Decimal(g.numerator) / Decimal(g.denominator) / Decimal(game.tau)
            for a, b, g in zip(p.tolist(), game.ref.tolist(), lead(game, p), strict=True)
        ]
        off = [abs(float(Decimal(a) - b)) for a, b in zip(found.tolist(), exact, strict=True)]
    assert (torch.tensor(off) <= rounding).all()
    # a logarithm of 600 has an error of 600 units itself
    assert (rounding >= 2.0**-53 * policy.abs()).all()
    assert (rounding < 1e-11).all()


def test_what_preferences_lack_of_antisymmetry_widens_the_certificate():
    # an equilibrium exists for the antisymmetric part alone, and the rest may hide it
    preference = random_game(4, 0.01).preference.clone()
    preference[0, 1] += 9e-13
    game = tabular.MatrixGame(preference, tau=0.01)
    assert game.asymmetry == pytest.approx(9e-13, rel=1e-3, abs=0)
    with pytest.raises(ValueError, match="above the tolerance 1e-12; raise it, or tau"):
        tabular.solve(game)
    found = tabular.solve(game, tolerance=1e-9)
    # half of it, over tau, moves log policy - log best response by so much at either end
    assert found.distance >= game.asymmetry / 2 / game.tau / 4
    assert tabular.solve(game.replace(tau=100.0)).distance < 1e-14


def test_the_certificate_of_a_context_is_that_of_its_game_alone():
    game = random_game(5, 0.1, contexts=3)
    best = tabular.solve(game).policy
    # near the equilibrium, and at it, where rounding is all that is left
    for size, tolerance in ((1e-3, 1e-9), (0.0, 0.3)):
        policy = tabular.normalise(best + size * random_policy(4, 3, 5))
        whole = equilibrium._certified(game, policy, 0)[0]
        for x in range(3):
            one = tabular.MatrixGame(game.preference[x], ref=game.ref[x], tau=0.1)
            alone = equilibrium._certified(one, policy[x], 0)[0]
            torch.testing.assert_close(whole.distance[x], alone.distance, rtol=tolerance, atol=0)
            if size:
                torch.testing.assert_close(whole.residual[x], alone.residual, rtol=1e-9, atol=0)


def bounds(game, policy):
    """Rounding of log policy - log best response and the distance, of one context, in floats."""
    unit, tau = 2.0**-53, game.tau
    p = [math.exp(x) for x in policy.tolist()]
    p = [x / math.fsum(p) for x in p]
    log_p, log_ref = [math.log(x) for x in p], [math.log(x) for x in game.ref.tolist()]
    gain = [float(x) / tau for x in lead(game, torch.tensor(p, dtype=torch.float64))]
    low = sum(abs(x - round(x * 2**27) / 2**27) for x in p)
    # each product of lower parts, at most 2^-24 or 2^-27 of its size, is rounded once in a sum
    sums = game.actions * unit * (2 * low + 2.0**-25)
    rounding = [
        (sums + game.asymmetry / 2) / tau + 8 * unit * (1 + abs(a) + abs(b) + abs(c))
        for a, b, c in zip(log_p, log_ref, gain, strict=True)
    ]
    wrong = [a - b - c for a, b, c in zip(log_p, log_ref, gain, strict=True)]
    mean = sum(x * y for x, y in zip(p, wrong, strict=True))
    deviation = math.sqrt(sum(x * (y - mean) ** 2 for x, y in zip(p, wrong, strict=True)))
    deviation += math.sqrt(sum(x * y**2 for x, y in zip(p, rounding, strict=True)))
    widest = max(wrong) - min(wrong) + 2 * max(rounding)
    return rounding, min(widest / 4, math.exp(widest / 2) * deviation / 2) + 8 * unit


@pytest.mark.parametrize("size", [0.0, 1e-13, 1e-3, 3.0])
def test_bounds_are_those_of_the_formulas_and_no_narrower(size):
    """A narrower one would certify what it must not."""
    preference = random_game(5, 0.1, contexts=2).preference.clone()
    preference[:, 0, 1] += 9e-13
    ref = torch.tensor([[0.3, 0.3, 0.2, 0.1, 0.1], [0.96, 0.01, 0.01, 0.01, 0.01]])
    game = tabular.MatrixGame(preference, ref=ref.double(), tau=0.1)
    best = tabular.solve(game, tolerance=1e-9).policy
    policy = tabular.normalise(best + size * random_policy(4, 2, 5))
    rounding = equilibrium._residual(game, policy)[2]
    distance = equilibrium._certified(game, policy, 0)[0].distance
    for x in range(2):
        one = tabular.MatrixGame(preference[x], ref=game.ref[x], tau=0.1)
        wanted, far = bounds(one, policy[x])
        torch.testing.assert_close(rounding[x].tolist(), wanted, rtol=1e-6, atol=0)
        assert distance[x].item() == pytest.approx(far, rel=1e-6, abs=1e-15)


def test_the_smallest_parts_of_bounds_are_there():
    """Each where the others are smaller still."""
    half = torch.full((2, 2, 2), 0.5, dtype=torch.float64)
    ref = torch.tensor([[0.5, 0.5], [0.3, 0.7]], dtype=torch.float64)
    # at the equilibrium only rounding is left, and next to no tau multiplies that of the sums
    for tau in (1.0, 1e-12):
        game = tabular.MatrixGame(half, ref=ref, tau=tau)
        wanted, far = bounds(tabular.MatrixGame(half[0], tau=tau), game.log_ref[0])
        rounding = equilibrium._residual(game, game.log_ref)[2]
        found = equilibrium._certified(game, game.log_ref, 0)[0]
        torch.testing.assert_close(rounding[0].tolist(), wanted, rtol=1e-6, atol=0)
        assert found.distance[0].item() == pytest.approx(far, rel=1e-6, abs=0)
    # numbers that 27 bits do not hold
    uneven = tabular.MatrixGame(half, ref=[[1 / 3, 2 / 3], [0.1, 0.9]], tau=1e-12)
    rounding = equilibrium._residual(uneven, uneven.log_ref)[2]
    for x in range(2):
        one = tabular.MatrixGame(half[x], ref=uneven.ref[x], tau=1e-12)
        wanted = bounds(one, uneven.log_ref[x])[0]
        torch.testing.assert_close(rounding[x].tolist(), wanted, rtol=1e-6, atol=0)
    # a span that is bounded better than the deviation, of which most is what P + P^T lacks
    preference = [[[0.5, 0.5 + 9e-13], [0.5, 0.5]], [[0.5, 1.0], [0.0, 0.5]]]
    lacking = tabular.MatrixGame(preference, tau=1e-11)
    found = equilibrium._certified(lacking, lacking.log_ref, 0)[0]
    far = bounds(tabular.MatrixGame(preference[0], tau=1e-11), lacking.log_ref[0])[1]
    assert found.distance[0].item() == pytest.approx(far, rel=1e-5, abs=0)


def test_a_tolerance_that_is_just_met_is_met():
    game = random_game(5, 0.1)
    found = tabular.solve(game)
    again = tabular.solve(game, tolerance=found.distance.item())
    assert again.iterations == found.iterations


def test_a_game_that_newton_does_not_end_on_says_so(monkeypatch):
    monkeypatch.setattr(equilibrium, "_NEWTON_STEPS", 2)
    with pytest.raises(ValueError, match=r"no equilibrium after 2 Newton steps at tau 0\.1; raise"):
        tabular.solve(random_game(5, 0.1))


def test_policies_and_games_are_broadcast_against_each_other():
    game = random_game(4, 0.1, contexts=3)
    one = tabular.MatrixGame(game.preference[1], tau=0.1)
    p = torch.rand(3, 4, dtype=torch.float64)
    for x in range(3):
        own = tabular.MatrixGame(game.preference[x], tau=0.1)
        assert torch.equal(equilibrium._lead(game, p)[x], equilibrium._lead(own, p[x]))
        assert torch.equal(equilibrium._lead(one, p)[x], equilibrium._lead(one, p[x]))
        assert torch.equal(equilibrium._lead(game, p[0])[x], equilibrium._lead(own, p[0]))


# games


@pytest.mark.parametrize("shape", [(7, 7), (3, 7, 7)])
def test_blocks_of_rows_are_small_and_together_all_rows(shape, monkeypatch):
    monkeypatch.setattr(matrix_game, "_BLOCK", 64)
    matrix = torch.zeros(shape)
    blocks = list(matrix_game.row_blocks(matrix))
    assert [i for rows in blocks for i in range(7)[rows]] == list(range(7))
    assert all(matrix[..., rows, :].numel() <= 64 for rows in blocks)
    assert len(blocks) == {1: 1, 3: 3}[matrix.numel() // 49]


def test_what_follows_from_a_game_is_neither_asked_for_nor_shown():
    game = fixtures.dice()
    for name in ("log_ref", "asymmetry"):
        assert f"{name}=" not in repr(game)
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            tabular.MatrixGame(game.preference, **{name: getattr(game, name)})


def test_a_reference_is_divided_by_its_sum_and_is_where_the_preference_is():
    preference = fixtures.dice().preference
    with pytest.raises(ValueError, match=r"at most 1, got 1.5 at \[1\]"):
        tabular.MatrixGame(preference, ref=[0.1, 1.5, 0.1])
    game = tabular.MatrixGame(preference, ref=[0.2, 0.3, 0.5 + 5e-7])
    assert game.ref.sum().item() == pytest.approx(1, abs=1e-15)
    assert game.device == preference.device


def test_the_value_at_tau_1_has_its_penalties():
    game, (pi, other) = fixtures.dice(), random_policy(1, 2, 3)
    penalty = tabular.kl(pi, game.log_ref) - tabular.kl(other, game.log_ref)
    found = game.value(pi, other, 1.0)
    torch.testing.assert_close(found, game.value(pi, other, 0.0) - penalty)


# games by name


def test_games_have_names_for_their_actions():
    assert fixtures.dice().names == ("die 2-4-9", "die 1-6-8", "die 3-5-7")
    for make in (fixtures.population, fixtures.three_types, fixtures.elo):
        assert make().names == ("y1", "y2", "y3")
    assert fixtures.rock_paper_scissors().names == ("rock", "paper", "scissors")
    assert fixtures.random(2).names == ("0", "1")


@pytest.mark.parametrize("name", tabular.GAMES)
def test_every_game_takes_tau_and_reference(name):
    actions = tabular.game(name).actions
    ref = random_policy(0, actions).exp()
    game = tabular.game(name, tau=2.0, ref=ref)
    assert game.tau == 2.0
    torch.testing.assert_close(game.ref, ref)


def test_what_games_are_made_of_where_nothing_is_said():
    for made, wanted in (
        (fixtures.random(), fixtures.random(10, None, 0)),
        (fixtures.three_types(), fixtures.three_types(0.1)),
        (fixtures.rock_paper_scissors(), fixtures.rock_paper_scissors(1.0)),
    ):
        assert torch.equal(made.preference, wanted.preference)
        assert made.tau == 0.1


def test_random_games_are_uniform_and_may_be_as_small_as_one():
    assert fixtures.random(1, 1).preference.tolist() == [[[0.5]]]
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"at least 1, got {wrong[0]} and {wrong[1]}"):
            fixtures.random(*wrong)
    # as fine as float64 is
    assert (fixtures.random(9).preference % 2.0**-30 > 0).any()
    below = fixtures.random(100).preference[tuple(torch.tril_indices(100, 100, -1))]
    assert below.mean().item() == pytest.approx(0.5, abs=0.02)
    assert below.var().item() == pytest.approx(1 / 12, rel=0.05)


# rewards


def test_a_fit_is_right_for_every_action_or_refused():
    """Also for one that is sampled once in a million million times."""
    fitted, refused = 0, 0
    for seed in (*range(20), 73, 84):
        generator = torch.Generator().manual_seed(seed)
        wins = torch.rand(4, 4, generator=generator, dtype=torch.float64) ** 6
        wins = wins.tril(-1) + (1 - wins).mT.triu(1) + 0.5 * torch.eye(4)
        game = tabular.MatrixGame(wins)
        noise = torch.randn(4, generator=generator, dtype=torch.float64)
        sampling = tabular.normalise(8 * noise)
        try:
            reward = tabular.bradley_terry(game, sampling)
        except ValueError as error:
            refused += "no fit, P(y > sampling) is off by" in str(error)
            continue
        model = (reward[:, None] - reward).sigmoid() @ sampling.exp()
        torch.testing.assert_close(model, game.wins(sampling), rtol=0, atol=1e-9)
        fitted += 1
    assert fitted >= 15
    assert refused


def test_newton_steps_are_counted_polish_included(monkeypatch):
    asked, newton, path = [], equilibrium._newton, equilibrium._path
    # a rough end of the path, so that polish has to follow
    rough = fixtures.random(6, tau=0.05)
    start = tabular.normalise(tabular.solve(rough).policy + 1e-3 * random_policy(1, 6))
    monkeypatch.setattr(equilibrium, "_newton", lambda *args: asked.append(1) or newton(*args))
    for way, least in ((path, 3), (lambda game: (start, 0), 2)):
        asked.clear()
        monkeypatch.setattr(equilibrium, "_path", way)
        found = tabular.solve(rough)
        assert found.iterations == len(asked) >= least
        assert found.residual < 1e-9
        assert found.distance <= 1e-12


@pytest.mark.parametrize(
    ("name", "tau", "steps", "products"),
    # a third more than it takes
    [("coins", 0.1, 6, 105), ("scored", 0.01, 13, 104), ("uniform noise", 1e-3, 63, 1180)],
)
def test_the_path_to_an_equilibrium_is_short(name, tau, steps, products, monkeypatch):
    asked, product = [], tabular.MatrixGame.product
    game = tabular.MatrixGame(hard_games()[name], tau=tau)
    monkeypatch.setattr(
        tabular.MatrixGame, "product", lambda *args: asked.append(1) or product(*args)
    )
    assert tabular.solve(game).iterations <= steps
    assert len(asked) <= products


def test_the_certificate_is_no_wider_than_it_must_be():
    """Without preferences the equilibrium is the reference; its bounds are met by two actions."""
    game = tabular.MatrixGame(torch.full((2, 2), 0.5))
    for off in (1e-3, 1e-6):
        policy = torch.tensor([0.5 + off, 0.5 - off], dtype=torch.float64).log()
        found = equilibrium._certified(game, policy, 0)[0]
        assert off <= found.distance <= off * (1 + 1e-5)
        assert found.residual.item() == pytest.approx(4 * off, rel=1e-5, abs=0)
    # and what is hardly ever played counts for little
    rare = tabular.MatrixGame(torch.full((2, 2), 0.5), ref=[1 - 1e-6, 1e-6])
    policy = (rare.ref * torch.tensor([1 - 1e-6, 2.0])).log()
    bound = equilibrium._certified(rare, tabular.normalise(policy), 0)[0].distance
    assert 1e-6 <= bound < 1e-3


# files


def test_archives_and_other_bytes_are_named(tmp_path):
    path = tmp_path / "game.npy"
    with open(path, "wb") as file:
        np.savez(file, np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"game\.npy: must hold real numbers .*, got an archive"):
        tabular.read(path)
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match=r"got float64 \(3,\)"):
        tabular.read(path)
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not an array of numbers in .npy format: .*pickle"):
        tabular.read(path)
    text = tmp_path / "game.csv"
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"game\.csv: not a text file with commas"):
        tabular.read(text)


def test_arrays_of_other_numbers_are_read(tmp_path):
    path = tmp_path / "game.npy"
    for kind in (">f8", "<f4", ">f2"):
        np.save(path, np.array([[0.5, 0.75], [0.25, 0.5]], dtype=kind))
        assert tabular.read(path).preference.tolist() == [[0.5, 0.75], [0.25, 0.5]]


def test_a_csv_of_one_action_is_read_as_it_stands(tmp_path):
    path = tmp_path / "game.csv"
    for text, names in (("0.5\n", ("0",)), ("good\n0.5\n", ("good",)), ("good,0.5\n", ("good",))):
        path.write_text(text)
        game = tabular.read(path)
        assert (game.preference.tolist(), game.names) == ([[0.5]], names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # a number among the names of a table whose corner is a word: then nothing is a name
        ("action,10,x\ny,0.5,0.7\nx,0.3,0.5\n", "line 1, column 1: 'action' is no number"),
        ("action,x,y\n10,0.5,0.7\ny,0.3,0.5\n", "line 1, column 1: 'action' is no number"),
        ('""\n', "line 1, column 1: '' is no number"),
        ("0.5,0.7,0.5,0.1\n0.3,0.5,0.2,0.1\n", "must have as many lines as columns"),
    ],
)
def test_what_is_neither_a_number_nor_a_name_is_named_with_its_file(text, message, tmp_path):
    path = tmp_path / "game.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"game\.csv: {message}"):
        tabular.read(path)


def test_a_number_is_a_name_under_an_empty_corner(tmp_path):
    path = tmp_path / "game.csv"
    path.write_text(",1\n1,0.5\n")
    assert tabular.read(path).names == ("1",)


def two_by_three(ref=None):
    """A game with contexts in two dimensions, and the same in one."""
    flat = random_game(4, 0.2, contexts=6)
    ref = flat.ref if ref is None else ref
    deep = ref.reshape(2, 3, 4) if ref.dim() > 1 else ref
    return (
        tabular.MatrixGame(flat.preference.reshape(2, 3, 4, 4), ref=deep, tau=0.2),
        tabular.MatrixGame(flat.preference, ref=ref, tau=0.2),
    )


@pytest.mark.parametrize("ref", [None, random_policy(5, 4).exp()], ids=["own", "shared"])
def test_contexts_may_have_several_dimensions(ref):
    deep, flat = two_by_three(ref)
    assert deep.actions == 4
    assert deep.names == ("0", "1", "2", "3")
    policy, other = random_policy(1, 6, 4), random_policy(2, 6, 4)
    shared = random_policy(3, 4)

    def measures(game, shape):
        pi, rho = policy.reshape(*shape, 4), other.reshape(*shape, 4)
        found = tabular.solve(game)
        yield from (found.policy, found.residual.clamp(min=1e-9), game.ref, game.wins(pi))
        yield from (game.wins(shared), game.value(pi, rho), game.value(pi, rho, 0.0))
        yield from (tabular.kl(pi, rho), tabular.span(pi, rho), tabular.best_response(game, pi))
        yield from (tabular.exploitability(game, pi), tabular.exploitability(game, pi, 0.0))
        yield from (tabular.duality_gap(game, pi, rho), tabular.pure_exploitability(game))
        yield from (tabular.bradley_terry(game), tabular.rlhf(game, pi))
        yield tabular.nash_md_pg_limit(game, 0.3)
        for name, solver in tabular.SOLVERS.items():
            start = pi if name != "rlhf" else None
            yield last(solver.run(game, start=start), 3)

    for one, two in zip(measures(deep, (2, 3)), measures(flat, (6,)), strict=True):
        assert one.shape[:2] == (2, 3)
        torch.testing.assert_close(one.reshape(two.shape), two, rtol=1e-9, atol=1e-12)


def test_a_wrong_entry_in_several_dimensions_of_contexts_is_named():
    preference = two_by_three()[0].preference.clone()
    preference[1, 2, 3, 0] = 2.0
    with pytest.raises(ValueError, match=r"preference\[1, 2, (3, 0|0, 3)\]"):
        tabular.MatrixGame(preference)
    ref = torch.full((2, 3, 4), 0.25)
    ref[1, 2, 3] = -1.0
    with pytest.raises(ValueError, match=r"ref must be .* got -1.0 at \[1, 2, 3\]"):
        two_by_three()[0].replace(ref=ref)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\) or \(4,\), got \(3, 4\)"):
        two_by_three()[0].replace(ref=torch.full((3, 4), 0.25))


def test_what_needs_regularisation_says_so_in_its_own_name():
    game = fixtures.dice(tau=0.0)
    for name in ("solve", "best_response", "rlhf"):
        with pytest.raises(ValueError, match=f"^{name}: tau must be above 0, got 0.0"):
            getattr(tabular, name)(game)
    with pytest.raises(ValueError, match=r"^nash_md_pg_limit: tau must be above 0, got 0.0"):
        tabular.nash_md_pg_limit(game, 0.5)
    with pytest.raises(ValueError, match="tau must be a number, at least 0 and finite, got inf"):
        fixtures.dice(tau=float("inf"))


@pytest.mark.parametrize("size", [0.0599, 0.0601])
def test_kl_is_precise_on_both_sides_of_where_its_series_ends(size):
    p, q = (tabular.normalise(torch.tensor([0.0, x], dtype=torch.float64)) for x in (0.0, size))
    with localcontext() as context:
        context.prec = 40
        pairs = list(zip(p.tolist(), q.tolist(), strict=True))
        total = [sum(Decimal(pair[i]).exp() for pair in pairs) for i in range(2)]
        exact = sum(
            Decimal(a).exp() / total[0] * (Decimal(a) - Decimal(b) - (total[0] / total[1]).ln())
            for a, b in pairs
        )
    assert tabular.kl(p, q).item() == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_a_sampling_distribution_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"^bradley_terry: a policy must be float64"):
        tabular.bradley_terry(fixtures.dice(), torch.zeros(3))


def test_the_span_is_that_of_each_context():
    p, q = random_policy(1, 3, 4), random_policy(2, 3, 4)
    alone = torch.stack([tabular.span(a, b) for a, b in zip(p, q, strict=True)])
    assert torch.equal(tabular.span(p, q), alone)
