"""What TRL's mixture is in the modes that are wrong; run by ``bench.train_step --wrong-too``.

    python -m bench.trl_faults cached|lora

The log-probabilities that ``NashMDTrainer`` samples y' from, as it computes them itself, against
the geometric mixture of its two models over the same tokens, each read without a cache. In nats,
on the tiny model. The last line of standard output is a JSON object.
"""

import contextlib
import json
import sys
import tempfile

import torch
from torch import Tensor, nn

from bench.setting import Setting, words
from bench.trl_step import make_trainer, versions

SETTINGS = {
    "cached": Setting("tiny", B=4, P=16, T=16),
    "lora": Setting("tiny", B=4, P=16, T=16, lora_r=4),
}


def speak_up(model: nn.Module, seed: int) -> None:
    """Weights that predict something: as they are initialised, all models say nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1, generator=generator)


def said_and_true(trainer, setting: Setting) -> dict[str, Tensor]:
    """(B, T, V) log-probabilities: what the mixture said, the true mixture, the policy."""
    from trl.experimental.nash_md import nash_md_trainer

    kind = nash_md_trainer.GeometricMixtureWrapper
    said, inner = [], kind.forward

    def forward(self, *args, **kwargs):
        outputs = inner(self, *args, **kwargs)
        said.append(outputs.logits[:, -1].clone())
        return outputs

    ids = setting.prompts()
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "raw": words(ids)}
    kind.forward = forward
    try:
        _, rows = trainer._generate_completions(trainer.model, prompts)
    finally:
        kind.forward = inner

    def logits(model: nn.Module) -> Tensor:
        return model(input_ids=rows[:, :-1], use_cache=False).logits[:, setting.P - 1 :]

    policy, ref = trainer.model.eval(), trainer.ref_model
    with torch.no_grad():
        of_policy = logits(policy)
        with contextlib.nullcontext() if ref is not None else policy.disable_adapter():
            of_ref = logits(policy if ref is None else ref)
    mixed = (1 - setting.mixture_coef) * of_policy + setting.mixture_coef * of_ref
    return {
        "said": torch.stack(said, 1).log_softmax(-1),
        "true": mixed.log_softmax(-1),
        "policy": of_policy.log_softmax(-1),
    }


def errors(setting: Setting, *, cached: bool = False, own_ref: bool = True) -> dict[str, float]:
    """Nats, over the whole vocabulary: mean and largest from the true mixture, and from the policy.

    ``own_ref`` hands TRL a reference; without it a LoRA policy is to serve as its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        ref = setting.policy(1) if own_ref else None
        trainer = make_trainer(setting, folder, ref=ref, cached=cached)
        for seed, model in enumerate(filter(None, (trainer.model, trainer.ref_model))):
            speak_up(model, seed)
        found = said_and_true(trainer, setting)
    off = (found["said"] - found["true"]).abs()
    from_policy = (found["said"] - found["policy"]).abs()
    return {
        "mean": off.mean().item(),
        "largest": off.max().item(),
        "from_policy": from_policy.max().item(),
    }


def judge(fault: str) -> tuple[bool, str]:
    """Whether the mode is wrong here, and a line that says how much."""
    setting = SETTINGS[fault]
    right = errors(setting)
    if fault == "cached":
        wrong = errors(setting, cached=True)
        why, other = "both models write into one cache", "without the cache"
    else:
        wrong = errors(setting, own_ref=False)
        why = f"its mixture is the policy, to {wrong['from_policy']:.1g} nats"
        other = "with a ref_model"
    line = (
        f"{why}: log-probabilities off by {wrong['mean']:.2g} nats on average and "
        f"{wrong['largest']:.2g} at most (random tiny model; {other} {right['largest']:.1g})"
    )
    return wrong["largest"] > 1e-2 and right["largest"] < 1e-3, line


def main() -> None:
    wrong, line = judge(sys.argv[1])
    print(json.dumps({"wrong": wrong, "note": line, "versions": versions()}))


if __name__ == "__main__":
    main()
