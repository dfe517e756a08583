"""The whole of training against itself: with the fused ops and with eager, over 200 steps."""

import contextlib

import pytest
import torch

import nlhf_kernels as nk
from nlhf import learner, parts
from nlhf_kernels.testing import TOLERANCE
from tests import test_train
from tests.test_train import settings

folder = test_train.folder
pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 200
NAMES = ("preference", "ended", "kl", "entropy", "length", "grad_norm")


def both(folder, tmp_path, **changes) -> list[learner.Learner]:
    given = {
        "steps": STEPS,
        "batch_size": 4,
        "max_new_tokens": 4,
        "tau": 0.02,
        "learning_rate": 0.005,
    }
    chosen = settings(folder, tmp_path / "x", eval_prompts="", **given | changes)
    return [learner.Learner(parts.build(chosen)) for _ in range(2)]


def step(made: learner.Learner, number: int, backend: str) -> dict[str, float]:
    with nk.use_backend(backend) if backend else contextlib.nullcontext():
        return made.step(number)


def assert_close(ours: dict, theirs: dict, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCE[dtype]
    for name in NAMES:
        assert ours[name] == pytest.approx(theirs[name], rel=rtol, abs=atol), (ours["step"], name)


def test_fused_and_eager_training_give_the_same_curve_in_float32(folder, tmp_path):
    fused, eager = both(folder, tmp_path)
    for number in range(STEPS):
        # each goes its own way
        ours, theirs = step(fused, number, ""), step(eager, number, "eager")
        assert_close(ours, theirs, torch.float32)
    # it went far
    assert ours["kl"] > 0.5
    assert ours["skipped"] == 0


@torch.no_grad()
def take_over(made: learner.Learner, other: learner.Learner) -> None:
    """The weights and moments of another."""
    for weight, theirs in zip(made.policy.parameters(), other.policy.parameters(), strict=True):
        weight.copy_(theirs)
        made.optimizer.state[weight] = {
            name: x.clone() for name, x in other.optimizer.state.get(theirs, {}).items()
        }


def test_fused_and_eager_training_give_the_same_curve_in_bfloat16(folder, tmp_path):
    """Step by step from the same weights: a rounding that differs changes what is drawn later.

    All weights are bfloat16, so that every pass and every sum of the step is.
    """
    fused, eager = both(folder, tmp_path, dtype="bfloat16", lora_r=0)
    for number in range(STEPS):
        take_over(eager, fused)
        ours, theirs = step(fused, number, ""), step(eager, number, "eager")
        assert_close(ours, theirs, torch.bfloat16)
    assert ours["kl"] > 0.05
    assert ours["skipped"] == 0
