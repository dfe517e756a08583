"""``pair_loss``: each method against its own formula, its gradient, its edges, on every backend."""

import math
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import nlhf_kernels as nk
from nlhf_kernels.testing.compare import compare, poisoned_memory

TAU, ETA = 0.3, 0.9
F32, F64 = torch.float32, torch.float64


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def ipo(target):
    def loss(h, u, v, p, q):
        return p * (h - target) ** 2 + (1 - p) * (-h - target) ** 2

    return loss


def cross_entropy(label, x):
    return -label * math.log(sigmoid(x)) - (1 - label) * math.log(sigmoid(-x))


# as the papers print them, of one pair; and the weights of the anchors
FORMULAS = {
    "online_ipo": (ipo(1 / (2 * TAU)), [1]),
    "ipo_md": (ipo(1 / (2 * TAU)), [1]),
    "inpo": (ipo(1 / (2 * ETA)), [TAU / ETA, (ETA - TAU) / ETA]),
    "mnpo": (ipo(1 / (2 * ETA)), [1 / 3, 1 / 3, 1 / 3]),
    "sppo": (
        lambda h, u, v, p, q: 0.5 * ((u - ETA * (p - 0.5)) ** 2 + (v - ETA * (q - 0.5)) ** 2),
        [1],
    ),
    "dno": (lambda h, u, v, p, q: cross_entropy(sigmoid(p - q), ETA * u - ETA * v), [1]),
    "dno_prct": (lambda h, u, v, p, q: cross_entropy(p, ETA * h), [1]),
    "egpo": (lambda h, u, v, p, q: (h - (p - q) / TAU) ** 2, [1]),
}


@pytest.fixture(params=FORMULAS)
def method(request):
    return request.param


def settings(method, **more):
    takes = nk.PAIR_METHODS[method].parameters
    return {
        "method": method,
        **{k: v for k, v in (("tau", TAU), ("eta", ETA)) if k in takes},
        **more,
    }


def inputs(method, B=5, dtype=F32, device="cpu", seed=0):
    """The six tensors, with hard labels among the preferences."""
    generator = torch.Generator().manual_seed(seed)
    J = len(FORMULAS[method][1])

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    y, y_other = random(B), random(B)
    anchors, other_anchors = random(J, B), random(J, B)
    p, q = torch.rand(2, B, generator=generator, dtype=F64)
    p[:1], p[1:2] = 1, 0
    tensors = [y, y_other, anchors, other_anchors, p]
    if nk.PAIR_METHODS[method].two_preferences:
        tensors.append(q)
    return [x.to(device, dtype) for x in tensors]


def run(tensors, backend, function=nk.pair_loss, **kwargs):
    """Loss, margins and both gradients, of a loss that is not the last word."""
    y, y_other, *rest = tensors
    y, y_other = y.detach().requires_grad_(), y_other.detach().requires_grad_()
    with poisoned_memory():
        out = function(y, y_other, *rest, backend=backend, **kwargs)
        grads = torch.autograd.grad(1.7 * out.loss, (y, y_other))
    assert not out.margins.requires_grad
    return out.loss.detach(), out.margins, *grads


def by_hand(method, tensors, weights=None):
    """(mean loss, margins) of Python numbers, pair by pair."""
    formula, numbers = FORMULAS[method]
    y, y_other, anchors, other_anchors, p, *q = (x.double().tolist() for x in tensors)
    losses, margins = [], []
    for b in range(len(y)):
        u, v = y[b], y_other[b]
        for j, weight in enumerate(weights or numbers):
            u -= weight * anchors[j][b]
            v -= weight * other_anchors[j][b]
        margins.append(u - v)
        losses.append(formula(u - v, u, v, p[b], q[0][b] if q else math.nan))
    return sum(losses) / len(losses), margins


@pytest.mark.parametrize("dtype", [F32, F64])
def test_is_its_formula(method, target, dtype):
    tensors = inputs(method, B=7, dtype=dtype, device=target.device)
    loss, margins, *_ = run(tensors, target.backend, **settings(method))
    want, h = by_hand(method, tensors)
    where = {"dtype": F64, "device": target.device}
    compare("loss", loss, torch.tensor(want, **where), dtype)
    compare("margins", margins, torch.tensor(h, **where), dtype)


def test_gradients_are_differences_of_the_formula(method, target):
    tensors = inputs(method, dtype=F64, device=target.device)
    *_, grad, other_grad = run(tensors, target.backend, **settings(method))
    step = 1e-5
    for got, place in ((grad, 0), (other_grad, 1)):
        for b in range(5):
            ends = []
            for side in (step, -step):
                moved = [x.clone() for x in tensors]
                moved[place][b] += side
                ends.append(by_hand(method, moved)[0])
            want = 1.7 * (ends[0] - ends[1]) / (2 * step)
            assert got[b].item() == pytest.approx(want, rel=1e-6, abs=1e-8)


def test_gradcheck(method, target):
    y, y_other, *rest = inputs(method, dtype=F64, device=target.device)
    pair = (y.requires_grad_(), y_other.requires_grad_())

    def function(y, y_other):
        return nk.pair_loss(y, y_other, *rest, backend=target.backend, **settings(method)).loss

    assert torch.autograd.gradcheck(function, pair)


@pytest.mark.parametrize("B", [0, 1, 255, 256, 257, 1000])
def test_every_number_of_pairs(B, target):

    for method in ("inpo", "sppo", "dno"):
        tensors = inputs(method, B, device=target.device)
        got = run(tensors, target.backend, **settings(method))
        oracle = run([x.double() for x in tensors], "eager", **settings(method))
        for name, x, want in zip(("loss", "margins", "grad", "other"), got, oracle, strict=True):
            compare(name, x, want, F32)
        if B == 0:
            assert got[0].item() == 0


def test_dtypes_and_layouts(method, target):
    """Mixed dtypes, strided rows: statistics float32, gradients as the log-probabilities are."""
    tensors = inputs(method, device=target.device)
    tensors = [x.bfloat16() if i % 2 else x.half() for i, x in enumerate(tensors)]
    bigger = torch.full((2, 5, tensors[2].shape[0]), math.nan, device=target.device)
    bigger[0].copy_(tensors[2].T)
    tensors[2] = bigger[0].T
    got = run(tensors, target.backend, **settings(method))
    oracle = run([x.double() for x in tensors], "eager", **settings(method))
    for x, want, dtype in zip(got, oracle, (F32, F32, torch.half, torch.bfloat16), strict=True):
        compare("output", x, want, dtype)
    # one of float64 makes all so
    tensors[4] = tensors[4].double()
    loss, margins, *_ = run(tensors, target.backend, **settings(method))
    assert loss.dtype == margins.dtype == F64


def test_one_anchor_may_be_flat(target):
    y, y_other, a, b, p = inputs("online_ipo", device=target.device)
    got = run([y, y_other, a[0], b[0], p], target.backend, **settings("online_ipo"))
    want = run([y, y_other, a, b, p], target.backend, **settings("online_ipo"))
    assert all(torch.equal(x, z) for x, z in zip(got, want, strict=True))


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], (1, 0.0, -2)])
def test_weights_of_mnpo(weights, target):
    tensors = inputs("mnpo", dtype=F64, device=target.device)
    loss, *_ = run(tensors, target.backend, **settings("mnpo", weights=weights))
    want, _ = by_hand("mnpo", tensors, weights)
    assert loss.item() == pytest.approx(want, rel=1e-11)


def test_eight_anchors_count_each(target):
    tensors = inputs("mnpo", dtype=F64, device=target.device)
    tensors[2], tensors[3] = torch.randn(2, 8, 5, dtype=F64, device=target.device)
    weights = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    loss, *_ = run(tensors, target.backend, **settings("mnpo", weights=weights))
    assert loss.item() == pytest.approx(by_hand("mnpo", tensors, weights)[0], rel=1e-11)


def test_an_anchor_of_weight_0_may_be_infinite(target):
    y, y_other, a, b, p = inputs("inpo", device=target.device)
    same = {"method": "inpo", "tau": ETA, "eta": ETA}
    want = run([y, y_other, a, b, p], target.backend, **same)
    a[1], b[1] = -math.inf, math.nan
    got = run([y, y_other, a, b, p], target.backend, **same)
    assert all(torch.equal(x, z) for x, z in zip(got, want, strict=True))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_infinite_margin_is_not_silent(method, target, place, value):
    """Not even where the label is hard and a logistic loss of it would be 0."""
    tensors = inputs(method, device=target.device)
    tensors[4][:] = 1
    whole = run(tensors, target.backend, **settings(method))
    tensors[place][..., 2] = value
    loss, margins, grad, other_grad = run(tensors, target.backend, **settings(method))
    assert loss.isnan()
    assert not margins[2].isfinite()
    others = [0, 1, 3, 4]
    for got, want in zip((margins, grad, other_grad), whole[1:], strict=True):
        assert not got[2].isfinite()
        assert torch.equal(got[others], want[others])


def test_far_margins_stay_finite(target):
    """Log-probabilities of thousands of tokens: sigma underflows, its logarithm does not."""
    for label in (0.0, 1.0, 0.4):
        y = torch.tensor([-900.0, -3000.0], device=target.device)
        zeros = torch.zeros(2, device=target.device)
        tensors = [y, zeros, zeros, zeros, zeros + label]
        got = run(tensors, target.backend, method="dno_prct", eta=1.0)
        oracle = run([x.double() for x in tensors], "eager", method="dno_prct", eta=1.0)
        assert got[0].isfinite()
        for x, want in zip(got, oracle, strict=True):
            compare("output", x, want, F32)


def test_dno_prct_is_dpo(target):
    y, y_other, a, b, p = inputs("dno_prct", device=target.device)
    tensors = [y, y_other, a, b, torch.ones_like(p)]
    loss, *_ = run(tensors, target.backend, method="dno_prct", eta=0.1)
    want = -torch.nn.functional.logsigmoid(0.1 * (y - a[0] - y_other + b[0])).mean()
    compare("loss", loss, want, F32)


def test_swapping_the_responses_changes_nothing(method, target):
    """A pair has no first response: preference and margin turn round together."""
    y, y_other, a, b, p, *q = inputs(method, device=target.device)
    loss, h, grad, other = run([y, y_other, a, b, p, *q], target.backend, **settings(method))
    turned = [y_other, y, b, a, *([q[0], p] if q else [1 - p])]
    again, h2, grad2, other2 = run(turned, target.backend, **settings(method))
    pairs = ((loss, again), (h, -h2), (grad, other2), (other, grad2))
    for x, want in pairs:
        compare("output", x, want, F32)


def test_two_runs_are_equal(method, target):
    tensors = inputs(method, B=600, device=target.device)
    first, second = (run(tensors, target.backend, **settings(method)) for _ in range(2))
    assert all(torch.equal(x, z) for x, z in zip(first, second, strict=True))


def test_frozen_tensors_get_no_gradient(method, target):
    y, y_other, *rest = (x.requires_grad_() for x in inputs(method, device=target.device))
    out = nk.pair_loss(y, y_other, *rest, backend=target.backend, **settings(method))
    out.loss.backward()
    assert y.grad is not None
    assert y_other.grad is not None
    assert all(x.grad is None for x in rest)


def test_opcheck(method, compiled):
    y, y_other, a, b, p, *q = inputs(method, device=compiled.device)
    weights = [1 / len(a)] * len(a)
    form = nk.PAIR_METHODS[method].form
    torch.library.opcheck(
        torch.ops.nlhf.pair_loss_fwd.default,
        (y, y_other, a, b, p, q[0] if q else None, weights, form, 0.7, compiled.backend),
    )


def test_compiles_as_one_graph(method, target):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager" if target.interpreted else "inductor")
    function = torch.compile(nk.pair_loss, fullgraph=True, backend=counter)
    tensors = inputs(method, device=target.device)
    got = run(tensors, target.backend, function, **settings(method))
    for x, want in zip(got, run(tensors, target.backend, **settings(method)), strict=True):
        compare("output", x, want, F32)
    assert counter.frame_count == 1


def test_table_of_methods(method):
    entry = nk.PAIR_METHODS[method]
    assert set(FORMULAS) == set(nk.PAIR_METHODS)
    assert entry.citation
    assert re.search(rf"^    .*\b{method}\b.*  ", nk.pair_loss.__doc__, re.M)
    weights = entry.weights(TAU, ETA, len(FORMULAS[method][1]))
    assert weights == pytest.approx(FORMULAS[method][1])
    with pytest.raises(AttributeError):
        entry.form = "label"


B5 = torch.zeros(5)


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("inpo", {"method": "ipo"}, "method must be one of online_ipo, ipo_md, inpo, mnpo, sppo"),
        ("inpo", {"method": None}, "method must be one of .*, got None"),
        ("inpo", {"tau": None}, "tau must be above 0 .* for inpo, got None"),
        ("inpo", {"tau": 0.0}, "tau must be above 0"),
        ("inpo", {"tau": 1.0}, "tau must be at most eta"),
        ("inpo", {"eta": math.inf}, "eta must be above 0 .* finite"),
        ("inpo", {"eta": math.nan}, "eta must be above 0"),
        ("online_ipo", {"eta": 1.0}, "eta must be left out, since online_ipo has none"),
        ("sppo", {"tau": 1.0}, "tau must be left out, since sppo has none"),
        ("inpo", {"weights": [1.0, 2.0]}, "weights must be left out, since inpo has its own"),
        ("mnpo", {"weights": [1.0]}, "weights must be 3 numbers, one per anchor"),
        ("mnpo", {"weights": torch.ones(3)}, "weights must be 3 numbers"),
        ("mnpo", {"weights": [1.0, 2.0, math.inf]}, r"weights\[2\] must be finite, got inf"),
        ("inpo", {2: B5, 3: B5}, r"anchors must be 2 \(ref, previous policy\) for inpo, got 1"),
        ("egpo", {2: torch.zeros(2, 5), 3: torch.zeros(2, 5)}, r"must be 1 \(ref\) for egpo"),
        ("mnpo", {2: torch.zeros(9, 5), 3: torch.zeros(9, 5)}, "anchors must be from 1 to 8"),
        ("mnpo", {2: torch.zeros(0, 5), 3: torch.zeros(0, 5)}, "anchors must be from 1 to 8"),
        ("inpo", {2: torch.zeros(2, 4)}, r"anchor_logprobs must be .* \(2, 5\)"),
        ("inpo", {2: torch.zeros(2, 5, 1)}, r"anchor_logprobs must be \(J, 5\), or \(5,\) for one"),
        ("inpo", {3: torch.zeros(3, 5)}, r"other_anchor_logprobs must be .* \(2, 5\)"),
        ("inpo", {0: torch.zeros(5, 1)}, r"logprobs must be a real \(B,\)"),
        ("inpo", {0: [1.0]}, r"logprobs must be a real \(B,\)"),
        ("inpo", {0: torch.zeros(5, dtype=torch.int64)}, "logprobs must be float16"),
        ("inpo", {0: torch.zeros(5, device="meta")}, "logprobs must be a real"),
        ("inpo", {1: torch.zeros(4)}, r"other_logprobs must be .* \(5,\)"),
        ("inpo", {4: torch.zeros(4)}, r"preference must be .* \(5,\)"),
        ("inpo", {4: torch.zeros(5, dtype=torch.bool)}, "preference must be float16"),
        ("inpo", {4: B5 + 1.01}, r"preference must be in \[0, 1\], got 1.0\d* at 0"),
        ("inpo", {4: B5 - 0.01}, r"preference must be in \[0, 1\]"),
        ("inpo", {4: B5 + math.nan}, r"preference must be in \[0, 1\], got nan"),
        ("inpo", {5: B5}, "other_preference must be left out, since inpo has none"),
        ("sppo", {5: None}, "other_preference, which sppo takes, must be .*, got None"),
        ("sppo", {5: B5 + 2}, r"other_preference must be in \[0, 1\]"),
        ("egpo", {"backend": "cuda"}, "pair_loss has no cuda implementation"),
    ],
)  # fmt: skip
def test_wrong_input(method, change, says):
    tensors = inputs(method)
    tensors += [None] * (6 - len(tensors))
    kwargs = settings(method)
    for key, value in change.items():
        if isinstance(key, int):
            tensors[key] = value
        else:
            kwargs[key] = value
    with pytest.raises(ValueError, match=rf"^pair_loss: .*{says}"):
        nk.pair_loss(*tensors, **kwargs)
