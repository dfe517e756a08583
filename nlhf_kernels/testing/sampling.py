"""Cases of the samplers: from logits, and from hidden states with their heads."""

import math

import torch
from torch import Tensor

from nlhf_kernels import eager
from nlhf_kernels.testing.case import (
    BF16,
    F16,
    F32,
    F64,
    VOCABULARY,
    Case,
    Op,
    lay_out,
    random_logits,
    with_infinities,
)

# ---- mixture_sample


def _parameters(
    generator,
    device,
    B,
    has_ref,
    coef=0.25,
    temperature=0.8,
    rows=False,
    filters=None,
    seed=1234,
    position=3,
    extrapolate=False,
) -> dict:
    """The keyword arguments that both samplers have."""
    if rows:
        coef = torch.linspace(0, 1, B, dtype=F32)
        temperature = torch.tensor([0, 0.3, 0.7, 1, 1.5], dtype=F32).repeat(-(-B // 5))[:B]
        seed = torch.randint(
            -(2**63), 2**63 - 1, (B,), generator=generator, device=generator.device
        )
        position = torch.arange(B) * 2**30
    tensors = {"mixture_coef": coef, "temperature": temperature, "seed": seed, "position": position}
    tensors |= filters or {}
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()}
    if extrapolate:
        kwargs["extrapolate"] = True
    if not has_ref:
        del kwargs["mixture_coef"]
    return kwargs


def _sample_inputs(
    generator,
    device,
    case,
    ref_dtype=F32,
    layout="dense",
    ref_layout="dense",
    special="",
    scale=3.0,
    **parameters,
):
    B, V = case.shape
    policy = random_logits(generator, (B, V), case.dtype, scale)
    ref = (
        None if ref_dtype is None else random_logits(generator, (B, V), ref_dtype, scale).roll(1, 0)
    )
    if special == "far tail":
        policy, seeds = _far_tail(V)
        parameters |= {"seed": seeds, "position": 0}
    elif special == "infinities":
        policy, ref = (with_infinities(generator, x) for x in (policy, ref))
    elif special == "ties":
        policy, ref = (x.div(4).round() for x in (policy, ref))
    elif special == "bad rows":
        policy[0, V // 2], policy[1, -1], policy[2] = math.nan, math.inf, -math.inf
        ref[3, 0], ref[4, V // 2], ref[5] = math.nan, math.inf, -math.inf
        # both models are fine, their mixture is empty
        policy[6], ref[6] = -math.inf, -math.inf
        policy[6, 0], ref[6, 1] = 0, 0
    kwargs = _parameters(generator, device, B, ref is not None, **parameters)
    policy = lay_out(policy, layout, device)
    return (policy, None if ref is None else lay_out(ref, ref_layout, device)), kwargs


# seeds whose noise has a word far in the tail: (seed, where); the words are 210, 287, 243 and 1063
_TAIL_LANES = ((3068488, 0), (6417572, 3), (8078782, 3))
_TAIL_TILE = 190326


def _far_tail(V: int) -> tuple[Tensor, Tensor]:
    """Logits (8, V) and seeds: a token of probability 1e-7 just wins, or just does not.

    Noise from 24 bits, or with a cap on its upper tail, decides otherwise.
    """
    logits = torch.zeros(8, V)
    seeds = [seed for seed, _ in _TAIL_LANES] + [_TAIL_TILE]
    for row, margin in enumerate([0.02] * 4 + [-0.02] * 4):
        seed = seeds[row % 4]
        logits[row, 1024:] = -40
        if row % 4 < 3:
            lane = _TAIL_LANES[row % 4][1]
            noise = _noise(seed, 0, 2, torch.arange(-(-min(V, 1024) // 4)))[: min(V, 1024)]
            best_other = noise[torch.arange(len(noise)) != lane].max()
            logits[row, lane] = best_other - noise[lane] + margin
        else:
            first, second = _noise(seed, torch.arange(2), 1, 0)[::4]
            logits[row, 1024:] = -math.inf
            logits[row, 1024] = math.log(1024) + first - second + margin
    return logits, torch.tensor(seeds * 2)


def _noise(seed: int, tile, stage: int, block) -> Tensor:
    words = eager.philox((0, tile, stage, block), (seed, 0))
    return eager.gumbel(torch.stack(words, -1).flatten(), F64)


def _sample(why, shape, dtype=F32, **options) -> Case:
    return Case("mixture_sample", why, shape, dtype, options)


_SAMPLE_TESTS = (
    _sample("ordinary: two tiles and a tail, strided", (6, 2050), layout="strided"),
    _sample("one below a tile", (4, 1023)),
    _sample("one tile", (4, 1024)),
    _sample("one above a tile", (4, 1025)),
    _sample("more tiles than a program takes", (2, 5121), F16, ref_dtype=F16),
    _sample("one class, one row", (1, 1)),
    _sample("no rows", (0, 50)),
    _sample("no reference", (5, 70), ref_dtype=None),
    _sample("bf16, strided, misaligned", (3, 1030), BF16, ref_dtype=BF16, layout="strided"),
    _sample("f16 beside f32", (5, 70), F16, ref_layout="strided"),
    _sample("bf16 beside f64", (5, 70), BF16, ref_dtype=F64),
    _sample("f64", (5, 1030), F64, ref_dtype=F64, layout="strided"),
    _sample("one row of the reference for all", (5, 70), ref_layout="shared"),
    _sample("parameters per row", (10, 70), rows=True),
    _sample("parameters per row, f64", (6, 70), F64, rows=True),
    _sample("-inf in the mixture", (4, 1100), special="infinities"),
    _sample("-inf, coefficient 0", (4, 1100), special="infinities", coef=0.0),
    _sample("-inf, coefficient 1", (4, 1100), special="infinities", coef=1.0),
    _sample("bad rows", (9, 40), special="bad rows"),
    _sample("bad temperatures", (5, 40), temperature=torch.tensor([-1, math.nan, math.inf, 1, 0])),
    _sample("bad coefficients", (4, 40), coef=torch.tensor([math.nan, math.inf, 1, 0.5])),
    _sample("temperature 0, ties", (6, 1100), special="ties", temperature=0.0, coef=0.5),
    _sample("the coldest temperature", (4, 70), temperature=1e-30),
    _sample("a hot one", (4, 70), temperature=1e4),
    _sample("extrapolation", (4, 1100), special="infinities", coef=-0.5, extrapolate=True),
    _sample("extrapolation beyond 1", (4, 40), coef=1.5, extrapolate=True),
    _sample("the far tail", (8, 1025), ref_dtype=None, special="far tail", temperature=1.0),
    _sample("a negative seed, a high position", (4, 70), seed=-(2**63), position=2**40 + 2**31),
    _sample("top-k", (6, 1100), filters={"top_k": 3}, special="ties"),
    _sample("top-p", (6, 70), filters={"top_p": 0.7}),
    _sample("min-p", (6, 70), filters={"min_p": 0.05}),
    _sample(
        "all filters, per row",
        (6, 1100),
        rows=True,
        filters={
            "top_k": torch.tensor([0, 1, 5, 50, 2000, 7]),
            "top_p": torch.tensor([0.9, 1.0, 0.5, 0.95, 0.99, 1e-6]),
            "min_p": torch.tensor([0.0, 0.1, 0.0, 0.01, 1.0, 0.5]),
        },
    ),
)


def _decode(model, B, dtype=F32) -> Case:
    why = f"{model}, B={B}" + (", bfloat16" if dtype == BF16 else "")
    return _sample(why, (B, VOCABULARY[model]), dtype, ref_dtype=dtype)


# on a CPU every vocabulary once and every batch size once: a peer that is compiled for a shape
# takes longer to compile than to measure
_SAMPLE_BENCH = {
    "cpu": (
        _decode("qwen2.5-1.5b", 16),
        _decode("qwen2.5-1.5b", 1),
        _decode("qwen2.5-1.5b", 64),
        _decode("qwen2.5-1.5b", 16, BF16),
        _decode("llama2-7b", 16),
        _decode("smollm2-135m", 16),
        _decode("qwen2.5-7b", 16),
        _decode("llama3-8b", 16),
        _decode("gemma2-9b", 16),
        _decode("gemma2-9b", 64),
    ),
    "cuda": tuple(
        _decode(model, B, BF16)
        for B in (64, 1, 512)
        for model in ("qwen2.5-7b", "smollm2-135m", "llama3-8b", "gemma2-9b")
    ),
}

MIXTURE_SAMPLE = Op(_sample_inputs, _SAMPLE_TESTS, _SAMPLE_BENCH)


# ---- linear_mixture_sample

_WIDTH = {
    "smollm2-135m": 576,
    "qwen2.5-1.5b": 1536,
    "qwen2.5-7b": 3584,
    "llama3-8b": 4096,
    "gemma2-9b": 3584,
}


def _linear_inputs(
    generator,
    device,
    case,
    heads="own",
    ref_width=None,
    ref_dtype=None,
    bias="",
    special="",
    layout="dense",
    softcap=None,
    **parameters,
):
    """(B, D, V); ``heads``: "own", "shared", "shared, given twice", or "no reference"."""
    B, D, V = case.shape
    policy = _model(generator, B, D, V, case.dtype, bias)
    ref = _model(generator, B, ref_width or D, V, ref_dtype or case.dtype, bias)
    if special == "bad rows":
        policy[0][0, D // 2], policy[0][1, -1] = math.nan, math.inf
        ref[0][2, 0], ref[0][3, D // 2] = math.nan, -math.inf
    policy, ref = (
        [None if x is None else lay_out(x, layout if x.dim() == 2 else "dense", device) for x in m]
        for m in (policy, ref)
    )
    if heads == "shared":
        ref[1:] = None, None
    elif heads == "shared, given twice":
        ref[1] = policy[1]
    elif heads == "no reference":
        ref = [None, None, None]
    kwargs = _parameters(generator, device, B, ref[0] is not None, **parameters)
    more = {"policy_bias": policy[2], "ref_bias": ref[2], "softcap": softcap}
    kwargs |= {name: x for name, x in more.items() if x is not None}
    return (*policy[:2], *ref[:2]), kwargs


def _model(generator, B, D, V, dtype, bias) -> list:
    """Hidden states, weights and bias: logits of order 3, in two rows the first or the last high"""
    wide = F64 if dtype == F64 else F32
    like = {"generator": generator, "device": generator.device, "dtype": wide}
    hidden = torch.randn(B, D, **like)
    weight = torch.randn(V, D, **like).mul_(3 / math.sqrt(D))
    if B > 2:
        weight[0], weight[-1] = (12 / D * hidden[row] for row in (1, 2))
    added = None
    if bias:
        added = torch.randn(V, **like)
    if bias == "bans":
        added[torch.rand(V, **like) < 0.3] = -math.inf
        added[:1024], added[-1] = -math.inf, 0.5
    return [None if x is None else x.to(dtype) for x in (hidden, weight, added)]


def _linear(why, shape, dtype=F32, **options) -> Case:
    return Case("linear_mixture_sample", why, shape, dtype, options)


_LINEAR_TESTS = (
    _linear("ordinary: own heads, bias, soft cap, strided", (5, 70, 1100), bias="added",
            softcap=10.0, layout="strided"),
    _linear("one head", (5, 70, 1025)),
    _linear("one head for both", (5, 70, 300), heads="shared"),
    _linear("one head for both, biased, bf16", (5, 64, 300), BF16, heads="shared", bias="added"),
    _linear("one head given twice, another bias", (5, 70, 130), heads="shared, given twice",
            bias="added"),
    _linear("no reference", (5, 70, 300), heads="no reference", bias="added"),
    _linear("a wider reference of another dtype", (5, 33, 300), BF16, ref_width=130, ref_dtype=F32),
    _linear("one below a tile", (4, 16, 1023)),
    _linear("one tile", (4, 16, 1024)),
    _linear("one above a block", (4, 65, 129)),
    _linear("one class, one row, one dimension", (1, 1, 1)),
    _linear("no rows", (0, 16, 50)),
    _linear("one above a block of rows", (17, 16, 70)),
    _linear("one above the largest block of rows", (33, 16, 70)),
    _linear("a larger block of rows, bf16", (40, 16, 70), BF16, heads="no reference"),
    _linear("more rows than are fused", (129, 16, 70), BF16, heads="no reference", bias="added"),
    _linear("bf16, strided, misaligned", (3, 80, 300), BF16, layout="strided"),
    _linear("f16", (5, 80, 300), F16),
    _linear("f64", (5, 70, 1025), F64, bias="added", softcap=10.0, layout="strided"),
    _linear("f64, one head", (5, 70, 300), F64, heads="shared"),
    _linear("bf16 beside f64", (5, 70, 300), BF16, ref_dtype=F64),
    _linear("bf16, soft-capped as in gemma2", (4, 64, 300), BF16, heads="shared", softcap=3.0),
    _linear("-inf in the biases", (4, 32, 1100), bias="bans"),
    _linear("-inf, coefficient 0", (4, 32, 1100), bias="bans", coef=0.0),
    _linear("-inf, coefficient 1", (4, 32, 1100), bias="bans", coef=1.0),
    _linear("bad rows", (6, 40, 300), special="bad rows"),
    _linear("temperature 0", (6, 32, 1100), temperature=0.0, coef=0.5),
    _linear("parameters per row", (10, 32, 300), rows=True),
    _linear("extrapolation", (4, 32, 1100), bias="bans", coef=-0.5, extrapolate=True),
    _linear("a negative seed, a high position", (4, 8, 300), seed=-(2**63), position=2**40 + 2**31),
    _linear("top-p", (6, 32, 70), heads="shared", filters={"top_p": 0.7}),
    _linear("all filters, bf16", (6, 32, 1100), BF16, bias="added",
            filters={"top_k": 50, "top_p": 0.9, "min_p": 0.01}),
)  # fmt: skip


def _decode_linear(model, B, dtype=BF16, heads="shared", **options) -> Case:
    why = f"{model}, B={B}, " + ("one head" if heads == "shared" else "two heads")
    shape = (B, _WIDTH[model], VOCABULARY[model])
    return _linear(why, shape, dtype, heads=heads, **options)


_LINEAR_BENCH = {
    "cpu": (
        _decode_linear("qwen2.5-1.5b", 4, F32),
        _decode_linear("smollm2-135m", 1, F32),
        _decode_linear("smollm2-135m", 4, F32),
        _decode_linear("smollm2-135m", 8, F32, heads="own"),
        _decode_linear("smollm2-135m", 64, F32),
    ),
    "cuda": (
        *(
            _decode_linear(model, B)
            for B in (64, 1, 16, 128)
            for model in ("qwen2.5-7b", "smollm2-135m", "llama3-8b")
        ),
        _decode_linear("qwen2.5-7b", 64, heads="own"),
        _decode_linear("gemma2-9b", 64, softcap=30.0),
    ),
}
LINEAR_MIXTURE_SAMPLE = Op(_linear_inputs, _LINEAR_TESTS, _LINEAR_BENCH)
