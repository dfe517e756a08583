"""Cases of the ops that start from hidden states and end in losses: few columns, many tokens."""

import math

import torch

from nlhf_kernels.testing.case import BF16, F16, F32, F64, VOCABULARY, Case, Op, normal
from nlhf_kernels.testing.losses import mask_some, pg_inputs, random_tokens

# hidden size of the models whose vocabulary is in ``VOCABULARY``
WIDTH = {"smollm2-135m": 576, "qwen2.5-1.5b": 1536, "qwen2.5-7b": 3584, "llama3-8b": 4096}
# a budget of one byte: as few tokens in a chunk as there may be
SMALL = {"memory_budget": 1}
# sums over a hundred tokens: an error in the last digit of each log-probability grows with them
LONG = {**SMALL, "tau": 0.02}


def _rows(generator, shape, dtype, layout, device):
    """Hidden states; strided: one more step and three more columns around them, all NaN."""
    x = normal(generator, shape).to(dtype)
    if layout == "dense":
        return x.to(device)
    *batch, T, D = shape
    base = torch.full((*batch, T + 1, D + 3), math.nan, dtype=dtype, device=device)
    view = base[..., :-1, :D]
    view.copy_(x)
    return view


def _head(generator, V, D, dtype, device, bias, banned):
    """Logits of about 1; weights that are rows of something wider."""
    weight = normal(generator, (V, D + 2)).mul_(D**-0.5).to(dtype).to(device)[:, :D]
    if not bias:
        return weight, None
    x = normal(generator, (V,)).to(dtype)
    if banned:
        x[::3] = -math.inf
    return weight, x.to(device)


def _tokens(generator, batch, V, banned):
    tokens = random_tokens(generator, batch, V)
    # a token that was sampled is not one that is banned
    return torch.where(tokens % 3 == 0, (tokens + 1) % V, tokens) if banned else tokens


def _linear_inputs(
    generator, device, case, layout="dense", bias=False, banned=False, masked=False, ref="none",
    ref_dtype=None, **kwargs,
):  # fmt: skip
    """(N, D, V) or (B, T, D, V); a reference for the KL: its own head, or the policy's."""
    *batch, D, V = case.shape
    hidden = _rows(generator, (*batch, D), case.dtype, layout, device)
    weight, offset = _head(generator, V, D, case.dtype, device, bias, banned)
    tokens = _tokens(generator, tuple(batch), V, banned)
    refs = ()
    if ref != "none":
        width = D if ref == "shared" else D + 5
        dtype = ref_dtype or case.dtype
        refs = (_rows(generator, (*batch, width), dtype, layout, device), None)
        if ref == "own":
            ref_weight, ref_bias = _head(generator, V, width, dtype, device, bias, False)
            refs = (refs[0], ref_weight)
            kwargs |= {} if ref_bias is None else {"ref_bias": ref_bias}
    if masked:
        rows = [x for x in (hidden, *refs[:1]) if x is not None]
        kwargs["mask"] = mask_some(tokens, *rows).to(device)
    if offset is not None:
        kwargs["bias"] = offset
    return (hidden, weight, *refs, tokens.to(device)), kwargs


def _logprobs(why, shape, dtype=F32, **options) -> Case:
    return Case("linear_token_logprobs", why, shape, dtype, options)


def _kl(why, shape, dtype=F32, ref="own", **options) -> Case:
    return Case("linear_token_kl", why, shape, dtype, {"ref": ref, **options})


def _common(make) -> tuple[Case, ...]:
    """What both per-token ops owe."""
    return (
        make("ordinary: (B, T, D), strided", (2, 3, 7, 1030), layout="strided", temperature=0.7),
        make("three chunks", (300, 5, 70), **SMALL),
        make("one token above a chunk", (129, 5, 70), bias=True, logit_scale=0.5, **SMALL),
        make("masked, two chunks", (5, 60, 6, 40), masked=True, layout="strided", **SMALL),
        make("bias, scale, soft cap", (5, 8, 70), bias=True, logit_scale=0.5, softcap=4.0),
        make("bias, scale, soft cap, bf16", (5, 8, 70), BF16, bias=True, logit_scale=0.25,
             softcap=30.0),
        make("banned by a bias of -inf", (5, 8, 70), bias=True, banned=True),
        make("one column", (5, 1, 70)),
        make("no rows", (0, 5, 7)),
        make("bf16, more than a piece of the head", (9, 8, 4200), BF16),
        make("f16", (5, 8, 70), F16),
        make("f64", (5, 8, 70), F64, bias=True, softcap=5.0, temperature=0.7),
    )  # fmt: skip


_LOGPROBS_TESTS = _common(_logprobs)
_KL_TESTS = (
    *_common(_kl),
    _kl("one head for both", (5, 8, 70), ref="shared", bias=True),
    _kl("bf16 beside f32", (5, 8, 70), BF16, ref_dtype=F32, bias=True),
    _kl("f32 beside f64", (5, 8, 70), ref_dtype=F64),
    _kl("one head, bf16, two chunks", (200, 8, 70), BF16, ref="shared", **SMALL),
)


# ---- linear_pairwise_pg_loss


def _pg_inputs(
    generator, device, case, layout="dense", bias=False, ref="logprobs", ref_dtype=None, **options
):
    """(B, T, D, V): ``pairwise_pg_loss``'s inputs, with hidden states for the logits."""
    *batch, D, V = case.shape
    if ref == "logits":
        ref = "own"
    scaling = {name: options.pop(name) for name in ("logit_scale", "memory_budget", "softcap")
               if name in options}  # fmt: skip
    like = Case("pairwise_pg_loss", case.why, (*batch, V), case.dtype)
    from_logits = ref if ref in ("logprobs", "two", "none") else "none"
    (logits, tokens, mask, preference), kwargs = pg_inputs(
        generator, device, like, ref=from_logits, **options
    )
    rows = (*logits.shape[:-1], D)
    hidden = _rows(generator, rows, case.dtype, layout, device)
    hidden[mask == 0] = math.nan
    weight, offset = _head(generator, V, D, case.dtype, device, bias, False)
    if offset is not None:
        kwargs["bias"] = offset
    if ref in ("own", "shared"):
        width = D if ref == "shared" else D + 5
        dtype = ref_dtype or case.dtype
        kwargs["ref_hidden"] = _rows(generator, (*rows[:-1], width), dtype, layout, device)
        kwargs["ref_hidden"][mask == 0] = math.nan
        if ref == "own":
            ref_weight, ref_bias = _head(generator, V, width, dtype, device, bias, False)
            kwargs |= {"ref_weight": ref_weight} | (
                {} if ref_bias is None else {"ref_bias": ref_bias}
            )
    return (hidden, weight, tokens, mask, preference), kwargs | scaling


def _pg(why, shape, dtype=F32, **options) -> Case:
    return Case("linear_pairwise_pg_loss", why, shape, dtype, options)


_PG_TESTS = (
    _pg("ordinary: padded, garbage under the mask, strided", (3, 5, 7, 50), layout="strided"),
    _pg("three chunks, sequences across them", (3, 100, 5, 40), **LONG),
    _pg("three chunks, packed", (3, 100, 5, 40), packed=True, layout="strided", **LONG),
    _pg("two chunks, sequence sums, a pass more", (2, 80, 5, 40), kl="sequence", **LONG),
    _pg("two chunks, sequence sums, supplied", (2, 80, 5, 40), kl="sequence", supplied=True,
        **LONG),
    _pg("two chunks, sequence sums, packed, head of the reference", (2, 80, 5, 40),
        kl="sequence", packed=True, ref="own", **LONG),
    _pg("two chunks, token by token", (2, 80, 5, 40), kl="token", baseline=0.0, **LONG),
    _pg("two chunks, exact", (2, 80, 5, 40), kl="exact", ref="own", bias=True, logit_scale=0.5,
        **LONG),
    _pg("exact, packed, soft-capped", (3, 5, 7, 50), kl="exact", ref="own", packed=True,
        softcap=5.0, temperature=0.7, bias=True, logit_scale=0.5),
    _pg("exact, one head", (3, 5, 7, 50), kl="exact", ref="shared", bias=True),
    _pg("two chunks, two anchors", (2, 80, 5, 40), ref="two", tau=(0.02, 0.05), **SMALL),
    _pg("head of the reference", (3, 5, 7, 50), ref="own", bias=True, softcap=4.0),
    _pg("one head for both", (3, 5, 7, 50), ref="shared"),
    _pg("supplied", (3, 5, 7, 50), supplied=True),
    _pg("sequence sums, supplied, head of the reference", (3, 5, 7, 50), kl="sequence",
        supplied=True, ref="own"),
    _pg("sequence sums, two anchors", (3, 5, 7, 50), kl="sequence", ref="two", tau=(0.1, 0.3)),
    _pg("two anchors of no strength", (3, 5, 7, 50), ref="two", tau=(0.0, 0.0)),
    _pg("exact, f64 reference", (3, 5, 7, 50), kl="exact", ref="own", ref_dtype=F64),
    _pg("f64 beside bf16", (3, 5, 7, 50), F64, ref="own", ref_dtype=BF16),
    _pg("bf16 beside f32, packed", (3, 5, 8, 50), BF16, kl="exact", ref="own", ref_dtype=F32,
        packed=True),
    _pg("no reference", (3, 5, 7, 50), ref="none", tau=0.0),
    _pg("one token each", (3, 1, 7, 50), masked="none"),
    _pg("no sequences", (0, 5, 7, 50)),
    _pg("no tokens", (3, 0, 7, 50)),
    _pg("no sequences, packed", (0, 5, 7, 50), packed=True),
    _pg("bf16, bias, scale, soft cap", (3, 5, 8, 70), BF16, bias=True, logit_scale=0.25,
        softcap=5.0, temperature=0.7),
    _pg("bf16, two chunks", (2, 80, 8, 40), BF16, **LONG),
    _pg("f16, exact", (3, 5, 8, 70), F16, kl="exact", ref="own"),
    _pg("f64", (3, 5, 7, 70), F64, layout="strided", softcap=5.0, temperature=0.7),
)  # fmt: skip


def step(make, model: str, B: int, T: int, dtype: torch.dtype, **options) -> Case:
    """So many tokens at the head of a real model."""
    shape = (B, T, WIDTH[model], VOCABULARY[model])
    return make(f"{model}, N={B * T:,}", shape, dtype, **options)


def _bench(make, on_cpu=(), **options) -> dict[str, tuple[Case, ...]]:
    def step_of(*setting):
        return step(make, *setting, **options)

    return {
        "cpu": tuple(step_of(*x, F32) for x in (("smollm2-135m", 8, 64), *on_cpu)),
        "cuda": (
            step_of("qwen2.5-7b", 16, 512, BF16),
            step_of("llama3-8b", 16, 512, BF16),
            step_of("qwen2.5-1.5b", 16, 512, BF16),
        ),
    }


_MORE = (("qwen2.5-1.5b", 4, 24),)
LINEAR_TOKEN_LOGPROBS = Op(_linear_inputs, _LOGPROBS_TESTS, _bench(_logprobs, _MORE))
LINEAR_TOKEN_KL = Op(_linear_inputs, _KL_TESTS, _bench(_kl))
LINEAR_PAIRWISE_PG_LOSS = Op(_pg_inputs, _PG_TESTS, _bench(_pg, masked="none"))
