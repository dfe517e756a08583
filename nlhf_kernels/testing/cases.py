"""The cases of every op: the shapes that tests need and why, the shapes that benchmarks use."""

import math

import torch

from nlhf_kernels.testing import sampling
from nlhf_kernels.testing.case import (
    BF16,
    F16,
    F32,
    F64,
    GARBAGE,
    OPS,
    VOCABULARY,
    Case,
    Op,
    lay_out,
    normal,
    random_logits,
    random_tokens,
    with_infinities,
)

# ---- token_logprobs


def _logprobs_inputs(
    generator, device, case, layout="dense", infinities=False, shift=0.0, scale=3.0, **kwargs
):
    *batch, V = case.shape
    logits = random_logits(generator, case.shape, F64, scale).add_(shift)
    if infinities:
        flat = with_infinities(generator, logits.reshape(-1, V))
        logits = flat.view(logits.shape)
    logits = lay_out(logits.to(case.dtype), layout, device)
    return (logits, random_tokens(generator, batch, V).to(device)), kwargs


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
    logits = random_logits(generator, case.shape, F64).add_(shift)
    tokens = random_tokens(generator, (B, T), V)
    # an untrained copy is near the reference: small log-ratios of both signs
    ref_logits = normal(generator, case.shape).mul_(0.5).add_(logits)
    temperature = kwargs.get("temperature", 1.0)
    rows = logits if temperature == 1 else logits / temperature
    logprobs = rows.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ref_logprobs = logprobs + normal(generator, (B, T))
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


OPS |= {
    "mixture_sample": sampling.MIXTURE_SAMPLE,
    "linear_mixture_sample": sampling.LINEAR_MIXTURE_SAMPLE,
    "token_logprobs": Op(_logprobs_inputs, _LOGPROBS_TESTS, _loss_bench(_logprobs)),
    "pairwise_pg_loss": Op(_pg_inputs, _PG_TESTS, _loss_bench(_pg, masked="none")),
}
SAMPLERS = ("mixture_sample", "linear_mixture_sample")


def traffic(case: Case, backward: bool = False) -> tuple[int, int]:
    """(bytes, FLOPs) that a call cannot avoid: every logit moved once, 4 flops per logit and pass.

    An exponential counts as one. What is per token or row is left out: it is a V-th of the rest.
    Where the logits are made first, a call moves the heads and hidden states, and multiplies them.
    """
    size = math.prod(case.shape)
    itemsize = case.dtype.itemsize
    assert not (backward and case.op in SAMPLERS), "sampling has no gradient"
    if case.op == "mixture_sample":
        ref = case.options.get("ref_dtype", F32)
        # both models and, with a reference, three distributions
        return size * (itemsize + (ref.itemsize if ref else 0)), size * (12 if ref else 4)
    if case.op == "linear_mixture_sample":
        B, D, V = case.shape
        heads = 1 if case.options.get("heads") == "shared" else 2
        return (heads * V + 2 * B) * D * itemsize, 2 * 2 * size
    if backward:
        return 2 * size * itemsize, 4 * size
    models = 2 if case.options.get("ref") == "logits" else 1
    return models * size * itemsize, models * 4 * size
