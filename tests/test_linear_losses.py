"""What the ``linear_`` losses owe beside right answers: chunks that cannot be seen, and no work and
no memory for what nobody asked for.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nlhf_kernels as nk
from nlhf_kernels.ops import common, heads
from nlhf_kernels.testing.compare import compare

LINEAR = ("linear_token_logprobs", "linear_token_kl", "linear_pairwise_pg_loss")
KL = ("reward_to_go", "sequence", "token", "exact")
B, T, D, V = 3, 11, 6, 40


def problem(dtype=torch.float32, batch=(B, T), device="cpu", trained=("hidden", "weight", "bias")):
    """Everything that any of the three ops takes; what is under the mask is NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.to(device, dtype)

    mask = torch.rand(*batch, generator=generator) < 0.7
    given = {"hidden": normal(*batch, D), "weight": normal(V, D, scale=0.5), "bias": normal(V)}
    given |= {"ref_hidden": normal(*batch, D + 1), "ref_weight": normal(V, D + 1, scale=0.5)}
    given["tokens"] = torch.randint(V, batch, generator=generator).to(device)
    given["mask"] = mask.to(device)
    given["preference"] = torch.rand(batch[0], generator=generator).to(device)
    for name in ("hidden", "ref_hidden"):
        given[name][~given["mask"]] = torch.nan
    for name in trained:
        given[name].requires_grad_()
    return given


def call(op, kl, given, **settings):
    """One number that all gradients come from."""
    names = ["hidden", "weight", "bias", "tokens", "mask"]
    if op == "linear_token_kl" or (op == "linear_pairwise_pg_loss" and kl == "exact"):
        names += ["ref_hidden", "ref_weight"]
    if op == "linear_pairwise_pg_loss":
        names += ["preference"]
        settings |= {"tau": 0.3, "kl": kl}
        if kl != "exact":
            generator = torch.Generator().manual_seed(1)
            refs = torch.randn(given["tokens"].shape, generator=generator) - 3
            settings["ref_logprobs"] = refs.to(given["hidden"].device)
    result = getattr(nk, op)(**{name: given[name] for name in names}, **settings)
    live = [x for x in result if x.requires_grad]
    return result, sum((x * (i + 1.5)).sum() for i, x in enumerate(live))


def gradients(total, given):
    own = [x for x in given.values() if x.requires_grad]
    return torch.autograd.grad(total, own)


class Watch(TorchDispatchMode):
    """The products, by shape of what is multiplied, and the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        if name in ("mm", "addmm", "addmm_", "bmm", "matmul"):
            two = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.products.append(tuple(tuple(x.shape) for x in two))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def seen(monkeypatch):
    """A dispatch mode sees what a raw op is, and not what it is made of."""

    def body_itself(raw_op, body, part, *arguments):
        return body(*arguments, part=part)

    monkeypatch.setattr(common, "call", body_itself)


@pytest.fixture
def small_chunks(monkeypatch):
    """``memory_budget=1`` then makes chunks of four tokens."""
    for kind in heads.FEWEST:
        monkeypatch.setitem(heads.FEWEST, kind, 4)


@pytest.fixture(params=[(op, kl) for op in LINEAR for kl in (KL if "pg" in op else KL[:1])],
                ids=lambda p: f"{p[0]}-{p[1]}")  # fmt: skip
def loss(request):
    return request.param


# ---- chunks


def test_chunks_cannot_be_seen(loss, small_chunks):
    found = []
    for budget in (None, 1):
        given = problem()
        result, total = call(*loss, given, memory_budget=budget, softcap=5.0, temperature=0.8)
        found.append([*result, *gradients(total, given)])
    for x, y in zip(*found, strict=True):
        compare("in chunks", y, x.double(), torch.float32)


def test_gradients_of_weights_are_as_exact_in_sixteen_chunks(monkeypatch):
    """Summed in float32 and rounded once: in bfloat16 sixteen sums would lose two digits."""
    monkeypatch.setitem(heads.FEWEST, "cpu", 64)
    for op in LINEAR:
        wide = problem(torch.bfloat16, batch=(16, 92), trained=())
        wide = {k: x.double() if x.is_floating_point() else x for k, x in wide.items()}
        wide["weight"].requires_grad_()
        (want,) = gradients(call(op, KL[0], wide, backend="eager")[1], wide)
        errors = []
        for budget in (None, 1):
            given = problem(torch.bfloat16, batch=(16, 92), trained=("weight",))
            chunks = -(-int(given["mask"].sum()) // 64)
            assert chunks >= 16
            (got,) = gradients(call(op, KL[0], given, memory_budget=budget)[1], given)
            assert got.dtype == torch.bfloat16
            errors.append(float((got.double() - want).norm() / want.norm()))
        assert errors[1] <= 1.01 * errors[0], (op, errors)
        # half a unit in the last of eight digits
        assert errors[1] < 2.0**-9, (op, errors)


def test_never_more_than_a_chunk_of_logits(loss, small_chunks, seen):
    given = problem(batch=(8, 50))
    kept = int(given["mask"].sum())
    with Watch() as watch:
        _, total = call(*loss, given, memory_budget=1)
        gradients(total, given)
    # hidden states of all tokens are less
    assert watch.largest <= 8 * 50 * (D + 1) < kept * V / 4


# ---- what is not asked for


def test_masked_tokens_are_not_multiplied(loss, seen):
    """The prompt and the padding are left out before the product, not after it."""
    given = problem()
    kept = int(given["mask"].sum())
    assert kept < B * T
    with Watch() as watch:
        _, total = call(*loss, given)
        gradients(total, given)
    sizes = {n for pair in watch.products for shape in pair for n in shape}
    assert sizes <= {kept, V, D, D + 1}, watch.products
    assert kept in sizes


def weights_of(products):
    """How many products give a gradient of a weight: V rows of D."""
    return sum(x[0] == V and y[1] == D for x, y in products)


def test_frozen_heads_cost_nothing(loss, seen):
    for trained, wanted in ((("hidden", "weight", "bias"), 1), (("hidden",), 0)):
        given = problem(trained=trained)
        with Watch() as watch:
            _, total = call(*loss, given)
            found = gradients(total, given)
        assert weights_of(watch.products) == wanted
        assert len(found) == len(trained)
    # nor do the hidden states of a model that is not trained
    given = problem(trained=("weight",))
    with Watch() as watch:
        _, total = call(*loss, given)
        gradients(total, given)
    assert weights_of(watch.products) == 1
    assert not any(x[1] == V and y == (V, D) for x, y in watch.products)


def test_without_gradients_there_are_none(loss, seen):
    counts = []
    for trained, mode in ((("hidden", "weight"), torch.no_grad()), ((), torch.enable_grad())):
        given = problem(trained=trained)
        with Watch() as watch, mode:
            result, _ = call(*loss, given)
        assert not any(x.requires_grad for x in result)
        counts.append(len(watch.products))
        # logits of one model, or of two
        assert counts[-1] == (2 if "exact" in loss or loss[0] == "linear_token_kl" else 1)


def test_given_logprobs_save_the_second_pass(seen):
    """Sums of whole sequences come before any gradient."""
    given = problem(trained=("hidden",))
    logprobs = call("linear_pairwise_pg_loss", "sequence", given)[0].logprobs
    counts, found = [], []
    for supplied in (None, logprobs):
        with Watch() as watch:
            _, total = call("linear_pairwise_pg_loss", "sequence", given, policy_logprobs=supplied)
            found += gradients(total, given)
        counts.append(len(watch.products))
    # logits once or twice, and what goes to the hidden states
    assert counts == [3, 2]
    assert torch.equal(*found)


# ---- gradients


def test_nothing_to_learn_from(loss, target):
    """No sequence, no token, or none that counts: 0, and gradients that are exactly 0."""
    for batch in ((0, T), (B, 0), (B, T)):
        given = problem(batch=batch, device=target.device)
        given["mask"][:] = False
        for name in ("hidden", "ref_hidden"):
            given[name] = torch.full_like(given[name], torch.nan)
        given["hidden"].requires_grad_()
        result, total = call(*loss, given, backend=target.backend)
        assert all(not x.any() for x in result)
        for grad in gradients(total, given):
            assert not grad.any()


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_tied_head_has_the_sum(loss, backend):
    """The embedding is the head: what comes through the hidden states is added."""
    given = problem(torch.float64, trained=())
    places = torch.where(given["mask"], given["tokens"], 0)
    found = []
    for op_backend, tied in ((backend, True), ("eager", False)):
        embedding = given["weight"].clone().requires_grad_()
        head = embedding if tied else given["weight"].clone().requires_grad_()
        some = given | {"hidden": embedding[places] * 0.5, "weight": head}
        _, total = call(*loss, some, backend=op_backend)
        grads = torch.autograd.grad(total, [embedding] if tied else [embedding, head])
        found.append(sum(grads))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_an_adapter_on_the_head(loss):
    given = problem(torch.float64, trained=("hidden",))
    found = []
    for backend in ("cpp", "eager"):
        generator = torch.Generator().manual_seed(3)
        down = torch.randn(2, D, generator=generator, dtype=torch.float64).requires_grad_()
        up = torch.randn(V, 2, generator=generator, dtype=torch.float64).requires_grad_()
        some = given | {"weight": given["weight"] + 0.3 * up @ down}
        _, total = call(*loss, some, backend=backend)
        found.append(torch.autograd.grad(total, [given["hidden"], up, down]))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_autocast_rounds_nothing(loss, backend):
    found = []
    for enabled in (False, True):
        given = problem()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result, total = call(*loss, given, backend=backend)
        found.append([*result, *gradients(total, given)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_second_backward_is_the_first(loss):
    given = problem()
    _, total = call(*loss, given)
    own = [x for x in given.values() if x.requires_grad]
    first = torch.autograd.grad(total, own, retain_graph=True)
    again = torch.autograd.grad(3 * total, own)
    for x, y in zip(first, again, strict=True):
        torch.testing.assert_close(3 * x, y)


# ---- losses and their per-token siblings


def coefficients(kl, logs, given, tau=0.3):
    """By hand, token by token, from (B, T) costs that count 0 under the mask."""
    ell, mask = logs, given["mask"]
    out = torch.zeros_like(ell)
    for b in range(len(ell)):
        for n in range(ell.shape[1]):
            sums = {
                "reward_to_go": ell[b, n:].sum(),
                "sequence": ell[b].sum(),
                "token": ell[b, n],
                "exact": ell[b, n + 1 :].sum(),
            }[kl]
            advantage = given["preference"][b] - 0.5 - tau * sums
            out[b, n] = -advantage / len(ell) if mask[b, n] else 0
    return out


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("linear", [True, False])
def test_a_loss_is_its_sibling_with_coefficients(kl, linear, target):
    """Fused losses must not drift from what they fuse."""
    batch = (2, 3) if target.interpreted else (B, T)
    given = problem(batch=batch, device=target.device)
    settings = {"backend": target.backend, "softcap": 5.0, "temperature": 0.8}
    mask, tokens = given["mask"], given["tokens"]
    some = {"mask": mask, "tokens": tokens} | settings
    if linear:
        own = [given["hidden"], given["weight"], given["bias"]]
        first = dict(zip(("hidden", "weight", "bias"), own, strict=True))
        ref = {"ref_hidden": given["ref_hidden"], "ref_weight": given["ref_weight"]}
        ops = nk.linear_token_logprobs, nk.linear_token_kl, nk.linear_pairwise_pg_loss
    else:
        generator = torch.Generator().manual_seed(5)
        logits, ref_logits = torch.randn(2, *batch, V, generator=generator).to(target.device)
        own = [logits.requires_grad_()]
        first, ref = {"logits": logits}, {"ref_logits": ref_logits}
        ops = nk.token_logprobs, nk.token_kl, nk.pairwise_pg_loss
    if kl == "exact":
        found = ops[1](**first, **ref, **some)
        by_hand = coefficients(kl, found.kl.detach(), given)
        total = (by_hand * found.logprobs).sum() + 0.3 / batch[0] * found.kl.sum()
        refs = ref
    else:
        found = ops[0](**first, **some)
        refs = {"ref_logprobs": torch.full_like(found.logprobs, -3.0).detach()}
        ell = torch.where(mask, found.logprobs.detach() + 3.0, 0)
        total = (coefficients(kl, ell, given) * found.logprobs).sum()
    loss = ops[2](**first, **refs, **some, preference=given["preference"], tau=0.3, kl=kl).loss
    compare("the loss", loss, total, torch.float32)
    grads = [torch.autograd.grad(x, own) for x in (loss, total)]
    for x, y in zip(*grads, strict=True):
        compare("the gradient", x, y, torch.float32)
