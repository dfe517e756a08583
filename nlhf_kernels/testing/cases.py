"""Per op: seeded inputs, the shapes that tests need and why, the shapes that benchmarks use.

Logits reach the op as they reach it in practice: as views of something bigger, whose rest is NaN.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nlhf_kernels import eager

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


def _normal(generator, shape) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=F64)


def _logits(generator, shape, dtype, scale=3.0) -> Tensor:
    """Random, with rows where the first, the last or no class stands out."""
    x = _normal(generator, shape).mul_(scale)
    rows = x.view(-1, shape[-1])
    rows[1::4, 0] += 4 * scale
    rows[2::4, -1] += 4 * scale
    return x.to(dtype)


def _tokens(generator, batch, V) -> Tensor:
    """Random ids, the first and the last class among them."""
    tokens = torch.randint(V, batch, generator=generator, device=generator.device)
    flat = tokens.view(-1)
    flat[::3], flat[1::4] = V - 1, 0
    return tokens


def _with_infinities(generator, x: Tensor) -> Tensor:
    """-inf in places, in a whole tile of the first row too, never in a whole row."""
    out = torch.rand(x.shape, generator=generator, device=generator.device) < 0.3
    out[0, :1024] = True
    out[:, -1] = False
    return x.masked_fill(out, -math.inf)


# ---- mixture_sample


def _sample_inputs(
    generator,
    device,
    case,
    ref_dtype=F32,
    coef=0.25,
    temperature=0.8,
    layout="dense",
    ref_layout="dense",
    special="",
    rows=False,
    filters=None,
    seed=1234,
    position=3,
    scale=3.0,
    extrapolate=False,
):
    B, V = case.shape
    policy = _logits(generator, (B, V), case.dtype, scale)
    ref = None if ref_dtype is None else _logits(generator, (B, V), ref_dtype, scale).roll(1, 0)
    if special == "far tail":
        policy, seed = _far_tail(V)
        position = 0
    elif special == "infinities":
        policy, ref = (_with_infinities(generator, x) for x in (policy, ref))
    elif special == "ties":
        policy, ref = (x.div(4).round() for x in (policy, ref))
    elif special == "bad rows":
        policy[0, V // 2], policy[1, -1], policy[2] = math.nan, math.inf, -math.inf
        ref[3, 0], ref[4, V // 2], ref[5] = math.nan, math.inf, -math.inf
        # both models are fine, their mixture is empty
        policy[6], ref[6] = -math.inf, -math.inf
        policy[6, 0], ref[6, 1] = 0, 0
    if rows:
        coef = torch.linspace(0, 1, B, dtype=F32)
        temperature = torch.tensor([0, 0.3, 0.7, 1, 1.5], dtype=F32).repeat(B)[:B]
        seed = torch.randint(
            -(2**63), 2**63 - 1, (B,), generator=generator, device=generator.device
        )
        position = torch.arange(B) * 2**30
    tensors = {"mixture_coef": coef, "temperature": temperature, "seed": seed, "position": position}
    tensors |= filters or {}
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()}
    if extrapolate:
        kwargs["extrapolate"] = True
    if ref is None:
        del kwargs["mixture_coef"]
        return (lay_out(policy, layout, device), None), kwargs
    return (lay_out(policy, layout, device), lay_out(ref, ref_layout, device)), kwargs


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


# ---- token_logprobs


def _logprobs_inputs(
    generator, device, case, layout="dense", infinities=False, shift=0.0, scale=3.0, **kwargs
):
    *batch, V = case.shape
    logits = _logits(generator, case.shape, F64, scale).add_(shift)
    if infinities:
        flat = _with_infinities(generator, logits.reshape(-1, V))
        logits = flat.view(logits.shape)
    logits = lay_out(logits.to(case.dtype), layout, device)
    return (logits, _tokens(generator, batch, V).to(device)), kwargs


def _logprobs(why, shape, dtype=F32, **options) -> Case:
    return Case("token_logprobs", why, shape, dtype, options)


_LOGPROBS_TESTS = (
    _logprobs("ordinary: (B, T, V), strided", (2, 3, 1030), layout="strided", temperature=0.7),
    _logprobs("one below a block", (3, 2047)),
    _logprobs("one block", (3, 2048)),
    _logprobs("one above a block", (3, 2049)),
    _logprobs("one above a tile", (3, 1025)),
    _logprobs("length 1", (1, 1, 3)),
    _logprobs("one class", (4, 1)),
    _logprobs("no rows", (0, 7)),
    _logprobs("no tokens", (2, 0, 7)),
    _logprobs("bf16, misaligned", (5, 1029), BF16, layout="strided"),
    _logprobs("f16", (5, 70), F16, layout="strided"),
    _logprobs("f64", (5, 1029), F64, layout="strided", temperature=0.7, softcap=5.0),
    _logprobs("time first", (3, 4, 50), layout="transposed"),
    _logprobs("soft-capped", (5, 70), softcap=3.0, temperature=1.7, scale=6.0),
    _logprobs("bf16, soft-capped as in gemma2", (5, 70), BF16, softcap=30.0, scale=20.0),
    _logprobs("-inf", (4, 1100), infinities=True),
    _logprobs("-inf, soft-capped", (4, 70), infinities=True, softcap=3.0),
    # float32 saves the log-sum-exp, so the gradient is as exact as one ulp of that
    _logprobs("far from 0", (4, 70), shift=50.0),
    _logprobs("f64, very far from 0", (4, 70), F64, shift=-1000.0),
    _logprobs("cold", (4, 70), temperature=0.2),
    _logprobs("in place", (5, 70), inplace_backward=True, softcap=10.0),
    _logprobs("in place, bf16, strided", (2, 3, 50), BF16, layout="strided", inplace_backward=True),
)


def _loss_bench(make, **options) -> dict[str, tuple[Case, ...]]:
    def step(model, B, T, dtype, **more):
        return make(f"{model}, {B} x {T}", (B, T, VOCABULARY[model]), dtype, **options, **more)

    return {
        "cpu": (step("qwen2.5-1.5b", 4, 24, F32), step("smollm2-135m", 8, 64, F32)),
        "cuda": (
            step("qwen2.5-7b", 8, 512, BF16),
            step("smollm2-135m", 16, 128, BF16),
            step("llama3-8b", 8, 512, BF16),
            step("gemma2-9b", 4, 512, BF16, softcap=30.0),
        ),
    }


# ---- pairwise_pg_loss


def _pg_inputs(
    generator,
    device,
    case,
    layout="dense",
    ref="logprobs",
    supplied=False,
    packed=False,
    mask_dtype=torch.bool,
    preference_dtype=F32,
    masked="some",
    tau=0.1,
    shift=0.0,
    **kwargs,
):
    """(B, T, V) padded, or with ``packed`` the same sequences without their padding."""
    B, T, V = case.shape
    lengths = torch.arange(T, T - B, -1).clamp(min=0) if masked == "some" else torch.full((B,), T)
    real = (torch.arange(T) < lengths[:, None]).to(generator.device)
    if masked == "some":
        # a prompt, or a tool's answer, in between
        real[:1, 1:2] = False
    elif masked == "middle":
        real[:, 4:-4] = False
    logits = _logits(generator, case.shape, F64).add_(shift)
    tokens = _tokens(generator, (B, T), V)
    # an untrained copy is near the reference: small log-ratios of both signs
    ref_logits = _normal(generator, case.shape).mul_(0.5).add_(logits)
    temperature = kwargs.get("temperature", 1.0)
    rows = logits if temperature == 1 else logits / temperature
    logprobs = rows.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ref_logprobs = logprobs + _normal(generator, (B, T))
    supplied_logprobs = logprobs + 0.1
    preference = torch.rand(B, generator=generator, device=generator.device, dtype=F64)

    # whatever is under the mask must not be looked at
    logits[~real], ref_logits[~real] = math.nan, math.nan
    ref_logprobs[~real], supplied_logprobs[~real] = math.nan, math.nan
    tokens[~real] = GARBAGE
    tensors = [logits, ref_logits, tokens, real, ref_logprobs, supplied_logprobs]
    if packed:
        # the first sequence keeps its padding, so that packed rows are masked too
        keep = real.clone()
        keep[:1] = True
        tensors = [x[keep] for x in tensors]
        offsets = [0, *keep.sum(1).cumsum(0).tolist()]
        kwargs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device=device)
    logits, ref_logits, tokens, real, ref_logprobs, supplied_logprobs = tensors
    wide = F64 if case.dtype == F64 else F32
    if ref == "logprobs":
        kwargs["ref_logprobs"] = ref_logprobs.to(wide).to(device)
    elif ref == "logits":
        kwargs["ref_logits"] = lay_out(ref_logits.to(case.dtype), layout, device)
    if supplied:
        kwargs["policy_logprobs"] = supplied_logprobs.to(wide).to(device)
    args = (
        lay_out(logits.to(case.dtype), layout, device),
        tokens.to(device),
        real.to(mask_dtype).to(device),
        preference.to(device, preference_dtype),
    )
    return args, {"tau": tau, **kwargs}


def _pg(why, shape, dtype=F32, **options) -> Case:
    return Case("pairwise_pg_loss", why, shape, dtype, options)


_PG_TESTS = (
    _pg("ordinary: padded, garbage under the mask, strided", (3, 5, 50), layout="strided"),
    _pg("one above a tile", (2, 3, 1025), temperature=0.7),
    _pg("one above a block", (1, 2, 2049)),
    _pg("sequence sums", (3, 5, 50), kl="sequence"),
    _pg("token by token", (3, 5, 50), kl="token", baseline=0.0),
    _pg("packed", (3, 5, 50), packed=True),
    _pg("packed, sequence sums, empty ones", (7, 5, 20), packed=True, kl="sequence"),
    _pg("packed, token by token, strided", (3, 5, 50), packed=True, kl="token", layout="strided"),
    _pg("logits of the reference", (3, 5, 50), ref="logits", layout="strided", softcap=5.0),
    _pg("packed, logits of the reference", (3, 5, 50), ref="logits", packed=True),
    _pg("log-probabilities of the rollout", (3, 5, 50), supplied=True),
    _pg("no reference", (3, 5, 50), ref="none", tau=0.0),
    _pg("tau 0 beside a reference", (3, 5, 50), tau=0.0),
    _pg("integer mask, f64 preference", (3, 5, 50), mask_dtype=torch.int32, preference_dtype=F64),
    _pg("length 1", (3, 1, 50), masked="none"),
    _pg("nothing masked", (3, 4, 50), masked="none"),
    _pg("longer than a step of the walk", (1, 1030, 3), masked="middle"),
    _pg("one class", (2, 3, 1)),
    _pg("no sequences", (0, 5, 50)),
    _pg("no tokens", (3, 0, 50)),
    _pg("no sequences, packed", (0, 5, 50), packed=True),
    _pg("bf16, soft-capped", (3, 5, 70), BF16, layout="strided", softcap=5.0, temperature=0.7),
    _pg("f16, logits of the reference", (3, 5, 70), F16, ref="logits"),
    _pg("f64", (3, 5, 70), F64, layout="strided", softcap=5.0, temperature=0.7),
    _pg("f64, time first", (3, 5, 70), F64, layout="transposed", ref="logits"),
    _pg("bf16, packed", (3, 5, 70), BF16, packed=True),
    _pg("in place", (3, 5, 50), inplace_backward=True),
    _pg("in place, bf16, strided", (3, 5, 50), BF16, layout="strided", inplace_backward=True),
    _pg("in place, packed, soft-capped", (3, 5, 50), packed=True, softcap=4.0,
        inplace_backward=True),
)  # fmt: skip


OPS = {
    "mixture_sample": Op(_sample_inputs, _SAMPLE_TESTS, _SAMPLE_BENCH),
    "token_logprobs": Op(_logprobs_inputs, _LOGPROBS_TESTS, _loss_bench(_logprobs)),
    "pairwise_pg_loss": Op(_pg_inputs, _PG_TESTS, _loss_bench(_pg, masked="none")),
}


def traffic(case: Case, backward: bool = False) -> tuple[int, int]:
    """(bytes, FLOPs) that a call cannot avoid: every logit moved once, 4 flops per logit and pass.

    An exponential counts as one. What is per token or row is left out: it is a V-th of the rest.
    """
    size = math.prod(case.shape)
    itemsize = case.dtype.itemsize
    if case.op == "mixture_sample":
        assert not backward, "sampling has no gradient"
        ref = case.options.get("ref_dtype", F32)
        # both models and, with a reference, three distributions
        return size * (itemsize + (ref.itemsize if ref else 0)), size * (12 if ref else 4)
    if backward:
        return 2 * size * itemsize, 4 * size
    models = 2 if case.options.get("ref") == "logits" else 1
    return models * size * itemsize, models * 4 * size
