"""Cases of the ops over logits with gradients: their inputs, and the shapes that tests need."""

import math

import torch

from nlhf_kernels.testing.case import (
    BF16,
    F16,
    F32,
    F64,
    GARBAGE,
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
    generator, device, case, layout="dense", infinities=False, masked=False, shift=0.0, scale=3.0,
    **kwargs,
):  # fmt: skip
    *batch, V = case.shape
    logits = random_logits(generator, case.shape, F64, scale).add_(shifts(shift, V))
    if infinities:
        flat = with_infinities(generator, logits.reshape(-1, V))
        logits = flat.view(logits.shape)
    tokens = random_tokens(generator, batch, V)
    if masked:
        kwargs["mask"] = mask_some(tokens, logits).to(device)
    return (lay_out(logits.to(case.dtype), layout, device), tokens.to(device)), kwargs


def shifts(shift, V):
    """A number for all, or steeply more for later ids and nothing for the first tile."""
    if shift != "rising":
        return shift
    rising = torch.linspace(-60.0, 60.0, V, dtype=F64)
    rising[:1024] = -math.inf
    return rising


def mask_some(tokens, *rows):
    """A mask that leaves out every other row, and whatever is under it."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask.view(-1)[1::2] = False
    tokens[~mask] = GARBAGE
    for x in rows:
        x[~mask] = math.nan
    return mask


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
    _logprobs("masked", (3, 4, 70), masked=True, layout="strided", temperature=0.7),
    _logprobs("everything masked but one", (2, 70), BF16, masked=True),
    # what an anchor from the start of the row does not foresee, or finds nothing to start from
    _logprobs("rising", (3, 4200), layout="dense", scale=1.0, shift="rising"),
    _logprobs("in place, masked", (3, 4, 70), masked=True, inplace_backward=True),
    _logprobs("in place", (5, 70), inplace_backward=True, softcap=10.0),
    _logprobs("in place, bf16, strided", (2, 3, 50), BF16, layout="strided", inplace_backward=True),
)


# ---- token_kl


def _kl_inputs(
    generator, device, case, ref_dtype=None, near=0.5, masked=False, infinities=False, shift=0.0,
    layout="dense", **kwargs,
):  # fmt: skip
    """``near``: how far the reference's logits are from the policy's; 0: they are the same."""
    *batch, V = case.shape
    logits = random_logits(generator, case.shape, F64).add_(shifts(shift, V))
    if infinities:
        logits = with_infinities(generator, logits.reshape(-1, V)).view(logits.shape)
    ref_logits = normal(generator, case.shape).mul_(near).add_(logits)
    if infinities:
        # a token that both ban counts 0, and one that the policy alone bans too
        ref_logits = ref_logits.where(normal(generator, case.shape) > -1, logits)
        ref_logits.view(-1, V)[:, 3] = 1.0
    tokens = random_tokens(generator, batch, V)
    if masked:
        kwargs["mask"] = mask_some(tokens, logits, ref_logits).to(device)
    ref_dtype = ref_dtype or case.dtype
    args = (
        lay_out(logits.to(case.dtype), layout, device),
        lay_out(ref_logits.to(ref_dtype), layout, device),
        tokens.to(device),
    )
    return args, kwargs


def _kl(why, shape, dtype=F32, **options) -> Case:
    return Case("token_kl", why, shape, dtype, options)


_KL_TESTS = (
    _kl("ordinary: (B, T, V), strided", (2, 3, 1030), layout="strided", temperature=0.7),
    _kl("one below a block", (3, 2047)),
    _kl("one above a block", (3, 2049)),
    _kl("one above a tile", (3, 1025)),
    _kl("one class", (4, 1)),
    _kl("no rows", (0, 7)),
    _kl("no tokens", (2, 0, 7)),
    _kl("far from the reference", (3, 70), near=10.0),
    _kl("the reference itself", (3, 1100), near=0.0, shift=50.0),
    _kl("bf16, strided", (5, 1029), BF16, layout="strided"),
    _kl("f16", (5, 70), F16),
    _kl("f64", (5, 1029), F64, layout="strided", temperature=0.7, softcap=5.0),
    _kl("bf16 beside f32", (5, 70), BF16, ref_dtype=F32),
    _kl("f32 beside f16", (5, 70), F32, ref_dtype=F16),
    _kl("f32 beside f64", (5, 70), F32, ref_dtype=F64),
    _kl("time first", (3, 4, 50), layout="transposed"),
    _kl("soft-capped", (5, 70), softcap=3.0, temperature=1.7),
    _kl("-inf", (4, 1100), infinities=True),
    _kl("-inf, bf16, soft-capped", (4, 70), BF16, infinities=True, softcap=10.0),
    _kl("rising", (3, 4200), shift="rising"),
    _kl("masked", (3, 4, 70), masked=True, layout="strided"),
    _kl("in place", (5, 70), inplace_backward=True, softcap=10.0),
    _kl("in place, bf16, strided", (2, 3, 50), BF16, layout="strided", inplace_backward=True),
)  # fmt: skip


# ---- what follows is of losses


def loss_bench(make, **options) -> dict[str, tuple[Case, ...]]:
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


def pg_inputs(
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
    ref_dtype=None,
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
    elif ref == "two":
        other = ref_logprobs - 0.3
        kwargs["ref_logprobs"] = tuple(x.to(wide).to(device) for x in (ref_logprobs, other))
    elif ref == "logits":
        dtype = ref_dtype or case.dtype
        kwargs["ref_logits"] = lay_out(ref_logits.to(dtype), layout, device)
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
    _pg("two anchors", (3, 5, 50), ref="two", tau=(0.1, 0.3)),
    _pg("two anchors, one left out, packed", (3, 5, 50), BF16, ref="two", tau=(0.0, 0.3),
        packed=True, supplied=True),
    _pg("exact", (3, 5, 50), ref="logits", kl="exact", layout="strided"),
    _pg("exact, packed, soft-capped", (3, 5, 50), ref="logits", kl="exact", packed=True,
        softcap=5.0, temperature=0.7),
    _pg("exact, bf16, in place", (3, 5, 1029), BF16, ref="logits", kl="exact",
        inplace_backward=True),
    _pg("exact, f64 reference", (3, 5, 50), ref="logits", kl="exact", ref_dtype=F64),
    _pg("f64 beside f16", (3, 5, 50), F64, ref="logits", ref_dtype=F16),
    _pg("exact, tau 0", (3, 5, 50), ref="logits", kl="exact", tau=0.0),
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

TOKEN_LOGPROBS = Op(_logprobs_inputs, _LOGPROBS_TESTS, loss_bench(_logprobs))
TOKEN_KL = Op(_kl_inputs, _KL_TESTS, loss_bench(_kl))
PAIRWISE_PG_LOSS = Op(pg_inputs, _PG_TESTS, loss_bench(_pg, masked="none"))
