"""Numbers that a loss over logits must give whatever the case: identities, infinities, extremes,
and calls that nobody chose.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import nlhf_kernels as nk
from nlhf_kernels.testing.case import GARBAGE, lay_out
from nlhf_kernels.testing.check import check_by
from nlhf_kernels.testing.compare import Answers, compare

OPS = ("token_logprobs", "token_kl", "pairwise_pg_loss")
KL = ("reward_to_go", "sequence", "token", "exact")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# what compares with itself, and what is interpreted, has less to show, or no time for it
MANY = {"eager": 25, "cpp": 120, "triton": 120 if torch.cuda.is_available() else 10}


def loss_of(op, logits, ref_logits, tokens, mask=None, **extra):
    """One number in which every output that has a gradient counts."""
    if op == "token_logprobs":
        found = nk.token_logprobs(logits, tokens, mask=mask, **extra)
    elif op == "token_kl":
        found = nk.token_kl(logits, ref_logits, tokens, mask=mask, **extra)
    else:
        mask = torch.ones_like(tokens) if mask is None else mask
        offsets = torch.tensor([0, len(tokens)], device=tokens.device)
        extra |= {"kl": "exact", "ref_logits": ref_logits, "tau": 0.3, "cu_seqlens": offsets}
        one = torch.ones(1, device=tokens.device, dtype=torch.float64)
        found = nk.pairwise_pg_loss(logits, tokens, mask, one, **extra)
    live = [x for x in found if x.requires_grad]
    return found, sum((x * (i + 1.5)).sum() for i, x in enumerate(live))


def rows(target, dtype, shape=(4, 1100)):
    logits, ref_logits = torch.randn(2, *shape, dtype=torch.float64).mul_(3)
    tokens = torch.tensor([0, 5, shape[1] - 1, 7])[: shape[0]]
    return *(x.to(target.device, dtype) for x in (logits, ref_logits)), tokens.to(target.device)


def gradient(op, logits, *arguments, **extra):
    logits = logits.detach().requires_grad_()
    found, total = loss_of(op, logits, *arguments, **extra)
    return found, torch.autograd.grad(total, logits)[0]


# ---- identities


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_the_gradient_sum_to_zero(name, dtype, target):
    """A shift of all logits changes nothing; a soft cap is not a shift."""
    logits, refs, tokens = rows(target, dtype)
    _, grad = gradient(name, logits, refs, tokens, temperature=0.7, backend=target.backend)
    bound = 40 * torch.finfo(dtype).eps * grad.double().abs().sum(-1)
    assert (grad.double().sum(-1).abs() <= bound).all()
    if not target.interpreted:
        settings = {"softcap": 3.0, "backend": target.backend}
        _, grad = gradient(name, logits, refs, tokens, **settings)
        assert (grad.sum(-1).abs() > 1e-3).any()


@pytest.mark.parametrize("name", OPS)
def test_a_shift_of_all_logits_changes_nothing(name, target):
    """Exactly, where the shifted logits are exact; each model has its own."""
    shape = (2, 70) if target.interpreted else (4, 1100)
    logits, refs, tokens = rows(target, torch.float64, shape)
    # in multiples of 2^-10, so that shifts by 512 are exact in float32
    logits, refs = ((x * 1024).round() / 1024 for x in (logits, refs))
    for dtype, atol in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        found = []
        for c, d in ((0, 0), (512, -256)):
            x, y = (logits + c).to(dtype), (refs + d).to(dtype)
            outputs, grad = gradient(name, x, y, tokens, backend=target.backend)
            found.append([*outputs, grad])
        for x, y in zip(*found, strict=True):
            # an ulp of 512 in float32 is 6e-5
            torch.testing.assert_close(x, y, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_is_at_least_0_and_0_for_equal_logits(dtype, target):
    """Also where both are shifted apart, cold, or far from 0."""
    shape = (2, 70) if target.interpreted else (4, 1100)
    logits, refs, tokens = rows(target, dtype, shape)
    near = logits + 1e-2 * torch.randn_like(logits)
    shifts = (0.0,) if target.interpreted else (0.0, 50.0)
    for c in shifts:
        for other in (refs, near):
            kl = nk.token_kl(logits + c, other + c, tokens, backend=target.backend).kl
            assert (kl >= (0 if dtype == torch.float64 else -1e-6)).all()
        same = logits + c
        found, grad = gradient("token_kl", same, same.clone(), tokens, backend=target.backend)
        assert (found.kl.abs() <= 1e-6).all()
        assert torch.equal(found.logprobs, found.ref_logprobs)
        assert grad.isfinite().all()


# ---- infinities


def test_kl_is_infinite_only_where_the_reference_alone_bans(target):
    logits, refs, tokens = rows(target, torch.float32, (4, 70))
    # the reference alone, the policy alone, both, none
    refs[0, 3] = -math.inf
    logits[1, 3] = -math.inf
    logits[2, 3], refs[2, 3] = -math.inf, -math.inf
    found, grad = gradient("token_kl", logits, refs, tokens, backend=target.backend)
    assert found.kl.isinf().tolist() == [True, False, False, False]
    assert found.kl[0] > 0
    assert grad[1:].isfinite().all()
    # the id that cannot be said has no gradient
    assert grad[1:3, 3].tolist() == [0, 0]
    for x in (found.logprobs, found.ref_logprobs, found.entropy):
        assert x.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_rows_under_the_mask_are_zero(name, target):
    """Whatever they hold: NaN, infinities, ids of no vocabulary; with them a whole batch."""
    for masked in ([0, 2], [0, 1, 2, 3]):
        logits, refs, tokens = rows(target, torch.float32, (4, 70))
        mask = torch.ones(4, dtype=torch.bool, device=target.device)
        mask[masked] = False
        for i, x in zip(masked, (math.nan, math.inf, -math.inf, math.nan), strict=False):
            logits[i], refs[i], tokens[i] = x, x, GARBAGE
        found, grad = gradient(name, logits, refs, tokens, mask, backend=target.backend)
        assert grad[masked].abs().max() == 0
        for x in found:
            assert x.isfinite().all()
            if x.shape == tokens.shape:
                assert x[masked].tolist() == [0] * len(masked)
        assert bool(grad.any()) == (len(masked) < 4)


@pytest.mark.parametrize("name", OPS)
def test_no_rows(name, target):
    logits = torch.zeros(0, 70, device=target.device)
    tokens = torch.zeros(0, dtype=torch.int64, device=target.device)
    found, grad = gradient(name, logits, logits.clone(), tokens, backend=target.backend)
    assert grad.shape == logits.shape
    assert not any(x.any() for x in found)


# ---- more than 2^31 of them


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["token_logprobs", "token_kl"])
def test_more_than_2_to_the_31_logits(name, where, tmp_path):
    """As many elements, where ``test_ops`` has as large an offset: the last rows are right."""
    V, N = 2**20, 2**11 + 2
    if where == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU: Triton's interpreter takes hours for 2^31 logits")
        free = torch.cuda.mem_get_info()[0]
        if free < 3 * 2 * V * N:
            pytest.skip(f"three times {2 * V * N >> 30} GiB of GPU memory are not free")
        logits = torch.zeros(N, V, device=where, dtype=torch.bfloat16)
        backend = "triton"
        logits[-1].copy_(torch.randn(V))
        refs = logits
    else:
        # all rows are one in memory
        logits = torch.randn(1, V).bfloat16().expand(N, V)
        refs, backend = logits, "cpp"
    assert logits.numel() > 2**31
    tokens = torch.arange(N, device=where)
    mask = torch.zeros(N, dtype=torch.bool, device=where)
    mask[0], mask[-2:] = True, True
    some = mask.nonzero()[:, 0]
    args = () if name == "token_logprobs" else (refs,)
    extra = {"backend": backend, "mask": mask}
    with torch.no_grad():
        found = getattr(nk, name)(logits, *args, tokens, **extra)
    few = [x[some].double() for x in (logits, *args)]
    want = getattr(nk, name)(*few, tokens[some], backend="eager")
    for field, x, y in zip(found._fields, found, want, strict=True):
        compare(field, x[some], y, torch.float32)
        assert not x[~mask].any()
    if where == "cuda":
        leaf = logits.requires_grad_()
        found = getattr(nk, name)(leaf, *args, tokens, inplace_backward=name == OPS[0], **extra)
        (grad,) = torch.autograd.grad(found.logprobs.sum(), leaf)
        last = few[0][-1:].requires_grad_()
        one = nk.token_logprobs(last, tokens[-1:], backend="eager").logprobs.sum()
        compare("the gradient", grad[-1:], torch.autograd.grad(one, last)[0], torch.bfloat16)
        assert not grad[1:-2:97].any()


# ---- anything


@st.composite
def calls(draw, op: str) -> tuple[tuple, dict]:
    """Shapes, strides, dtypes and parameters; some ids, or rows, that must not count."""
    batch = draw(st.sampled_from([(3,), (2, 2), (1,), (0,), (2, 0)]))
    if op == "pairwise_pg_loss":
        batch = (*batch, 1)[:2] if len(batch) == 1 else batch
    V = draw(st.one_of(st.integers(1, 90), st.sampled_from([1023, 1024, 1025, 2049, 4099])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # float32 saves the log-sum-exp: more of it, or colder, and its last digit shows in a gradient
    scale = draw(st.sampled_from([0.1, 1.0, 2.0]))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(2)]
    settings = {"temperature": draw(st.sampled_from([1.0, 0.7, 1.7]))}
    settings["softcap"] = draw(st.sampled_from([None, 3.0, 30.0]))
    tokens = torch.randint(V, batch, generator=generator)
    two = torch.randn(2, *batch, V, generator=generator, dtype=torch.float64) * scale
    if draw(st.booleans()):
        banned = torch.rand(*batch, V, generator=generator) < 0.2
        banned.scatter_(-1, tokens[..., None], False)
        # by both, so that the KL is finite
        two.masked_fill_(banned, -math.inf)
    mask = torch.rand(batch, generator=generator) < 0.7
    if op != "pairwise_pg_loss" and draw(st.booleans()):
        mask = None
    else:
        two[:, ~mask] = math.nan
        tokens[~mask] = GARBAGE
        settings["mask"] = mask.to(draw(st.sampled_from([torch.bool, torch.int32])))
    layouts = ["dense", "strided", *(["transposed"] if len(batch) == 2 else [])]
    logits, refs = (
        lay_out(x.to(dtype), draw(st.sampled_from(layouts)), "cpu")
        for x, dtype in zip(two, dtypes, strict=True)
    )
    settings["inplace_backward"] = draw(st.booleans())
    if op == "token_logprobs":
        return (logits, tokens), settings
    if op == "token_kl":
        return (logits, refs, tokens), settings
    mask = settings.pop("mask")
    settings |= {"kl": draw(st.sampled_from(KL)), "tau": draw(st.sampled_from([0.0, 0.2]))}
    settings |= {"ref_logits": refs, "baseline": draw(st.sampled_from([0.5, 0.0]))}
    preference = torch.rand(batch[0], generator=generator)
    return (logits, tokens, mask, preference), settings


@pytest.mark.parametrize("name", OPS)
def test_any_call_is_right(name, target):
    @seed(2024)
    @settings(
        max_examples=MANY[target.backend],
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(calls(name))
    def right(call):
        args, kwargs = call
        args = tuple(x.to(target.device) for x in args)
        kwargs = {k: x.to(target.device) if torch.is_tensor(x) else x for k, x in kwargs.items()}
        check_by(Answers((args, kwargs)), name, target.backend)

    right()
