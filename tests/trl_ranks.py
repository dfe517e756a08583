"""One of the processes that train together: python -m torch.distributed.run tests/trl_ranks.py."""

import sys
from pathlib import Path

import torch

from nlhf import distributed
from tests import tiny
from tests.trl_tiny import prompts, trainer, weights


def run(folder: Path, size: int, **changes) -> tuple[torch.Tensor, float]:
    """The weights after two steps of LoRA, and how often y was preferred in the held-out data."""
    found = trainer(
        folder,
        model=tiny.with_lora(tiny.llama()),
        data=prompts(16),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.3,
        **changes,
    )
    found.train()
    return weights(found), found.evaluate()["eval_rewards/probabilities"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run(Path(sys.argv[1]), 2, ddp_backend="gloo")
    if torch.distributed.get_rank() == 0:
        torch.save(result, Path(sys.argv[1]) / "result.pt")
    distributed.leave()
