"""``skinny_linear``: against float64, row by row to the bit, and inside a model that decodes."""

import math

import pytest
import torch
from torch import nn

import nlhf_kernels as nk
from nlhf import linears
from nlhf_kernels.testing import TOLERANCE
from nlhf_kernels.testing.compare import poisoned_memory
from tests.conftest import why_not

# the rest is of every machine
needs_cpp = pytest.mark.skipif(bool(why_not("cpp")), reason=f"cpp: {why_not('cpp')}")

# every block of rows (8, 4, 2, 1), odd columns, several pieces; a width below, at and beside each
# register's, and none at all
ROWS = (0, 1, 2, 3, 5, 8, 15, 16, 23)
SHAPES = [
    (1, 1),
    (33, 3),
    (2, 4),
    (7, 8),
    (31, 17),
    (65, 64),
    (577, 100),
    (3, 1000),
    (4, 0),
    (0, 5),
]


def inputs(M, N, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((M, D), (N, D), (N,))]


def linear(*args, **kwargs):
    with poisoned_memory():
        return nk.skinny_linear(*args, backend="cpp", **kwargs)


@needs_cpp
@pytest.mark.parametrize(("N", "D"), SHAPES)
@pytest.mark.parametrize("M", ROWS)
def test_matches_float64(M, N, D):
    x, w, bias = inputs(M, N, D)
    for b in (None, bias):
        want = nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
        got = linear(x, w, b)
        assert got.dtype == torch.float32
        assert got.shape == (M, N)
        # each sum is off by the roundings of its terms, however small it is itself
        scale = (x.double().abs() @ w.double().abs().T + 1) * math.sqrt(D + 1)
        assert ((got - want).abs() <= scale * torch.finfo(torch.float32).eps).all()


@needs_cpp
def test_a_row_is_the_same_whatever_the_others_and_the_threads():
    x, w, bias = inputs(23, 577, 100)
    before = torch.get_num_threads()
    alone = torch.cat([linear(row[None], w, bias) for row in x])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for M in ROWS[1:]:
                assert torch.equal(linear(x[:M], w, bias), alone[:M]), (threads, M)
    finally:
        torch.set_num_threads(before)


@needs_cpp
def test_leading_dimensions_strides_and_odd_addresses():
    x, w, bias = inputs(12, 40, 24)
    want = linear(x, w, bias)
    assert torch.equal(linear(x.view(3, 4, 24), w, bias), want.view(3, 4, 40))
    assert torch.equal(linear(x[0], w, bias), want[0])
    assert torch.equal(linear(x.T.contiguous().T, w, bias), want)
    moved = torch.empty(w.numel() + 1)[1:].view_as(w).copy_(w)
    assert torch.equal(linear(x, moved, bias), want)


@needs_cpp
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_stay_in_their_row_and_column(value):
    x, w, _ = inputs(9, 35, 37)
    clean = linear(x, w)
    x[4, 36] = value
    w[20, 0] = value
    got = linear(x, w)
    want = nn.functional.linear(x.double(), w.double())
    spoilt = torch.zeros(9, 35, dtype=torch.bool)
    spoilt[4], spoilt[:, 20] = True, True
    assert torch.equal(got[~spoilt], clean[~spoilt])
    torch.testing.assert_close(got[spoilt], want[spoilt].float(), equal_nan=True)


@needs_cpp
def test_backends_and_the_raw_op():
    x, w, bias = inputs(5, 40, 24)
    rtol, atol = TOLERANCE[torch.float32]
    eager = nk.skinny_linear(x, w, bias, backend="eager")
    assert torch.equal(eager, nn.functional.linear(x, w, bias))
    torch.testing.assert_close(linear(x, w, bias), eager, rtol=rtol, atol=atol)
    torch.library.opcheck(torch.ops.nlhf.skinny_linear_fwd.default, (x, w, "cpp"))
    compiled = torch.compile(nk.skinny_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, bias, backend="cpp"), linear(x, w, bias))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": torch.ones(2, 3)}, r"input must be \(..., 4\)"),
        ({"input": torch.ones(())}, r"input must be \(..., 4\)"),
        ({"input": torch.ones(2, 4, dtype=torch.bfloat16)}, "input must be float32 on the CPU"),
        ({"input": torch.ones(2, 4, device="meta")}, "input must be float32 on the CPU"),
        ({"weight": torch.ones(5, 4).double()}, "weight must be float32 on the CPU"),
        ({"weight": torch.ones(4, 5).T}, "contiguous"),
        ({"weight": torch.ones(4)}, r"weight must be \(N, D\)"),
        ({"weight": None}, "weight must be float32"),
        ({"bias": torch.ones(4)}, r"bias must be \(5,\) like weight"),
        ({"bias": torch.ones(5, dtype=torch.float64)}, "bias must be float32 on the CPU"),
        ({"weight": torch.ones(5, 4, requires_grad=True)}, "no gradient: call it under"),
        ({"backend": "triton"}, "skinny_linear has no triton implementation"),
    ],
)
def test_wrong_input_is_named(change, says):
    good = {"input": torch.ones(2, 4), "weight": torch.ones(5, 4), "bias": torch.ones(5)}
    with pytest.raises(ValueError, match=rf"^skinny_linear: .*{says}"):
        nk.skinny_linear(**good | change)


# ---- in a model


class Wrapped(nn.Linear):
    """Does more than multiply."""

    def forward(self, input):
        return super().forward(input) + 1


def model() -> nn.Sequential:
    hooked = nn.Linear(8, 8)
    hooked.forward = lambda input: input
    layers = [nn.Linear(8, 8), Wrapped(8, 8), hooked, nn.Linear(8, 8).double(), nn.Linear(7, 9)]
    return nn.Sequential(*layers).requires_grad_(False)


def counted(monkeypatch) -> list[int]:
    monkeypatch.setattr(linears, "_WEIGHTS", 64)
    seen = []
    inner = nk.skinny_linear

    def count(input, *args):
        seen.append(len(input))
        return inner(input, *args)

    monkeypatch.setattr(nk, "skinny_linear", count)
    return seen


@needs_cpp
def test_plain_float32_layers_with_few_rows_alone_are_replaced(monkeypatch):
    seen = counted(monkeypatch)
    layers = model()
    x = torch.randn(16, 8)
    with linears.skinny([layers, layers]):
        for M in (15, 16):
            want = nn.functional.linear(x[:M], layers[0].weight, layers[0].bias)
            torch.testing.assert_close(layers[0](x[:M]), want)
            torch.testing.assert_close(layers[1](x[:M]), Wrapped.forward(layers[1], x[:M]))
            assert layers[2](x[:M]).equal(x[:M])
            assert layers[3](x[:M].double()).dtype == torch.float64
            assert layers[4](x[:M, :7]).shape == (M, 9)
    assert seen == [15]
    layers[0](x[:2])
    assert seen == [15]
    assert "forward" not in vars(layers[0])
    assert "forward" in vars(layers[2])


@needs_cpp
def test_layers_are_their_own_again_after_an_error(monkeypatch):
    counted(monkeypatch)
    layers = model()
    context = linears.skinny([layers])
    context.__enter__()
    assert "forward" in vars(layers[0])
    # passed on, not swallowed
    stop = RuntimeError("stop")
    assert not context.__exit__(type(stop), stop, None)
    assert "forward" not in vars(layers[0])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_another_backend_leaves_the_layers_alone(backend, monkeypatch):
    seen = counted(monkeypatch)
    layers = model()
    with nk.use_backend(backend), linears.skinny([layers]):
        layers[0](torch.randn(2, 8))
    assert not seen


def test_autocast_leaves_the_layers_alone(monkeypatch):
    seen = counted(monkeypatch)
    layers = model()
    with torch.autocast("cpu", dtype=torch.bfloat16), linears.skinny([layers]):
        assert layers[0](torch.randn(2, 8)).dtype == torch.bfloat16
    assert not seen
