"""What a case is: a shape with its seeded inputs, and how they lie in memory.

Tensors reach the op as they reach it in practice: as views of something bigger, whose rest is NaN.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
GARBAGE = 2**62
VOCABULARY = {
    "llama2-7b": 32_000,
    "smollm2-135m": 49_152,
    "llama3-8b": 128_256,
    "qwen2.5-1.5b": 151_936,
    "qwen2.5-7b": 152_064,
    "gemma2-9b": 256_000,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, a dtype and what is special about it; ``why`` is its name in reports."""

    op: str
    why: str
    # of the logits; packed cases of pairwise_pg_loss give (B, T, V) too
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    options: dict = dataclasses.field(default_factory=dict)

    def inputs(
        self, seed: int = 0, device: str = "cpu", generate_on: str = "cpu"
    ) -> tuple[tuple, dict]:
        """Positional and keyword arguments of the public op; equal for equal seeds.

        ``generate_on`` names the device whose generator makes the values: those of the CPU are the
        same everywhere, gigabytes come sooner from the one that they are for.
        """
        generator = torch.Generator(generate_on).manual_seed(seed)
        return OPS[self.op].build(generator, device, self, **self.options)

    @property
    def features(self) -> tuple[str, ...]:
        """What the registry must be asked for, beside the op."""
        return ("filters",) if "filters" in self.options else ()

    def __str__(self) -> str:
        return f"{self.op}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Op:
    build: Callable
    # the first is the ordinary one, for tests that need just one
    tests: tuple[Case, ...]
    # by type of device; the first is the one that says most about an op if there is time for one
    bench: dict[str, tuple[Case, ...]]


# filled by ``cases``
OPS: dict[str, Op] = {}


# ---- layouts


def lay_out(x: Tensor, layout: str, device: str) -> Tensor:
    """The same values on ``device`` as a view with last stride 1, NaN around it."""
    *batch, V = x.shape
    if layout == "dense":
        return x.to(device).contiguous()
    if layout == "strided":
        # one more row or step, as in logits[:, :-1], and an address that no wide load likes
        bigger = [*batch[:-1], batch[-1] + 1, V + 5]
        base = torch.full(bigger, math.nan, dtype=x.dtype, device=device)
        view = base.narrow(-2, 0, batch[-1])[..., 3 : V + 3]
    elif layout == "transposed":
        base = torch.full((*reversed(batch), V), math.nan, dtype=x.dtype, device=device)
        view = base.transpose(0, len(batch) - 1)
    elif layout == "shared":
        return x[:1].to(device).expand(x.shape)
    view.copy_(x)
    return view


def copied(x):
    """A tensor with the same values and strides in memory of its own; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    storage = x.detach().untyped_storage().clone()
    empty = torch.empty(0, dtype=x.dtype, device=x.device)
    return empty.set_(storage, x.storage_offset(), x.shape, x.stride())


def normal(generator, shape) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=F64)


def random_logits(generator, shape, dtype, scale=3.0) -> Tensor:
    """Random, with rows where the first, the last or no class stands out."""
    x = normal(generator, shape).mul_(scale)
    rows = x.view(-1, shape[-1])
    rows[1::4, 0] += 4 * scale
    rows[2::4, -1] += 4 * scale
    return x.to(dtype)


def random_tokens(generator, batch, V) -> Tensor:
    """Random ids, the first and the last class among them."""
    tokens = torch.randint(V, batch, generator=generator, device=generator.device)
    flat = tokens.view(-1)
    flat[::3], flat[1::4] = V - 1, 0
    return tokens


def with_infinities(generator, x: Tensor) -> Tensor:
    """-inf in places, in a whole tile of the first row too, never in a whole row."""
    out = torch.rand(x.shape, generator=generator, device=generator.device) < 0.3
    out[0, :1024] = True
    out[:, -1] = False
    return x.masked_fill(out, -math.inf)
