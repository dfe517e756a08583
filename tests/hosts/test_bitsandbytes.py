"""AdamW with the 8-bit moments of bitsandbytes itself."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from nlhf import snapshots, train
from tests import tiny
from tests.test_optimizers import built
from tests.test_train import folder, metrics, settings, weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def test_8_bit_moments_descend_like_those_of_32():
    generator = torch.Generator().manual_seed(0)
    start, goal = torch.randn(2, 128, 64, generator=generator)
    left = {}
    for name in ("adamw", "adamw_8bit"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = built([weight], optimizer=name)
        for _ in range(100):
            (weight - goal).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        left[name] = (weight - goal).abs().mean().item()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert left["adamw_8bit"] == pytest.approx(left["adamw"], rel=0.05)


@pytest.mark.parametrize("changes", [{"lora_r": 64}, {"lora_r": 0, "dtype": "bfloat16"}])
def test_8_bit_moments_resume_to_the_bit(folder, tmp_path, changes):  # noqa: F811
    model = tiny.llama(dtype=torch.float32, hidden_size=128, intermediate_size=64)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    changes |= {"model": str(tmp_path / "model"), "optimizer": "adamw_8bit", "steps": 4}
    changes |= {"eval_prompts": "", "checkpoint_every": 2}
    train.run(settings(folder, tmp_path / "whole", **changes))
    short = settings(folder, tmp_path / "cut", **changes)
    train.run(short)
    for name in ("checkpoints/step-000004", "model"):
        shutil.rmtree(tmp_path / "cut" / name)
    train.run(short, resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    a, b = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(a[k], b[k]) for k in b)
    kept = snapshots.complete(tmp_path / "whole" / "checkpoints")[-1]
    (path,) = kept.glob("*.safetensors")
    held = [key.split("|") for key in load_file(path)]
    names = {key[2] for key in held if key[0] == "optimizer"}
    assert {"state1", "absmax1", "qmap1", "step"} <= names
