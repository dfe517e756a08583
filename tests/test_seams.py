"""Ops and what goes around them: torch.compile, autocast, DTensor, export, CUDA graphs."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf_kernels import integrations, registry
from nlhf_kernels.testing import OPS
from tests.test_wrong_input import right

V, D = 37, 8
trl, verl, openrlhf = integrations.trl, integrations.verl, integrations.openrlhf
IDS = torch.tensor([[3, 0, 36], [7, 8, 9]])


def head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, D, generator=generator).to(dtype)
    return hidden.requires_grad_(), torch.randn(V, D, generator=generator).to(
        dtype
    ).requires_grad_()


# ---- torch.compile, through the drop-ins


def by_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T
    logprobs = trl.selective_log_softmax(logits, IDS)
    several = trl.selective_log_softmax(logits, IDS[..., None].expand(2, 3, 2))
    both = trl.selective_log_softmax_and_entropy(logits, IDS, temperature=0.7)
    other = openrlhf.log_probs_from_logits(logits, IDS, 0.9)
    plain = verl.logprobs_from_logits(logits * 1, IDS)
    total = logprobs + several.sum(-1) + both[0] - 0.1 * both[1] + other + plain
    return (total - trl.entropy_from_logits(logits)).exp().mean()


def by_head(hidden: Tensor, weight: Tensor) -> Tensor:
    logprobs, entropy = verl.FusedLinearForPPO()(hidden, weight, IDS, 0.8)
    kernel = verl.linear_cross_entropy(hidden, weight, IDS, 0.8, "mean")
    rows = hidden.flatten(0, 1)
    chunked = trl.ChunkedLogprobs.apply(rows, weight, None, IDS.flatten(), 0.9, 64)
    return (logprobs - 0.1 * entropy).exp().mean() + kernel[0] + chunked[0].sum()


@pytest.mark.parametrize("train", [by_logits, by_head])
def test_a_loss_through_the_drop_ins_is_one_graph(train):
    torch._dynamo.reset()
    want_leaves, leaves = head(), head()
    want = train(*want_leaves)
    got = torch.compile(train, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(want, want_leaves)
    for x, y in zip(torch.autograd.grad(got, leaves), grads, strict=True):
        torch.testing.assert_close(x, y)


# ---- autocast


@pytest.mark.parametrize("backend", ["", "eager"])
def test_autocast_changes_nothing(op, backend):
    """An op computes in its own dtypes, whatever is around it."""
    for case in OPS[op].tests[:12]:
        if case.options.get("inplace_backward"):
            continue
        arguments, named = case.inputs()
        found = []
        for enabled in (False, True):
            leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments]
            mine = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
            differentiable = "sample" not in op
            for x in mine if differentiable else ():
                x.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                outputs = getattr(nk, op)(*leaves, **named | {"backend": backend})
            outputs = [x for x in outputs if isinstance(x, Tensor)]
            wanted = [x for x in outputs if x.requires_grad and x.numel()]
            grads = ()
            if wanted:
                ones = [torch.ones_like(x) for x in wanted]
                grads = torch.autograd.grad(wanted, mine, ones, allow_unused=True)
            found.append([*(x.detach() for x in outputs), *grads])
        for x, y in zip(*found, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_a_head_in_another_dtype_is_one_clear_error():
    hidden, weight = head()
    wanted = r"linear_token_logprobs: weight must be \(V, D\) like hidden"
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=rf"{wanted}.*float32 \(37, 8\).*bfloat16 \(2, 3, 8\)"),
    ):
        nk.linear_token_logprobs(hidden.bfloat16(), weight, IDS)


# ---- DTensor


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


ALL = (*registry.OPS, *registry.UPDATES, *registry.LAYERS)


def given(op: str) -> dict:
    if op == "ema_update_":
        return {"ema": torch.zeros(3), "params": torch.zeros(3), "decay": 0.5}
    if op == "skinny_linear":
        return {"input": torch.zeros(2, D), "weight": torch.zeros(V, D), "bias": torch.zeros(V)}
    if op == "pair_loss":
        names = ("logprobs", "other_logprobs", "anchor_logprobs", "other_anchor_logprobs")
        numbers = {name: torch.full((2,), 0.5) for name in (*names, "preference")}
        return numbers | {"method": "online_ipo", "tau": 0.1}
    return right(op)


def test_a_dtensor_is_one_error_that_says_what_to_give(mesh):
    from torch.distributed.tensor import distribute_tensor

    for name in ALL:
        arguments = given(name)
        for argument in [key for key, x in arguments.items() if isinstance(x, Tensor)]:
            changed = arguments | {argument: distribute_tensor(arguments[argument], mesh)}
            if name == "ema_update_":
                changed |= {key: [changed[key]] for key in ("ema", "params")}
            wanted = (
                rf"^{name}: {argument}(\[0\])? is a DTensor.*full_tensor\(\).*to_local\(\).*group="
            )
            with pytest.raises(ValueError, match=wanted):
                getattr(nk, name)(**changed)
            if name != "ema_update_":
                # the same without it is right, so that nothing else raised
                getattr(nk, name)(**arguments)


# ---- torch.export


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, V)

    def forward(self, hidden, tokens, mask):
        weight, bias = self.head.weight, self.head.bias
        logits, rows = self.head(hidden), hidden[0]
        return (
            *nk.linear_token_logprobs(hidden, weight, tokens, bias=bias, mask=mask),
            *nk.token_logprobs(logits, tokens, temperature=0.7),
            *nk.linear_token_kl(hidden, weight, hidden.flip(0), weight, tokens, bias=bias),
            *nk.token_kl(logits, logits.flip(0), tokens, mask=mask),
            *nk.linear_mixture_sample(
                rows, weight, -rows, weight, mixture_coef=0.3, seed=1, position=2
            ),
        )


class Sampler(nn.Module):
    def forward(self, policy_logits, ref_logits, seed, position):
        return tuple(
            nk.mixture_sample(
                policy_logits, ref_logits, mixture_coef=0.3, top_p=0.9, seed=seed, position=position
            )
        )


def test_what_is_exported_gives_the_same_numbers():
    module, (hidden, _) = Statistics(), head()
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    exported = torch.export.export(module, (hidden.detach(), IDS, mask)).module()
    for example in ((hidden.detach(), IDS, mask), (torch.randn(2, 3, D), IDS.flip(0), 1 - mask)):
        for x, y in zip(exported(*example), module(*example), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_an_exported_sampler_draws_the_same_tokens_for_any_number_of_rows():
    def inputs(rows: int) -> tuple:
        generator = torch.Generator().manual_seed(rows)
        logits = 3 * torch.randn(2, rows, 1500, generator=generator)
        return *logits, torch.arange(rows) + 5, torch.arange(rows)

    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = tuple({0: rows} for _ in range(4))
    exported = torch.export.export(Sampler(), inputs(4), dynamic_shapes=shapes).module()
    for count in (4, 9):
        for x, y in zip(exported(*inputs(count)), Sampler()(*inputs(count)), strict=True):
            assert torch.equal(x, y)


# ---- CUDA graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_replays_ops_on_new_numbers():
    where = {"device": "cuda"}
    logits, ref = torch.randn(2, 4, 1500, **where)
    tokens = torch.arange(4, **where)
    seeds, positions = torch.arange(4, **where), torch.zeros(4, dtype=torch.int64, **where)

    def step():
        drawn = nk.mixture_sample(
            logits, ref, mixture_coef=0.4, temperature=0.9, seed=seeds, position=positions
        )
        return *drawn, *nk.token_logprobs(logits, tokens)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = step()
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for x in (logits, ref):
            x.copy_(torch.randn(4, 1500, generator=generator, **where))
        positions.fill_(seed)
        graph.replay()
        with torch.no_grad():
            want = step()
        for x, y in zip(outputs, want, strict=True):
            assert torch.equal(x, y)
