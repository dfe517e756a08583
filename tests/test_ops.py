"""THE harness: what every op owes on every backend. ``nlhf_kernels.testing.check`` says what is
correct; this file adds what a single call cannot show. What is special to sampling, and wrong
input, have files of their own.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import nlhf_kernels as nk
from nlhf_kernels import eager, registry
from nlhf_kernels.testing import OPS, TOLERANCE, check
from nlhf_kernels.testing.case import copied
from nlhf_kernels.testing.cases import SAMPLERS
from nlhf_kernels.testing.compare import compare, grad_outputs
from nlhf_kernels.testing.gradients import leaves, named
from tests.conftest import far_apart, targets
from tests.wrong_losses import RAW

DIFFERENTIABLE = tuple(op for op in registry.OPS if op not in SAMPLERS)
# with a backward that may write over the logits
INPLACE = tuple(op for op in DIFFERENTIABLE if not op.startswith("linear_"))
# op -> the raw ops that its first case, and one in place if there is one, go through
THROUGH = {
    "token_logprobs": {"token_logprobs_fwd", "token_logprobs_bwd", "token_logprobs_bwd_"},
    "token_kl": {"token_kl_fwd", "token_kl_bwd", "token_kl_bwd_"},
    "pairwise_pg_loss": {
        "token_logprobs_fwd", "pairwise_pg_coef_fwd", "token_logprobs_bwd", "token_logprobs_bwd_"
    },
    "linear_token_logprobs": {"linear_token_logprobs_fwd", "linear_token_logprobs_bwd"},
    "linear_token_kl": {"linear_token_kl_fwd", "linear_token_kl_bwd"},
    "linear_pairwise_pg_loss": {"linear_pairwise_pg_loss_fwd"},
}  # fmt: skip


def test_matches_the_oracle(case, target):
    if why := registry.reason(case.op, target.backend, target.device, case.features):
        args, kwargs = case.inputs(device=target.device)
        with pytest.raises(ValueError, match=case.op) as error:
            getattr(nk, case.op)(*args, **kwargs, backend=target.backend)
        assert why in str(error.value)
        return
    check(case, target.backend, device=target.device)


# ---- running an op, forward and backward


def run(op: str, args: tuple, kwargs: dict, backend: str, function=None) -> list[Tensor]:
    """The outputs and, where there are any, the gradients."""
    function = function or getattr(nk, op)
    if op not in DIFFERENTIABLE:
        return list(function(*args, **kwargs, backend=backend))
    arguments = named(op, args, kwargs)
    own = {name: x.detach().requires_grad_() for name, x in leaves(op, arguments).items()}
    outputs = list(function(**arguments | own, backend=backend))
    live = [x for x in outputs if x.requires_grad]
    if live:
        grads = [g.to(x.device, x.dtype) for g, x in zip(grad_outputs(live), live, strict=True)]
        outputs += torch.autograd.grad(live, list(own.values()), grads)
    return outputs


def identical(xs: list[Tensor], ys: list[Tensor]) -> bool:
    def bits(x):
        return x.detach().contiguous().view(torch.uint8)

    pairs = list(zip(xs, ys, strict=True))
    return all(x.dtype == y.dtype and x.shape == y.shape for x, y in pairs) and all(
        torch.equal(bits(x.reshape(-1)), bits(y.reshape(-1))) for x, y in pairs
    )


class Recorder(TorchDispatchMode):
    """Notes the raw ops that run, with their arguments as they were before."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "nlhf":
            self.calls.append((function, tree_map(copied, args)))
        return function(*args, **(kwargs or {}))


# ---- raw ops


def raw_calls(op: str, target) -> list[tuple]:
    if op in SAMPLERS:
        wanted = ("no reference", "parameters per row")
        cases = [case for case in OPS[op].tests if case.why in wanted]
    else:
        cases = [OPS[op].tests[0], *(c for c in OPS[op].tests if c.why == "in place")]
    with Recorder() as recorder:
        for case in cases:
            run(op, *case.inputs(device=target.device), target.backend)
    return recorder.calls


def test_opcheck(op, compiled):
    calls = raw_calls(op, compiled)
    names = {function.name().removeprefix("nlhf::") for function, _ in calls}
    if op in SAMPLERS:
        # a backend without a kernel for it draws from logits
        forward = op if registry.has(f"{op}_fwd", compiled.backend) else "mixture_sample"
        assert names == {f"{forward}_fwd"}
    else:
        assert names == THROUGH[op]
    for function, args in calls:
        torch.library.opcheck(function, args)


@pytest.mark.parametrize("rows", [False, True])
def test_opcheck_of_eager_sampling(rows):
    """The one raw op of eager, which only torch.compile uses."""
    policy, ref = torch.randn(2, 3, 40)
    # mixture_coef, temperature, top_k, top_p, min_p, seed, position
    scalars = [0.3, 0.9, 7, 0.95, 0.01, 5, 2]
    like = [torch.full((3,), x) if rows else None for x in scalars]
    arguments = [x for pair in zip(scalars, like, strict=True) for x in pair]
    torch.library.opcheck(torch.ops.nlhf.mixture_sample_eager, (policy, ref, *arguments))


def test_fold_in_compiles():
    """Inductor's C++ has undefined overflows, where eager's integers wrap around."""
    torch._dynamo.reset()
    seeds = eager.fold_in(3, torch.arange(64))
    for k in (0, 2**32 - 1):
        got = torch.compile(nk.fold_in, fullgraph=True)(seeds, k)
        assert torch.equal(got, nk.fold_in(seeds, k))


def test_every_raw_op_of_a_backend_is_there(compiled):
    for raw_op, paths in registry._PATHS.items():
        if compiled.backend in paths:
            assert callable(registry.load(raw_op, compiled.backend))


def _pairs() -> list:
    compiled = [x.values[0] for x in targets(compiled_only=True) if not x.marks]
    pairs = [(a, b) for a, b in itertools.permutations(compiled, 2) if a.device == b.device]
    here = ", ".join(map(str, compiled)) or "none"
    skip = pytest.mark.skip(reason=f"no two compiled backends on one device here: {here}")
    return pairs or [pytest.param(None, marks=skip)]


@pytest.mark.parametrize("pair", _pairs(), ids=lambda p: p and f"{p[0]}->{p[1]}")
@pytest.mark.parametrize("differentiable", DIFFERENTIABLE)
def test_forward_of_one_with_backward_of_another(differentiable, pair, plant):
    forward, backward = pair
    op, kernels = differentiable, {}
    for raw_op in RAW:
        source = forward if raw_op.endswith("_fwd") else backward
        kernels[raw_op] = registry.load(raw_op, source.backend)
    backend = plant(kernels)
    for case in OPS[op].tests:
        # what changes the residuals: masks, packing, scaling, dtypes
        if case.options.keys() & {"layout", "packed", "softcap", "temperature"}:
            check(case, backend, device=forward.device)


@pytest.mark.parametrize("kind", ["lse", "logprobs and entropy"])
def test_ids_outside_the_vocabulary_are_never_read(kind, compiled):
    """The public op refuses them on the CPU; a GPU cannot look, and must stay within bounds."""
    where = {"device": compiled.device}
    logits = torch.randn(4, 70, **where)
    tokens = torch.tensor([0, -1, 70, 2**62], **where)
    raw = torch.ops.nlhf
    got = raw.token_logprobs_fwd(logits, tokens, None, 1.0, 0.0, compiled.backend)
    want = eager.token_logprobs(logits.double(), tokens.clamp(0, 69))
    if kind == "lse":
        compare("lse", got[2], logits.double().logsumexp(-1), torch.float32)
        return
    assert got[0].isnan().tolist() == [False, True, True, True]
    compare("entropy", got[1], want.entropy, torch.float32)
    ones = torch.ones(4, **where)
    grads = (ones, torch.zeros(4, **where))
    grad = raw.token_logprobs_bwd(
        logits, tokens, None, got[2], got[1], *grads, 1.0, 0.0, compiled.backend
    )
    assert grad[0].abs().sum() > 0
    assert torch.equal(grad[1:], torch.zeros_like(grad[1:]))


# ---- gradients


@pytest.mark.parametrize("differentiable", DIFFERENTIABLE)
def test_gradcheck(differentiable, target):
    where = {"dtype": torch.float64, "device": target.device}
    tokens = torch.tensor([[0, 3], [1, 2]], device=target.device)
    mask = torch.tensor([[True, True], [True, False]], device=target.device)
    settings = {"temperature": 0.7, "softcap": 4.0, "backend": target.backend}
    other, ref_weight = torch.randn(2, 2, 4, **where), torch.randn(4, 3, **where)
    if differentiable.startswith("linear_"):
        inputs = [
            torch.randn(2, 2, 3, **where),
            torch.randn(4, 3, **where),
            torch.randn(4, **where),
        ]
        settings |= {"logit_scale": 0.8}
    else:
        inputs = [torch.randn(2, 2, 4, **where)]
    inputs = [x.requires_grad_() for x in inputs]
    op = getattr(nk, differentiable)
    # the loss has a stop_gradient: what is under it is held constant through policy_logprobs
    loss = {"tau": 0.3, "ref_logprobs": torch.randn(2, 2, **where)}
    loss |= {"policy_logprobs": torch.randn(2, 2, **where)}
    preference = torch.rand(2, **where)

    def function(x, weight=None, bias=None):
        head = {} if weight is None else {"bias": bias}
        first = (x,) if weight is None else (x, weight)
        if differentiable.endswith("pairwise_pg_loss"):
            return op(*first, tokens, mask, preference, **loss, **head, **settings).loss
        refs = ()
        if differentiable.endswith("token_kl"):
            refs = (other,) if weight is None else (other[..., 1:], ref_weight)
        result = op(*first, *refs, tokens, mask=mask, **head, **settings)
        return tuple(x for x in result if x.requires_grad)

    assert torch.autograd.gradcheck(function, inputs)


def test_gradcheck_of_the_exact_kl(target):
    """Of one token: later ones would stand under the stop_gradient."""
    where = {"dtype": torch.float64, "device": target.device}
    logits, ref_logits = torch.randn(2, 2, 1, 4, **where)
    tokens = torch.tensor([[0], [3]], device=target.device)
    preference = torch.rand(2, **where)

    def function(x):
        return nk.pairwise_pg_loss(
            x, tokens, tokens >= 0, preference, tau=0.3, ref_logits=ref_logits, kl="exact",
            temperature=0.7, softcap=4.0, backend=target.backend,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def test_only_one_output_is_differentiated(target):
    """Autograd then hands zeros, or nothing, for the other."""
    logits = torch.randn(3, 50, device=target.device)
    tokens = torch.tensor([0, 49, 7], device=target.device)
    for name in ("logprobs", "entropy"):
        grads = []
        for backend, dtype in ((target.backend, torch.float32), ("eager", torch.float64)):
            x = logits.to(dtype, copy=True).requires_grad_()
            getattr(nk.token_logprobs(x, tokens, backend=backend), name).sum().backward()
            grads.append(x.grad)
        compare(f"the gradient of {name}", *grads, torch.float32)


# ---- bit for bit


def eighths(x: Tensor) -> Tensor:
    """Rounded so that float32 holds sums of products, in any order of the terms."""
    return (x * 8).round() / 8


def test_two_runs_are_equal_whatever_the_threads(op, target):
    """But gradients of heads: torch's library may sum in an order of its threads (MKL on AMD)."""
    case = OPS[op].tests[0]
    args, kwargs = case.inputs(device=target.device)
    sums = 0
    if op.startswith("linear_"):
        kwargs = named(op, args, kwargs)
        heads = [name for name in kwargs if name.endswith(("hidden", "weight", "bias"))]
        args, kwargs = (), kwargs | {name: eighths(kwargs[name]) for name in heads}
        sums = len(leaves(op, kwargs)) if op in DIFFERENTIABLE else 0
    runs = []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        runs.append(run(op, args, kwargs, target.backend))
    torch.set_num_threads(2)
    assert identical(runs[0], runs[1])
    kept = len(runs[0]) - sums
    assert identical(runs[0][:kept], runs[2][:kept])
    for i in range(kept, len(runs[0])):
        compare(f"gradient {i - kept}", runs[2][i], runs[0][i], torch.float32)


def test_offsets_beyond_32_bits(op, target, tmp_path):
    """Rows 4 GiB apart: an offset in int32 reads, or writes, somewhere else."""
    V = 40
    near = torch.randn(2, V, device=target.device).bfloat16()
    far, ref = far_apart(near, tmp_path), torch.randn_like(near)
    tokens, small = torch.tensor([[0, V - 1], [0, 1]], device=target.device)
    sample = {"mixture_coef": 0.5, "seed": 1, "position": 0}
    mask = torch.ones(2, 1, dtype=torch.bool, device=target.device)
    preference = torch.ones(2, device=target.device)
    calls = {
        "mixture_sample": lambda x: ((x, x), sample),
        # one tensor is the hidden states of both models and their head
        "linear_mixture_sample": lambda x: ((x, x, x), sample),
        "token_logprobs": lambda x: ((x, tokens), {"inplace_backward": True}),
        "token_kl": lambda x: ((x, ref, tokens), {"inplace_backward": True}),
        "pairwise_pg_loss": lambda x: (
            (x[:, None], tokens[:, None], mask, preference),
            {"tau": 0.0, "inplace_backward": True},
        ),
        # the head, and what its gradient is made of
        "linear_token_logprobs": lambda x: ((near, x, small), {}),
        "linear_token_kl": lambda x: ((near, near, x, x, small), {}),
        "linear_pairwise_pg_loss": lambda x: (
            (x[:, None], x, small[:, None], mask, preference),
            {"tau": 0.0},
        ),
    }
    before = near.clone()
    got = run(op, *calls[op](far), target.backend)
    want = run(op, *calls[op](near), target.backend)
    assert identical(got, want)
    assert identical([far], [near])
    assert identical([near], [before]) == (op not in INPLACE)


# ---- gradient in place


@pytest.mark.parametrize("inplace", INPLACE)
def test_in_place_backward(inplace, target):
    """``check`` compares what it writes; here: when it writes, and only once."""
    case = next(c for c in OPS[inplace].tests if c.why == "in place, bf16, strided")
    args, kwargs = case.inputs(device=target.device)
    function = getattr(nk, inplace)
    before, version = args[0].detach().clone(), args[0]._version

    with torch.no_grad():
        function(*args, **kwargs, backend=target.backend)
    assert identical([args[0]], [before])

    # not a leaf: the gradient goes on to what made the logits
    parent = torch.zeros(args[0].shape, device=target.device, requires_grad=True)
    logits = args[0] + parent.to(args[0].dtype)
    output = function(logits, *args[1:], **kwargs, backend=target.backend)[0].sum() * 2.5
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    version = logits._version
    output.backward(retain_graph=True)
    assert logits._version > version
    assert torch.equal(parent.grad, logits.detach().float())
    kwargs.pop("inplace_backward")
    other = args[0].detach().requires_grad_()
    (function(other, *args[1:], **kwargs, backend=target.backend)[0].sum() * 2.5).backward()
    assert torch.equal(other.grad, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


# ---- torch.compile


def test_compiles_as_one_graph(op, target):
    torch._dynamo.reset()
    compiler = "aot_eager" if target.interpreted else "inductor"
    function = torch.compile(getattr(nk, op), fullgraph=True, backend=compiler)
    args, kwargs = OPS[op].tests[0].inputs(device=target.device)
    want = run(op, args, kwargs, target.backend)
    got = run(op, args, kwargs, target.backend, function)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        compare(f"output {i}", x, y, y.dtype)


@pytest.mark.parametrize("kind", ["packed", "in place"])
def test_compiles_other_layouts(kind, target):
    """Inside torch.compile ``inplace_backward`` is ignored."""
    torch._dynamo.reset()
    case = next(c for c in OPS["pairwise_pg_loss"].tests if c.why == kind)
    function = torch.compile(nk.pairwise_pg_loss, fullgraph=True, backend="aot_eager")
    args, kwargs = case.inputs(device=target.device)
    before = copied(args[0])
    got = run(case.op, args, kwargs, target.backend, function)
    assert identical([args[0]], [before])
    kwargs.pop("inplace_backward", None)
    want = run(case.op, args, kwargs, target.backend)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        compare(f"output {i}", x, y, y.dtype)


@pytest.mark.parametrize(
    ("of", "kind"),
    [
        *itertools.product(
            ("pairwise_pg_loss", "linear_pairwise_pg_loss"),
            ("no reference", "exact, packed, soft-capped", "exact, f64 reference"),
        ),
        ("pairwise_pg_loss", "two anchors"),
        ("linear_pairwise_pg_loss", "sequence sums, two anchors"),
        ("linear_token_kl", "one head for both"),
        ("linear_token_logprobs", "masked, two chunks"),
    ],
)
def test_compiles_whatever_is_given(of, kind):
    """On the backend that is chosen: which tensors there are is what a graph depends on."""
    torch._dynamo.reset()
    case = next(c for c in OPS[of].tests if c.why == kind)
    function = torch.compile(getattr(nk, of), fullgraph=True, backend="aot_eager")
    args, kwargs = case.inputs()
    got, want = run(of, args, kwargs, "", function), run(of, args, kwargs, "")
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        compare(f"output {i}", x, y, y.dtype)


def test_new_seeds_and_tensors_do_not_recompile(target):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(nk.mixture_sample, fullgraph=True, backend=counter)
    policy, ref = torch.randn(2, 3, 40, device=target.device)
    for seed in range(5, 12):
        settings = {"seed": seed, "position": seed + 1, "backend": target.backend}
        coef = torch.full((3,), seed / 20, device=target.device)
        got = function(policy, ref, mixture_coef=coef, **settings)
        assert torch.equal(
            got.tokens, nk.mixture_sample(policy, ref, mixture_coef=coef, **settings).tokens
        )
    # once for the first integers, once more with integers as symbols
    assert counter.frame_count <= 2


COLD = """
import sys, torch, nlhf_kernels as nk
backend, device = sys.argv[1:]
x = torch.randn(2, 3, 8, device=device)
tokens = torch.zeros(2, 3, dtype=torch.int64, device=device)
@torch.compile(fullgraph=True, backend="aot_eager")
def step(x):
    y = nk.mixture_sample(x[0], x[1], mixture_coef=0.5, seed=1, position=0, backend=backend)
    p = nk.token_logprobs(x, tokens, backend=backend).logprobs
    loss = nk.pairwise_pg_loss(x, tokens, tokens == 0, p[:, 0].detach(), tau=0.0, backend=backend)
    return y.tokens.sum() + p.sum() + loss.loss
step(x.requires_grad_()).backward()
assert "nlhf_kernels.backends" in " ".join(sys.modules) and x.grad.isfinite().all()
"""


def test_compiles_in_a_new_process(compiled):
    """Nothing has imported the backend yet, and a trace cannot."""
    command = [sys.executable, "-c", COLD, compiled.backend, compiled.device]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr


def test_tolerances_cover_every_dtype_of_logits():
    assert set(TOLERANCE) == {torch.float16, torch.bfloat16, torch.float32, torch.float64}
