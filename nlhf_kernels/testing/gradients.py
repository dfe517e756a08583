"""Whether outputs and gradients are right: ``eager`` in float64, its gradients by autograd."""

import functools
import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf_kernels import eager
from nlhf_kernels.testing.compare import (
    Answers,
    Snapshot,
    compare,
    grad_outputs,
    poisoned_memory,
    widened,
)

# whose gradients an op gives: of the first, one row for each token; of the others, sums over tokens
LEAVES = {"linear_": ("hidden", "weight", "bias"), "": ("logits",)}
# what belongs to no token
HEADS = ("weight", "bias", "ref_weight", "ref_bias")


class Oracle(NamedTuple):
    """``eager`` in float64 on the same rounded inputs."""

    outputs: tuple
    # which outputs are differentiated, and what their gradients are multiplied by
    live: list[bool]
    grads: list[Tensor]
    # of the first leaf, by pieces: (which rows, gradient)
    gradients: list[tuple[slice, Tensor]]
    # of the other leaves
    sums: list[Tensor]


@functools.cache
def _names(op: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(nk, op)).parameters)


def named(op: str, args: tuple, kwargs: dict) -> dict:
    """All arguments by name."""
    return dict(zip(_names(op), args, strict=False)) | kwargs


def leaves(op: str, arguments: dict) -> dict[str, Tensor]:
    names = LEAVES["linear_" if op.startswith("linear_") else ""]
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def oracle(op: str, args: tuple, kwargs: dict, at_once: int = 2**25) -> Oracle:
    """Whole sequences, of at most ``at_once`` logits together: 0.3 GB each time they are copied.

    They know of each other only in the mean of a loss, so that parts add up to the whole.
    """
    results, gradients, shares, grads, sums = [], [], [], [], []
    arguments = named(op, args, kwargs)
    tokens, statistics = arguments["tokens"], statistics_of(arguments)
    for some, share, part in sequences(arguments, at_once):
        wide = widened(part)
        own = leaves(op, wide)
        for name, x in own.items():
            own[name] = wide[name] = x.detach().clone().requires_grad_()
        result = getattr(eager, op)(**wide)
        outputs = [x for x in result if x.requires_grad]
        if not grads:
            # a result is a number for all, or one for each token
            likes = [torch.empty(tokens.shape if x.dim() else ()) for x in outputs]
            grads = [g.to(statistics).to(tokens.device) for g in grad_outputs(likes)]
        weights = [g.double()[some] if g.dim() else share * g.double() for g in grads]
        first, *others = torch.autograd.grad(outputs, list(own.values()), weights)
        gradients.append((some, first))
        sums = [x + y for x, y in zip(sums, others, strict=True)] if sums else others
        shares.append(share)
        results.append(result)
    live = [x.requires_grad for x in results[0]]

    def whole(pieces: tuple) -> Tensor:
        pieces = [x.detach() for x in pieces]
        if pieces[0].dim() >= tokens.dim():
            # several anchors come first
            return torch.cat(pieces, pieces[0].dim() - tokens.dim())
        if pieces[0].dim():
            return pieces[0]
        return sum(share * x for share, x in zip(shares, pieces, strict=True))

    columns = map(whole, zip(*results, strict=True))
    return Oracle(type(results[0])(*columns), live, grads, gradients, sums)


def statistics_of(arguments: dict) -> torch.dtype:
    """That of the logits; an exact KL is one of two models."""
    names = ["logits", "hidden"]
    if "preference" not in arguments or arguments.get("kl") == "exact":
        names += ["ref_logits", "ref_hidden"]
    return eager.statistics_dtype(*(arguments.get(name) for name in names))


def sequences(arguments: dict, at_once: int) -> Iterator[tuple]:
    """(which, their share of the mean, arguments): all at once if they are few, or packed."""
    tokens = arguments["tokens"]
    B = len(tokens)
    size = B
    if B and "cu_seqlens" not in arguments:
        V = len(arguments["weight"]) if "weight" in arguments else arguments["logits"].shape[-1]
        size = max(1, at_once // max(1, tokens[0].numel() * V))
    if size >= B:
        yield slice(None), 1.0, arguments
        return
    for start in range(0, B, size):
        some = slice(start, min(start + size, B))

        def cut(name, x, some=some):
            if isinstance(x, tuple):
                return tuple(cut(name, one) for one in x)
            return x[some] if isinstance(x, Tensor) and x.dim() and name not in HEADS else x

        share = (some.stop - start) / B
        yield some, share, {name: cut(name, x) for name, x in arguments.items()}


def check_gradients(
    answers: Answers, op: str, backend: str, by_own_logprobs: bool, inplace: bool
) -> None:
    args, kwargs = answers.inputs()
    inplace |= kwargs.pop("inplace_backward", False)
    arguments = named(op, args, kwargs)
    own_leaves = [x.requires_grad_() for x in leaves(op, arguments).values()]
    logits, tokens = own_leaves[0], arguments["tokens"]
    statistics = statistics_of(arguments)

    before = Snapshot(args, kwargs)
    extra = {"inplace_backward": True} if inplace else {}
    with poisoned_memory():
        outputs = getattr(nk, op)(*args, **kwargs, **extra, backend=backend)
    before.require_unchanged()
    own = None
    if by_own_logprobs and op.endswith("pairwise_pg_loss") and arguments.get("kl") != "exact":
        own = outputs.logprobs.detach()
        assert own.shape == tokens.shape, f"logprobs are {own.shape}"

    def right(args: tuple, kwargs: dict) -> Oracle:
        kwargs = {name: x for name, x in kwargs.items() if name != "inplace_backward"}
        return oracle(op, args, ({} if own is None else {"policy_logprobs": own}) | kwargs)

    want = answers.once("oracle", right, by=own)
    assert type(outputs) is type(want.outputs), f"{op} returns {type(outputs)}"
    for name, got, x, live in zip(outputs._fields, outputs, want.outputs, want.live, strict=True):
        compare(name, got, x, statistics)
        assert got.requires_grad == live, f"{name}.requires_grad is wrong"

    with poisoned_memory():
        outputs = [x for x in outputs if x.requires_grad]
        # copies: a wrong kernel must not spoil what the next is judged by
        got, *sums = torch.autograd.grad(outputs, own_leaves, [g.clone() for g in want.grads])
    for some, gradient in want.gradients:
        compare("the gradient", got[some], gradient, logits.dtype)
        if inplace:
            compare("the gradient in place of the logits", logits[some], gradient, logits.dtype)
    for x, y, leaf in zip(sums, want.sums, own_leaves[1:], strict=True):
        compare(f"the gradient of {tuple(leaf.shape)} for all tokens", x, y, leaf.dtype)
    before.require_unchanged(but=logits if inplace else None)
