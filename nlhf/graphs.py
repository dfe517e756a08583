"""CUDA graphs: a step that touches static tensors only is recorded once and played back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Graphs:
    """Graphs and buffers of the decode loop, kept from one call to the next.

    Give the same object to every ``rollout.generate`` of a training run. As long as the models,
    the settings, the number of rows and the width (to the next multiple of ``bucket``) stay, the
    graphs of the first call serve all others; weights may change in place. It holds the buffers
    of the last call, the caches among them, until it is dropped itself.

    A graph attends to a multiple of ``bucket`` columns, the unwritten ones masked.
    """

    device = "cuda"

    def __init__(self, bucket: int = 128):
        self.bucket = bucket
        self._key: Any = None
        self._held: Any = None
        self._warm: set[int] = set()
        self._recorded: dict[int, Callable[[], None]] = {}
        self._pool: Any = None

    def prepare(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gave for this key; for another key, all that was recorded is dropped."""
        if key != self._key:
            self._key = self._held = None
            self._warm.clear()
            self._recorded.clear()
            self._pool = None
            self._held, self._key = make(), key
        return self._held

    def play(self, seen: int, step: Callable[[], None]) -> None:
        """``step``, whose shapes depend on ``seen`` alone: run the first time, then replayed."""
        if seen not in self._warm:
            self.warm_up(step)
            self._warm.add(seen)
            return
        if seen not in self._recorded:
            self._recorded[seen] = self.record(step)
        self._recorded[seen]()

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run ``step``, so that libraries initialise and kernels compile outside of a recording."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record ``step`` without running it; what comes back runs it."""
        if self._pool is None:
            # the graphs never run side by side, and nothing lives from one to the next
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


def fingerprint(model: nn.Module) -> tuple:
    """What a recording of the model has baked in: where its tensors are, and peft's switches."""
    tensors = [*model.parameters(), *model.buffers()]
    switches = [
        (module._disable_adapters, getattr(module, "merged", None), str(module.active_adapters))
        for module in model.modules()
        if hasattr(module, "_disable_adapters")
    ]
    return tuple(x.data_ptr() for x in tensors), tuple(switches)
