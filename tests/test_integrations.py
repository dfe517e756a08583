"""The drop-ins of TRL, verl and OpenRLHF against definitions in float64, without those hosts."""

import os
import re
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import Tensor

from nlhf_kernels import integrations
from nlhf_kernels.integrations import patching, versions
from tests.test_repo import ROOT

trl, verl, openrlhf = integrations.trl, integrations.verl, integrations.openrlhf
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
V = 1031


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).to(dtype)


def ids(*shape: int, below: int = V) -> Tensor:
    found = torch.randint(below, shape, generator=torch.Generator().manual_seed(7))
    # the borders of the vocabulary
    found.view(-1)[:2] = torch.tensor([0, below - 1])
    return found


def logs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.double() / temperature).log_softmax(-1)


def at(logs: Tensor, index: Tensor) -> Tensor:
    if index.dim() == logs.dim():
        return logs.gather(-1, index)
    return logs.gather(-1, index[..., None])[..., 0]


def entropy(logs: Tensor) -> Tensor:
    return -(logs.exp() * logs).sum(-1)


def same(got, want, inputs: list[Tensor], doubles: list[Tensor]) -> None:
    """Values in their dtypes, and gradients for incoming ones that are not constant."""
    total = []
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.detach(), y.detach().to(x.dtype))
        # what 16 bits hold: the cast of a result rounds what comes back through it
        grad = normal(*y.shape, seed=3).bfloat16().double()
        total.append(((x.double() * grad).sum(), (y * grad).sum()))
    ours, theirs = (sum(side) for side in zip(*total, strict=True))
    expected = torch.autograd.grad(theirs, doubles, retain_graph=True)
    for x, y in zip(torch.autograd.grad(ours, inputs), expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), atol=atol(x.dtype, y), rtol=rtol(x.dtype))


def rtol(dtype: torch.dtype) -> float:
    # gradients are rounded once; in 16 bits that is half a unit in the last place
    return {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-7}.get(dtype, 1e-5)


def atol(dtype: torch.dtype, like: Tensor) -> float:
    return (1e-12 if dtype == torch.float64 else 2e-6) * float(like.abs().max())


def leaf(x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf, and the same in float64."""
    return x.requires_grad_(), x.detach().double().requires_grad_()


# ---- logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3), (2, 3, 4), ()], ids=str)
def test_selective_log_softmax_is_its_definition_for_any_shape(dtype, shape):
    several = shape == (2, 3, 4)
    logits, double = leaf(normal(*(shape[:-1] if several else shape), V, dtype=dtype))
    index = ids(*shape) if shape else torch.tensor(3)
    got = trl.selective_log_softmax(logits, index)
    assert got.dtype == dtype
    assert got.shape == index.shape
    same([got], [at(logs(double), index)], [logits], [double])


@pytest.mark.parametrize("K", [1, 4])
def test_rows_under_the_mask_are_zero_and_pass_no_gradient(K):
    logits, double = leaf(normal(3, 4, V, dtype=torch.float32))
    index = ids(3, 4, K) if K > 1 else ids(3, 4)
    mask = (torch.arange(index.numel()).reshape(index.shape) % 3 > 0).long()
    got = trl.selective_log_softmax(logits, index, 0.7, mask)
    want = at(logs(double, 0.7), index) * mask
    same([got], [want], [logits], [double])
    assert (got[mask == 0] == 0).all()


def test_a_slice_costs_no_copy_and_a_transpose_is_read_right():
    full = normal(2, 4, V, dtype=torch.float32)
    logits, index = full[:, :-1], ids(2, 3)
    torch.testing.assert_close(
        trl.selective_log_softmax(logits, index).double(),
        at(logs(logits), index),
        atol=1e-5,
        rtol=0,
    )
    turned = normal(V, 5, dtype=torch.float32).T
    want = entropy(logs(turned))
    torch.testing.assert_close(trl.entropy_from_logits(turned).double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_and_both_at_once(dtype):
    logits, double = leaf(normal(2, 3, V, dtype=dtype))
    same([trl.entropy_from_logits(logits, 1)], [entropy(logs(double))], [logits], [double])
    index, mask = ids(2, 3), torch.tensor([[1, 1, 0], [0, 1, 1]])
    got = trl.selective_log_softmax_and_entropy(logits, index, temperature=1.3, row_mask=mask)
    both = logs(double, 1.3)
    same(got, [at(both, index) * mask, entropy(both) * mask], [logits], [double])
    apart = trl.selective_log_softmax_and_entropy(logits, index, False)
    assert apart[0].requires_grad
    assert not apart[1].requires_grad


def test_a_banned_token_counts_zero_in_the_entropy():
    logits = normal(2, V, dtype=torch.float32)
    logits[0, 5] = -torch.inf
    want = entropy(logs(torch.cat([logits[:1, :5], logits[:1, 6:]], 1)))
    torch.testing.assert_close(
        trl.entropy_from_logits(logits)[:1].double(), want, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_from_logits_writes_over_the_logits_only_where_told(dtype, inplace):
    logits, double = leaf(normal(2, 3, V, dtype=dtype))
    before, index = logits.detach().clone(), ids(2, 3)
    got = verl.logprobs_from_logits(logits, index, inplace)
    assert torch.equal(logits, before)
    same([got], [at(logs(double), index)], [logits], [double])
    assert torch.equal(logits, before) != inplace


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_from_logits_leave_the_logits(dtype):
    logits, double = leaf(normal(2, 3, V, dtype=dtype))
    before, index = logits.detach().clone(), ids(2, 3)
    got = openrlhf.log_probs_from_logits(logits, index, 0.7)
    same([got], [at(logs(double, 0.7), index)], [logits], [double])
    assert torch.equal(logits, before)
    assert got.dtype == dtype


# ---- hidden states


def head(dtype: torch.dtype, *shape: int, D: int = 24) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states, weight and bias, as leaves, and the same in float64."""
    made = [normal(*shape, D, dtype=dtype), normal(V, D, seed=1) / D, normal(V, seed=2)]
    pairs = [leaf(x.to(dtype)) for x in made]
    return [x for x, _ in pairs], [y for _, y in pairs]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "MEAN"])
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_linear_cross_entropy_is_its_definition(shape, reduction):
    (hidden, weight, _), (h, w, _) = head(torch.float32, *shape)
    labels = ids(*shape)
    got = verl.linear_cross_entropy(hidden, weight, labels, 0.8, reduction)
    both = logs(h @ w.T, 0.8).flatten(0, -2)
    chosen = at(both, labels.flatten())
    how = {"none": lambda x: x, "sum": Tensor.sum, "mean": Tensor.mean}[reduction.lower()]
    # entropies are never reduced, and rows are flat, as verl's kernel has them
    same(got, [how(chosen), entropy(both)], [hidden, weight], [h, w])
    assert [x.dtype for x in got] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_fused_linear_for_ppo_is_its_definition(shape, dtype):
    (hidden, weight, _), (h, w, _) = head(dtype, *shape)
    labels = ids(*shape).int()
    got = verl.FusedLinearForPPO(chunk_size=2)(hidden, weight, labels, 0.8)
    both = logs(h @ w.T, 0.8)
    assert [x.dtype for x in got] == [torch.float32, dtype]
    same(got, [at(both, labels.long()), entropy(both)], [hidden, weight], [h, w])


@pytest.mark.parametrize("size", [7 * 128 + 1, 152064])
def test_a_vocabulary_that_no_block_divides_gains_no_mass(size):
    """One logit of 3 over -15 everywhere: a padded column of 0 would outweigh the row."""
    rows = 2
    hidden = torch.eye(rows, 128)
    weight = torch.full((size, 128), -15.0)
    labels = torch.tensor([size - 1, size // 2])
    weight[labels, torch.arange(rows)] = 3
    both = logs(hidden @ weight.T)
    for got in (
        verl.linear_cross_entropy(hidden, weight, labels),
        verl.FusedLinearForPPO()(hidden, weight, labels),
    ):
        torch.testing.assert_close(got[0].double(), at(both, labels), atol=1e-6, rtol=0)
        torch.testing.assert_close(got[1].double(), entropy(both), atol=1e-6, rtol=0)
    plain = verl.logprobs_from_logits(hidden @ weight.T, labels)
    torch.testing.assert_close(plain.double(), at(both, labels), atol=1e-6, rtol=0)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [False, True])
def test_trl_from_hidden_states_is_its_definition(bias, softcap):
    (*inputs, b), (*doubles, b64) = head(torch.float32, 5)
    targets = ids(5)
    z = doubles[0] @ doubles[1].T + (b64 if bias else 0)
    z = 0.5 * z if softcap is None else softcap * torch.tanh(0.5 * z / softcap)
    both = logs(z, 0.9)
    want = [at(both, targets), entropy(both)]
    if bias:
        inputs, doubles = [*inputs, b], [*doubles, b64]
    arguments = (*inputs[:2], b if bias else None, targets, 0.9, 256, softcap, 0.5)
    with torch.no_grad():
        assert not trl.ChunkedLogprobs.apply(*arguments)[0].requires_grad
    same(trl.ChunkedLogprobs.apply(*arguments), want, inputs, doubles)
    logprobs, entropies, squares, means, first = trl.ChunkedStatistics.apply(*arguments)
    same([logprobs, entropies], want, inputs, doubles)
    torch.testing.assert_close(squares, both.exp().pow(2).sum(-1).log().detach().float())
    torch.testing.assert_close(means, (z / 0.9).mean(-1).detach().float())
    assert first.tolist() == (z.argmax(-1) == targets).tolist()
    none = trl.ChunkedStatistics.apply(*arguments, ("log_probs",))
    assert [x is None for x in none] == [False, True, True, True, True]


def test_the_target_that_is_largest_is_seen():
    (hidden, weight, _), _ = head(torch.float32, 300)
    z = hidden @ weight.T
    targets = z.argmax(-1)
    targets[::2] = (targets[::2] + 1) % V
    found = trl.ChunkedStatistics.apply(hidden, weight, None, targets, 1.0, 64)[4]
    assert found.tolist() == (torch.arange(300) % 2 == 1).tolist()


def test_a_head_in_another_dtype_is_taken_to_that_of_the_hidden_states():
    (hidden, weight, bias), _ = head(torch.float32, 5)
    narrow, targets = hidden.detach().bfloat16(), ids(5)
    want = logs(narrow.double() @ weight.bfloat16().double().T + bias.bfloat16().double())
    got = trl.ChunkedLogprobs.apply(narrow, weight, bias, targets, 1.0, 64)
    torch.testing.assert_close(got[0].double(), at(want, targets), atol=1e-4, rtol=1e-5)
    got[0].sum().backward()
    assert weight.grad.dtype == torch.float32


def test_wrong_input_names_what_is_wrong():
    (hidden, weight, _), _ = head(torch.float32, 3)
    labels = ids(3)
    with pytest.raises(ValueError, match="reduction must be none, sum, mean, got 'max'"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "max")
    with pytest.raises(ValueError, match="temperature must be above 0"):
        verl.linear_cross_entropy(hidden, weight, labels, 0.0)
    with pytest.raises(ValueError, match="impl_backend must be 'torch' or 'liger', got 'x'"):
        verl.FusedLinearForPPO(impl_backend="x")
    with pytest.raises(ValueError, match=r"token 1031 at \(0,\) is outside"):
        trl.selective_log_softmax(torch.zeros(2, V), torch.tensor([V, 0]))
    weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3"):
        trl.ChunkedLogprobs.apply(hidden, weight, None, labels, 1.0, 64)


def example(name: str, *paths: str) -> str:
    """What examples/<name>.py prints, with more places to import from."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", f"examples/{name}.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *paths])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ---- patching


@pytest.fixture
def host(monkeypatch):
    """A package whose function two modules hold, one of them under another name."""
    home, user = types.ModuleType("somehost.home"), types.ModuleType("somehost.user")
    home.f = user.g = lambda: "theirs"
    home.kept = 1
    stranger = types.ModuleType("somehostile")
    stranger.f = home.f
    for module in (types.ModuleType("somehost"), home, user, stranger):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return home, user, stranger


def test_every_module_of_the_host_is_patched_and_put_back(host, monkeypatch):
    home, user, stranger = host
    own, patches = home.f, patching.Patches("somehost")
    new = lambda: "ours"  # noqa: E731
    patches.replace(home.f, new)
    assert home.f is user.g is new
    assert stranger.f is own
    assert patches.holds(home.f)
    assert not patches.holds(own)
    late = types.ModuleType("somehost.late")
    late.f = home.f
    monkeypatch.setitem(sys.modules, "somehost.late", late)
    patches.undo()
    patches.undo()
    assert home.f is user.g is late.f is own
    assert home.kept == 1


@pytest.mark.parametrize(
    ("found", "warns"),
    [("0.9.1", False), ("0.9.0", True), ("0.10.0", True), ("0.9.1+local", False), ("?", True)],
)
def test_a_version_outside_the_tested_range_is_said_once(monkeypatch, found, warns):
    monkeypatch.setattr(versions, "_said", set())
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: found)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        versions.check("verl")
        versions.check("verl")
    assert len(said) == warns
    for warning in said:
        assert warning.category is UserWarning
        for part in ("verl", found, "tested range, 0.9.1"):
            assert part in str(warning.message)


def test_the_range_is_in_the_warning_of_a_loaded_source_tree(monkeypatch):
    monkeypatch.setattr(versions, "_said", set())
    module = types.ModuleType("trl")
    module.__version__ = "2.0.0"
    monkeypatch.setitem(sys.modules, "trl", module)
    with pytest.warns(
        UserWarning, match=re.escape("trl 2.0.0 is outside the tested range, 1.13.0 to")
    ):
        versions.check("trl")


def test_a_host_that_is_not_there_is_named():
    with pytest.raises(ImportError, match=r"^nohost is not installed: pip install nohost$"):
        versions.load("nohost", "nohost.utils")
    with pytest.raises(AttributeError, match="no attribute 'nohost'"):
        _ = integrations.nohost


def test_importing_a_drop_in_imports_no_host_and_its_example_says_so():
    code = """
import sys
class Block:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("trl", "verl", "openrlhf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import runpy
from nlhf_kernels import integrations
for host in ("trl", "verl", "openrlhf"):
    getattr(integrations, host)
assert "transformers" not in sys.modules
for host in ("trl", "verl", "openrlhf"):
    try:
        runpy.run_path(f"examples/{host}_ops.py", run_name="__main__")
    except SystemExit as end:
        sys.stdout.write(f"{end.code}\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hosts = ("trl", "verl", "openrlhf")
    wanted = [f"{host}_ops: {host} is not installed: pip install {host}" for host in hosts]
    assert done.stdout.splitlines() == wanted


# ---- a vocabulary that two processes share

PART = """
import datetime, sys
import torch
import torch.distributed as dist
from nlhf_kernels import integrations
from tests.test_integrations import at, atol, entropy, head, ids, logs

def near(x, y):
    torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=atol(x.dtype, y))

def judge(rank):
    (hidden, weight, _), (h, w, _) = head(torch.float32, 2, 3)
    labels = ids(2, 3)
    mine = slice(0, 600) if rank == 0 else slice(600, None)
    part = weight.detach()[mine].clone().requires_grad_()
    got = integrations.verl.linear_cross_entropy(
        hidden, part, labels, 0.8, "mean", dist.group.WORLD
    )
    both = logs(h @ w.T, 0.8).flatten(0, -2)
    want = at(both, labels.flatten()).mean(), entropy(both)
    for x, y in zip(got, want, strict=True):
        near(x, y)
    grads = torch.autograd.grad(got[0] + (got[1] * labels.flatten()).sum(), (hidden, part))
    exact = torch.autograd.grad(want[0] + (want[1] * labels.flatten()).sum(), (h, w))
    near(grads[1], exact[1][mine])
    # a share: what Megatron adds up is the gradient
    share = grads[0].clone()
    dist.all_reduce(share)
    near(share, exact[0])
    assert not torch.allclose(grads[0], share)

rank, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{file}", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=60),
)
# nothing of the group may outlive it
judge(rank)
dist.barrier()
dist.destroy_process_group()
"""


def test_ranks_that_share_the_vocabulary_have_shares_of_the_gradient(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PART, str(rank), str(tmp_path / "meeting")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
