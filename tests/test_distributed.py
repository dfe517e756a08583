"""Several processes train what one trains: they answer, learn, save and resume as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nlhf import config, distributed, preference, train
from tests import tiny
from tests.test_train import WORDS

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
# on a machine without GPUs its choice falls on torchrun only where FSDP is asked for
ACCELERATE = (
    "accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--mixed_precision=no",
    "--num_machines=1", "--dynamo_backend=no", "--main_process_port=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


def make(path: Path) -> Path:
    """Tiny models in float64, whose draws no rounding moves, and prompts of several lengths."""
    tiny.llama().save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    model = preference.PairwiseModel(tiny.llama(1).model, tiny.tokenizer())
    model.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(path / "preference")
    rows = [{"prompt": " ".join(WORDS[i : i + 1 + i % 4])} for i in range(20)]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder, output, **changes) -> dict:
    if changes.get("preference") == "model":
        changes["preference"] = str(folder / "preference")
    return {
        "model": str(folder / "model"),
        "prompts": str(folder / "prompts.jsonl"),
        "eval_prompts": str(folder / "prompts.jsonl"),
        "preference": "tests.test_train:prefer_even",
        "output": str(output),
        "max_new_tokens": 5,
        "steps": 4,
        "batch_size": 8,
        "learning_rate": 0.02,
        "eval_every": 2,
        "eval_samples": 7,
        "report_samples": 9,
        "checkpoint_every": 2,
        "keep_checkpoints": 9,
        "dtype": "float64",
        "device": "cpu",
    } | changes


def launch(processes: int, *command: str, launcher=TORCHRUN, good=True) -> str:
    """A command in so many processes; what they printed."""
    count = [f"--{'num_processes' if launcher is ACCELERATE else 'nproc-per-node'}={processes}"]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *count, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = result.stdout + result.stderr
    assert (result.returncode == 0) == good, said
    return said


def flags(values: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def run_all(processes: int, folder: Path, runs: list[dict]) -> None:
    """Runs one after the other in the same processes, since to start them takes the longest."""
    plan = folder / f"runs-{processes}.json"
    plan.write_text(json.dumps(runs))
    launch(processes, "-m", "tests.distributed_runs", str(plan))


def metrics(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds_", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def assert_same(one: Path, other: Path, rough: float = 1e-9, model: str = "model") -> None:
    """The same tokens, so the same counts; numbers but for the order of their sums."""
    ours, theirs = metrics(one), metrics(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        # every token of every response counts in it, and both its halves are whole numbers
        assert a["length"] == b["length"]
        for name, value in a.items():
            assert value == pytest.approx(b[name], rel=rough, abs=rough), name
    a, b = (load_file(path / model / "model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], rtol=0, atol=rough)
    reports = [json.loads((path / "report.json").read_text()) for path in (one, other)]
    assert reports[0]["samples"] == reports[1]["samples"]
    assert reports[0]["kl"] == pytest.approx(reports[1]["kl"], abs=rough)


def by_one(values: dict) -> config.Config:
    """The run of one process that these settings of several are compared with."""
    shared = ("parallel", "gather", "vocabulary_parallel")
    return config.from_dict({k: v for k, v in values.items() if k not in shared}, "test")


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The run of a single process, by its settings."""
    done = {}

    def run(**changes) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("alone") / "run"
            train.run(by_one(settings(folder, done[key], **changes)))
        return done[key]

    return run


LORA = {"lora_r": 4, "lora_alpha": 8}
EMA = {"algorithm": "nash_mp", "eta": 1.0, "ema_decay": 0.5}
VOCABULARY = {"parallel": "fsdp2", "vocabulary_parallel": True}
# by the number of processes; a preference that is a model adds up in float32, batch by batch
RUNS = {
    4: {
        "ddp": {"parallel": "ddp"} | LORA,
        "fsdp2": {"parallel": "fsdp2"} | LORA | EMA,
        "by-layer": {"parallel": "fsdp2", "gather": "layer", "preference": "model"} | LORA,
    },
    2: {
        "ddp": {"parallel": "ddp", "micro_batch_size": 3},
        "fsdp2": {"parallel": "fsdp2", "micro_batch_size": 2, "gradient_checkpointing": True} | EMA,
        "vocabulary": VOCABULARY | {"kl": "exact", "micro_batch_size": 3},
        "pairs": VOCABULARY | {"algorithm": "online_ipo", "packing": True},
    },
}


def interrupted(source: Path, target: Path) -> Path:
    """A run as it was after its checkpoint of step 2."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-000004")
    for name in ("model", "model-ema"):
        shutil.rmtree(target / name, ignore_errors=True)
    return target


def test_several_processes_equal_one_and_go_on_with_each_others_checkpoints(
    alone, folder, tmp_path
):
    """One test, because to start processes takes longer than all that they do."""
    sharded = RUNS[4]["fsdp2"]

    def run(processes: int, begun: dict[Path, dict]) -> None:
        fresh = {tmp_path / f"{processes}-{name}": how for name, how in RUNS[processes].items()}
        every = (fresh | begun).items()
        run_all(processes, tmp_path, [settings(folder, output, **how) for output, how in every])

    # what one process began, four go on with; what four began, two and one
    run(4, {interrupted(alone(**sharded), tmp_path / "1-4"): sharded})
    run(2, {interrupted(tmp_path / "4-fsdp2", tmp_path / "4-2"): sharded | {"parallel": "ddp"}})
    begun = interrupted(tmp_path / "4-fsdp2", tmp_path / "4-1")
    train.run(by_one(settings(folder, begun, **sharded)), resume=True)

    done = {f"{n}-{name}": how for n, by in RUNS.items() for name, how in by.items()}
    for name, changes in (done | dict.fromkeys(("1-4", "4-2", "4-1"), sharded)).items():
        rough = 3e-7 if "preference" in changes else 1e-9
        assert_same(alone(**changes), tmp_path / name, rough)
        if "ema_decay" in changes:
            assert_same(alone(**changes), tmp_path / name, rough, "model-ema")


def test_the_command_under_accelerate_launch(alone, folder, tmp_path):
    """Its choice of an engine is ours, and one process alone talks."""
    changes = {"micro_batch_size": 3}
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in settings(folder, tmp_path / "run", **changes).items()
    ]
    said = launch(
        2, "-m", "nlhf", "train", *flags,
        launcher=ACCELERATE,
    )  # fmt: skip
    assert said.count("The run is in") == 1
    assert_same(alone(**changes), tmp_path / "run")


def test_bad_input_is_one_line_of_one_process(folder, tmp_path):
    values = settings(folder, tmp_path / "run", batch_size=7)
    said = launch(2, "-m", "nlhf", "train", *flags(values), good=False)
    assert said.count("nlhf: config: batch_size must be a multiple of the 2 processes, got 7") == 1


def test_a_head_shared_out_needs_shards_and_hidden_states(folder, tmp_path):
    values = settings(folder, tmp_path / "run", vocabulary_parallel=True)
    with pytest.raises(ValueError, match="needs parallel = 'fsdp2', got one process"):
        train.run(config.from_dict(values, "test"))
    with pytest.raises(ValueError, match="needs hidden states, got head 'logits'"):
        config.from_dict(values | {"head": "logits"}, "test")


@pytest.mark.parametrize("wanted", ["ddp", "fsdp2", "zero3"])
def test_an_engine_needs_a_launcher(wanted):
    with pytest.raises(ValueError, match=f"{wanted}.*needs a launcher: torchrun"):
        distributed.engine_name(wanted)


@pytest.mark.parametrize(
    ("environment", "engine"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP must be version 2, got 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed must be ZeRO stage 3, got 2"),
    ],
)
def test_auto_is_what_accelerate_launch_says(monkeypatch, environment, engine):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "must be" in engine:
        with pytest.raises(ValueError, match=engine):
            distributed.engine_name("auto")
    else:
        assert distributed.engine_name("auto") == engine


def test_shares_are_all_of_it_in_order():
    for size in (1, 2, 3, 4):
        for n in range(10):
            shares = [distributed.World(rank, size).share(range(n)) for rank in range(size)]
            assert [x for share in shares for x in share] == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
