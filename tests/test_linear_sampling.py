"""What ``linear_mixture_sample`` owes beyond single calls: it is ``mixture_sample`` of its logits,
on either side of its limit, and reads a shared head once.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nlhf_kernels as nk
from nlhf_kernels import registry
from nlhf_kernels.ops import linear_mixture_sample as contract
from nlhf_kernels.testing.compare import compare
from nlhf_kernels.testing.draw import linear_draw
from tests.sampling import rows, seeds_for, surprise
from tests.test_ops import Recorder

INF = math.inf
FIELDS = ("policy_logprobs", "ref_logprobs", "sampling_logprobs")


def models(B, D, V, device, dtype=torch.float32):
    """Hidden states of two models, and their heads."""
    hidden = [torch.randn(B, D, device=device).to(dtype) for _ in range(2)]
    weight = [torch.randn(V, D, device=device).mul(3 / math.sqrt(D)).to(dtype) for _ in range(2)]
    return hidden[0], weight[0], hidden[1], weight[1]


def ran(function) -> tuple:
    """(what a call returns, the raw ops that it ran)."""
    with Recorder() as recorder:
        result = function()
    return result, [f.name().removeprefix("nlhf::") for f, _ in recorder.calls]


def fused(backend: str) -> str:
    """The raw op of a call that fits the kernel, if the backend has one."""
    op = "linear_mixture_sample_fwd"
    return op if registry.has(op, backend) else "mixture_sample_fwd"


def same_draw(got, want) -> None:
    """The tokens of two ways are the same, their logits up to rounding."""
    assert torch.equal(got.tokens, want.tokens)
    for name in FIELDS:
        compare(name, getattr(got, name), getattr(want, name), torch.float32)


def test_agrees_with_mixture_sample_token_for_token(compiled):
    B = rows(compiled, 128, 40)
    policy_hidden, policy_weight, ref_hidden, ref_weight = models(B, 48, 1100, compiled.device)
    settings = {"mixture_coef": 0.3, "temperature": 0.9, "position": 11}
    settings["seed"] = seeds_for(B, compiled.device)
    heads = (policy_hidden, policy_weight, ref_hidden, ref_weight)
    got = nk.linear_mixture_sample(*heads, **settings, backend=compiled.backend)
    pairs = ((policy_hidden, policy_weight), (ref_hidden, ref_weight))
    logits = [(hidden.double() @ weight.double().T).float() for hidden, weight in pairs]
    want = nk.mixture_sample(*logits, **settings, backend="eager")
    linear_draw(*heads, **settings).require_winners(got.tokens)
    same_draw(got, want)


def test_distribution_is_exact(target):
    """Eleven tokens in three tiles, the others banned by the biases."""
    B, D, V, steps = rows(target, 120, 64), 8, 2060, rows(target, 8, 1)
    ids = torch.tensor([0, 1, 5, 700, 1023, 1024, 1025, 2000, 2047, 2048, 2059])
    generator = torch.Generator().manual_seed(3)
    heads, logits = [], []
    for _ in range(2):
        hidden, weight = (torch.randn(n, D, generator=generator) / 2 for n in (1, V))
        bias = torch.full((V,), -INF)
        bias[ids] = torch.randn(len(ids), generator=generator) / 2
        heads.append([x.to(target.device) for x in (hidden.expand(B, D), weight, bias)])
        logits.append(3 * torch.tanh((hidden @ weight.T + bias)[0].double() / 3))
        # a soft cap makes of -inf a logit like others
        logits[-1][bias == -INF] = -3
    probs = (0.75 * logits[0] + 0.25 * logits[1]).div(0.8).softmax(-1).cpu()
    tokens = [
        nk.linear_mixture_sample(
            *heads[0][:2], *heads[1][:2], policy_bias=heads[0][2], ref_bias=heads[1][2],
            softcap=3.0, mixture_coef=0.25, temperature=0.8, seed=7, position=position,
            backend=target.backend,
        ).tokens
        for position in range(steps)
    ]  # fmt: skip
    counts = torch.cat(tokens).cpu().bincount(minlength=V)
    few = torch.ones(V, dtype=torch.bool)
    few[ids] = False
    # the banned are one token more
    counts, probs = (torch.cat([x[ids], x[few].sum()[None]]) for x in (counts, probs))
    assert surprise(counts, probs) < 5


def test_banned_tokens_are_never_drawn(target):
    """Without a soft cap a bias of -inf in either model is final."""
    hidden, weight, ref_hidden, ref_weight = models(60, 8, 1040, target.device)
    biases = torch.zeros(2, 1040, device=target.device)
    biases[0, :1030], biases[1, 1035:] = -INF, -INF
    biases = {"policy_bias": biases[0], "ref_bias": biases[1]}
    settings = {"mixture_coef": 0.5, "seed": 3, "position": 0, "backend": target.backend}
    got = nk.linear_mixture_sample(hidden, weight, ref_hidden, ref_weight, **biases, **settings)
    assert set(got.tokens.tolist()) == set(range(1030, 1035))


def test_logits_are_not_rounded_to_the_dtype_of_the_inputs(target, monkeypatch):
    """16 and 16 + 2^-9 are one number in bfloat16, and the first of a tie is another token."""
    hidden = torch.tensor([[1, 2**-9]], device=target.device).bfloat16()
    weight = torch.tensor([[16, 0], [16, 1]], device=target.device).bfloat16()
    settings = {"temperature": 0.0, "seed": 0, "position": 0, "backend": target.backend}
    for limit in (128, 0):
        monkeypatch.setitem(contract.FUSED_ROWS, target.device, limit)
        assert nk.linear_mixture_sample(hidden, weight, **settings).tokens.tolist() == [1]
        # nor by autocast
        with torch.autocast(target.device, torch.bfloat16):
            wide = nk.linear_mixture_sample(hidden.float(), weight.float(), **settings)
        assert wide.tokens.tolist() == [1]


def test_a_gpu_multiplies_16_bits_into_float32():
    """Without one: what it would be asked for, by shapes and dtypes alone."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="cuda") for n in (200, 70))
        logits = contract._product(hidden, weight, torch.float32)
    assert (logits.dtype, logits.shape) == (torch.float32, (200, 70))


def test_a_draw_does_not_depend_on_the_batch(target):
    device = target.device
    hidden, weight, ref_hidden, _ = models(18, 40, 1100, device)
    seed, position = seeds_for(18, device), torch.arange(18, device=device)
    coef = torch.linspace(0, 1, 18, device=device)

    def draw(of):
        return nk.linear_mixture_sample(
            hidden[of], weight, ref_hidden[of], mixture_coef=coef[of], temperature=0.9,
            seed=seed[of], position=position[of], backend=target.backend,
        )  # fmt: skip

    together = draw(torch.arange(18))
    for some in ([4], [17, 0, 3], [5, 5, 1, 2]):
        same_draw(draw(some), type(together)(*(x[some] for x in together)))


# ---- which way a call goes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_sides_of_the_limit_draw_the_same(dtype, compiled, monkeypatch):
    heads = models(6, 40, 1100, compiled.device, dtype)
    settings = {"mixture_coef": 0.3, "seed": 5, "position": 2, "softcap": 8.0}
    draws = []
    for limit, raw_op in ((6, fused(compiled.backend)), (5, "mixture_sample_fwd")):
        monkeypatch.setitem(contract.FUSED_ROWS, compiled.device, limit)
        result, ops = ran(
            lambda: nk.linear_mixture_sample(*heads, **settings, backend=compiled.backend)
        )
        assert ops == [raw_op]
        draws.append(result)
    same_draw(*draws)


@pytest.mark.parametrize("special", [{"top_k": 3}, {"min_p": 0.1}, "float64"], ids=str)
def test_what_a_kernel_has_not_got_goes_through_logits(special, compiled):
    dtype = torch.float64 if special == "float64" else torch.float32
    filters = {} if special == "float64" else special
    heads = models(3, 16, 50, compiled.device, dtype)
    settings = {"mixture_coef": 0.3, "seed": 5, "position": 2, "backend": compiled.backend}
    result, ops = ran(lambda: nk.linear_mixture_sample(*heads, **settings, **filters))
    assert ops == ["mixture_sample_fwd"]
    logits = [hidden @ weight.T for hidden, weight in (heads[:2], heads[2:])]
    want = nk.mixture_sample(*logits, **settings, **filters)
    assert torch.equal(result.tokens, want.tokens)


def test_one_head_is_one_however_it_is_given(plant):
    """The kernel is told so by the head that it is not given."""
    given = []

    def kernel(policy_hidden, policy_weight, policy_bias, ref_hidden, *arguments):
        given.append(arguments[:2])
        B = policy_hidden.shape[0]
        return torch.zeros(B, dtype=torch.int64), *(torch.zeros(B) for _ in range(4))

    backend = plant({f"{contract.OP}_fwd": kernel, "mixture_sample_fwd": kernel})
    hidden, weight, ref_hidden, other = models(3, 8, 20, "cpu")
    bias, ref_bias = torch.randn(2, 20)
    settings = {"mixture_coef": 0.5, "seed": 0, "position": 0, "backend": backend}

    def call(ref_weight, **biases):
        nk.linear_mixture_sample(hidden, weight, ref_hidden, ref_weight, **biases, **settings)
        return given.pop()

    for head in (None, weight, weight.view(20, 8), torch.nn.Parameter(weight)):
        assert call(head) == (None, None)
    found = call(None, policy_bias=bias)
    assert found[0] is None
    assert torch.equal(found[1], bias)
    # the same head with another bias, and another head in the same values
    assert torch.equal(call(weight, policy_bias=bias, ref_bias=ref_bias)[1], ref_bias)
    for head in (other, weight.clone(), torch.as_strided(weight, (20, 8), (7, 1))):
        assert torch.equal(call(head)[0], head)


def test_a_float64_head_is_not_shared_with_one_that_is_not(target):
    """Dtypes may differ, and the wider decides."""
    hidden, weight, ref_hidden, ref_weight = models(4, 16, 50, target.device)
    got = nk.linear_mixture_sample(
        hidden, weight, ref_hidden.double(), ref_weight.double(), mixture_coef=0.3, seed=1,
        position=0, backend=target.backend,
    )  # fmt: skip
    assert got.policy_logprobs.dtype == torch.float64
    want = (hidden.double() @ weight.double().T).log_softmax(-1)[range(4), got.tokens]
    compare("policy_logprobs", got.policy_logprobs, want, torch.float64)


def test_it_has_no_gradient(target):
    hidden, weight, ref_hidden, _ = (x.requires_grad_() for x in models(3, 8, 20, target.device))
    bias = torch.zeros(20, device=target.device, requires_grad=True)
    got = nk.linear_mixture_sample(
        hidden, weight, ref_hidden, policy_bias=bias, mixture_coef=0.5, seed=0, position=0,
        backend=target.backend,
    )  # fmt: skip
    assert not any(x.requires_grad for x in got)


def test_check_names_the_bad_row(target):
    hidden, weight, ref_hidden, _ = models(5, 8, 20, target.device)
    ref_hidden[3, 2] = math.nan
    settings = {"mixture_coef": 0.5, "seed": 0, "position": 0, "backend": target.backend}
    got = nk.linear_mixture_sample(hidden, weight, ref_hidden, **settings)
    assert (got.tokens == -1).tolist() == [False, False, False, True, False]
    with pytest.raises(ValueError, match=r"linear_mixture_sample: row 3 \(1 in all\)"):
        nk.linear_mixture_sample(hidden, weight, ref_hidden, **settings, check=True)
    settings["position"] = torch.tensor([0, 1, -1, 0, 0], device=target.device)
    with pytest.raises(ValueError, match=r"linear_mixture_sample: position must be .* in row 2"):
        nk.linear_mixture_sample(hidden, weight, ref_hidden, **settings, check=True)


@pytest.mark.parametrize("special", [{}, {"top_k": 4}], ids=str)
def test_compiles_as_one_graph_through_logits(special, target, monkeypatch):
    """In pieces of the vocabulary, where the weights are of another dtype."""
    torch._dynamo.reset()
    monkeypatch.setitem(contract.FUSED_ROWS, target.device, 0)
    heads = models(4, 8, 600, target.device, torch.bfloat16)
    function = torch.compile(nk.linear_mixture_sample, fullgraph=True, backend="aot_eager")
    settings = {"mixture_coef": 0.5, "seed": 0, "position": 0, "backend": target.backend}
    got, want = (f(*heads, **settings, **special) for f in (function, nk.linear_mixture_sample))
    same_draw(got, want)
