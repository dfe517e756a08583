"""What judging needs, whatever the op: inputs of one's own, poisoned memory, tolerances."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nlhf_kernels.testing.case import copied

# by dtype of the output, whatever the inputs: (rtol, atol). Logits and their statistics are of
# order 10, where one ulp of float32 is 1e-6; 16 bits are for gradients, rounded once
TOLERANCE = {
    torch.float64: (1e-11, 1e-12),
    torch.float32: (1e-5, 5e-6),
    torch.bfloat16: (2.0**-8, 5e-6),
    torch.float16: (2.0**-10, 5e-6),
}


class Answers:
    """The inputs of a case and what is right for them, each worked out once for all who are judged.

    These may be gigabytes: they belong to one problem and go with it.
    """

    def __init__(self, inputs: tuple[tuple, dict]):
        self._inputs = inputs
        self._found: dict[str, tuple[Tensor | None, Any]] = {}

    def inputs(self) -> tuple[tuple, dict]:
        """In memory of their own each time: who is judged may write over them, right or wrong."""
        args, kwargs = self._inputs
        # what is given twice stays one
        own: dict[int, Any] = {}

        def copy(x):
            if isinstance(x, tuple):
                return tuple(map(copy, x))
            return own.setdefault(id(x), copied(x))

        return tuple(map(copy, args)), {name: copy(x) for name, x in kwargs.items()}

    def once(self, name: str, make: Callable[[tuple, dict], Any], by: Tensor | None = None) -> Any:
        """``make(args, kwargs)``; once more if ``by``, which it depends on, is another."""
        if name in self._found and not _same(self._found[name][0], by):
            # never two at a time
            del self._found[name]
        if name not in self._found:
            self._found[name] = None if by is None else by.clone(), make(*self._inputs)
        return self._found[name][1]


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and torch.equal(x, y)


@contextlib.contextmanager
def poisoned_memory():
    """``torch.empty`` and its kin give NaN, or the largest integer, in Python and in C++."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def compare(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """``want`` is of any dtype; ``got`` must have ``dtype`` and agree by its tolerance."""
    assert isinstance(got, Tensor), f"{name} is {type(got).__name__}, not a tensor"
    assert got.dtype == dtype, f"{name} is {got.dtype}, must be {dtype}"
    assert got.shape == want.shape, f"{name} is {tuple(got.shape)}, must be {tuple(want.shape)}"
    assert got.device == want.device, f"{name} is on {got.device}, must be on {want.device}"
    rtol, atol = TOLERANCE.get(dtype, (0, 0))
    torch.testing.assert_close(
        # NaN and infinities must be where the oracle has them
        got.detach().to(torch.float64), want.detach().to(torch.float64), rtol=rtol, atol=atol,
        equal_nan=True, msg=lambda m: f"{name}: {m}",
    )  # fmt: skip


class Snapshot:
    """The bytes behind tensors, the NaN around a view among them, and their versions."""

    def __init__(self, args: tuple, kwargs: dict):
        named = {f"argument {i}": x for i, x in enumerate(args)} | kwargs
        for name, several in kwargs.items():
            if isinstance(several, tuple):
                named |= {f"{name}[{j}]": x for j, x in enumerate(several)}
        self.tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
        self.bytes = {name: _bytes(x).clone() for name, x in self.tensors.items()}
        self.versions = {name: x._version for name, x in self.tensors.items()}

    def require_unchanged(self, but: Tensor | None = None) -> None:
        """``but`` may have changed, inside itself only, and then must have a new version."""
        for name, x in self.tensors.items():
            now, before = _bytes(x), self.bytes[name]
            if x is but:
                assert x._version > self.versions[name], f"{name} changed, but not its version"
                before = before.clone()
                view = torch.empty(0, dtype=x.dtype, device=x.device).set_(before.untyped_storage())
                view.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x.detach())
            else:
                assert x._version == self.versions[name], f"{name} has a new version"
            assert torch.equal(now, before), f"{name} changed, or the memory around it"


def _bytes(x: Tensor) -> Tensor:
    raw = torch.empty(0, dtype=torch.uint8, device=x.device)
    return raw.set_(x.detach().untyped_storage())


def widened(arguments: dict) -> dict:
    """The same values with every floating tensor in float64."""

    def wide(x):
        if isinstance(x, tuple):
            return tuple(map(wide, x))
        return x.to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: wide(x) for name, x in arguments.items()}


def grad_outputs(outputs: list[Tensor], seed: int = 7) -> list[Tensor]:
    """Random, in float64: a kernel that forgets to multiply by them is found out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) + 2 for x in outputs]
