"""The processes of one run: which of them this is, and what they tell each other.

They are those of ``torchrun`` or ``accelerate launch``. Each takes a share of the prompts of a
step, and draws what a single process would draw for them: seeds follow prompts, not processes.
"""

import contextlib
import datetime
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# seconds that a process waits for the others: a report by one of them is not the end
TIMEOUT = 1800.0
# what backends say of a process that is gone, or does not come
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "imeout", "NCCL", "gloo")


@dataclass(frozen=True)
class World:
    """``size`` processes, of which this one is number ``rank``; alone, all of it costs nothing."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This process's part of what all of them have: side by side, in the order of the ranks."""
        start, end = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return items[start:end]

    def gather(self, items: list) -> list:
        """Everybody's items, in the order of the ranks; for few and small ones."""
        if self.size == 1:
            return items
        parts: list = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def sum(self, numbers: dict[str, float]) -> dict[str, float]:
        """Name by name over the processes, in float64; all must bring the same names."""
        if self.size == 1:
            return numbers
        parts: list = [None] * self.size
        # not a reduction: one order of the ranks, so the same last bit every time
        dist.all_gather_object(parts, numbers)
        return {name: sum(part[name] for part in parts) for name in numbers}

    def any(self, flag: bool) -> bool:
        """Whether it is true of one of them."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def worst(self, problem: str) -> str:
        """The first problem that one of them has; "" if none has any."""
        return next(filter(None, self.gather([problem])), "")

    def first(self, do: Callable[[], Any]) -> Any:
        """What ``do`` returns, which the first process does and the others wait for.

        Raises:
            ValueError, OSError: ``do`` raised it; every process then does.
        """
        if self.size == 1:
            return do()
        said: list = [None, None]
        if self.main:
            # what is not caught here the others must learn of too
            said[1] = RuntimeError("the first process has failed")
            try:
                said[:] = do(), None
            except (ValueError, OSError) as error:
                said[1] = error
            finally:
                dist.broadcast_object_list(said)
        else:
            dist.broadcast_object_list(said)
        if said[1] is not None:
            raise said[1]
        return said[0]


ALONE = World()


def join(timeout: float = TIMEOUT) -> World:
    """This process among those of its launcher, after it has found them; alone without one.

    timeout: seconds that they wait for each other, from the first call on.

    Raises:
        ValueError: the launcher's processes cannot be reached.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # objects and frozen copies may lie on the CPU beside a policy on the GPU
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(
                f"distributed: the other processes cannot be reached: {first}; start them with "
                "torchrun or accelerate launch"
            ) from None
    return World(dist.get_rank(), dist.get_world_size())


class Lost(Exception):
    """Another process of the run is gone, or did not come in time."""


@contextlib.contextmanager
def together(timeout: float) -> Iterator[None]:
    """What waits for the others inside it says so if they do not come.

    Raises:
        Lost: instead of what torch's backends raise.
    """
    try:
        yield
    except RuntimeError as error:
        several = dist.is_available() and dist.is_initialized()
        if not several or not any(word in str(error) for word in _LOST):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise Lost(
            f"another process of the run is gone, or did not come within collective_timeout = "
            f"{timeout:g} s ({first}); its own output says why. Go on with --resume"
        ) from error


def leave() -> None:
    """End the program, as one of several processes, when all of them have come here.

    At once and with nothing after it: taken down in the usual way, one process in twenty was
    aborted by a thread of torch's own, long after all was written, and the launcher called the run
    failed. A process alone goes on.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


def engine_name(wanted: str) -> str:
    """The engine of a run: the one that is wanted, with "auto" that of ``accelerate launch``.

    "" is a process by itself.

    Raises:
        ValueError: an engine without a launcher, or one of accelerate's that this project lacks.
    """
    launched = dist.is_available() and dist.is_initialized()
    if wanted != "auto":
        if not launched:
            raise ValueError(
                f"config: parallel = {wanted!r} needs a launcher: torchrun --nproc-per-node N -m "
                "nlhf train ..., or accelerate launch -m nlhf train ..."
            )
        return wanted
    if not launched:
        return ""
    if _flag("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(
                f"config: accelerate's FSDP must be version 2, got {version}; set fsdp_version: 2"
            )
        return "fsdp2"
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage != "3":
            raise ValueError(
                f"config: accelerate's DeepSpeed must be ZeRO stage 3, got {stage}; set "
                "zero_stage: 3, or take DDP"
            )
        return "zero3"
    return "ddp"


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
