"""A linear layer while it decodes: few rows, so that its time is that of reading the weights."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import gates
from bench.problem import Contender, Problem

OP = "skinny_linear"
# columns of a block of the batched product
_BLOCK = 64


@dataclass(frozen=True)
class Layer:
    name: str
    M: int
    N: int
    D: int

    def inputs(self) -> tuple[tuple, dict]:
        """Input (M, D) and weight (N, D), the outputs of deviation 1."""
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(rows, self.D, generator=generator) for rows in (self.M, self.N))
        return (x, w.mul_(self.D**-0.5)), {}

    def traffic(self, mode: str) -> tuple[int, int, str]:
        moved = 4 * (self.M * self.D + self.N * self.D + self.M * self.N)
        return moved, 2 * self.M * self.N * self.D, "read"


# 8 rows: y and y' of 4 prompts
LAYERS = (
    Layer("smollm2-135m, head", 8, 49_152, 576),
    Layer("smollm2-135m, up", 8, 1_536, 576),
    Layer("qwen2.5-1.5b, up", 8, 8_960, 1_536),
    Layer("qwen2.5-1.5b, down", 8, 1_536, 8_960),
    Layer("smollm2-135m, head, one row", 1, 49_152, 576),
)


def problems(device: str) -> list[Problem]:
    """None on CUDA: the op is for the CPU."""
    return [problem(layer) for layer in LAYERS] if device == "cpu" else []


def problem(layer: Layer) -> Problem:
    return Problem(
        op=OP,
        shape=layer.name,
        dims={"M": layer.M, "N": layer.N, "D": layer.D},
        dtype="float32",
        modes=("fwd",),
        inputs=layer.inputs,
        leaves=(),
        contenders=contenders(layer),
        traffic=layer.traffic,
    )


def contenders(layer: Layer) -> tuple[Contender, ...]:
    def contender(name, solve, missing="", peer=True):
        gate = functools.partial(require, solve, layer)
        return Contender(name, peer, lambda args, kwargs: solve(*args), gate, missing)

    def ours(backend):
        solve = functools.partial(nk.skinny_linear, backend=backend)
        return contender(backend, solve, nk.reason(OP, backend, "cpu"), peer=False)

    return (
        ours("cpp"),
        # eager is torch's linear layer: a product of MKL here
        ours("eager"),
        contender("torch.bmm, blocks of columns", blocked),
        contender("oneDNN linear", onednn),
    )


def blocked(input: Tensor, weight: Tensor) -> Tensor:
    """The same product as many small ones, which MKL does sooner."""
    (M, D), N = input.shape, len(weight)
    blocks = weight.view(N // _BLOCK, _BLOCK, D).transpose(1, 2)
    found = torch.bmm(input.expand(len(blocks), M, D), blocks)
    return found.transpose(0, 1).reshape(M, N)


def onednn(input: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, None, "none", [], "")


def require(solve, layer: Layer) -> None:
    """Agrees with float64."""
    (x, w), _ = layer.inputs()
    want = torch.nn.functional.linear(x.double(), w.double())
    gates.close("outputs", solve(x, w), want, gates.TOLERANCE[torch.float32])
