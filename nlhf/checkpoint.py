"""Checkpoints: trainable weights, copies and optimiser state, hashed, renamed when complete.

``torch.distributed.checkpoint`` writes them, each process its own part, as safetensors that hold
no code. A checkpoint may be read by any number of processes, whatever lay where. A run needs
nothing else to go on: every draw and the order of the prompts follow from the seed and the step.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from nlhf.data import replace_folder
from nlhf.learner import Learner
from nlhf.players import trainable

_STATE = "state.json"
_FILE_BYTES = 2**30
_KINDS = ("weights", "optimizer", "copies")


def save(folder: Path, step: int, learner: Learner, keep: int) -> Path:
    """Write ``folder``/step-NNNNNN and delete all but the last ``keep``."""
    final, world, engine = folder / f"step-{step:06d}", learner.world, learner.engine
    tensors = {}
    for name, weight in trainable(learner.policy).items():
        tensors[f"weights|{name}"] = engine.value(weight)
        for field, moment in engine.moments(weight).items():
            tensors[f"optimizer|{name}|{field}"] = torch.as_tensor(moment)
    tensors |= {f"copies|{name}": weight for name, weight in _copies(learner).items()}
    with contextlib.ExitStack() as stack:
        if world.main:
            new = stack.enter_context(replace_folder(final, marker=_STATE))
        # every process writes into the folder that the first one has made
        place = world.first(lambda: new)
        writer = HuggingFaceStorageWriter(str(place), _files(tensors), save_distributed=True)
        with _alone_without_a_word():
            dcp.save(
                {name: x.contiguous() for name, x in tensors.items()},
                storage_writer=writer,
                no_dist=world.size == 1,
            )
        if world.main:
            hashes = {path.name: _sha256(path) for path in sorted(place.glob("*.safetensors"))}
            state = {"step": step, "sha256": hashes}
            (place / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    world.first(lambda: _forget(folder, keep))
    return final


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file that each goes into: one is a copy in memory while it is written."""
    before = itertools.accumulate((x.nbytes for x in tensors.values()), initial=0)
    return {name: n // _FILE_BYTES + 1 for name, n in zip(tensors, before, strict=False)}


def _forget(folder: Path, keep: int) -> None:
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def load(checkpoint: Path, learner: Learner) -> int:
    """Restore weights, copies and optimiser in place; return the number of steps done.

    Raises:
        ValueError: a file is missing, damaged or of another model; nothing is changed then.
    """
    engine = learner.engine
    names, copies = trainable(learner.policy), _copies(learner)
    try:
        # one process reads the hashes' gigabytes, and all learn what it found
        step = learner.world.first(lambda: _checked(checkpoint))
        reader = HuggingFaceStorageReader(str(checkpoint))
        held = {
            key: (tuple(kind.size), kind.properties.dtype)
            for key, kind in reader.read_metadata().state_dict_metadata.items()
        }
        shapes = {kind: _shapes(held, kind) for kind in _KINDS}
        if shapes["weights"] != {n: engine.shape(p) for n, p in names.items()} or shapes[
            "copies"
        ] != {n: tuple(x.shape) for n, x in copies.items()}:
            raise ValueError("its weights are those of another model or other adapters")
        read = {f"weights|{n}": torch.zeros_like(engine.value(p)) for n, p in names.items()}
        read |= {f"copies|{n}": torch.zeros_like(x) for n, x in copies.items()}
        for key in shapes["optimizer"]:
            shape, dtype = held[f"optimizer|{key}"]
            like = read[f"weights|{key.rsplit('|', 1)[0]}"]
            same = shape == tuple(like.shape)
            new = torch.zeros_like(like, dtype=dtype) if same else torch.zeros(shape, dtype=dtype)
            read[f"optimizer|{key}"] = new
        with _alone_without_a_word():
            dcp.load(read, storage_reader=reader, no_dist=learner.world.size == 1)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        safetensors.SafetensorError,
        dcp.CheckpointException,
    ) as error:
        raise ValueError(
            f"checkpoint {checkpoint}: cannot be used: {error}; "
            "delete this folder to go on from the one before it"
        ) from None
    with torch.no_grad():
        for name, own in copies.items():
            own.copy_(read[f"copies|{name}"])
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key in shapes["optimizer"]:
            name, field = key.rsplit("|", 1)
            moments[name][field] = read[f"optimizer|{key}"]
        for name, weight in names.items():
            engine.restore(weight, read[f"weights|{name}"], moments[name])
    return step


def _checked(checkpoint: Path) -> int:
    """The number of steps, after a look at every file."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    try:
        step, hashes = int(state["step"]), dict(state["sha256"])
    except (KeyError, TypeError) as error:
        # what the other processes are told of too
        raise ValueError(f"{_STATE} lacks or misstates {error}") from None
    for name, wanted in hashes.items():
        if _sha256(checkpoint / name) != wanted:
            raise ValueError(f"{name} does not match its hash")
    return step


def _shapes(held: dict[str, tuple], kind: str) -> dict[str, tuple]:
    start = f"{kind}|"
    return {key.removeprefix(start): s for key, (s, _) in held.items() if key.startswith(start)}


def _copies(learner: Learner) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": weight.detach()
        for name, copy in learner.players.copies.items()
        for key, weight in copy.own().items()
    }


@contextlib.contextmanager
def _alone_without_a_word() -> Iterator[None]:
    """A single process is told each time that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load)")
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
