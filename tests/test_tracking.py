"""What a run reports: trackers by name, samples, progress as a bar or as plain lines."""

import io
import json
import logging
import sys
import types

import pytest

from nlhf import learner, progress, tracking, train
from tests.test_train import folder, metrics, run_cli, settings  # noqa: F401


def service(name: str, failing: str = "") -> types.ModuleType:
    """A module with the public calls of wandb and trackio that writes down what it is told.

    The parameters are those of the packages (wandb 0.31, trackio 0.43).
    """
    module = types.ModuleType(name)
    module.started, module.rows, module.finished = [], [], 0

    def wandb_init(project=None, name=None, config=None, id=None, resume=None, dir=None, mode=None):
        start(project=project, name=name, config=config, id=id, resume=resume, dir=dir)

    def trackio_init(project, name=None, config=None, resume="never", embed=True):
        start(project=project, name=name, config=config, resume=resume, embed=embed)

    def start(**arguments):
        if failing:
            raise module.Error(failing)
        module.started.append(arguments)

    class Table:
        def __init__(self, columns=None, data=None):
            self.columns, self.data = columns, data

    def log(data, step=None):
        assert module.started
        module.rows.append((step, data))

    def finish():
        module.finished += 1

    module.init = {"wandb": wandb_init, "trackio": trackio_init}[name]
    module.Table, module.log, module.finish = Table, log, finish
    module.Error = type("Error", (Exception,), {})
    return module


@pytest.fixture
def services(monkeypatch):
    made = {name: service(name) for name in ("wandb", "trackio")}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_every_tracker_gets_every_row_and_the_samples(folder, tmp_path, services, one_thread):  # noqa: F811
    chosen = settings(
        folder, tmp_path / "mine", report_to="wandb, trackio,tensorboard", eval_samples=3
    )
    train.run(chosen)
    rows = metrics(tmp_path / "mine")
    written = (tmp_path / "mine" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in written]
    assert [sample["step"] for sample in samples] == [3, 3, 3, 6, 6, 6]
    for module in services.values():
        (start,) = module.started
        assert start["project"] == "nlhf"
        assert start["name"] == "mine"
        assert start["config"]["tau"] == chosen.tau
        assert [step for step, _ in module.rows] == [1, 2, 3, 4, 5, 6]
        assert [data["kl"] for _, data in module.rows] == [row["kl"] for row in rows]
        tables = {step: data["samples"] for step, data in module.rows if "samples" in data}
        assert list(tables) == [3, 6]
        shown = [dict(zip(tables[6].columns, row, strict=True)) for row in tables[6].data]
        assert [{"step": 6} | row for row in shown] == samples[3:]
        assert module.finished == 1
    # a sample is what was measured
    mean = sum(sample["preference"] for sample in samples[3:]) / 3
    assert mean == pytest.approx(rows[-1]["preference_vs_ref"])
    held_out = (folder / "held_out.jsonl").read_text().splitlines()[:3]
    assert [s["prompt"] for s in samples[:3]] == [json.loads(row)["prompt"] for row in held_out]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "mine" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("kl")] == [1, 2, 3, 4, 5, 6]
    texts = board.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [3, 6]
    assert samples[5]["completion"] in texts[1].tensor_proto.string_val[0].decode()


def test_a_run_that_goes_on_is_the_same_run_there(
    folder,  # noqa: F811
    tmp_path,
    services,
    one_thread,
    monkeypatch,
):
    class Killed(Exception):
        pass

    step = learner.Learner.step

    def dies(self, number):
        if number == 5:
            raise Killed
        return step(self, number)

    changes = {"eval_every": 1, "eval_samples": 2, "eval_prompts": str(folder / "train.jsonl")}
    chosen = settings(folder, tmp_path / "cut", report_to="wandb,trackio", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "step", dies)
        with pytest.raises(Killed):
            train.run(chosen)
    assert services["wandb"].finished == services["trackio"].finished == 1
    train.run(chosen, resume=True)
    first, second = services["wandb"].started
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert [start["resume"] for start in services["trackio"].started] == ["never", "allow"]
    samples = (tmp_path / "cut" / "samples.jsonl").read_text().splitlines()
    # step 5 was measured twice, and stands there once
    assert [json.loads(line)["step"] for line in samples] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_samples_of_any_text_are_kept(tmp_path):
    path = tmp_path / "samples.jsonl"
    text = "one\u2028two\x85three\x0bfour\nfive"
    rows = [{"step": step, "completion": text} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert train._keep_metrics(path, 2) == rows[:2]
    assert train._keep_metrics(path, 2) == rows[:2]


def test_trackers_may_change_between_a_run_and_its_continuation(folder, tmp_path, one_thread):  # noqa: F811
    train.run(settings(folder, tmp_path / "run", steps=2, report_to="none", eval_every=0))
    assert not (tmp_path / "run" / "tensorboard").exists()
    again = settings(folder, tmp_path / "run", steps=2, report_to="tensorboard", eval_every=0)
    train.run(again, resume=True)
    assert (tmp_path / "run" / "tensorboard").exists()


def test_auto_is_tensorboard_where_it_is_installed(monkeypatch):
    assert tracking.trackers("auto") == ["tensorboard"]
    monkeypatch.setattr(tracking, "_installed", lambda name: False)
    assert tracking.trackers("auto") == []
    assert tracking.trackers("none") == []
    assert tracking.trackers("") == []


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("wandbb", "got 'wandbb'; do you mean wandb?"),
        ("tensorboard,none", "got 'tensorboard,none'"),
        ("tensorboard,nothere", "must be auto, none, or names with commas between"),
    ],
)
def test_an_unknown_tracker_is_refused_before_anything_is_read(
    tmp_path, capsys, report_to, message
):
    output = str(tmp_path / "run")
    line = run_cli(capsys, "--report-to", report_to, "--model", "nowhere", "--output", output)
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_missing_or_does_not_start_says_so(
    folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setitem(tracking.TRACKERS, "no_such_package", tracking.Trackio)
    chosen = settings(folder, tmp_path / "run", report_to="no_such_package")
    with pytest.raises(ValueError, match="not installed: pip install no_such_package"):
        train.run(chosen)
    monkeypatch.setitem(sys.modules, "wandb", service("wandb", failing="no API key\nlog in"))
    with pytest.raises(ValueError, match=r"report_to: wandb does not start: no API key$"):
        train.run(settings(folder, tmp_path / "run", report_to="wandb"))


# ---- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_plain_lines(monkeypatch, capsys):
    # what people set for colours, and what must not matter in a file
    monkeypatch.setenv("FORCE_COLOR", "1")
    now = iter(range(0, 10_000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.Progress("mine", 12, 2) as bar:
        for i in range(10):
            bar.advance(text=f"KL {i}")
    written = capsys.readouterr().err
    assert not any(ord(c) < 32 and c != "\n" for c in written)
    lines = written.splitlines()
    assert lines[0] == "mine: 3/12, 0:04, 0:36 left: KL 0"
    # 4 seconds a unit, and a line after 10 seconds at least
    assert [line.split(",")[0] for line in lines] == [f"mine: {done}/12" for done in (3, 6, 9, 12)]
    assert lines[-1] == "mine: 12/12, 0:40: KL 9"


def test_progress_can_be_silent(capsys):
    assert list(progress.track([1, 2], "quiet", 2, show=False)) == [1, 2]
    assert not capsys.readouterr().err


def test_on_a_terminal_it_is_a_bar_and_what_is_logged_stands_above(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    handler = logging.StreamHandler()
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    out = sys.stdout
    with progress.Progress("mine", 3) as bar:
        bar.advance(text="KL 0.25")
        logging.getLogger("nlhf").warning("step 1: collapse")
        # a file that a command writes to is not the terminal's
        assert sys.stdout is out
        bar.advance(2, text="KL 0.75")
    assert handler.stream is screen
    assert sys.stderr is screen
    written = screen.getvalue()
    assert "\x1b[" in written
    assert "3/3" in written
    assert "KL 0.75" in written
    # a line of its own, not one that the bar is drawn over
    assert "step 1: collapse\n" in written


def test_a_dumb_terminal_gets_lines(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    list(progress.track(range(2), "mine", 2))
    assert "\x1b" not in screen.getvalue()
    assert "mine: 2/2" in screen.getvalue()
