"""ZeRO-3 trains what one process trains, and both go on with each other's checkpoints."""

import torch

from nlhf import train
from tests import test_distributed as several
from tests import tiny

LORA = several.LORA
ENGINE = {"parallel": "zero3", "dtype": "float32"}
CASES = {
    # with small steps: Adam makes a gradient that is 0 but for rounding, as some are, one of a step
    "all": {"micro_batch_size": 2, "learning_rate": 2e-5},
    "lora": LORA | {"preference": "model"},
    "by-layer": LORA | {"gather": "layer"},
}
# it computes in float32
ROUGH = 2e-6


def test_two_processes_of_deepspeed_equal_one(tmp_path):
    folder = several.make(tmp_path / "tiny")
    tiny.llama(dtype=torch.float32).save_pretrained(folder / "model")

    def settings(name: str, **how) -> dict:
        return several.settings(folder, tmp_path / name, **{"dtype": "float32"} | how)

    for name, changes in CASES.items():
        train.run(several.by_one(settings(f"one-{name}", **changes)))
    begun = several.interrupted(tmp_path / "one-all", tmp_path / "one-zero")
    runs = [settings(f"zero-{name}", **ENGINE | changes) for name, changes in CASES.items()]
    several.run_all(2, tmp_path, [*runs, settings(begun.name, **ENGINE | CASES["all"])])
    several.interrupted(tmp_path / "zero-all", tmp_path / "zero-one")
    train.run(several.by_one(settings("zero-one", **CASES["all"])), resume=True)
    for name in CASES:
        several.assert_same(tmp_path / f"one-{name}", tmp_path / f"zero-{name}", ROUGH)
    for name in ("one-zero", "zero-one"):
        several.assert_same(tmp_path / "one-all", tmp_path / name, ROUGH)
