"""The C++ ops beside eager at small shapes: CPU time of one thread, the least of a few turns."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import gates
from nlhf_kernels.testing import Case
from nlhf_kernels.testing.case import BF16, F32
from nlhf_kernels.testing.cases import HEADS, SAMPLERS

DTYPES = (F32, BF16)
SHAPES = {
    "mixture_sample": (4, 16_384),
    "linear_mixture_sample": (4, 32, 16_384),
    "token_logprobs": (2, 8, 8_192),
    "token_kl": (2, 8, 8_192),
    "pairwise_pg_loss": (2, 8, 8_192),
    # few columns: a matrix product is the same for both
    **dict.fromkeys(HEADS, (2, 16, 4, 16_384)),
}
OPTIONS = {"linear_token_kl": {"ref": "own"}}
TURNS = 7
SECONDS = 0.02
Call = Callable[[str], object]


def measured() -> dict[str, float]:
    """CPU time with backend "cpp" over that with "eager", by op and dtype."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: ratio(call) for name, call in calls()}
    finally:
        torch.set_num_threads(threads)


def calls() -> Iterator[tuple[str, Call]]:
    """What is timed, given a backend: forward and backward where there is one."""
    for op, shape in SHAPES.items():
        for dtype in DTYPES:
            case = Case(op, "small", shape, dtype, OPTIONS.get(op, {}))
            yield f"{op} {str(dtype).removeprefix('torch.')}", _of_case(case)
    generator = torch.Generator().manual_seed(0)
    rows, pairs = torch.randn(8, 512, generator=generator), torch.randn(5, 128, generator=generator)
    weight = torch.randn(8_192, 512, generator=generator)
    yield "skinny_linear float32", lambda backend: nk.skinny_linear(rows, weight, backend=backend)
    yield "pair_loss float32", lambda backend: _pair_loss(pairs, backend)
    ema, params = torch.randn(2, 8, 8_192, generator=generator).unbind()
    tensors = list(ema), list(params)
    for name, kind in (("float32", {}), ("float32 to bfloat16, stochastic", {"seed": 1})):
        averages = [x.to(BF16) if kind else x for x in tensors[0]]
        yield (
            f"ema_update_ {name}",
            lambda backend, averages=averages, kind=kind: nk.ema_update_(
                averages, tensors[1], decay=0.99, backend=backend, **kind
            ),
        )


def _of_case(case: Case) -> Call:
    args, kwargs = case.inputs()
    if case.op in SAMPLERS:
        return lambda backend: getattr(nk, case.op)(*args, **kwargs, backend=backend)
    leaves = (0, 1) if case.op in HEADS else (0,)
    args = [x.detach().requires_grad_(i in leaves) if i in leaves else x
            for i, x in enumerate(args)]  # fmt: skip

    def call(backend: str) -> tuple[Tensor, ...]:
        result = getattr(nk, case.op)(*args, **kwargs, backend=backend)
        output = gates.differentiated(case.op, result)
        return torch.autograd.grad(output.sum(), [args[i] for i in leaves])

    return call


def _pair_loss(x: Tensor, backend: str) -> Tensor:
    logprobs, *rest = x[0].detach().requires_grad_(), *x[1:]
    rest[-1] = rest[-1].sigmoid()
    loss = nk.pair_loss(logprobs, *rest, method="online_ipo", tau=0.1, backend=backend).loss
    return torch.autograd.grad(loss, logprobs)[0]


def ratio(call: Call) -> float:
    """Turns, so that both meet the same machine; the least, since noise only ever adds."""
    counts = {}
    for backend in ("eager", "cpp"):
        call(backend)
        counts[backend] = 1 + int(SECONDS / max(_seconds(call, backend, 1), 1e-6))
    found = [{b: _seconds(call, b, n) / n for b, n in counts.items()} for _ in range(TURNS)]
    return min(x["cpp"] for x in found) / min(x["eager"] for x in found)


def _seconds(call: Call, backend: str, count: int) -> float:
    # what others run on the machine does not count
    start = time.process_time()
    for _ in range(count):
        call(backend)
    return time.process_time() - start
