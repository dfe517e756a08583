"""The sweeps end to end at a tiny scale, and what they are made of against slow twins."""

import itertools
import json

import pytest
import torch

from nlhf import algorithms, cli, tabular
from nlhf.experiments import (
    cost,
    games,
    learned,
    mixture_sweep,
    parallel,
    preference_ablation,
    tau_sweep,
    training,
)
from nlhf.preference_fit import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quick(monkeypatch):
    """References that are fitted for a moment only."""
    fitted = training.reference
    monkeypatch.setattr(
        training, "reference", lambda game, seed, steps: fitted(game, seed, "tiny", 3)
    )


@pytest.fixture(scope="module")
def small():
    """A cyclic game of 4 responses to each of 3 prompts, and its reference."""
    game = games.make("population", words=3, length=1)
    return game, training.reference(game, 0, "tiny", 40)


def policies(game, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, len(game.prompts), len(game.responses))
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1))


# ---- what is learned from votes


def test_votes_are_drawn_from_the_reference_and_the_preference(small):
    game, ref = small
    data = learned.votes(game, ref, 20000, seed=3)
    policy = training.policy_logprobs(ref, game).exp()
    wins = torch.zeros_like(game.matrices)
    places = {text: i for i, text in enumerate(game.responses)}
    for prompt, chosen, rejected in zip(*data.texts(), strict=True):
        wins[game.prompts.index(prompt), places[chosen], places[rejected]] += 1
    # a win of i over j: both are drawn, in either order, and i has the vote
    expected = 2 * policy[:, :, None] * policy[:, None] * game.matrices / len(game.prompts)
    assert expected.sum().item() == pytest.approx(1)
    off = (wins / len(data) - expected).abs()
    assert (off <= 5 * (expected / len(data)).sqrt()).all()
    again = learned.votes(game, ref, 20000, seed=3)
    assert again == data


@pytest.mark.parametrize("kind", learned.KINDS)
def test_a_table_says_what_its_model_says(small, kind):
    game, ref = small
    data = learned.votes(game, ref, 400, seed=0)
    model = learned.model(game, kind, data, size="tiny", seed=0, epochs=2)
    table = learned.table(game, model)
    texts = zip(*itertools.product(game.prompts, game.responses, game.responses), strict=True)
    prompts, first, second = map(list, texts)
    said = model(prompts, first, second)
    torch.testing.assert_close(table(prompts, first, second), said, rtol=1e-5, atol=1e-6)
    matrices = learned.matrices(table)
    torch.testing.assert_close(matrices.flatten().float(), said, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(matrices + matrices.mT, torch.ones_like(matrices))


def test_more_votes_make_a_better_model(small):
    game, ref = small
    policy = training.policy_logprobs(ref, game)
    nothing = torch.full_like(game.matrices, 0.5)
    data = learned.votes(game, ref, 4000, seed=0)
    model = learned.model(game, "pairwise", data, size="tiny", seed=0, epochs=10)
    said = learned.matrices(learned.table(game, model))
    errors = [
        learned.error(p, game.matrices, policy, policy).mean().item() for p in (said, nothing)
    ]
    assert errors[0] < errors[1] / 2
    assert evaluate(model, learned.votes(game, ref, 1000, seed=1))["accuracy_0"] > 0.58


def test_measures_equal_sums_over_all_responses(small):
    game, _ = small
    one, other = policies(game, 2)
    for x in range(len(game.prompts)):
        p, q, P = one[x].exp(), other[x].exp(), game.matrices[x]
        pairs = list(itertools.product(range(len(p)), repeat=2))
        wins = sum(p[i] * q[j] * P[i, j] for i, j in pairs)
        assert learned.win_rate(game.matrices, one, other)[x].item() == pytest.approx(wins.item())
        off = sum(p[i] * q[j] * abs(P[i, j] - 0.5) for i, j in pairs)
        flat = torch.full_like(game.matrices, 0.5)
        got = learned.error(game.matrices, flat, one, other)[x].item()
        assert got == pytest.approx(off.item())
        cycles = sum(
            p[i] * p[j] * p[k]
            for i, j, k in itertools.product(range(len(p)), repeat=3)
            if (P[i, j] > 0.5 and P[j, k] > 0.5 and P[k, i] > 0.5)
            or (P[j, i] > 0.5 and P[k, j] > 0.5 and P[i, k] > 0.5)
        )
        assert learned.cyclic(game.matrices, one)[x].item() == pytest.approx(float(cycles))
    transitive = games.make("reward", words=3, length=1)
    assert learned.cyclic(transitive.matrices, one).max() == 0


# ---- the rule for beta


def outcome(best: float, **features: float) -> mixture_sweep.Outcome:
    """Quality falls with the distance from ``best``."""
    family = {name: beta for beta, name in mixture_sweep.FAMILY.items()}
    worst = [0.1 * abs(family.get(name, 9) - best) for name in mixture_sweep.POLICIES]
    filled = dict.fromkeys(mixture_sweep.FEATURES, 0.0) | features
    return mixture_sweep.Outcome([], {mixture_sweep.WORST: worst}, filled)


def test_a_rule_is_found_where_there_is_one():
    known = [outcome(0.125, cycles=c) for c in (0.0, 0.1)]
    known += [outcome(0.75, cycles=c) for c in (0.3, 0.4)]
    rule = mixture_sweep.fit_rule(known)
    assert rule == mixture_sweep.Rule("cycles", 0.2, 0.125, 0.75)
    assert [o.regret(rule(o.features)) for o in known] == [0] * 4
    found = {"a": known[:2], "b": known[2:], "c": [outcome(0.75, cycles=0.5) for _ in range(3)]}
    held = mixture_sweep.rotation(found, "c")
    assert held.rule == rule
    assert held.regrets["rule"].mean == 0
    assert held.better.mean > 0
    assert held.regrets["beta of the paper"].mean == pytest.approx(held.better.mean)


def test_a_constant_is_kept_where_features_say_nothing():
    known = [outcome(0.5, cycles=c) for c in (0.1, 0.2, 0.3)]
    rule = mixture_sweep.fit_rule(known)
    assert str(rule) == "always 0.5"


def test_the_pairwise_table_is_of_the_column_over_the_row():
    game = games.make("population", words=2, length=1)
    made = policies(game, len(mixture_sweep.POLICIES))
    measured = mixture_sweep.measure(game, 1 - game.matrices, made, {})
    wins = torch.tensor(measured.wins, dtype=torch.float64)
    torch.testing.assert_close(wins + wins.T, torch.ones_like(wins))
    truth = tabular.MatrixGame(game.matrices, tau=0.1)
    value = truth.value(made[2], made[1], tau=0).mean().item()
    assert measured.wins[1][2] == pytest.approx(value)
    columns = measured.measures
    assert columns["true win rate against SFT"] == measured.wins[0]
    # the learned preference was turned around
    sums = zip(*list(columns.values())[:2], strict=True)
    assert [sum(pair) for pair in sums] == pytest.approx([1.0] * len(made))
    assert columns["KL to SFT"][0] == 0


# ---- end to end


def reproduce(capsys, tmp_path, name: str, scale: str = "0.01") -> dict:
    folder = tmp_path / name
    cli.main(["reproduce", name, "--seed", "5", "--scale", scale, "--output", str(folder)])
    shown = capsys.readouterr().out
    assert "Seed 5" in shown
    assert f"--seed 5 --scale {scale}" in shown
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results["meaning"] in shown
    for table in results["tables"]:
        assert table["title"] in shown
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    return results


def test_mixture_sweep_end_to_end(capsys, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(mixture_sweep, "WORDS", 2)
    results = reproduce(capsys, tmp_path, "mixture-sweep")
    titles = [table["title"] for table in results["tables"]]
    assert len(titles) == 7
    assert all(any(task in title for title in titles) for task in mixture_sweep.TASKS)
    pairs = results["tables"][0]
    assert pairs["columns"][1:] == [row[0] for row in pairs["rows"]]
    assert pairs["columns"][1:5] == ["SFT", "RLHF", "SP", "MD 0.125"]
    assert pairs["columns"][-3:] == ["BR", "EMA", "EMA*"]
    rules = results["tables"][-1]
    assert [row[0] for row in rules["rows"]] == list(mixture_sweep.TASKS)


def test_tau_sweep_end_to_end_and_its_runs_notice_that_they_fail(
    capsys, tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(tau_sweep, "WORDS", 2)
    monkeypatch.setattr(tau_sweep, "TAUS", (0.0, 0.1))
    monkeypatch.setattr(tau_sweep, "RATES", (1e-7,))
    monkeypatch.setattr(tau_sweep, "FAILING", ())
    results = reproduce(capsys, tmp_path, "tau-sweep", "0.22")
    by_tau, others = results["tables"]
    assert [row[0] for row in by_tau["rows"]] == ["tau 0", "tau 0.1"]
    ((name, *_, noticed),) = others["rows"]
    assert name == "learning rate 1e-07"
    assert noticed.startswith("no progress in 2 of 2 (")
    assert "Most runs notice no progress at: learning rate 1e-07." in results["meaning"]


def test_cost_end_to_end(capsys, tmp_path, monkeypatch):
    few = {n: algorithms.ALGORITHMS[n] for n in ("nash_md_pg", "rlhf", "egpo")}
    monkeypatch.setattr(algorithms, "ALGORITHMS", few)
    results = reproduce(capsys, tmp_path, "cost")
    (table,) = results["tables"]
    rows = {name: numbers for name, *numbers in table["rows"]}
    assert list(rows) == ["rlhf", "nash_md_pg", "egpo"]
    assert rows["rlhf"][1] == rows["rlhf"][4] == "1.00"
    assert all(seconds > 0 and rate > 0 for seconds, _, rate, *_ in rows.values())
    # a copy of the policy, and three more responses a prompt
    assert float(rows["egpo"][3]) > float(rows["rlhf"][3])


def test_cost_counts_what_is_trained_and_generated():
    job = cost.Job("rlhf", "1M", 0, 2, 0, "cpu")
    measured = cost.measure(job)
    assert measured.parameters == 852608
    assert measured.tokens_per_second * measured.seconds == pytest.approx(2 * 8 * 16, rel=0.5)


def test_preference_ablation_end_to_end(capsys, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(preference_ablation, "WORDS", 2)
    monkeypatch.setattr(preference_ablation, "TASKS", ("population",))
    monkeypatch.setattr(preference_ablation, "SIZES", ("tiny",))
    results = reproduce(capsys, tmp_path, "preference-ablation")
    (table,) = results["tables"]
    assert [row[0] for row in table["rows"]] == ["pairwise"] * 3 + ["Bradley-Terry"] * 3
    before = {json.dumps(row[3]) for row in table["rows"][:3]}
    # the error on the reference is that of the model, whatever tau is
    assert len(before) == 1


def test_runs_on_several_cores_give_the_same():
    jobs = [str(i) for i in range(parallel._WORTH)]
    assert parallel.run(json.loads, jobs, "test") == list(range(len(jobs)))
    assert parallel.run(json.loads, jobs[:3], "test") == [0, 1, 2]
