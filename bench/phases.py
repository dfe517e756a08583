"""One measured step: its seconds by phase, and its memory. The same code for us and for peers.

Imported in the peer's environment too, so it needs torch alone.
"""

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable

import torch
from torch import nn

from bench.memory import Peak


class Phases:
    """Seconds in wrapped methods and ``with phases(name)`` blocks, by name."""

    def __init__(self, device: str):
        self._cuda = torch.device(device).type == "cuda"
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner, method: str, name: str, look=lambda result: None) -> None:
        """Time a method of ``owner``; ``look`` is shown its results."""
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            with self(name):
                result = inner(*args, **kwargs)
            look(result)
            return result

        setattr(owner, method, timed)


def settle() -> None:
    """Give back what is free, so that memory before a step is what is live, not what once was."""
    gc.collect()
    # only glibc keeps freed memory to itself
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def gradient_mb(model: nn.Module) -> float:
    """Of one gradient for every trainable weight."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**20


def measure_step(step: Callable[[], None], phases: Phases, device: str, policy: nn.Module) -> dict:
    """Seconds by phase, ``update`` being what is in no other; peak and state in MB, or None.

    The state is what is there before the step and after it (weights of all models, the optimiser's
    moments, and on the CPU the process), and the gradients of ``policy``: ``zero_grad`` gives their
    memory back, but no step can do without it.
    """
    settle()
    phases.seconds = {}
    with Peak(device) as peak, phases("step"):
        step()
    found = dict(phases.seconds)
    found["update"] = found["step"] - sum(s for name, s in found.items() if name != "step")
    known = peak.total_mb is not None
    state = peak.before_mb + gradient_mb(policy) if known else None
    return {**found, "peak_mb": peak.total_mb, "state_mb": state}
