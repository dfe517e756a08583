"""Checkpoints: trainable weights, copies and optimiser state as safetensors, hashed, renamed.

A run needs nothing else to go on: every draw and the order of the prompts follow from the seed and
the step.
"""

import hashlib
import json
import shutil
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nlhf.data import replace_folder
from nlhf.learner import Learner
from nlhf.players import trainable

_FILES = ("weights.safetensors", "optimizer.safetensors", "copies.safetensors")


def save(folder: Path, step: int, learner: Learner, keep: int) -> Path:
    """Write ``folder``/step-NNNNNN and delete all but the last ``keep``."""
    final = folder / f"step-{step:06d}"
    names, optimizer = trainable(learner.policy), learner.optimizer
    state = {
        f"{n}|{key}": torch.as_tensor(value).contiguous()
        for n, p in names.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    with replace_folder(final, marker="state.json") as new:
        save_file({n: p.detach().contiguous() for n, p in names.items()}, new / _FILES[0])
        save_file(state, new / _FILES[1])
        copies = {name: x.contiguous() for name, x in _copies(learner).items()}
        save_file(copies, new / _FILES[2])
        hashes = {name: _sha256(new / name) for name in _FILES}
        (new / "state.json").write_text(json.dumps({"step": step, "sha256": hashes}, indent=1))
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def load(checkpoint: Path, learner: Learner) -> int:
    """Restore weights, copies and optimiser in place; return the number of steps done.

    Raises:
        ValueError: a file is missing, damaged or of another model; nothing is changed then.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        for name in _FILES:
            if _sha256(checkpoint / name) != state["sha256"][name]:
                raise ValueError(f"{name} does not match its hash")
        weights, moments, copied = (load_file(checkpoint / name) for name in _FILES)
        step = int(state["step"])
        names, copies = trainable(learner.policy), _copies(learner)
        if _shapes(weights) != _shapes(names) or _shapes(copied) != _shapes(copies):
            raise ValueError("its weights are those of another model or other adapters")
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"checkpoint {checkpoint}: cannot be used: {error}; "
            "delete this folder to go on from the one before it"
        ) from None
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(weights[name])
        for name, own in copies.items():
            own.copy_(copied[name])
    for key, value in moments.items():
        name, field = key.rsplit("|", 1)
        parameter = names[name]
        # AdamW keeps its step counter on the CPU and its moments beside the weights
        device = "cpu" if field == "step" else parameter.device
        learner.optimizer.state[parameter][field] = value.to(device)
    return step


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(x.shape) for name, x in tensors.items()}


def _copies(learner: Learner) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": weight.detach()
        for name, copy in learner.players.copies.items()
        for key, weight in zip(copy.names, copy.weights, strict=True)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
