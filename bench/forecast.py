"""Memory and time of a step of Nash-MD before it is run, from the bytes and FLOPs of what it does.

A sum of limits, each phase as fast as the memory or the multipliers allow (the slower of the two),
nothing overlapped: y and y' from policy and reference with one cache each, a preference model of
the policy's size that reads both responses in both orders, loss and gradient of y with gradient
checkpointing, AdamW. With more than one process, FSDP2: what lies still is shared out, a rollout
has both models whole ("model") or a layer at a time ("layer").

  python -m bench forecast                    1.5B to 70B on H200s: what fits, what takes how long
  python -m bench forecast --measured         the same sum for the CPU, beside what was measured
  python -m bench forecast --save             both tables and the plot, into docs/scaling.*

Of an H200 nothing here is measured: bandwidth and shares of the peaks are assumptions, listed in
the table.
"""

import argparse
import functools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import h200, reading, rows
from bench.setting import MODELS
from nlhf_kernels.testing import Case
from nlhf_kernels.testing.cases import traffic

GB = 1e9
PAGE = rows.ROOT / "docs" / "scaling.md"
PHASES = ("rollout", "preference", "loss", "update", "links", "step")
# of logits at once, the ops' own bound on CUDA
CHUNK = 3 * 2**30
# what Python, torch and transformers take before there is a model: a tiny one's state, less itself
PROCESS = 440 * 2**20
LARGE = {
    "qwen2.5-7b": (152_064, 3_584, 18_944, 28, 28, 4),
    "qwen2.5-14b": (152_064, 5_120, 13_824, 48, 40, 8),
    "qwen2.5-32b": (152_064, 5_120, 27_648, 64, 40, 8),
    "llama3-70b": (128_256, 8_192, 28_672, 80, 64, 8),
}
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
SHAPES = MODELS | {
    name: dict(zip(FIELDS, sizes, strict=True)) | {"tie_word_embeddings": False}
    for name, sizes in LARGE.items()
}
STANDING = ("qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "llama3-70b")


@dataclass(frozen=True)
class Machine:
    """Bytes a second of its memory and of its links, FLOPs a second, and bytes of memory."""

    name: str
    read: float
    flops: float
    link: float = math.inf
    memory: float = math.inf


# 60 % of 989 TFLOP/s and 80 % of 450 GB/s a direction: what large products and gathers are said to
# reach; the bandwidth is that of bench.h200
H200 = Machine("H200", h200.COPY, 0.6 * 989e12, 0.8 * 450e9, 141e9)


@dataclass(frozen=True)
class Work:
    """A step: per process B prompts of P tokens, T new ones, ``micro`` prompts a backward pass.

    ``state`` is bytes a weight of moments, masters and gradients beside the weights themselves;
    ``trained`` the share of weights that has them.
    """

    model: str
    B: int
    P: int
    T: int
    itemsize: int = 2
    processes: int = 1
    micro: int = 8
    state: float = 14.0
    trained: float = 1.0
    gather: str = "model"
    # the bench's preference is a small reward model, whose cost is not in the sum
    preference: bool = True
    recompute: bool = True


@functools.cache
def sizes(model: str) -> tuple[int, int]:
    """(all weights, those of the embeddings that are only looked up)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        made = LlamaForCausalLM(LlamaConfig(**SHAPES[model]))
    looked_up = (
        0 if SHAPES[model]["tie_word_embeddings"] else made.model.embed_tokens.weight.numel()
    )
    return sum(p.numel() for p in made.parameters()), looked_up


def memory(work: Work) -> dict[str, float]:
    """Bytes a process, by what they are for; ``peak`` is the larger phase on top of the state."""
    shape, (N, _) = SHAPES[work.model], sizes(work.model)
    V, D, layers = (shape[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers"))
    W, size = work.processes, work.itemsize
    whole = 1 if work.gather == "model" or W == 1 else 1 / layers
    # adapters lie on the reference itself
    models = 2 if work.trained == 1 else 1
    rest = {
        "weights": (models + work.preference) * N * size / W,
        "gradients and optimiser": N * work.trained * work.state / W,
    }
    cache = 2 * shape["num_key_value_heads"] * D // shape["num_attention_heads"] * size * layers
    rows_ = 2 * work.B
    rollout = {
        "gathered": models * N * size * whole if W > 1 else 0,
        "caches": 2 * rows_ * (work.P + work.T) * cache,
        "logits": 2 * rows_ * V * size,
    }
    tokens = work.micro * (work.P + work.T)
    wide = shape["intermediate_size"] * 3 + D * 8
    loss = {
        # a layer's weights and its gradient, whole for as long as it runs
        "gathered": 2 * N * size / layers if W > 1 else 0,
        "activations": tokens * size * ((layers * D + wide) if work.recompute else layers * wide),
        # a chunk of logits, and the gradient of the head, which adds up in float32
        "head": min(4 * work.micro * work.T * V, CHUNK) + V * D * 4 * (work.trained == 1),
    }
    state = sum(rest.values())
    phases = {"rollout": sum(rollout.values()), "loss": sum(loss.values())}
    return rest | {"rollout": phases["rollout"], "loss": phases["loss"]} | {
        "peak": state + max(phases.values())
    }  # fmt: skip


def time(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds by phase."""
    shape, (N, looked_up) = SHAPES[work.model], sizes(work.model)
    V, D, layers = (shape[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers"))
    B, P, T, size, W = work.B, work.P, work.T, work.itemsize, work.processes
    body = N - looked_up - V * D
    dtype = {2: torch.bfloat16, 4: torch.float32}[size]

    def slower(read: float, flops: float) -> float:
        return max(read / machine.read, flops / machine.flops)

    def forward(tokens: float, context: float) -> float:
        return 2 * body * tokens + 4 * tokens * context * D * layers

    def op(name: str, shape: tuple, **how) -> float:
        return slower(*traffic(Case(name, "", shape, dtype), **how))

    rows_ = 2 * B
    # both models read all rows, once a token; a prompt is read once for all of them
    decode = reading.least_bytes(B, P, T, size, N - looked_up, cache_numbers(shape))
    rollout = slower(decode, 2 * (forward(rows_ * T, P + T / 2) + 2 * V * D * rows_ * T))
    rollout += slower(0, 2 * forward(B * P, P / 2))
    rollout += T * op("mixture_sample", (rows_, V))
    prefer = 0.0
    if work.preference:
        prefer = slower(N * size, forward(2 * B * (P + 2 * T), P / 2 + T))
    # adapters want no gradient of the weights that they lie on
    passes = 3 + work.recompute - (work.trained < 1)
    lose = slower(0, passes * forward(B * (P + T), (P + T) / 2))
    lose += op("linear_pairwise_pg_loss", (B, T, D, V), backward=True)
    # weights, gradients, two moments, read and written
    update = N * work.trained / W * (work.state + size) * 2 / machine.read
    links = 0.0
    if W > 1:
        micro = math.ceil(B / work.micro)
        once = N * size / machine.link
        gathers = 2 if work.trained == 1 else 1
        # by layer, adapters or not, each pass of each model gathers
        gathers = gathers if work.gather == "model" else 2 * T
        # forward, recomputation or backward, and the gradient's way back in the last
        links = once * (gathers + work.preference + 2 * micro + work.trained)
    found = {
        "rollout": rollout, "preference": prefer, "loss": lose, "update": update, "links": links,
    }  # fmt: skip
    return found | {"step": sum(found.values())}


def cache_numbers(shape: dict) -> int:
    """What a token leaves in the caches of all layers."""
    head = shape["hidden_size"] // shape["num_attention_heads"]
    return 2 * shape["num_key_value_heads"] * head * shape["num_hidden_layers"]


# ---- tables


def standing() -> list[Work]:
    """What a node of H200s does, and what 70B needs."""
    full = {"B": 32, "P": 512, "T": 512, "processes": 8}
    lora = full | {"state": 14.0, "trained": 0.01}
    found = [Work(model, **full) for model in STANDING[:3]]
    found += [Work(model, **full, gather="layer") for model in STANDING[3:4]]
    found += [Work("llama3-70b", **full | {"processes": 32}, gather="layer")]
    found += [Work(model, **lora) for model in STANDING[2:4]]
    return [*found, Work("llama3-70b", **lora, gather="layer")]


def predictions() -> str:
    """Markdown: memory and time a step of ``standing``."""
    lines = [
        "| model | trained | GPUs | rollout has whole | state, GB | rollout, GB | loss, GB "
        f"| peak of {H200.memory / GB:.0f} GB | {', s | '.join(PHASES)}, s |",
        "|---|---|---|---|" + "---:|" * 10,
    ]
    for work in standing():
        held, took = memory(work), time(work, H200)
        state = held["weights"] + held["gradients and optimiser"]
        cells = [
            work.model,
            "all" if work.trained == 1 else "LoRA",
            str(work.processes),
            {"model": "the models", "layer": "a layer"}[work.gather],
            *(f"{x / GB:.0f}" for x in (state, held["rollout"], held["loss"], held["peak"])),
            *(f"{took[name]:.1f}" for name in PHASES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measured() -> list[dict]:
    """The newest measured step of nlhf of each setting on the CPU, with what the sum says of it."""
    (path,) = rows.RESULTS.glob("*-cores.jsonl")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    limits = {row["name"]: row["value"] for row in found if row["kind"] == "limit"}
    machine = Machine("CPU", limits["read"] * 1e9, limits["gemm float32"] * 1e12)
    newest = {
        (s["model"], s["B"], s["P"], s["T"]): row
        for row in found
        if row["kind"] == "step" and row["variant"] == "nlhf"
        and (s := row["setting"])["dtype"] == "float32" and not s["lora_r"]
    }  # fmt: skip
    result = []
    for (model, B, P, T), row in sorted(newest.items(), key=lambda x: (sizes(x[0][0]), x[0])):
        work = Work(
            model, B, P, T, itemsize=4, micro=B, state=12.0, preference=False, recompute=False
        )
        took = time(work, machine)
        median = {name: statistics.median(s) for name, s in row["seconds"].items()}
        result.append(
            {
                "work": work,
                "rollout": (took["rollout"], median["rollout"]),
                "update": (took["loss"] + took["update"], median["update"]),
                "step": (took["step"], median["step"]),
                "memory": (memory(work)["peak"], row["peak_mb"] * 2**20 - PROCESS),
            }
        )
    return result


def comparison() -> str:
    """Markdown: ``measured``."""
    lines = [
        "| model | B, P, T | rollout, s | loss and update, s | step, s | memory, GB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in measured():
        work = row["work"]
        cells = [
            f"{predicted:.3g}, measured {got:.3g} ({got / predicted:.1f} x)"
            for predicted, got in (row[name] for name in ("rollout", "update", "step"))
        ]
        predicted, got = (x / GB for x in row["memory"])
        cells.append(f"{predicted:.2f}, measured {got:.2f} ({got / predicted:.1f} x)")
        lines.append(f"| {work.model} | {work.B}, {work.P}, {work.T} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(
        "python -m bench forecast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--measured", action="store_true", help="the CPU, beside what was measured")
    p.add_argument("--save", action="store_true", help="rewrite docs/scaling.md and its plot")
    arguments = p.parse_args(argv)
    if arguments.save:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        plot(PAGE.with_suffix(".png"))
    else:
        print(comparison() if arguments.measured else predictions(), end="")
    return 0


def page(text: str) -> str:
    """The page with its tables made again."""
    for name, table in (("predicted", predictions()), ("measured", comparison())):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = before + begin + table + end + rest.partition(end)[2]
    return text


def plot(path: Path) -> None:
    """Step time and memory over the number of weights: measured points, predicted lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    points = [row for row in measured() if row["work"].T == 32]
    weights = [sizes(row["work"].model)[0] for row in points]
    for ax, kind, title, unit in zip(
        axes, ("step", "memory"), ("seconds a step", "GB a process"), (1, GB), strict=True
    ):
        told, got = zip(*(row[kind] for row in points), strict=True)
        ax.plot(weights, [x / unit for x in told], "C0-", label="2 CPU cores, predicted")
        ax.plot(weights, [x / unit for x in got], "C0o", label="2 CPU cores, measured")
        for gather, line in (("model", "C1--"), ("layer", "C1:")):
            gpu = [Work(model, 32, 512, 512, processes=8, gather=gather) for model in STANDING]
            ys = [time(w, H200)["step"] if kind == "step" else memory(w)["peak"] / GB for w in gpu]
            xs = [sizes(work.model)[0] for work in gpu]
            ax.plot(xs, ys, line, label=f"8 H200, gather: {gather}, predicted")
        ax.set(xscale="log", yscale="log", xlabel="weights", ylabel=title)
        ax.grid(alpha=0.3)
    axes[1].axhline(H200.memory / GB, color="C1", lw=0.8, ls=":")
    axes[0].legend()
    figure.savefig(path, dpi=110)
