"""One of two processes that share a vocabulary: ``test_vocabulary_parallel`` starts both.

Each judges its part by the oracle of the whole, which it works out alone.
"""

import datetime
import re
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import nlhf_kernels as nk
from nlhf_kernels.ops import heads
from nlhf_kernels.testing.compare import compare
from nlhf_kernels.testing.gradients import leaves, named, oracle, statistics_of
from tests.conftest import interpret_sooner

B, T, D = 2, 3, 5
# by rank
SIZES = (37, 33)
V = sum(SIZES)
KL = ("reward_to_go", "sequence", "token", "exact")
# what has a column, or a row, for each id
BY_ID = ("logits", "ref_logits", "weight", "bias", "ref_weight", "ref_bias")
SECONDS = 60


def rows(dtype: torch.dtype) -> dict:
    """Logits of two models: a row with nothing finite in one part, one in the other, NaN."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, B, T, V, generator=generator, dtype=torch.float64) * 3
    start = SIZES[0]
    logits[0, 0, :start] = -torch.inf
    logits[0, 1, start:] = -torch.inf
    # what both ban counts 0 in the KL
    ref_logits[0, 1, start:] = -torch.inf
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 0] = False
    logits[~mask], ref_logits[~mask] = torch.nan, torch.nan
    # in either part, at both sides of the border, and outside of all under the mask
    tokens = torch.tensor([[start + 9, 3, V - 1], [2**62, start - 1, start]])
    given = {"logits": logits.to(dtype), "ref_logits": ref_logits.to(dtype), "tokens": tokens}
    return given | {"mask": mask}


def head(dtype: torch.dtype, banned: bool) -> dict:
    """Hidden states and heads; with ``banned`` nothing of the first part can be said."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    given = {name: x for name, x in rows(dtype).items() if "logits" not in name}
    given |= {"hidden": normal(B, T, D), "ref_hidden": normal(B, T, D)}
    given |= {"weight": normal(V, D), "ref_weight": normal(V, D), "bias": normal(V)}
    given["ref_bias"] = normal(V)
    for name in ("hidden", "ref_hidden"):
        given[name][~given["mask"]] = torch.nan
    if banned:
        given["bias"][: SIZES[0]] = -torch.inf
        given["tokens"] = given["tokens"].clamp(min=SIZES[0])
    return given


def cases(few: bool) -> Iterator[tuple[str, str, dict]]:
    """(what it is called, op, arguments by name)."""
    scaling = {"temperature": 0.8, "softcap": 4.0}
    loss = {"preference": torch.tensor([0.3, 0.9]), "tau": 0.3}
    dtypes = (torch.float32,) if few else (torch.float64, torch.float32, torch.bfloat16)
    for dtype in dtypes:
        given = rows(dtype)
        own = {name: x for name, x in given.items() if name != "ref_logits"}
        yield f"{dtype}", "token_logprobs", own
        yield f"{dtype}, in place", "token_kl", given | {"inplace_backward": True} | scaling
        if not few:
            yield f"{dtype}, in place", "token_logprobs", own | {"inplace_backward": True}
            yield f"{dtype}", "token_kl", given
        for kl in KL:
            extra = {"inplace_backward": kl == "exact"} | (scaling if kl != "sequence" else {})
            yield f"{dtype}, {kl}", "pairwise_pg_loss", given | loss | {"kl": kl} | extra
    for dtype in dtypes:
        given = head(dtype, banned=False)
        chunks = {"memory_budget": 1, "logit_scale": 0.7} | scaling
        own = {name: x for name, x in given.items() if not name.startswith("ref_")}
        yield f"{dtype}", "linear_token_logprobs", own | chunks
        yield f"{dtype}", "linear_token_kl", given | chunks
        for kl in ("reward_to_go", "exact") if few else KL:
            yield f"{dtype}, {kl}", "linear_pairwise_pg_loss", given | loss | chunks | {"kl": kl}
    if not few:
        given = head(torch.float64, banned=True)
        yield "a part without a word", "linear_token_kl", given
        yield "a part without a word", "linear_pairwise_pg_loss", given | loss | {"kl": "exact"}


def judge(op: str, arguments: dict, some: slice, group, backend: str) -> None:
    """Values, and gradients of all that has one, of the ids ``some``."""
    inplace = arguments.pop("inplace_backward", False)
    want = oracle(op, (), named(op, (), arguments))
    part = {name: x[..., some] if "logits" in name else x for name, x in arguments.items()}
    part |= {name: x[some] for name, x in arguments.items() if "weight" in name or "bias" in name}
    part = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in part.items()}
    own = leaves(op, part)
    for x in own.values():
        x.requires_grad_()
    extra = {"inplace_backward": True} if inplace else {}
    outputs = getattr(nk, op)(**part, **extra, group=group, backend=backend)
    for name, got, x in zip(outputs._fields, outputs, want.outputs, strict=True):
        compare(name, got, x, statistics_of(arguments))
    live = [x for x in outputs if x.requires_grad]
    grads = torch.autograd.grad(live, list(own.values()), want.grads)
    right = [want.gradients[0][1], *want.sums]
    for (name, leaf), got, x in zip(own.items(), grads, right, strict=True):
        if name in BY_ID:
            x = x[..., some] if name == "logits" else x[some]
        compare(f"the gradient of {name}", got, x, leaf.dtype)
        if inplace:
            compare("the gradient in place", leaf, x, leaf.dtype)


def infinite(some: slice, backend: str) -> None:
    """The reference alone bans an id, or all of a part: no gradient is asked of it."""
    given = rows(torch.float32)
    start = SIZES[0]
    # where nothing else is infinite
    given["ref_logits"][0, 2, start + 3] = -torch.inf
    given["ref_logits"][1, 1, start:] = -torch.inf
    given["ref_logits"][1, 2, :start] = -torch.inf
    want = nk.token_kl(**given, backend="eager")
    assert want.kl.isinf().tolist() == [[False, False, True], [False, True, True]]
    part = {name: x[..., some] if "logits" in name else x for name, x in given.items()}
    got = nk.token_kl(**part, group=dist.group.WORLD, backend=backend)
    for name, x, y in zip(got._fields, got, want, strict=True):
        compare(f"{name} where the reference bans", x, y, torch.float32)


def draws(some: slice, backend: str) -> None:
    """The same tokens as from the whole, with and without a filter."""
    generator = torch.Generator().manual_seed(2)
    logits, ref_logits = torch.randn(2, 6, V, generator=generator) * 3
    hidden, weight = torch.randn(6, D, generator=generator), torch.randn(V, D, generator=generator)
    part = {"group": dist.group.WORLD, "backend": backend}
    for more in ({}, {"top_k": 9, "top_p": 0.8}):
        settings = {"mixture_coef": 0.3, "seed": 5, "position": 2, **more}
        calls = {
            "mixture_sample": ((logits, ref_logits), (logits[:, some], ref_logits[:, some])),
            # the second hidden states are the reference's: one head for both
            "linear_mixture_sample": ((hidden, weight, -hidden), (hidden, weight[some], -hidden)),
        }
        for op, (whole, own) in calls.items():
            want = getattr(nk, op)(*whole, **settings, backend="eager")
            got = getattr(nk, op)(*own, **settings, **part)
            for name, x, y in zip(got._fields, got, want, strict=True):
                compare(f"{op}: {name}", x, y, y.dtype)


def refusals(rank: int, some: slice, backend: str) -> None:
    """What a group does not go with, in one line that names the op."""
    given = rows(torch.float32)
    logits, tokens, mask = given["logits"][..., some].clone(), given["tokens"], given["mask"]
    one = dist.new_group([0])
    wrong = {
        f"is outside [0, {V})": lambda: nk.token_logprobs(
            logits, tokens.clamp(max=V), group=dist.group.WORLD, backend=backend
        ),
    }
    if rank == 1:
        wrong["a process group of this process"] = lambda: nk.token_logprobs(
            logits, tokens, mask=mask, group=one, backend=backend
        )
    for words, call in wrong.items():
        with pytest.raises(ValueError, match=f"^token_logprobs: [^\\n]*{re.escape(words)}[^\\n]*$"):
            call()
    # dynamo wraps it; without fullgraph the call runs outside of the graph
    compiled = torch.compile(nk.token_logprobs, backend="eager", fullgraph=True)
    said = re.escape("ValueError('token_logprobs: group cannot be used in torch.compile')")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=said):
        compiled(logits, tokens, mask=mask, group=dist.group.WORLD, backend=backend)


def main(rank: int, file: str, backend: str, few: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    # five tokens that are kept make two chunks
    heads.FEWEST["cpu"] = 3
    some = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], V)
    for what, op, arguments in cases(few):
        try:
            judge(op, arguments, some, dist.group.WORLD, backend)
        except AssertionError as error:
            raise AssertionError(f"{op}, {what}, rank {rank}: {error}") from error
    infinite(some, backend)
    draws(some, backend)
    # once is enough, and dynamo takes seconds
    if backend == "cpp":
        refusals(rank, some, backend)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    few = sys.argv[4] == "few"
    if few:
        interpret_sooner()
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], few)
