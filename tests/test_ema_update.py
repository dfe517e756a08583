"""``ema_update_``: the same bits on every backend, unbiased rounding, what it refuses."""

import fractions
import itertools
import math

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels import eager, noise, registry
from tests.conftest import why_not

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = list(itertools.product((F16, BF16, F32, F64), repeat=2))
# none, fewer than a word's four, odd ones, one below, at and above a block of the kernels
SIZES = ((0,), (1,), (3, 1), (2, 0, 5), (7, 11), (), (4095,), (4096,), (4097,))


def tensors(device, pairs=PAIRS, sizes=((7, 11), (300,)), seed=0):
    """(averages, parameters), and among each their own zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    ema, params = [], []
    for (average, param), size in itertools.product(pairs, sizes):
        x, p = (torch.randn(size, generator=generator, dtype=F64) for _ in range(2))
        if x.numel() > 60:
            special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 3e38])
            x.view(-1)[:49], p.view(-1)[:49] = special.repeat(7), special.repeat_interleave(7)
        ema.append(x.to(device, average))
        params.append(p.to(device, param))
    return ema, params


def bits(x):
    """As integers, all NaN as one."""
    x = torch.where(x.isnan(), torch.full_like(x, math.nan), x).contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def same(xs, ys) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))
        for x, y in zip(xs, ys, strict=True)
    )


def updated(ema, params, backend, **kwargs):
    """The averages afterwards, of copies with the same strides."""
    ema = [torch.empty_like(x).copy_(x) for x in ema]
    assert nk.ema_update_(ema, params, backend=backend, **kwargs) is None
    return ema


@pytest.mark.parametrize("seed", [None, 3, -(2**63)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 0.999, 0.5, 0.3])
def test_the_same_bits_as_eager(decay, seed, compiled):
    """Every pair of dtypes in one call."""
    ema, params = tensors(compiled.device)
    got = updated(ema, params, compiled.backend, decay=decay, seed=seed)
    assert same(got, updated(ema, params, "eager", decay=decay, seed=seed))


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32), (F64, F16)], ids=str)
def test_every_size(pair, compiled):
    ema, params = tensors(compiled.device, [pair], SIZES)
    got = updated(ema, params, compiled.backend, decay=0.9, seed=1)
    assert same(got, updated(ema, params, "eager", decay=0.9, seed=1))


def test_many_pieces_and_threads(compiled):
    """More than a thread takes at a time, an address that no wide load likes among them."""
    # the interpreter takes a second for each hundred thousand elements
    size = 3 * (2**12 if compiled.interpreted else 2**16) + 5
    ema, params = tensors(compiled.device, [(BF16, F32), (F32, BF16)], [(size,), (size,)])
    ema[1], params[2] = ema[1][1:], params[2][3:]
    params[1], ema[2] = params[1][1:], ema[2][3:]
    want = updated(ema, params, "eager", decay=0.99, seed=8)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same(updated(ema, params, compiled.backend, decay=0.99, seed=8), want)
    finally:
        torch.set_num_threads(threads)


def test_is_the_average(target):
    ema, params = tensors(target.device, [(F32, F32), (F64, F64), (BF16, F16)], [(30,)])
    for decay in (0.999, 0.2):
        got = updated(ema, params, target.backend, decay=decay)
        for x, e, p in zip(got, ema, params, strict=True):
            want = decay * e.double() + (1 - decay) * p.double()
            rtol = {F64: 1e-14, F32: 1e-6, BF16: 2.0**-8}[x.dtype]
            torch.testing.assert_close(x.double(), want, rtol=rtol, atol=rtol)


def test_a_fixed_point_stays(target):
    """Rounded weights that do not add up to 1 would move it, by more with every step."""
    x = torch.randn(100, device=target.device)
    ema = [x.clone()]
    for _ in range(20):
        nk.ema_update_(ema, [x], decay=0.9999, backend=target.backend)
    assert torch.equal(ema[0], x)


@pytest.mark.parametrize("seed", [None, 4])
def test_the_ends_are_exact(target, seed):
    """0 copies and 1 leaves alone, infinities too, and the sign of a zero."""
    ema, params = tensors(target.device, [(d, d) for d in (F16, BF16, F32, F64)], [(60,)])
    assert same(updated(ema, params, target.backend, decay=1.0, seed=seed), ema)
    assert same(updated(ema, params, target.backend, decay=0.0, seed=seed), params)


def test_a_tensor_as_decay_and_seed(target):
    """Read on the device; a number of another dtype is the number that it holds."""
    ema, params = tensors(target.device, [(F32, F32), (BF16, F32)])
    for dtype in (F16, BF16, F32, F64):
        decay = torch.tensor(0.99, dtype=dtype, device=target.device)
        seed = torch.tensor(-5, device=target.device)
        got = updated(ema, params, target.backend, decay=decay, seed=seed)
        assert same(got, updated(ema, params, "eager", decay=decay.item(), seed=-5))


# ---- layouts


def test_transposed_and_channels_last(target):
    """By place in memory, whatever the order of the dimensions."""
    images = torch.randn(2, 3, 4, 5, device=target.device).bfloat16()
    ema = [
        torch.randn(6, 5, device=target.device).T,
        images.contiguous(memory_format=torch.channels_last),
        torch.randn(3, 1, 4, device=target.device).transpose(0, 1),
    ]
    params = [torch.empty_like(x).copy_(torch.randn_like(x)) for x in ema]
    # strides of a dimension of one element do not count
    params[2] = params[2].as_strided((1, 3, 4), (77, 4, 1))
    got = updated(ema, params, target.backend, decay=0.7, seed=2)
    assert got[1].stride() == ema[1].stride()
    flat = [[x.as_strided((x.numel(),), (1,)).clone() for x in xs] for xs in (ema, params)]
    want = updated(*flat, "eager", decay=0.7, seed=2)
    assert same([x.as_strided((x.numel(),), (1,)) for x in got], want)


def test_slices_of_one_buffer(target):
    """Side by side in memory, at addresses that divide by nothing; what is between stays."""
    buffer = torch.randn(1000, device=target.device).bfloat16()
    before = buffer.clone()
    pieces = [(1, 8), (8, 100), (103, 900)]
    ema = [buffer[a:b] for a, b in pieces]
    params = [torch.randn(b - a, device=target.device) for a, b in pieces]
    want = updated(ema, params, "eager", decay=0.9)
    nk.ema_update_(ema, params, decay=0.9, backend=target.backend)
    assert same(ema, want)
    rest = torch.ones(1000, dtype=torch.bool, device=target.device)
    for a, b in pieces:
        rest[a:b] = False
    assert torch.equal(buffer[rest], before[rest])


def test_nothing_to_do(target):
    nk.ema_update_([], [], decay=0.9, backend=target.backend)
    empty = [torch.empty(0, 3, device=target.device)]
    nk.ema_update_(empty, [torch.empty(0, 3, device=target.device)], decay=0.9, seed=1,
                   backend=target.backend)  # fmt: skip


# ---- rounding


def test_words_are_those_of_the_contract(target):
    """A value halfway between two bfloat16 shows the upper bit of a word's lower half."""
    half = torch.tensor(0x3F808000, dtype=torch.int32).view(F32)
    for k in (0, 2):
        ema = [torch.zeros(10, dtype=BF16, device=target.device) for _ in range(3)]
        params = [half.to(target.device).expand(10).clone() for _ in range(3)]
        nk.ema_update_(ema, params, decay=0.0, seed=77, backend=target.backend)
        key = noise.split(torch.tensor(nk.fold_in(77, k)))
        words = [int(w[i // 4]) for i in range(10)
                 for w in [eager.philox((torch.arange(3), 0, 0, 3), key)[i % 4]]]  # fmt: skip
        up = [(word & 0xFFFF) + 0x8000 > 0xFFFF for word in words]
        assert (ema[k] > 1).tolist() == up
        assert 0 < sum(up) < 10


def test_rounding_is_unbiased(target):
    """The mean over many elements is the value, within four standard errors."""
    n = 8192 if target.interpreted else 2**17
    for value in (1.001, -1.0071, 3e-3, 2.0**-130 * 1.3):
        x = torch.full((n,), value, device=target.device)
        ema = torch.zeros(n, dtype=BF16, device=target.device)
        nk.ema_update_([ema], [x], decay=0.0, seed=5, backend=target.backend)
        low, high = ema.min().double().item(), ema.max().double().item()
        exact = x[0].double().item()
        assert low < exact < high
        assert ema.unique().numel() == 2
        share = (exact - low) / (high - low)
        error = (ema.double().mean().item() - exact) / (high - low)
        assert abs(error) < 4 * math.sqrt(share * (1 - share) / n)


def test_tensors_and_seeds_have_words_of_their_own(target):
    x = torch.full((4096,), 1.003, device=target.device)
    draws = []
    for seed in (1, 2):
        ema = [torch.zeros(4096, dtype=BF16, device=target.device) for _ in range(2)]
        nk.ema_update_(ema, [x, x], decay=0.0, seed=seed, backend=target.backend)
        draws += [(y > 1.003).double() for y in ema]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4, device=target.device)
    assert correlation.abs().max() < 5 / math.sqrt(4096)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_bfloat16_stalls_without_and_moves_with_it(backend):
    """1,000 steps with decay 0.999 from 0 toward 1 end at 1 - 0.999^1000 = 0.632."""
    if backend == "cpp" and (why := why_not("cpp")):
        pytest.skip(f"cpp: {why}")
    params = [torch.ones(512)]
    nearest, drawn, exact = ([torch.zeros(512, dtype=d)] for d in (BF16, BF16, F32))
    for step in range(1000):
        nk.ema_update_(nearest, params, decay=0.999, backend=backend)
        nk.ema_update_(drawn, params, decay=0.999, seed=step, backend=backend)
        nk.ema_update_(exact, params, decay=0.999, backend=backend)
    assert exact[0][0].item() == pytest.approx(1 - 0.999**1000, rel=1e-4)
    assert nearest[0].max() <= 0.26
    assert drawn[0].float().mean().item() == pytest.approx(exact[0][0].item(), rel=0.01)


def test_overflow_and_subnormals(target):
    """The largest float32 is drawn between the largest bfloat16 and infinity."""
    top = torch.finfo(F32).max
    x = torch.tensor([top, -top, 2.0**-149, 2.0**-133], device=target.device).repeat(64)
    for seed in (None, 1):
        got = updated([torch.zeros(256, dtype=BF16, device=target.device)], [x], target.backend,
                      decay=0.0, seed=seed)  # fmt: skip
        want = updated([torch.zeros(256, dtype=BF16, device=target.device)], [x], "eager",
                       decay=0.0, seed=seed)  # fmt: skip
        assert same(got, want)
        assert not got[0].isnan().any()


# ---- autograd


def test_versions_and_gradients(target):
    ema = [torch.randn(5, device=target.device, requires_grad=True)]
    params = [torch.randn(5, device=target.device, requires_grad=True)]
    saved = (ema[0] ** 2).sum()
    version = ema[0]._version
    with torch.no_grad():
        nk.ema_update_(ema, params, decay=0.9, backend=target.backend)
    assert ema[0]._version > version
    assert ema[0].requires_grad
    assert ema[0].is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    with pytest.raises(ValueError, match=r"^ema_update_: ema must not require a gradient"):
        nk.ema_update_(ema, params, decay=0.9, backend=target.backend)
    # parameters may, and record nothing
    plain = [torch.zeros(5, device=target.device)]
    nk.ema_update_(plain, params, decay=0.9, backend=target.backend)
    assert not plain[0].requires_grad


def test_inference_mode(target):
    before = torch.zeros(5, device=target.device)
    with torch.inference_mode():
        ema = [torch.zeros(5, device=target.device), before]
        params = [torch.ones(5, device=target.device) for _ in ema]
        nk.ema_update_(ema, params, decay=0.5, backend=target.backend)
        assert all((x == 0.5).all() for x in ema)


def test_opcheck(compiled):
    ema, params = tensors(compiled.device, [(BF16, F32), (F32, F32)], [(10,)])
    params = [torch.nan_to_num(p) for p in params]
    decay = torch.tensor(0.9, device=compiled.device)
    seed = torch.tensor(1, device=compiled.device)
    raw = torch.ops.nlhf.ema_update__fwd.default
    for numbers in ((0.9, None, None, None), (0.9, None, 7, None), (0.0, decay, 0, seed)):
        torch.library.opcheck(raw, (ema, params, *numbers, compiled.backend))


def test_compiles_as_one_graph(target):
    torch._dynamo.reset()
    compiler = "aot_eager" if target.interpreted else "inductor"

    @torch.compile(fullgraph=True, backend=compiler)
    def step(ema, params, decay, seed):
        with torch.no_grad():
            nk.ema_update_(ema, params, decay=decay, seed=seed, backend=target.backend)

    ema, params = tensors(target.device, [(BF16, F32), (F32, F32)], [(10,)])
    params[0].requires_grad_()
    tensor = {"device": target.device}
    for decay, seed in (
        (0.9, None),
        (0.9, 3),
        (0.9, 4),
        (torch.tensor(0.5, **tensor), torch.tensor(3, **tensor)),
    ):
        got = [x.clone().requires_grad_() for x in ema]
        version = got[0]._version
        step(got, params, decay, seed)
        assert got[0]._version > version
        assert same(got, updated(ema, params, target.backend, decay=decay, seed=seed))


# ---- triton's table


@pytest.fixture
def launches(monkeypatch):
    if why := why_not("triton"):
        pytest.skip(f"triton: {why}")
    from nlhf_kernels.backends.triton import common, ema_update

    made = []
    launch, build = common.launch, ema_update.build

    def counted(*args, **kwargs):
        made.append("launch")
        launch(*args, **kwargs)

    def built(*args):
        made.append("table")
        return build(*args)

    monkeypatch.setattr(common, "launch", counted)
    monkeypatch.setattr(ema_update, "build", built)
    ema_update._tables.clear()
    return made


def test_one_launch_and_one_table(launches):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ema, params = tensors(device)
    for seed in (None, 1):
        nk.ema_update_(ema, params, decay=0.9, seed=seed, backend="triton")
    assert launches == ["table", "launch", "launch"]
    # others at the same addresses are others
    ema[0] = ema[0].view(ema[0].dtype)[:3]
    params[0] = params[0][:3]
    nk.ema_update_(ema, params, decay=0.9, backend="triton")
    assert launches[3:] == ["table", "launch"]


def test_tables_that_are_not_used_go(launches):
    from nlhf_kernels.backends.triton import ema_update

    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffer, params = torch.zeros(100, device=device), torch.zeros(1, device=device)
    for i in range(ema_update.MOST_TABLES + 3):
        nk.ema_update_([buffer[i : i + 1]], [params], decay=0.9, backend="triton")
        nk.ema_update_([buffer[:1]], [params], decay=0.9, backend="triton")
    assert len(ema_update._tables) == ema_update.MOST_TABLES
    assert launches.count("table") == ema_update.MOST_TABLES + 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_cuda_graph():
    ema, params = tensors("cuda", [(BF16, F32), (F32, F32)], [(5000,)])
    want = [x.clone() for x in ema]
    decay, seed = torch.tensor(0.9, device="cuda"), torch.tensor(0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before a CUDA graph"), torch.cuda.graph(graph):
        nk.ema_update_(ema, params, decay=decay, seed=seed)
    nk.ema_update_(ema, params, decay=decay, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nk.ema_update_(ema, params, decay=decay, seed=seed)
        seed += 1
    for _ in range(3):
        graph.replay()
    for s in (0, 0, 1, 2):
        nk.ema_update_(want, params, decay=0.9, seed=s, backend="eager")
    assert same(ema, want)


# ---- wrong input

X, Y, M = torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ema": X}, "ema must be a sequence of tensors, got one"),
        ({"params": Y}, "params must be a sequence of tensors, got one"),
        ({"params": [Y, Y]}, "ema and params must be as many, got 1 and 2 tensors"),
        ({"params": [1.0]}, r"params\[0\] must be a real float16"),
        ({"ema": [X.long()]}, r"ema\[0\] must be a real float16.*, got int64"),
        ({"ema": [X.to("meta")]}, r"ema\[0\] must be a real"),
        ({"params": [X.to_sparse()]}, r"params\[0\] must be a real"),
        ({"params": [Y.T]}, r"params\[0\] must be \(3, 4\) like ema\[0\], got float32 \(4, 3\)"),
        ({"params": [torch.ones(4, 3).T]}, r"strides of params\[0\] must be \(4, 1\) like"),
        ({"ema": [torch.zeros(3, 8)[:, :4]]}, r"ema\[0\] must be without gaps and overlaps"),
        ({"ema": [torch.zeros(1, 4).expand(3, 4)]}, r"ema\[0\] must be without gaps"),
        ({"ema": [X], "params": [X]}, r"params\[0\] must not share memory with ema\[0\]"),
        ({"ema": [M[4:]], "params": [M[:8]]}, r"ema\[0\] must not share memory with params\[0\]"),
        ({"ema": [X, X], "params": [Y, Y]}, r"ema\[1\] must not share memory with ema\[0\]"),
        ({"decay": 1.1}, r"decay must be in \[0, 1\], got 1.1"),
        ({"decay": -0.1}, r"decay must be in \[0, 1\]"),
        ({"decay": math.nan}, r"decay must be in \[0, 1\], got nan"),
        ({"decay": True}, r"decay must be in \[0, 1\]"),
        ({"decay": fractions.Fraction(1, 2)}, r"decay must be in \[0, 1\], got Fraction"),
        ({"decay": torch.tensor(1.5)}, r"decay must be in \[0, 1\], got 1.5"),
        ({"decay": torch.tensor([0.5])}, r"decay must be a number or .* \(\) on cpu"),
        ({"decay": torch.tensor(1)}, "decay must be a number or float16"),
        ({"seed": 2**63}, "seed must be a 64-bit integer or None"),
        ({"seed": 1.0}, "seed must be a 64-bit integer or None, got 1.0"),
        ({"seed": True}, "seed must be a 64-bit integer"),
        ({"seed": torch.tensor(1.0)}, r"seed must be a number or int64 \(\) on cpu"),
        ({"backend": "cuda"}, "ema_update_ has no cuda implementation"),
    ],
)  # fmt: skip
def test_wrong_input(change, says):
    with pytest.raises(ValueError, match=rf"^ema_update_: .*{says}"):
        nk.ema_update_(**{"ema": [X.clone()], "params": [Y], "decay": 0.9} | change)


def test_parts_of_one_parameter_may_be_shared():
    """Two parameters of the same memory, as tied ones are, are read twice: no harm."""
    ema = [torch.zeros(3, 4), torch.zeros(3, 4)]
    nk.ema_update_(ema, [Y, Y], decay=0.5)
    assert all((x == 0.5).all() for x in ema)


def test_any_sequence_will_do():
    """Also what ``parameters()`` gives."""
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with torch.no_grad():
        nk.ema_update_(a.parameters(), b.parameters(), decay=0.0)
    assert torch.equal(a.weight, b.weight)


@pytest.mark.skipif(bool(why_not("cpp")), reason=f"cpp: {why_not('cpp')}")
def test_updates_stand_in_the_table():
    assert set(registry.UPDATES) <= {row[0] for row in registry.table()}
    assert all(registry.resolve(op, "cpu") == "cpp" for op in registry.UPDATES)
