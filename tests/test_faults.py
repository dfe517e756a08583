"""What goes wrong while a run goes on: bad numbers, judges that fail, memory, signals."""

import dataclasses
import math
import os
import shlex
import signal

import pytest
import torch

from nlhf import cli, config, http, learner, memory, parts, train
from tests import serving as local
from tests import test_train
from tests.test_train import metrics, prefer_even, settings, weights

folder = test_train.folder
pytestmark = pytest.mark.usefixtures("one_thread")

# what the preference below does instead, by the number of its call
FAULTS: dict = {}
CALLS: list = []


def prefer(prompts, first, second):
    CALLS.append(len(first))
    fault = FAULTS.get(len(CALLS), FAULTS.get("always"))
    return fault(first) if fault else prefer_even(prompts, first, second)


def nan(first):
    return [math.nan] * len(first)


def too_much(first):
    return [0.5] * (len(first) - 1) + [1.5]


def down(first):
    raise http.Unavailable("judge http://localhost:1/v1: no connection, after 6 attempts")


@pytest.fixture(autouse=True)
def faults():
    FAULTS.clear()
    CALLS.clear()
    return FAULTS


def chosen(folder, output, **changes) -> config.Config:
    plain = {"preference": "tests.test_faults:prefer", "eval_prompts": ""}
    return settings(folder, output, **plain | changes)


def state(made) -> list[torch.Tensor]:
    """All that a step may change."""
    moments = [x for s in made.optimizer.state.values() for x in s.values()]
    copies = [w for copy in made.players.copies.values() for w in copy.weights]
    kept = [*made.policy.parameters(), *moments, *copies]
    return [x.detach().clone() for x in kept]


@pytest.mark.parametrize(
    ("fault", "why"),
    [(nan, "in [0, 1], got nan"), (too_much, "got 1.5 at index 7"), (down, "no connection")],
    ids=["NaN", "1.5", "down"],
)
def test_a_step_whose_preference_cannot_be_used_changes_nothing(
    folder, tmp_path, faults, fault, why, caplog
):
    faults[2] = fault
    # which keeps an average of the weights
    given = {"algorithm": "nash_mp", "eta": 1.0, "ema_decay": 0.5} if fault is nan else {}
    made = learner.Learner(parts.build(chosen(folder, tmp_path / "x", **given)))
    assert made.step(0)["skipped"] == 0
    before = state(made)
    row = made.step(1)
    assert row["skipped"] == 1
    assert "kl" not in row
    assert why in made.problem
    assert f"step 2 is skipped: {made.problem}" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, state(made), strict=True))
    # and it goes on as if that step had not been
    assert made.step(2)["skipped"] == 1
    assert not made.problem
    assert not all(torch.equal(a, b) for a, b in zip(before, state(made), strict=True))


@pytest.mark.parametrize("fault", [500, "slow", "garbage", "cut", "neither"])
def test_a_judge_that_is_down_slow_or_lying(folder, tmp_path, fault):
    """Once, the request is sent again; twice, the step is skipped; then all is well."""
    lies = []

    def answer(path, body):
        return local.chat("maybe") if lies else local.opinion(path, body)

    with local.serve(answer) as server:
        path = tmp_path / "judge.yaml"
        path.write_text(
            f"url: {server.url}\nmodel: {local.MODEL}\ntemplate: '{local.TEMPLATE}'\n"
            "retries: 1\nbackoff: 0.001\ntimeout: 0.3\nconcurrency: 1\n"
        )
        made = learner.Learner(parts.build(chosen(folder, tmp_path / "x", preference=str(path))))
        assert made.step(0)["judge_retries"] == 0
        if fault != "neither":
            server.faults = [fault]
            row = made.step(1)
            assert (row["judge_retries"], row["skipped"]) == (1, 0)
        server.faults, before = [fault] * 2 * (fault != "neither"), state(made)
        lies += [1] * (fault == "neither")
        row = made.step(2)
        lies.clear()
        assert row["skipped"] == 1
        assert f"judge {server.url}, model {local.MODEL}: " in made.problem
        assert all(torch.equal(a, b) for a, b in zip(before, state(made), strict=True))
        row = made.step(3)
        assert (row["judge_retries"], row["skipped"]) == (0, 1)
        assert row["judge_requests"] > 0


def poisoned(made, value: float, where: str):
    """The learner, whose second loss, or its gradient alone, is not finite."""
    lose = made.lose
    calls = []

    def wrong(*arguments):
        result = lose(*arguments)
        calls.append(1)
        if len(calls) != 2:
            return result
        if where == "loss":
            return result._replace(loss=result.loss * value)
        # the loss is what it was
        return result._replace(loss=Poison.apply(result.loss, value))

    made.lose = wrong
    return made


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, value):
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.value, None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_without_a_finite_loss_or_gradient_changes_nothing(folder, tmp_path, where, value):
    made = learner.Learner(parts.build(chosen(folder, tmp_path / "x")))
    poisoned(made, value, where)
    made.step(0)
    before = state(made)
    assert made.step(1)["skipped"] == 1
    assert where in made.problem
    assert all(torch.equal(a, b) for a, b in zip(before, state(made), strict=True))
    assert all(p.grad is None or not p.grad.any() for p in made.policy.parameters())
    assert made.step(2)["grad_norm"] > 0


def test_a_step_that_training_reads_otherwise_than_it_was_drawn_is_skipped(
    folder, tmp_path, monkeypatch
):
    made = learner.Learner(parts.build(chosen(folder, tmp_path / "x")))
    row = made.step(0)
    # two ways to the same numbers in float32
    assert 0 < row["sampling_logp_difference"] < 1e-5
    assert row["sampling_logp_difference"] <= row["sampling_logp_difference_max"] < 1e-4
    rollout = parts.Parts.generate

    def shifted(self, *arguments, **more):
        pair, judges = rollout(self, *arguments, **more)
        wrong = pair.y.policy_logprobs - 0.02 * pair.y.mask
        return dataclasses.replace(
            pair, y=dataclasses.replace(pair.y, policy_logprobs=wrong)
        ), judges

    monkeypatch.setattr(parts.Parts, "generate", shifted)
    assert made.step(1)["skipped"] == 1
    assert "0.02 apart on average, more than max_logp_difference = 0.01" in made.problem
    wide = chosen(folder, tmp_path / "y", max_logp_difference=0.03)
    row = learner.Learner(parts.build(wide)).step(0)
    assert row["sampling_logp_difference"] == pytest.approx(0.02, rel=1e-3)


def test_a_bad_run_ends_itself_and_goes_on_when_all_is_well_again(folder, tmp_path, faults):
    faults["always"] = nan
    faults.update(dict.fromkeys(range(1, 6), lambda first: prefer_even(None, first, first)))
    ours = chosen(folder, tmp_path / "run", steps=20, checkpoint_every=3, max_skipped=2)
    with pytest.raises(ValueError, match=r"3 steps in a row were skipped, up to step 8: pref.*nan"):
        train.run(ours)
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [0] * 5 + [1, 2, 3]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    # no good step is lost
    assert saved[-1] == "step-000006"
    faults.clear()
    train.run(ours, resume=True)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["skipped"] for row in rows] == [0] * 5 + [1] * 15


def test_the_first_step_of_all_must_be_good(folder, tmp_path, faults):
    faults["always"] = nan
    with pytest.raises(ValueError, match="step 1: preference: must be a probability"):
        train.run(chosen(folder, tmp_path / "run"))


def test_a_measurement_without_a_judge_is_left_out(folder, tmp_path, faults, caplog):
    held_out = str(folder / "held_out.jsonl")
    # steps 1 to 3, and the measurement after the third
    faults[4] = down
    train.run(chosen(folder, tmp_path / "run", eval_prompts=held_out, report_samples=2))
    rows = metrics(tmp_path / "run")
    assert ["preference_vs_ref" in row for row in rows] == [False] * 5 + [True]
    assert "a measurement is left out: judge http" in caplog.text


def test_importance_weights_correct_for_what_training_reads_otherwise(
    folder, tmp_path, monkeypatch
):
    rollout = parts.Parts.generate

    def shifted(self, *arguments, **more):
        pair, judges = rollout(self, *arguments, **more)
        names = ("policy_logprobs", "sampling_logprobs")
        wrong = {name: getattr(pair.y, name) - 0.05 * pair.y.mask for name in names}
        return dataclasses.replace(pair, y=dataclasses.replace(pair.y, **wrong)), judges

    given = {"importance": "token", "importance_cap": 1.5}
    row = learner.Learner(parts.build(chosen(folder, tmp_path / "x", **given))).step(0)
    assert row["importance_mean"] == pytest.approx(1, abs=1e-5)
    monkeypatch.setattr(parts.Parts, "generate", shifted)
    row = learner.Learner(parts.build(chosen(folder, tmp_path / "y", **given))).step(0)
    assert row["skipped"] == 0
    assert row["sampling_logp_difference"] == pytest.approx(0.05, rel=1e-3)
    assert row["importance_mean"] == pytest.approx(math.exp(0.05), rel=1e-4)


# ---- memory


OUT = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("kind", OUT)
def test_rollout_and_loss_take_half_the_rows_when_memory_runs_out(
    folder, tmp_path, kind, monkeypatch, caplog
):
    plain = learner.Learner(parts.build(chosen(folder, tmp_path / "x")))
    rows = [plain.step(0), plain.step(1)]
    made = learner.Learner(parts.build(chosen(folder, tmp_path / "y")))
    seen = []

    def limited(module, inputs, more):
        batch = len(more.get("input_ids", inputs[0] if inputs else None))
        seen.append((torch.is_grad_enabled(), batch))
        # the rollout's batch is both responses of a prompt
        if batch > (3 if torch.is_grad_enabled() else 9):
            raise OUT[kind]

    made.parts.policy.get_base_model().register_forward_pre_hook(limited, with_kwargs=True)
    found = [made.step(0), made.step(1)]
    assert made.counts() == {"skipped": 0, "skipped_in_a_row": 0, "rows": 2, "prompts": 4}
    said = [line for line in caplog.messages if "out of memory" in line]
    assert [line.split(" (")[0] for line in said] == [
        "rollout: out of memory with 8 rows at a time, 4 from now on",
        "loss: out of memory with 8 rows at a time, 4 from now on",
        "loss: out of memory with 4 rows at a time, 2 from now on",
    ]
    for ours, theirs in zip(found, rows, strict=True):
        # the same tokens, and a gradient that differs in the order of its sums
        assert ours["length"] == theirs["length"]
        for name in ("preference", "kl", "entropy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_a_single_row_that_does_not_fit_ends_the_run_with_what_to_set(folder, tmp_path):
    made = learner.Learner(parts.build(chosen(folder, tmp_path / "x")))

    def full(*_):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")

    made.parts.policy.get_base_model().register_forward_pre_hook(full)
    with pytest.raises(ValueError, match=r"loss: out of memory with 1 row .*; set gradient_ch"):
        made.step(0)


def test_other_errors_are_not_taken_for_memory():
    chunks = memory.Chunks("loss", "set less")

    def wrong():
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        chunks.attempt(4, wrong)


# ---- signals


def test_a_signal_ends_a_run_after_its_step_and_the_rest_equals_an_uninterrupted_one(
    folder, tmp_path, capsys, monkeypatch
):
    # nothing else would write a checkpoint
    whole = chosen(folder, tmp_path / "whole", checkpoint_every=0)
    train.run(whole)
    CALLS.clear()

    cut = tmp_path / "a run"
    ours = chosen(folder, cut, checkpoint_every=0)
    prefer, stops = learner.Learner.prefer, {2: signal.SIGTERM, 4: signal.SIGINT}

    def interrupted(self, *arguments):
        if len(CALLS) + 1 in stops:
            os.kill(os.getpid(), stops.pop(len(CALLS) + 1))
        return prefer(self, *arguments)

    monkeypatch.setattr(learner.Learner, "prefer", interrupted)
    config.save(ours, tmp_path / "c.yaml")
    words = ["train", "--config", str(tmp_path / "c.yaml")]
    for name, step in (("SIGTERM", 2), ("SIGINT", 4)):
        cli.main(words)
        said = capsys.readouterr().out
        assert f"Stopped by {name}, after step {step} of 6, saved. Go on with: nlhf " in said
        # the command is one that works
        words = shlex.split(said.strip().rpartition("Go on with: ")[2])[1:]
        assert len(metrics(cut)) == step
        assert not (cut / "model").exists()
    cli.main(words)
    assert metrics(cut) == metrics(tmp_path / "whole")
    a, b = weights(cut), weights(tmp_path / "whole")
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
