"""Preference training, conversion and download are killed, damaged, starved: nothing is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors
import torch

from nlhf import cli, data, preference_fit, quickstart, snapshots, store
from tests.preference_kills import WORKS, preference_inputs, tree

# of each of the works, 3 here, 40 by hand
SIGNALS = int(os.environ.get("NLHF_KILLS", "3"))


@pytest.fixture(scope="module")
def ordeals(tmp_path_factory):
    """What the processes went through, by work."""
    command = [sys.executable, "-m", "tests.preference_kills", str(tmp_path_factory.mktemp("k"))]
    alone = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, str(SIGNALS), "0"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | alone,
        cwd=Path(__file__).parent.parent,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one.pop("work"): one for one in found}


@pytest.mark.parametrize("work", WORKS)
def test_killed_and_started_again_leaves_what_one_leaves_that_nobody_killed(ordeals, work):
    found = ordeals[work]
    assert found["wrong"] == []
    assert len(found["codes"]) == SIGNALS
    assert found["runs"] > 0
    # a signal may come before a process listens, or after it has come to its end
    assert (0 if work == "sigterm" else -signal.SIGKILL) in found["codes"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return preference_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def place(tmp_path, monkeypatch, one_thread):
    """The folder in which the run is ``run``."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The files of a run that came to its end by itself."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        cli.main(flags)
        torch.set_num_threads(threads)
    return tree(folder / "run")


def stopped(flags, monkeypatch, after: int, number: int = signal.SIGTERM) -> None:
    """A run to which a signal came in the middle of a step."""
    steps, loss = iter(range(1, 100)), preference_fit.preference_loss

    def signalled(*inputs):
        if next(steps) == after:
            os.kill(os.getpid(), number)
        return loss(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(preference_fit, "preference_loss", signalled)
        cli.main(flags)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    flags, whole, place, monkeypatch, capsys, number
):
    stopped([*flags, "--output", "run 1", "--checkpoint-every", "0"], monkeypatch, 3, number)
    said = capsys.readouterr().out
    assert f"Stopped by {number.name} after step 3 of 12, saved. Go on with: " in said
    assert "nlhf preference --config 'run 1/config.yaml' --resume\n" in said
    assert [path.name for path in (place / "run 1" / "checkpoints").iterdir()] == ["step-000003"]
    cli.main(["preference", "--config", "run 1/config.yaml", "--resume"])
    mine = tree(place / "run 1")
    same = {name for name in whole if not name.startswith(("checkpoints", "config"))}
    assert {name: mine[name] for name in same} == {name: whole[name] for name in same}


def test_a_signal_before_anything_was_written_says_so(flags, place, monkeypatch, capsys):
    read = data.read_preferences

    def signalled(*inputs, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*inputs, **options)

    monkeypatch.setattr(data, "read_preferences", signalled)
    cli.main(flags)
    said = "Stopped by SIGTERM before the first step, nothing was written: start it again with"
    assert said in capsys.readouterr().out
    assert list(place.iterdir()) == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "state-00000.safetensors": (truncate, flip, Path.unlink),
    "metrics.jsonl": (truncate,),
    "state.json": (truncate, Path.unlink),
}


@pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for name, many in DAMAGE.items() for damage in many]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    flags, whole, place, monkeypatch, caplog, name, damage
):
    stopped(flags, monkeypatch, 5)
    damage(place / "run" / "checkpoints" / "step-000005" / name)
    cli.main(flags)
    assert "checkpoint run/checkpoints/step-000005: cannot be used: " in caplog.text
    assert "the run goes on from run/checkpoints/step-000004" in caplog.text
    mine = tree(place / "run")
    assert {k: v for k, v in mine.items() if "damaged-" not in k} == whole


def test_a_checkpoint_of_another_run_is_named_and_the_one_before_it_used(
    flags, whole, place, monkeypatch, capsys, caplog
):
    stopped(flags, monkeypatch, 3)
    stopped([*flags, "--output", "other", "--seed", "1"], monkeypatch, 3)
    line = bad(capsys, *flags, "--seed", "1")
    assert "the run in run has seed = 0, not 1: resume it with its own settings, or" in line
    folder = place / "run" / "checkpoints"
    (folder / "step-000003").rename(place / "away")
    (place / "other" / "checkpoints" / "step-000003").rename(folder / "step-000003")
    cli.main(flags)
    assert "step-000003: cannot be used: it is of a run with seed = 1, not 0" in caplog.text
    assert "the run goes on from run/checkpoints/step-000002" in caplog.text
    assert {k: v for k, v in tree(place / "run").items() if "damaged-" not in k} == whole


def test_checkpoints_of_other_pairs_are_refused(flags, place, monkeypatch, capsys):
    pairs = place / "pairs.jsonl"
    pairs.write_text(Path(flags[flags.index("--pairs") + 1]).read_text())
    flags = [*flags, "--pairs", str(pairs)]
    stopped(flags, monkeypatch, 3)
    pairs.write_text("".join(reversed(pairs.read_text().splitlines(keepends=True))))
    line = bad(capsys, *flags)
    assert f"step-000003: cannot be used: it is of other pairs than {pairs} has now" in line
    assert "delete run/checkpoints to start again from step 0" in line


def test_a_run_is_not_begun_again_by_mistake(flags, whole, place, monkeypatch, capsys):
    stopped(flags, monkeypatch, 3)
    again = [flag for flag in flags if flag != "--resume"]
    assert "holds a run that has not ended: give --resume" in bad(capsys, *again)
    cli.main([*flags, "--max-skipped", "3", "--keep-checkpoints", "2"])
    first = capsys.readouterr().out
    assert tree(place / "run") == whole
    assert "is not empty: choose another --output" in bad(capsys, *again)
    # one that has ended says what it said
    cli.main(flags)
    assert capsys.readouterr().out == first
    assert tree(place / "run") == whole


def test_a_full_disk_ends_a_run_in_one_line_and_leaves_the_last_good_checkpoint(
    flags, whole, place, monkeypatch, capsys
):
    save, before = snapshots.new, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(folder, step):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        return save(folder, step)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "new", full)
        try:
            line = bad(capsys, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "checkpoint run/checkpoints/step-000006: cannot be written: " in line
    assert "File too large" in line
    assert "the last complete one is run/checkpoints/step-000004: make room, then go on" in line
    cli.main(flags)
    assert tree(place / "run") == whole


def test_a_kill_after_the_last_checkpoint_leaves_none_too_many(flags, whole, place, monkeypatch):
    forget = snapshots.forget

    def killed(folder, keep):
        if snapshots.path_of(folder, 12).exists():
            raise KeyboardInterrupt
        forget(folder, keep)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "forget", killed)
        with pytest.raises(KeyboardInterrupt):
            cli.main(flags)
    assert len(snapshots.complete(place / "run" / "checkpoints")) == 3
    cli.main(flags)
    assert tree(place / "run") == whole


def test_a_kill_between_saving_and_measuring_only_measures(flags, whole, place, monkeypatch):
    def evaluate(*inputs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preference_fit, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            cli.main(flags)
    assert not (place / "run" / "fit.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(preference_fit, "fit", None)
        cli.main(flags)
    assert tree(place / "run") == whole


@pytest.mark.parametrize("damage", [truncate, flip])
def test_features_are_kept_by_batch_and_those_that_are_damaged_read_again(
    flags, place, monkeypatch, caplog, damage
):
    from nlhf.preference import PreferenceModel

    features, asked = PreferenceModel.features, []

    def counted(self, batch):
        if len(asked) == 1 and not (place / "again").exists():
            raise KeyboardInterrupt
        asked.append(batch)
        return features(self, batch)

    monkeypatch.setattr(PreferenceModel, "features", counted)
    flags = [*flags, "--freeze-trunk"]
    with pytest.raises(KeyboardInterrupt):
        cli.main(flags)
    (kept,) = (place / "run" / "features").iterdir()
    (place / "again").touch()
    damage(kept)
    cli.main(flags)
    assert f"features {kept.relative_to(place)}: does not match its hash" in caplog.text
    assert asked[0] == asked[1]
    assert not (place / "run" / "features").exists()
    cli.main([*flags, "--output", "whole"])
    for name in ("metrics.jsonl", "fit.json", "head.safetensors"):
        assert (place / "run" / name).read_bytes() == (place / "whole" / name).read_bytes()


def bad(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_in_the_store_is_whole_or_named(tmp_path):
    with store.working(tmp_path) as work:
        (work / "model").mkdir()
        (work / "model" / "config.json").write_text("{}")
        (work / "model" / "a.safetensors").write_bytes(safetensors.serialize({}))
        place = store.put(work / "model", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "model"]
    assert store.problem(place, "config.json") == ""
    assert store.problem(place, "other.json") == "other.json is not there"
    (place / "config.json").write_text("[]")
    assert store.problem(place, "config.json") == "config.json does not match its hash"
    # one of an earlier version
    (place / store.HASHES).unlink()
    assert store.problem(place, "config.json") == ""
    truncate(place / "a.safetensors")
    assert "a.safetensors is damaged" in store.problem(place, "config.json")


def test_processes_that_fill_the_store_wait_for_each_other(tmp_path, caplog):
    inside = []

    def other() -> None:
        with store.working(tmp_path):
            inside.append("other")

    thread = threading.Thread(target=other)
    with store.working(tmp_path) as work:
        thread.start()
        thread.join(0.2)
        assert inside == []
        store.tidy(tmp_path)
        assert work.exists()
    thread.join()
    assert inside == ["other"]
    assert f"waiting for the process that is filling {tmp_path}" in caplog.text


def test_what_a_kill_left_is_taken_away_when_nobody_works(tmp_path):
    (tmp_path / ".work" / "of a killed one").mkdir(parents=True)
    store.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_is_said_of_the_store(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with (
            pytest.raises(ValueError, match=r"no room left on its disk \(File too large\)"),
            store.working(tmp_path) as work,
        ):
            (work / "x").write_bytes(bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_damaged_download_is_named_and_fetched_again(tmp_path, monkeypatch, capsys):
    archive = tmp_path / quickstart.RATINGS[1]
    archive.write_bytes(b"half of")
    ran = []

    def run(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    with pytest.raises(ValueError, match="no network"):
        quickstart.fetch_ratings(tmp_path)
    assert f"{archive}: is not the file expected" in capsys.readouterr().err
    assert len(ran) == 1
    monkeypatch.setitem(quickstart.ROOM, archive.name, 10**12)
    with pytest.raises(ValueError, match=r"takes 1000000000000 MB on the disk of .*: make some"):
        quickstart.fetch_ratings(tmp_path)
    assert len(ran) == 1
