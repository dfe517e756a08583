"""Checkpoints that were damaged, are somebody else's, or cannot be written."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as profile
from hypothesis import strategies as st

from nlhf import checkpoint, learner, parts, snapshots, train
from tests import test_train
from tests.test_train import metrics, settings, weights

folder = test_train.folder
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of four steps, with checkpoints after two and four."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train.run(settings(folder, output, steps=4, eval_prompts=""))
    return output


@pytest.fixture
def copied(finished, folder, tmp_path):
    """The same before its model was saved, and what resumes it."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run", settings(folder, tmp_path / "run", steps=4, eval_prompts="")


def first(snapshot: Path) -> Path:
    return min(snapshot.glob("*.safetensors"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def restate(snapshot: Path, **changes) -> None:
    """As ``seal`` would have written it."""
    state = snapshots.checked(snapshot) | changes
    (snapshot / "state.json").unlink()
    del state["files"]
    snapshots.seal(snapshot, **state)


def foreign(snapshot: Path) -> None:
    restate(snapshot, settings=snapshots.checked(snapshot)["settings"] | {"seed": 7})


def recount(snapshot: Path) -> None:
    path = snapshot / "state.json"
    path.write_text(path.read_text().replace('"rows": 0', '"rows": 1'))


def older(snapshot: Path) -> None:
    shutil.rmtree(snapshot)
    shutil.copytree(snapshot.with_name("step-000002"), snapshot)


DAMAGE = {
    "truncated": (lambda c: first(c).write_bytes(b"x" * 10), "does not match its hash"),
    "empty": (lambda c: first(c).write_bytes(b""), "does not match its hash"),
    "bit flipped": (lambda c: flip(first(c)), "does not match its hash"),
    "a file less": (lambda c: first(c).unlink(), "No such file"),
    "a file more": (lambda c: (c / "a.safetensors").touch(), "a.safetensors is none of its files"),
    "no state": (lambda c: (c / "state.json").unlink(), "No such file"),
    "state is not JSON": (lambda c: (c / "state.json").write_text("{"), "Expecting property name"),
    "state without a hash": (
        lambda c: (c / "state.json").write_text('{"state": 4}'),
        "none of ours",
    ),
    "state of another kind": (lambda c: (c / "state.json").write_text("[]"), "none of ours"),
    "another count": (recount, "state.json does not match its hash"),
    "of another run": (foreign, "it is of a run with seed = 7, not 0"),
    "of another step": (older, "state.json is that of step 2"),
    "a file": (lambda c: shutil.rmtree(c) or c.touch(), "Not a directory"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used_and_both_are_named(
    finished, copied, name, caplog
):
    damage, why = DAMAGE[name]
    output, chosen = copied
    last = output / "checkpoints" / "step-000004"
    damage(last)
    with caplog.at_level(logging.INFO):
        train.run(chosen, resume=True)
    (said,) = (m for m in caplog.messages if "cannot be used" in m)
    assert said.startswith(f"checkpoint {last}: cannot be used: ")
    assert why in said
    assert said.endswith("; it is now called damaged-step-000004")
    assert f"the run goes on from {last.with_name('step-000002')}" in caplog.messages
    # steps 3 and 4 are made again, and a complete checkpoint with them
    assert metrics(output) == metrics(finished)
    assert all(torch.equal(weights(output)[k], x) for k, x in weights(finished).items())
    assert snapshots.checked(last)["step"] == 4
    assert last.with_name("damaged-step-000004").exists()


def test_if_none_can_be_used_the_run_says_so_and_touches_none(copied):
    output, chosen = copied
    both = snapshots.complete(output / "checkpoints")
    for snapshot in both:
        flip(first(snapshot))
    with pytest.raises(ValueError, match=r"step-000004: cannot be used: .*; nor can the others in"):
        train.run(chosen, resume=True)
    assert snapshots.complete(output / "checkpoints") == both
    shutil.rmtree(both[0])
    with pytest.raises(ValueError, match=r"there is no other: delete .* to start again"):
        train.run(chosen, resume=True)
    # the advice in the message works
    shutil.rmtree(output / "checkpoints")
    train.run(chosen, resume=True)
    assert len(snapshots.complete(output / "checkpoints")) == 2


def test_one_of_another_model_is_refused(folder, tmp_path):
    for rank in (2, 4):
        made = learner.Learner(parts.build(settings(folder, tmp_path / str(rank), lora_r=rank)))
        made.step(0)
        checkpoint.save(tmp_path / str(rank), 1, made, 2)
    theirs = snapshots.path_of(tmp_path / "2", 1)
    # one that says nothing of the run
    restate(theirs, settings={})
    with pytest.raises(ValueError, match="those of another model or other adapters"):
        checkpoint.load(theirs, made)


@pytest.fixture(scope="module")
def restored(folder, tmp_path_factory):
    """A learner, its one checkpoint, and what is in it."""
    output = tmp_path_factory.mktemp("restored")
    chosen = settings(folder, output, algorithm="nash_mp", eta=1.0, ema_decay=0.5)
    made = learner.Learner(parts.build(chosen))
    made.step(0)
    path = checkpoint.save(output, 1, made, 2)
    return made, path, {p.name: p.read_bytes() for p in path.iterdir()}


@seed(0)
@profile(max_examples=int(os.environ.get("NLHF_EXAMPLES", "60")), deadline=None, database=None,
         suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    data=st.data(),
    kind=st.sampled_from(["flip", "cut", "insert", "zero", "delete", "swap", "add"]),
)
def test_no_damage_goes_unseen(restored, data, kind):
    made, path, files = restored
    wanted = [w.detach().clone() for w in made.policy.parameters()]
    shutil.rmtree(path)
    path.mkdir()
    changed = dict(files)
    name = data.draw(st.sampled_from(sorted(files)))
    place = data.draw(st.integers(0, len(files[name]) - 1))
    old = files[name]
    if kind == "flip":
        changed[name] = old[:place] + bytes([old[place] ^ (1 << place % 8)]) + old[place + 1 :]
    elif kind == "cut":
        changed[name] = old[:place]
    elif kind == "insert":
        changed[name] = old[:place] + data.draw(st.binary(min_size=1)) + old[place:]
    elif kind == "zero":
        end = data.draw(st.integers(place + 1, len(old)))
        changed[name] = old[:place] + bytes(end - place) + old[end:]
    elif kind == "delete":
        del changed[name]
    elif kind == "swap":
        other = data.draw(st.sampled_from(sorted(files)))
        changed[name], changed[other] = old and files[other], old
    else:
        changed[data.draw(st.sampled_from(["x", "pytorch_model.bin", "y.safetensors"]))] = b"x"
    for file, content in changed.items():
        (path / file).write_bytes(content)
    before = made.counts()
    try:
        checkpoint.load(path, made)
        found = ""
    except ValueError as error:
        found = str(error)
    if not found:
        # in the white space of the JSON
        texts = [content["state.json"] for content in (files, changed)]
        assert json.loads(texts[0]) == json.loads(texts[1])
        same = [{n: c for n, c in x.items() if n != "state.json"} for x in (files, changed)]
        assert same[0] == same[1]
    else:
        assert changed != files
        assert found.startswith(f"checkpoint {path}: cannot be used: ")
        assert len(found.splitlines()) == 1
    assert made.counts() == before
    assert all(torch.equal(a, b) for a, b in zip(wanted, made.policy.parameters(), strict=True))


def test_a_disk_without_room_ends_the_run_in_one_line_and_keeps_the_last_one(folder, tmp_path):
    chosen = settings(folder, tmp_path / "run", eval_prompts="", report_to="none")
    save, limits = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_room(checkpoints, step, *arguments):
        # the second one: every file above 10 kB ends in the middle, as on a full disk
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return save(checkpoints, step, *arguments)

    checkpoint.save = no_room
    try:
        with pytest.raises(ValueError, match="cannot be written") as stop:
            train.run(chosen)
    finally:
        checkpoint.save = save
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert str(stop.value) == (
        f"checkpoint {checkpoints / 'step-000004'}: cannot be written: File too large; the last "
        f"complete one is {checkpoints / 'step-000002'}: make room, then go on with --resume"
    )
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    train.run(chosen, resume=True)
    assert len(metrics(tmp_path / "run")) == 6


def test_one_process_at_a_time_works_on_a_run(copied):
    output, chosen = copied
    other = "import sys, time; from nlhf import snapshots; from pathlib import Path\n"
    other += "with snapshots.alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", other, str(output)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process works on this run"):
            train.run(chosen, resume=True)
        # a lock goes with its process, however that ends
        process.kill()
    train.run(chosen, resume=True)


def test_the_last_k_are_kept_in_the_order_of_their_numbers(tmp_path):
    for step in (999_999, 1_000_000, 2):
        with snapshots.new(tmp_path, step) as place:
            (place / "x").write_bytes(b"x")
            snapshots.seal(place, step)
    (tmp_path / "step-foreign").mkdir()
    snapshots.forget(tmp_path, 2)
    names = ["step-999999", "step-1000000"]
    assert [path.name for path in snapshots.complete(tmp_path)] == names


def test_what_a_killed_process_left_is_cleaned_away(tmp_path):
    (tmp_path / ".step-000004.123.new").mkdir()
    (tmp_path / ".step-000002.123.old").mkdir()
    (tmp_path / ".config.yaml.123.new").write_text("tau: ")
    # between the two renames of one that replaces another
    (tmp_path / ".model.123.old").mkdir()
    (tmp_path / ".model.123.new").mkdir()
    (tmp_path / ".git").mkdir()
    snapshots.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "model"]
