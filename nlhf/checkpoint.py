"""Checkpoints: trainable weights, copies and optimiser state, in ``nlhf.snapshots``.

``torch.distributed.checkpoint`` writes them, each process its own part, as safetensors that hold
no code. A checkpoint may be read by any number of processes, whatever lay where. A run needs
nothing else to go on but a few counts: every draw and the order of the prompts follow from the seed
and the step.
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from nlhf import config, snapshots
from nlhf.learner import Learner
from nlhf.players import trainable

_FILE_BYTES = 2**30
_KINDS = ("weights", "optimizer", "copies")


def save(folder: Path, step: int, learner: Learner, keep: int) -> Path:
    """Write ``folder``/step-NNNNNN and delete all but the last ``keep``.

    Raises:
        ValueError: it cannot be written, for want of room for example; those before it are whole.
    """
    final, world, engine = snapshots.path_of(folder, step), learner.world, learner.engine
    tensors = {}
    for name, weight in trainable(learner.policy).items():
        tensors[f"weights|{name}"] = engine.value(weight)
        for field, moment in engine.moments(weight).items():
            tensors[f"optimizer|{name}|{field}"] = torch.as_tensor(moment)
    tensors |= {f"copies|{name}": weight for name, weight in _copies(learner).items()}
    counts = learner.counts()
    with (
        snapshots.said(folder, step, dcp.CheckpointException, safetensors.SafetensorError),
        contextlib.ExitStack() as stack,
    ):
        # every process writes into the folder that the first one has made
        place = world.first(lambda: stack.enter_context(snapshots.new(folder, step)))
        writer = HuggingFaceStorageWriter(str(place), _files(tensors), save_distributed=True)
        with _alone_without_a_word():
            dcp.save(
                {name: x.contiguous() for name, x in tensors.items()},
                storage_writer=writer,
                no_dist=world.size == 1,
            )
        of = config.identity(learner.parts.config)
        world.first(lambda: snapshots.seal(place, step, counts=counts, settings=of))
    world.first(lambda: snapshots.forget(folder, keep))
    return final


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file that each goes into: one is a copy in memory while it is written."""
    before = itertools.accumulate((x.nbytes for x in tensors.values()), initial=0)
    return {name: n // _FILE_BYTES + 1 for name, n in zip(tensors, before, strict=False)}


def load(checkpoint: Path, learner: Learner) -> int:
    """Restore weights, copies, optimiser and counts in place; return the number of steps done.

    Raises:
        ValueError: a file is missing, damaged or of another model; nothing is changed then.
    """
    engine = learner.engine
    names, copies = trainable(learner.policy), _copies(learner)
    try:
        # one process reads the hashes' gigabytes, and all learn what it found
        state = learner.world.first(lambda: _checked(checkpoint, learner))
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
        raise ValueError(f"checkpoint {checkpoint}: cannot be used: {error}") from None
    with torch.no_grad():
        for name, own in copies.items():
            own.copy_(read[f"copies|{name}"])
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key in shapes["optimizer"]:
            name, field = key.rsplit("|", 1)
            moments[name][field] = read[f"optimizer|{key}"]
        for name, weight in names.items():
            engine.restore(weight, read[f"weights|{name}"], moments[name])
    learner.count_on(state["counts"])
    return state["step"]


def _checked(checkpoint: Path, learner: Learner) -> dict:
    """Its state, if it is whole and of this run."""
    state = snapshots.checked(checkpoint)
    if other := config.difference(learner.parts.config, state["settings"]):
        raise ValueError(f"it is of a run with {other}")
    return state


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
