"""What a loss from hidden states takes, forward and backward, in a process that has made none.

    python -m bench.losses_memory '{"variant": "cpp", "N": 4096, "D": 576, "V": 151936, ...}'

It counts what becomes resident, or is allocated on a GPU, beyond the inputs at the highest point:
gradients too, which are named beside it. Threads, imports and kernels are there beforehand, by a
call with few tokens.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import heads, ops
from bench.memory import Peak
from bench.phases import settle
from bench.problem import Contender
from bench.rows import ROOT
from nlhf_kernels.testing.case import BF16, F32, VOCABULARY, Case

OP = "linear_pairwise_pg_loss"
# tokens, columns, model of the vocabulary, dtype
SHAPES = {
    "cpu": (4096, 576, "qwen2.5-1.5b", F32),
    "cuda": (65_536, 4096, "qwen2.5-1.5b", BF16),
}
# fewer tokens would say nothing of a GPU
QUICK = SHAPES | {"cpu": (512, 576, "smollm2-135m", F32)}
# numbers of each logit that lie in memory at a time, in float32: what a look at them has shown, and
# one to spare
EAGER_COPIES, MATMUL_COPIES = 6, 2
# of what is free; the rest is for others
SHARE, FEWEST = 0.8, 256
B = 8


def rows(device: str, quick: bool) -> Iterator[dict]:
    """All at one size if the machine has the memory, else those that it suffices for, and all at
    the largest size of which that is true.
    """
    N, D, model, dtype = (QUICK if quick else SHAPES)[device]
    V = VOCABULARY[model]
    own = nk.resolve(OP, device)
    copies = {own: 0, f"matmul + {own}, in place": MATMUL_COPIES, "eager": EAGER_COPIES}
    small = Case(OP, "gate", (2, 8, D, V), dtype, {"masked": "none"})
    verdicts = _judged(small, device, copies)
    free = _free_bytes(device) * SHARE
    for size in dict.fromkeys((N, _fitting(N, V, free))):
        for name, count in copies.items():
            need = 4 * count * size * V
            status, note = verdicts[name]
            if status == "ok" and need > free:
                status = "missing"
                note = f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB may be taken"
            row = {
                "kind": "losses memory", "op": OP, "shape": f"{model}, N={size:,}",
                "dims": {"N": size, "D": D, "V": V}, "variant": name, "peer": False,
                "dtype": str(dtype).removeprefix("torch."), "status": status, "note": note,
                "mb": None, "gradients_mb": None,
            }  # fmt: skip
            yield row | (_measured(row, device) if status == "ok" else {})


def _fitting(N: int, V: int, free: float) -> int:
    """The tokens that eager has the memory for."""
    while N > FEWEST and free < 4 * EAGER_COPIES * N * V:
        N //= 2
    return N


def _free_bytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo")
    if not lines.exists():
        return 8e9
    (line,) = (x for x in lines.read_text().splitlines() if x.startswith("MemAvailable"))
    return 1024.0 * int(line.split()[1])


def _judged(case: Case, device: str, names) -> dict[str, tuple[str, str]]:
    """By few tokens of the same head: gates take several times the memory."""
    own = nk.resolve(OP, device)
    some: list[Contender] = [x for x in heads.contenders(case, device) if x.name in names]
    return ops.judge(ops.problem(case, device, list(dict.fromkeys((own, "eager"))), some))


def _measured(row: dict, device: str) -> dict:
    spec = {**row["dims"], "variant": row["variant"], "dtype": row["dtype"], "device": device}
    command = [sys.executable, "-m", "bench.losses_memory", json.dumps(spec)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        # who is killed says nothing
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return {"status": "wrong", "note": last[:160]}
    found = json.loads(done.stdout.splitlines()[-1])
    if found["mb"] is None:
        found |= {"status": "missing", "note": "the platform does not say"}
    return found


# ---- in a process of its own


def measure(spec: dict) -> dict:
    """{"mb": beyond the inputs, "gradients_mb": of which gradients}."""
    device, dtype = spec["device"], getattr(torch, spec["dtype"])
    weight = torch.empty(spec["V"], spec["D"], dtype=dtype, device=device)
    weight.normal_().mul_(spec["D"] ** -0.5).requires_grad_()
    solve = _solver(spec["variant"])

    def inputs(T: int) -> tuple[tuple, dict]:
        hidden = torch.randn(B, T, spec["D"], device=device).to(dtype).requires_grad_()
        tokens = torch.randint(spec["V"], (B, T), device=device)
        settings = {"tau": 0.1, "ref_logprobs": torch.full((B, T), -10.0, device=device)}
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        preference = torch.rand(B, device=device)
        return (hidden, weight, tokens, mask, preference), settings

    def once(T: int) -> Peak:
        args, kwargs = inputs(T)
        settle()
        with Peak(device) as peak:
            grads = torch.autograd.grad(solve(args, kwargs), args[:2])
        del grads
        return peak

    once(1)
    peak = once(spec["N"] // B)
    leaves = (spec["N"] + spec["V"]) * spec["D"] * dtype.itemsize
    return {"mb": peak.extra_mb, "gradients_mb": leaves / 2**20}


def _solver(variant: str) -> Callable[[tuple, dict], Tensor]:
    if variant.startswith("matmul + "):
        return heads.after_matmul(OP, variant.removeprefix("matmul + ").split(",")[0], True)
    return lambda args, kwargs: nk.linear_pairwise_pg_loss(*args, **kwargs, backend=variant).loss


def main(argv: list[str]) -> int:
    if sys.platform == "linux":
        # if memory runs out after all, this process goes and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    print(json.dumps(measure(json.loads(argv[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
