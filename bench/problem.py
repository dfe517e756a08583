"""What is timed: a problem, and who competes on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Contender:
    """Someone who solves a problem: one of our backends, or a peer.

    ``run`` takes the arguments of the public op and returns the tensor to differentiate, or for a
    sampler its tokens and log-probabilities. ``gate`` raises AssertionError unless its results on
    this problem are right: a number is printed only behind it.
    """

    name: str
    peer: bool
    run: Callable[[tuple, dict], Tensor | tuple]
    gate: Callable[[], None]
    # why it cannot run here; "" if it can
    missing: str = ""
    # its backward writes over the logits, so that they must be laid out anew each time
    inplace: bool = False


@dataclass(frozen=True)
class Problem:
    """A case of an op on a device; ``leaves`` are the places of the arguments to differentiate."""

    op: str
    shape: str
    dims: dict[str, int]
    dtype: str
    modes: tuple[str, ...]
    inputs: Callable[[], tuple[tuple, dict]]
    leaves: tuple[int, ...]
    contenders: tuple[Contender, ...]
    # mode -> (bytes, FLOPs, name of the limit: read, copy, gemm <dtype>)
    traffic: Callable[[str], tuple[int, int, str]]

    def grad_outputs(self, outputs: Tensor) -> Any:
        """What a caller's backward would pass on: ones, of the outputs' own shape."""
        return outputs.new_ones(outputs.shape)
