"""The average of a model's weights: one launch, beside torch's own for lists and a loop."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import gates
from bench.problem import Contender, Problem
from bench.setting import MODELS

OP = "ema_update_"
MODEL, QUICK_MODEL = "smollm2-135m", "tiny"
DECAY = 0.99
FOREACH, LOOP = "torch._foreach_lerp_", "lerp_, a loop"


def sizes(model: str) -> list[int]:
    """Of every weight, that of the head being the embeddings."""
    m = MODELS[model]
    D, F = m["hidden_size"], m["intermediate_size"]
    kv = D // m["num_attention_heads"] * m["num_key_value_heads"]
    layer = [D * D, kv * D, kv * D, D * D, F * D, F * D, D * F, D, D]
    return [m["vocab_size"] * D, *layer * m["num_hidden_layers"], D]


def problem(device: str, quick: bool = False) -> Problem:
    model = QUICK_MODEL if quick else MODEL
    parts = sizes(model)
    count = sum(parts)
    return Problem(
        op=OP,
        shape=f"{model}, {count / 1e6:.3g} million weights",
        dims={"N": count, "tensors": len(parts)},
        dtype="float32",
        modes=("fwd",),
        inputs=functools.partial(inputs, count, device),
        leaves=(),
        contenders=contenders(tuple(parts), device),
        # the average is read and written, the weights are read
        traffic=lambda mode: (3 * 4 * count, 2 * count, "copy"),
    )


def inputs(count: int, device: str) -> tuple[tuple, dict]:
    """Average and weights, each in one piece of memory."""
    generator = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(2, count, generator=generator, device=device).unbind()), {}


def contenders(parts: tuple[int, ...], device: str) -> tuple[Contender, ...]:
    def contender(name: str, update: Callable, peer: bool) -> Contender:
        # cut once: views of hundreds of tensors take as long as the update of a GPU
        known: dict[tuple, tuple] = {}

        def run(args: tuple, kwargs: dict) -> tuple:
            place = tuple(x.data_ptr() for x in args)
            if place not in known:
                known[place] = tuple(list(x.detach().split(parts)) for x in args)
            update(*known[place])
            return args[:1]

        def gate() -> None:
            average, weights = inputs(sum(parts), device)[0]
            want = DECAY * average.double() + (1 - DECAY) * weights.double()
            run((average, weights), {})
            known.clear()
            gates.close("average", average, want, 2e-6)

        return Contender(name, peer, run, gate)

    return (
        contender(OP, functools.partial(nk.ema_update_, decay=DECAY), False),
        contender(FOREACH, _foreach, True),
        contender(LOOP, _loop, True),
    )


def _foreach(averages: list[Tensor], weights: list[Tensor]) -> None:
    torch._foreach_lerp_(averages, weights, 1 - DECAY)


def _loop(averages: list[Tensor], weights: list[Tensor]) -> None:
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight, 1 - DECAY)
