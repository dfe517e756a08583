"""Failure signatures: each is seen where it is, and not in healthy runs."""

import json
import logging
import math
import random

import pytest
import torch

from nlhf import diagnosis, train
from nlhf.config import Config
from nlhf.experiments import games, training
from tests.test_train import folder, settings  # noqa: F401

BATCH = 32
CHOSEN = Config(batch_size=BATCH, steps=200, tau=0.05, learning_rate=1e-3, max_new_tokens=64)


def healthy(seed: int, steps: int = 200, kl: float = 3.0, spread: float = 0.25) -> list[dict]:
    """A run as they should be: the KL settles, the preference comes back, and all is noisy."""
    draw = random.Random(seed)
    rows = []
    for t in range(steps):
        moved = 1 - math.exp(-5 * t / steps)
        wins = 0.5 + 0.2 * moved * (1 - moved) + 0.02 * moved
        mean = kl * moved
        rows.append(
            {
                "step": t + 1,
                "preference": min(1, max(0, draw.gauss(wins, spread / math.sqrt(BATCH)))),
                "kl": draw.gauss(mean, 1.2 * math.sqrt(2 * mean / BATCH)),
                "entropy": draw.gauss(2.3 - 0.5 * moved, 0.08),
                "length": draw.gauss(15, 0.4),
                "grad_norm": draw.gauss(1, 0.1),
                "learning_rate": 1e-3 * min((t + 1) / 6, 1 - 0.9 * t / steps),
            }
        )
    return rows


def names(rows: list[dict], chosen: Config | None = CHOSEN) -> list[str]:
    return [finding.name for finding in diagnosis.history(rows, chosen)]


def with_column(name: str, change) -> list[dict]:
    """A healthy run in which ``change(row)`` replaces a metric after step 40."""
    return [row | {name: change(row)} if row["step"] > 40 else row for row in healthy(1)]


@pytest.mark.parametrize("kl", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_healthy_runs_raise_no_alarm(kl, spread):
    for seed in range(4):
        rows = healthy(seed, kl=kl, spread=spread)
        assert names(rows) == []
        assert names(rows, None) == []


def test_too_few_rows_say_nothing():
    assert diagnosis.diagnose([]) == []
    assert diagnosis.diagnose(healthy(0)[:1], CHOSEN) == []
    assert diagnosis.diagnose([{"step": i + 1} for i in range(100)], CHOSEN) == []


COLLAPSES = {
    "entropy falls": ("entropy", lambda row: row["entropy"] / 50, "entropy fell from 2.3"),
    "KL beyond 1 / (2 tau)": ("kl", lambda row: 15 + row["kl"], "above 1 / (2 tau) = 10"),
    "no words left": ("length", lambda row: 1.0, "shrank from 14.9 to 1 tokens"),
    "words without end": ("length", lambda row: 64.0, "grew from 14.9 to 64 tokens, the limit"),
}


@pytest.mark.parametrize("which", COLLAPSES)
def test_each_collapse_is_seen_once_it_has_happened(which):
    name, change, text = COLLAPSES[which]
    rows = with_column(name, change)
    assert diagnosis.diagnose(rows[:40], CHOSEN) == []
    found = diagnosis.history(rows, CHOSEN)
    assert [f.name for f in found] == ["collapse"]
    assert 40 < found[0].step <= 80
    assert text in found[0].text
    assert "learning_rate (now 0.001)" in found[0].text
    assert "\n" not in found[0].text


def test_without_tau_the_kl_is_compared_with_the_entropy_of_the_reference():
    rows = with_column("kl", lambda row: 100.0)
    (finding,) = diagnosis.diagnose(rows, Config(batch_size=BATCH, tau=0.0))
    assert "6.56 nats a token, and the reference began with an entropy of 2.31" in finding.text
    # nobody said what tau is
    (finding,) = diagnosis.diagnose(rows)
    assert "raise tau or lower learning_rate" in finding.text
    assert "now" not in finding.text
    assert diagnosis.diagnose(with_column("kl", lambda row: 30 + row["kl"]), None) == []


def test_the_bound_by_tau_holds_for_the_regularised_game_alone():
    rows = with_column("kl", lambda row: 15 + row["kl"])
    for name, found in (("nash_mp", ["collapse"]), ("rlhf", []), ("sppo", [])):
        chosen = Config(algorithm=name, batch_size=BATCH, tau=0.05)
        assert [f.name for f in diagnosis.diagnose(rows, chosen)] == found


def still(seed: int, kl: float = 0.0) -> list[dict]:
    draw = random.Random(seed)
    size = math.sqrt(2 * kl / BATCH) + 1e-6
    return [row | {"kl": draw.gauss(kl, size), "preference": draw.gauss(0.5, 0.05)}
            for row in healthy(seed)]  # fmt: skip


@pytest.mark.parametrize("kl", [0.0, 1e-6, 1e-3])
def test_no_progress_is_seen_after_enough_steps(kl):
    seen = 0
    for seed in range(20):
        found = diagnosis.history(still(seed, kl), CHOSEN)
        seen += [f.name for f in found] == ["no progress"]
        assert all(f.step >= 40 for f in found)
        assert all("raise learning_rate (now 0.001)" in f.text for f in found)
    assert seen >= 19


def test_no_progress_waits_for_the_warm_up():
    rows = [row | {"learning_rate": 1e-3 * row["step"] / 3000} for row in still(0)]
    assert diagnosis.diagnose(rows, CHOSEN) == []
    assert [f.name for f in diagnosis.diagnose(still(0), CHOSEN)] == ["no progress"]
    # a rate of 0 is no warm-up
    rows = [row | {"learning_rate": 0.0} for row in still(0)]
    assert diagnosis.diagnose(rows, Config(batch_size=BATCH, learning_rate=0.0)) != []


def test_no_progress_is_not_said_of_a_preference_that_moved():
    rows = [row | {"preference": row["preference"] + 0.2 * (row["step"] > 20)} for row in still(0)]
    assert diagnosis.diagnose(rows, CHOSEN) == []
    rows = still(0)
    for step, value in ((9, 0.5), (199, 0.8)):
        rows[step] = rows[step] | {"preference_vs_ref": value}
    assert diagnosis.diagnose(rows, CHOSEN) == []


def test_no_progress_blames_tau_where_no_optimum_is_further():
    (finding,) = diagnosis.diagnose(still(0), Config(batch_size=BATCH, tau=10.0))
    assert "lower tau (now 10)" in finding.text
    assert "learning_rate" not in finding.text


def swinging(seed: int, name: str, period: float, size: float, decay: float = 0.0) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for row in healthy(seed):
        since = row["step"] - 40
        if since > 0:
            wave = size * math.exp(-decay * since) * math.sin(2 * math.pi * (since + 0.5) / period)
            mean = 3 * (1 + wave) if name == "kl" else 0.5 + wave
            noise = 1.2 * math.sqrt(2 * mean / BATCH) if name == "kl" else 0.04
            row = row | {name: draw.gauss(mean, noise)}
        rows.append(row)
    return rows


@pytest.mark.parametrize("period", [2, 6, 10, 20, 50])
@pytest.mark.parametrize(("name", "size"), [("preference", 0.35), ("kl", 0.8)])
def test_oscillation_is_seen_at_any_period(name, size, period):
    for seed in range(4):
        rows = swinging(seed, name, period, size)
        assert diagnosis.diagnose(rows[:40], CHOSEN) == []
        (finding,) = diagnosis.history(rows, CHOSEN)
        assert finding.name == "oscillation"
        assert finding.text.startswith(f"oscillation: {name if name == 'preference' else 'KL'} ")
        assert "lower learning_rate (now 0.001)" in finding.text
        assert "mixture_coef (now 0.125)" in finding.text
        stated = float(finding.text.partition("about every ")[2].split()[0])
        assert stated == pytest.approx(period, rel=0.35)


def test_a_knob_that_the_algorithm_has_not_is_not_named():
    rows = swinging(0, "kl", 20, 0.8)
    (finding,) = diagnosis.diagnose(rows, Config(algorithm="self_play", batch_size=BATCH))
    assert finding.text.endswith("or raise tau (now 0.05)")


def test_two_swings_or_dying_ones_are_no_oscillation():
    assert names(swinging(0, "kl", 300, 0.8)) == []
    found = names(swinging(0, "preference", 20, 0.35, decay=0.1))
    assert found == []


def test_a_step_costs_the_same_late_in_a_run():
    class Counted(dict):
        reads = 0

        def get(self, *key):
            Counted.reads += 1
            return super().get(*key)

    counts = []
    for length in (300, 3000):
        rows = [Counted(row) for row in healthy(0, length)]
        Counted.reads = 0
        diagnosis.diagnose(rows, CHOSEN)
        counts.append(Counted.reads)
    assert counts[1] <= 2 * counts[0]


# ---- runs of a transformer


@pytest.fixture(scope="module")
def game():
    # a second thread costs a model of this size more than it brings
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = games.make("population", words=3, length=1)
    yield made, training.reference(made, 0, "tiny", 40)
    torch.set_num_threads(before)


def run(game, **changes) -> list[str]:
    made, ref = game
    chosen = {"batch_size": 64, "steps": 45, "mixture_coef": 0.0} | changes
    trained = training.train(made, ref, made, **chosen)
    return names(trained.metrics, trained.learner.parts.config)


def test_runs_that_fail_are_seen_and_one_that_does_not_is_not(game):
    assert run(game, tau=0.1, mixture_coef=0.125) == []
    assert run(game, tau=0.0, learning_rate=1.0, steps=15) == ["collapse"]
    assert run(game, tau=0.05, learning_rate=1e-9) == ["no progress"]


def test_self_play_in_a_cyclic_game_oscillates(game):
    assert "oscillation" in run(game, tau=0.02, learning_rate=0.01, steps=160)


def test_training_warns_once_and_reports(folder, tmp_path, caplog):  # noqa: F811
    chosen = settings(folder, tmp_path / "run", steps=12, tau=0.2, learning_rate=20.0, eval_every=0)
    with caplog.at_level(logging.WARNING, logger="nlhf"):
        result = train.run(chosen)
    (record,) = (r for r in caplog.records if r.name.startswith("nlhf"))
    assert "collapse" in record.getMessage()
    (finding,) = result["findings"]
    assert finding["name"] == "collapse"
    assert finding["text"] in (tmp_path / "run" / "report.md").read_text()
    rows = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [vars(f) for f in diagnosis.history(rows, chosen)] == [finding]
