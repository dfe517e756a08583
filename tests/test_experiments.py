"""`nlhf reproduce`: its reports, its refusals, and each experiment end to end at a tiny scale."""

import itertools
import json
import math

import pytest
import torch

from nlhf import cli
from nlhf.experiments import EXPERIMENTS, games, intransitive, report, stability, training
from nlhf.experiments import one_step_mixture as osm
from nlhf.tabular import (
    SOLVERS,
    MatrixGame,
    best_response,
    exploitability,
    kl,
    nash_md_pg_limit,
    normalise,
    rlhf,
    span,
)

OURS = ("intransitive", "one-step-mixture", "stability")


@pytest.fixture(autouse=True)
def one_thread():
    with training.one_thread():
        yield


@pytest.mark.parametrize("name", OURS)
def test_an_experiment_ends_with_table_plot_and_seed(name, tmp_path, capsys):
    folder = tmp_path / "out"
    line = ["reproduce", name, "--seed", "3", "--scale", "0.01", "--output", str(folder)]
    cli.main(line)
    text = capsys.readouterr().out
    written = (folder / "report.md").read_text()
    assert text.startswith(written)
    assert "Seed 3" in written
    assert f"nlhf {' '.join(line)}" in written
    assert f"![{name}]({name}.png)" in written
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / "results.json").read_text())
    assert (data["name"], data["seed"], data["scale"]) == (name, 3, 0.01)
    assert set(data["versions"]) >= {"nlhf", "torch"}
    assert len(data["meaning"]) > 100
    for table in data["tables"]:
        assert f"**{table['title']}**" in written
        assert table["rows"]
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}


# ---- the command


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_an_unknown_name_suggests_the_nearest(capsys):
    assert "'stabilty'; do you mean stability?" in refused(capsys, "stabilty")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale", "0"], "scale must be above 0 and finite, got 0.0"),
        (["--scale", "nan"], "scale must be above 0"),
        (["--seed", str(2**63)], "seed must be a 64-bit integer"),
    ],
)
def test_bad_settings_are_one_line(capsys, tmp_path, flags, message):
    assert message in refused(capsys, "stability", "--output", str(tmp_path / "x"), *flags)
    assert not (tmp_path / "x").exists()


def test_a_folder_with_something_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    line = refused(capsys, "stability", "--output", str(tmp_path))
    assert "holds something else" in line
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_only_the_same_report_is_made_again(tmp_path):
    first = report.Settings(0, 0.5, tmp_path)
    report.write(_result("stability"), first, 1.0)
    report.claim(tmp_path, "stability", first)
    for name, other in [
        ("stability", report.Settings(1, 0.5, tmp_path)),
        ("stability", report.Settings(0, 1.0, tmp_path)),
        ("intransitive", first),
    ]:
        with pytest.raises(ValueError, match="something else"):
            report.claim(tmp_path, name, other)


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_without_a_name_the_experiments_are_listed(capsys, arguments):
    cli.main(["reproduce", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert all("?" in line and "minutes)" in line for line in lines)


# ---- reports


def _result(name: str) -> report.Result:
    rows = [["a|b", 0.25, report.Interval(0.5, 0.031)], ["c", math.nan, None]]
    table = report.Table("Title", ("what", "x", "y"), rows)
    return report.Result(name, 0, {"steps": 3}, [table], lambda figure: figure.subplots(), "So.")


def test_tables_are_markdown_and_json_has_no_nan(tmp_path):
    written = report.write(_result("stability"), report.Settings(0, 1.0, tmp_path), 2.0)
    assert "| what | x | y |\n| --- | --- | --- |\n| a\\|b | 0.25 | 0.500 ± 0.031 |" in written
    data = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    rows = data["tables"][0]["rows"]
    assert rows == [["a|b", 0.25, {"mean": 0.5, "half": 0.031}], ["c", None, None]]


def test_the_interval_is_student_t_by_hand():
    found = report.interval([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    # variance (16 + 1 + 25) / 9 / 2, and t of two degrees of freedom
    assert found.half == pytest.approx(4.303 * math.sqrt(42 / 18 / 3))
    assert math.isnan(report.interval([1.0]).half)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    covered = [abs(cell.mean) < cell.half for cell in map(report.interval, draws)]
    assert sum(covered) / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.12345, "0.123"), (1e-5, "1.0e-05"), (1e-17, "< 1e-12"), (0.0, "0"), (math.nan, "nan")],
)
def test_numbers_have_three_digits(value, shown):
    assert report.number(value) == shown


# ---- one-step-mixture


@pytest.fixture(scope="module")
def small():
    """A game of 13 responses with two random models, in a table too."""
    game = games.make("mixed", words=3, length=2)
    models = [training.transformer(game, seed, "tiny", std=0.5) for seed in (0, 1)]
    return game, *models, training.matrix_game(game, models[1], 0.1)


def test_the_two_mixtures_of_one_token_are_one(small):
    game, policy, ref, _ = small
    pair = osm._pair("", game, policy, ref)
    for coef in osm.COEFS:
        assert max(osm._distance(pair, 1, coef)) < 1e-14
        assert min(osm._distance(pair, 2, coef)) > 1e-4


@pytest.mark.parametrize("coef", [0.0, 1.0])
def test_the_mixtures_agree_where_one_side_has_all_the_weight(small, coef):
    game, policy, ref, _ = small
    tv, divergence = osm._distance(osm._pair("", game, policy, ref), 2, coef)
    assert tv < 1e-14
    assert abs(divergence) < 1e-14


def test_exact_weights_give_the_exact_divergence(small):
    game, policy, ref, _ = small
    pi, mu = (training.policy_logprobs(model, game) for model in (policy, ref))
    one = osm.token_mixture(pi, mu, 0.5, 3, 2)
    whole = osm.sequence_mixture(pi, mu, 0.5)
    log_w = 0.5 * pi + 0.5 * mu - one
    # the normalisers are at most 1
    assert log_w.max() <= 1e-12
    log_mean = (one + log_w).logsumexp(-1)
    divergence = log_mean - (one.exp() * log_w).sum(-1)
    assert torch.allclose(divergence, kl(one, whole), atol=1e-12)


@pytest.mark.parametrize("coef", [0.25, 0.5])
def test_importance_weights_find_the_exact_divergence(small, coef):
    game, policy, ref, _ = small
    exact_tv, exact_kl = osm._distance(osm._pair("", game, policy, ref), 2, coef)
    ids = torch.tensor([[0], [1], [2]])
    log_w = osm.log_weights(
        policy, ref, ids, torch.ones_like(ids), coef=coef, samples=4000, length=2, end=3, seed=1
    )
    assert log_w.shape == (3, 4000, 2)
    # at the first token the mixture is exact, so every weight is the same
    assert (log_w[..., 0] - log_w[:, :1, 0]).abs().max() < 1e-5
    for kind, exact in (("kl", exact_kl), ("tv", exact_tv)):
        found = osm.bootstrap(log_w[..., 1], kind)
        assert found.half < 0.2 * exact
        assert abs(found.mean - exact) < 2 * found.half


def test_the_estimate_by_hand():
    found = osm.estimate(torch.tensor([1.0, 3.0]).log())
    assert found.kl.item() == pytest.approx(math.log(2) - math.log(3) / 2)
    assert found.tv.item() == pytest.approx(0.25)
    assert found.size.item() == pytest.approx(16 / 10)


@pytest.mark.parametrize("coef", [0.125, 0.75])
def test_the_resting_point_of_the_one_step_mixture_is_one(small, coef):
    table = small[-1]
    policy = osm.token_limit(table, coef, 3, 2)
    mixture = osm.token_mixture(policy, table.log_ref, coef, 3, 2)
    assert span(policy, best_response(table, mixture)).max() < 1e-9
    apart = osm.total_variation(policy, nash_md_pg_limit(table, coef))
    assert apart.max() > 1e-4


def test_with_one_token_it_is_the_limit_of_the_paper():
    game = games.make("population", words=3, length=1)
    ref = training.transformer(game, 0, "tiny", std=0.5)
    table = training.matrix_game(game, ref, 0.05)
    found = osm.token_limit(table, 0.25, 3, 1)
    assert osm.total_variation(found, nash_md_pg_limit(table, 0.25)).max() < 1e-9


# ---- intransitive


def test_matched_is_as_far_and_on_the_line_of_all_tau():
    rows = [[0.5, 0.75, 0.375], [0.25, 0.5, 0.75], [0.625, 0.25, 0.5]]
    game = MatrixGame(torch.tensor(rows), tau=0.1)
    other = normalise(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    found = intransitive.matched(rlhf(game), game.log_ref, other)
    assert kl(found, game.log_ref).item() == pytest.approx(kl(other, game.log_ref).item())
    ratio = (found - game.log_ref).diff() / (rlhf(game) - game.log_ref).diff()
    assert ratio[0].item() == pytest.approx(ratio[1].item())


def test_pairs_are_those_of_the_reference_and_its_annotators():
    game = games.make("reward", words=2, length=1)
    ref = training.transformer(game, 0, "tiny", std=0.5)
    play = intransitive.Play(game, ref, training.matrix_game(game, ref, 0.1))
    n = 20_000
    pairs = intransitive.sample_pairs(play, n, 0)
    rows = list(zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True))
    for x, i, j in itertools.product(range(2), range(3), range(3)):
        p = play.table.log_ref[x].exp()
        # either order of the draw
        expected = 2 * p[i] * p[j] * game.matrices[x, i, j] / 2
        wanted = (game.prompts[x], game.responses[i], game.responses[j])
        assert rows.count(wanted) / n == pytest.approx(expected.item(), abs=0.01)


def test_dpo_finds_the_optimum_of_rlhf_where_a_reward_explains_the_preference(monkeypatch):
    game = games.make("reward", words=2, length=2)
    ref = training.reference(game, 0, "tiny", steps=100)
    play = intransitive.Play(game, ref, training.matrix_game(game, ref, 0.5))
    monkeypatch.setattr(intransitive, "TAU", 0.5)
    pairs = intransitive.sample_pairs(play, 20_000, 0)
    found = training.policy_logprobs(intransitive.dpo(play, pairs, 400, 0, 512), game)
    before = osm.total_variation(play.table.log_ref, rlhf(play.table)).mean()
    assert osm.total_variation(found, rlhf(play.table)).mean() < 0.2 * before


# ---- stability


@pytest.mark.parametrize("method", stability.METHODS)
def test_w_is_the_share_of_the_log_policy_that_a_step_replaces(method):
    table = MatrixGame(torch.full((4, 4), 0.5), tau=0.05)
    start = normalise(torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    chosen = stability.solver_settings(method, table.tau, 0.3)
    if method == "nash_prox":
        chosen["inner_steps"] = 1
    policies = SOLVERS[stability.METHODS[method][0]].run(table, start=start, **chosen)
    after = next(itertools.islice(policies, 1, None))
    # all wins are equal, so only the anchors pull
    kept = ((after - table.log_ref).diff() / (start - table.log_ref).diff()).tolist()
    # the anchor of Nash Prox is half of what it started from
    wanted = 1 - 0.3 / 2 if method == "nash_prox" else 0.7
    assert kept == pytest.approx([wanted] * 3)


def test_the_largest_stable_rate_has_none_below_it_that_fails():
    assert stability.largest({0.1: 0.0, 0.3: 0.0, 1.0: 0.5, 3.0: 0.0}) == 0.3
    assert stability.largest({0.1: 0.5, 0.3: 0.0}) is None


def test_a_run_that_ends_worse_than_it_began_has_diverged():
    bad = normalise(torch.tensor([-9.0, 9.0], dtype=torch.float64))[None]
    game = MatrixGame(torch.tensor([[[0.5, 0.75], [0.25, 0.5]]]), tau=0.1)
    assert stability._outcome(game, best_response(game), bad).diverged.tolist() == [True]
    good = stability._outcome(game, best_response(game), best_response(game))
    assert good.diverged.tolist() == [False]
    assert good.exploitability.item() == exploitability(game, best_response(game)).item()
