"""AdamW with master weights and with 8-bit moments: what arrives, and what a checkpoint keeps."""

import sys
import types

import pytest
import torch

from nlhf import algorithms, checkpoint, config, learner, optimizers, parts
from nlhf.optimizers import MasterAdamW
from tests.test_train import folder, metrics, settings, weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def built(weight_list, algorithm="nash_md_pg", **changes):
    chosen = config.from_dict({"algorithm": algorithm, "learning_rate": 0.01} | changes, "test")
    return optimizers.build(chosen, algorithms.get(algorithm), weight_list)


def test_steps_that_bfloat16_alone_would_lose_arrive():
    """A hundred steps of 1e-3 from 1, where bfloat16 has no number between 1 and 1 - 1/256."""
    found = {}
    for master_weights in (False, True):
        weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = built(
            [weight], learning_rate=1e-3, dtype="bfloat16", master_weights=master_weights
        )
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        found[master_weights] = weight.detach().float()
    assert (found[False] == 1).all()
    torch.testing.assert_close(found[True], torch.full((8,), 0.9), rtol=0, atol=2**-9)


def test_masters_move_as_float32_weights_do_and_weights_are_the_masters_rounded():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 30, generator=generator).bfloat16()
    weight, wide = torch.nn.Parameter(start), torch.nn.Parameter(start.float())
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = MasterAdamW([weight], **settings)
    expected = torch.optim.AdamW([wide], **settings, fused=True)
    for step in range(20):
        weight.grad = torch.randn(40, 30, generator=generator).bfloat16()
        wide.grad = weight.grad.float()
        for one in (optimizer, expected):
            one.param_groups[0]["lr"] = 0.01 / (step + 1)
            one.step()
        assert torch.equal(optimizer.state[weight]["master"], wide)
        assert torch.equal(weight, wide.bfloat16())
    assert {k: v.dtype for k, v in optimizer.state[weight].items()} == dict.fromkeys(
        ("master", "exp_avg", "exp_avg_sq", "step"), torch.float32
    )


def test_a_weight_without_a_gradient_stays():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight])
    optimizer.step()
    assert not optimizer.state[weight]
    assert (weight == 1).all()


@pytest.mark.parametrize("changes", [
    {"dtype": "bfloat16", "lora_r": 0, "master_weights": True},
    {"dtype": "bfloat16", "lora_r": 0, "master_weights": True, "algorithm": "nash_ema_pg",
     "ema_decay": 0.5, "kl": "sequence"},
])  # fmt: skip
def test_master_weights_resume_to_the_bit(folder, tmp_path, changes):  # noqa: F811
    changes = {"eval_prompts": "", "learning_rate": 1e-4, "steps": 4} | changes
    pieces = parts.build(settings(folder, tmp_path, **changes))
    whole = learner.Learner(pieces)
    for step in range(2):
        whole.step(step)
    saved = checkpoint.save(tmp_path / "checkpoints", 2, whole, keep=1)
    resumed = learner.Learner(parts.build(pieces.config))
    assert checkpoint.load(saved, resumed) == 2
    for one in (whole, resumed):
        one.step(2)
    state = [[one.optimizer.state[p] for p in one.policy.parameters()] for one in (whole, resumed)]
    assert "master" in state[0][0]
    torch.testing.assert_close(state[1], state[0], rtol=0, atol=0)
    own = [list(one.policy.parameters()) for one in (whole, resumed)]
    torch.testing.assert_close(own[1], own[0], rtol=0, atol=0)


def test_masters_are_for_bfloat16_weights_that_nobody_else_sets():
    for wrong in ({"dtype": "float32"}, {"lora_r": 4}, {"optimizer": "adamw_8bit"}):
        with pytest.raises(ValueError, match="master_weights needs dtype 'bfloat16', lora_r 0"):
            config.from_dict({"dtype": "bfloat16", "master_weights": True} | wrong, "test")
    set_back = [
        name
        for name, algorithm in algorithms.ALGORITHMS.items()
        if any(to == "policy" for phase in algorithm.phases for to, _ in phase.then)
    ]
    assert set_back
    weight = [torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))]
    for name in set_back:
        with pytest.raises(ValueError, match=f"master_weights must be off for .* {name}"):
            built(weight, name, dtype="bfloat16", master_weights=True)


# ---- 8 bits


def test_8_bits_without_the_package_name_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"'adamw_8bit' needs bitsandbytes .*pip install bitsandb"):
        built([torch.nn.Parameter(torch.ones(2))], optimizer="adamw_8bit")
    with pytest.raises(ValueError, match=r"optimizer must be one of.*; do you mean adamw_8bit"):
        config.from_dict({"optimizer": "adamw8bit"}, "test")


class Counting(torch.optim.Optimizer):
    """Keeps what bitsandbytes keeps: a step that must be an int, one table for all weights."""

    table = torch.linspace(-1, 1, 256)

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state |= {"step": 0, "state1": torch.zeros_like(weight, dtype=torch.uint8)}
                    state["qmap1"] = self.table
                assert type(state["step"]) is int
                state["step"] += 1
                state["state1"] += 1
                weight -= group["lr"] * state["step"]


def test_the_state_of_8_bits_goes_through_a_checkpoint(folder, tmp_path, monkeypatch):  # noqa: F811
    """With a stand-in for bitsandbytes; tests/hosts has the real one."""
    changes = {"eval_prompts": "", "optimizer": "adamw_8bit", "steps": 4}
    chosen = settings(folder, tmp_path, **changes)
    # before peft and transformers could find the stand-in
    pieces = [parts.build(chosen) for _ in range(2)]
    stand_in = types.SimpleNamespace(AdamW8bit=Counting)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=stand_in))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    whole, resumed = map(learner.Learner, pieces)
    for step in range(2):
        whole.step(step)
    saved = checkpoint.save(tmp_path / "checkpoints", 2, whole, keep=1)
    assert checkpoint.load(saved, resumed) == 2
    for one in (whole, resumed):
        one.step(2)
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)
        assert whole.optimizer.state[a].keys() == resumed.optimizer.state[b].keys()
    assert {state["step"] for state in resumed.optimizer.state.values() if state} == {3}
