"""The linear family: from hidden states and the head's weight to log-probabilities, and back.

Ours has no fused op for it yet: a library's matrix product, then ``token_logprobs``. Peers fuse the
two, or work in chunks, so that logits of the whole batch never lie in memory.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import gates
from bench.peers import NEEDS_GPU, absent, compiled, gpu_only, load
from bench.problem import Contender, Problem
from nlhf_kernels.testing.cases import BF16, F32
from nlhf_kernels.testing.check import backends
from nlhf_kernels.testing.compare import grad_outputs

OP = "linear_token_logprobs"
# what TRL's trainer takes
TRL_CHUNK = 8192
# rows; torch's own choice was measured for 16 bits alone, and is a row or four with these heads in
# float32: the gradient of a whole weight for each
TORCH_CHUNK = {"cpu": 64, "cuda": None}
# rows of the oracle's logits, and of the weight in float64, at a time
_ROWS, _CLASSES = 1024, 4096


@dataclass(frozen=True)
class Head:
    name: str
    N: int
    D: int
    V: int
    dtype: torch.dtype

    def inputs(self, device: str) -> tuple[tuple, dict]:
        """Hidden states (N, D), weight (V, D), tokens (N,); logits have a deviation of 3."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            x = torch.empty(rows, self.D, dtype=self.dtype, device=device)
            return x.normal_(generator=generator).mul_(scale)

        tokens = torch.randint(self.V, (self.N,), generator=generator, device=device)
        tokens[::4], tokens[1::4] = 0, self.V - 1
        return (normal(self.N, 1.0), normal(self.V, 3 * self.D**-0.5), tokens), {}

    def traffic(self, mode: str) -> tuple[int, int, str]:
        """Both factors are read in each pass, and their gradients written in the backward."""
        factors = (self.N + self.V) * self.D * self.dtype.itemsize
        passes = {"fwd": (1, 2), "bwd": (2, 4), "fwd+bwd": (3, 6)}
        moved, products = passes[mode]
        flops = products * self.N * self.V * self.D
        return moved * factors, flops, f"gemm {str(self.dtype).removeprefix('torch.')}"


HEADS = {
    "cpu": (
        Head("smollm2-135m", 512, 576, 49_152, F32),
        Head("qwen2.5-1.5b", 96, 1536, 151_936, F32),
    ),
    "cuda": (
        Head("llama3-8b", 8192, 4096, 128_256, BF16),
        Head("qwen2.5-1.5b", 16_384, 1536, 151_936, BF16),
    ),
}
QUICK = {
    "cpu": (Head("smollm2-135m", 64, 576, 49_152, F32),),
    "cuda": (Head("llama3-8b", 1024, 4096, 128_256, BF16),),
}


def problems(device: str, quick: bool = False) -> list[Problem]:
    """For "cpu" or "cuda"."""
    return [problem(head, device) for head in (QUICK if quick else HEADS)[device]]


def problem(head: Head, device: str) -> Problem:
    return Problem(
        op=OP,
        shape=f"{head.name}, N={head.N:,}",
        dims={"N": head.N, "D": head.D, "V": head.V},
        dtype=str(head.dtype).removeprefix("torch."),
        modes=("fwd", "bwd", "fwd+bwd"),
        inputs=functools.partial(head.inputs, device),
        leaves=(0, 1),
        contenders=contenders(head, device),
        traffic=head.traffic,
    )


def contenders(head: Head, device: str) -> tuple[Contender, ...]:
    def contender(name, solve, missing="", peer=True):
        gate = functools.partial(require, solve, head, device)
        return Contender(name, peer, lambda args, kwargs: solve(*args), gate, missing)

    found = []
    # that of eager is the plain formula below
    for backend in (x for x in backends(device) if x != "eager"):
        for inplace in (False, True):
            name = f"matmul + {backend}{', in place' if inplace else ''}"
            solve = functools.partial(ours, backend=backend, inplace=inplace)
            found.append(contender(name, solve, _why_not(backend, device), peer=False))
    torch_2_13 = (
        "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs torch 2.13 or later"
    )
    liger = gpu_only("liger_kernel.ops", device)
    cut = absent("cut_cross_entropy")
    found += [
        contender("eager", eager, peer=False),
        contender("torch.compile", compiled(eager)),
        contender("torch linear_cross_entropy", torch_linear, torch_2_13),
        contender("torch linear_cross_entropy, chunked", torch_chunked, torch_2_13),
        contender("Liger fused linear cross entropy", liger_linear, liger),
        contender("TRL chunked log-probabilities", trl_chunked, absent("trl.trainer.utils")),
    ]
    if device == "cuda":
        found += [
            contender("Cut Cross Entropy", cut_kernel, cut),
            # without leaving out what is too small to matter
            contender("Cut Cross Entropy, exact", cut_exact, cut),
        ]
    else:
        found += [
            contender("Cut Cross Entropy, torch_compile", cut_compiled, cut),
            contender("Cut Cross Entropy", cut_kernel, gpu_only("cut_cross_entropy", device)),
        ]
    return tuple(found)


def _why_not(backend: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return NEEDS_GPU
    one = torch.zeros(1, 1, device=device)
    try:
        nk.token_logprobs(one, one[0].long(), backend=backend)
    except ValueError as error:
        return str(error)
    return ""


# ---- solvers: (hidden, weight, tokens) -> log-probabilities (N,)


def ours(hidden: Tensor, weight: Tensor, tokens: Tensor, backend: str, inplace: bool) -> Tensor:
    logits = hidden @ weight.T
    return nk.token_logprobs(logits, tokens, inplace_backward=inplace, backend=backend).logprobs


def eager(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logs = (hidden @ weight.T).float().log_softmax(-1)
    return logs.gather(-1, tokens[:, None])[:, 0]


def torch_linear(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, tokens, reduction="none")


def torch_chunked(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    rows = TORCH_CHUNK[hidden.device.type]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, tokens, reduction="none", options=options
    )


def liger_linear(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    # bias, weights of classes, ignored token, z loss, label smoothing, reduction
    settings = None, None, -100, 0.0, 0.0, "none"
    function = load("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    return -function.apply(hidden, weight, tokens, *settings)[0]


def trl_chunked(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    function = load("trl.trainer.utils")._ChunkedLogProbFunction
    # the bias comes third, the temperature after the tokens; entropy is computed as well
    return function.apply(hidden, weight, None, tokens, 1.0, TRL_CHUNK)[0]


def _cut(hidden: Tensor, weight: Tensor, tokens: Tensor, **settings) -> Tensor:
    solve = load("cut_cross_entropy").linear_cross_entropy
    return -solve(hidden, weight, tokens, reduction="none", **settings)


cut_kernel = functools.partial(_cut, impl="cce")
cut_exact = functools.partial(_cut, impl="cce", filter_eps=None)
cut_compiled = functools.partial(_cut, impl="torch_compile")


# ---- the gate


def require(solve: Callable, head: Head, device: str) -> None:
    """Log-probabilities and both gradients agree with float64."""
    known = gates.answers(head, device, functools.partial(head.inputs, device))
    (hidden, weight, tokens), _ = known.inputs()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    got = solve(*leaves, tokens)
    weights = _grad_weights(head).to(got.dtype).to(device)
    grads = torch.autograd.grad(got, leaves, weights)
    logprobs, peak, *wanted = known.once("oracle", functools.partial(oracle, head, device))
    tolerance = gates.TOLERANCE[head.dtype]
    # a product of 16-bit matrices is rounded to 16 bits
    rounding = torch.finfo(head.dtype).eps / 2 * peak
    gates.close("log-probabilities", got, logprobs, tolerance + rounding)
    for name, grad, want in zip(("hidden", "weight"), grads, wanted, strict=True):
        distance = gates.Distance()
        distance.add(grad, want)
        distance.require(tolerance, f"gradient of {name}")


def _grad_weights(head: Head) -> Tensor:
    return grad_outputs([torch.empty(head.N, device="meta")])[0]


def oracle(
    head: Head, device: str, args: tuple, kwargs: dict
) -> tuple[Tensor, float, Tensor, Tensor]:
    """By eager in float64: log-probabilities, the largest logit, and the gradients in float32."""
    hidden, weight, tokens = args
    weights = _grad_weights(head).to(device)
    logprobs, grads, peak = [], [], 0.0
    total = torch.zeros_like(weight, dtype=torch.float64)
    for start in range(0, head.N, _ROWS):
        some = slice(start, start + _ROWS)
        rows = hidden[some].double()
        parts = [rows @ part.double().T for part in weight.split(_CLASSES)]
        logits = torch.cat(parts, 1).requires_grad_()
        peak = max(peak, float(logits.detach().abs().max()))
        part = nk.token_logprobs(logits, tokens[some], backend="eager").logprobs
        (slopes,) = torch.autograd.grad(part, logits, weights[some])
        logprobs.append(part.detach())
        grad = torch.zeros_like(rows)
        pieces = (weight.split(_CLASSES), total.split(_CLASSES), slopes.split(_CLASSES, 1))
        for of_weight, of_total, slope in zip(*pieces, strict=True):
            grad.addmm_(slope, of_weight.double())
            of_total.addmm_(slope.T, rows)
        grads.append(grad.float())
    return torch.cat(logprobs), peak, torch.cat(grads), total.float()
