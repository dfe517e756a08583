"""The losses from hidden states: who else goes from a head's weight to them, and back.

Without a fused op one makes the logits of all tokens: a library's matrix product, then an op over
logits. Peers fuse the two, or work in chunks, so that those logits never lie in memory.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import gates
from bench.peers import absent, compiled, gpu_only, load, pg_weights
from bench.problem import Contender
from nlhf_kernels.testing import Case
from nlhf_kernels.testing.check import backends

# op -> that over logits
OVER_LOGITS = {
    "linear_token_logprobs": "token_logprobs",
    "linear_token_kl": "token_kl",
    "linear_pairwise_pg_loss": "pairwise_pg_loss",
}
# what TRL's trainer takes
TRL_CHUNK = 8192
# rows; torch's own choice was measured for 16 bits alone, and is a row or four with these heads in
# float32: the gradient of a whole weight for each
TORCH_CHUNK = {"cpu": 64, "cuda": None}
# of quick runs: an eighth of the sequences
_QUICKER = 8
LIGER_GRPO = "Liger fused linear GRPO, its log-probabilities first (no entropy)"


def quick(case: Case) -> Case:
    """The same head with fewer tokens."""
    if case.op not in OVER_LOGITS or case.shape[0] < _QUICKER:
        return case
    B, T, *head = case.shape
    B //= _QUICKER
    name = case.why.split(", N=")[0]
    return dataclasses.replace(case, why=f"{name}, N={B * T:,}", shape=(B, T, *head))


def contenders(case: Case, device: str) -> list[Contender]:
    """All but the op itself and eager: two of ours after a product, and the peers."""

    def contender(name, solve, missing="", peer=True):
        gate = functools.partial(gates.gradients, solve, case, device)
        return Contender(name, peer, solve, gate, missing)

    over, found = OVER_LOGITS[case.op], []
    for backend, inplace in itertools.product(backends(device), (False, True)):
        if backend != "eager":
            name = f"matmul + {backend}{', in place' if inplace else ''}"
            solve = after_matmul(case.op, backend, inplace)
            found.append(contender(name, solve, nk.reason(over, backend, device), peer=False))
    found.append(contender("torch.compile", compiled_eager(case.op)))
    if case.op == "linear_token_kl":
        return found
    loss = logprobs if case.op == "linear_token_logprobs" else pg_loss
    found += [contender(name, loss(solve), why) for name, solve, why in _logprobs(device)]
    if loss is pg_loss:
        found.append(contender(LIGER_GRPO, liger_grpo, absent("liger_kernel.chunked_loss")))
    return found


# ---- ours after a product, and eager compiled


def after_matmul(op: str, backend: str, inplace: bool) -> Callable:
    """The op over the logits of all tokens, those of the reference too if it has a head."""

    def solve(args: tuple, kwargs: dict) -> Tensor:
        hidden, weight, *rest = args
        kwargs = dict(kwargs)
        if op == "linear_token_kl":
            ref_hidden, ref_weight, *rest = rest
        else:
            ref_hidden, ref_weight = kwargs.pop("ref_hidden", None), kwargs.pop("ref_weight", None)
        refs = ()
        if ref_hidden is not None:
            with torch.no_grad():
                refs = (ref_hidden @ (weight if ref_weight is None else ref_weight).T,)
        if refs and op == "linear_pairwise_pg_loss":
            kwargs["ref_logits"], refs = refs[0], ()
        settings = {"inplace_backward": inplace, "backend": backend}
        result = getattr(nk, OVER_LOGITS[op])(hidden @ weight.T, *refs, *rest, **kwargs, **settings)
        return gates.differentiated(op, result)

    return solve


def compiled_eager(op: str) -> Callable:
    def formula(args: tuple, kwargs: dict) -> Tensor:
        return gates.differentiated(op, getattr(nk, op)(*args, **kwargs, backend="eager"))

    return compiled(formula)


# ---- peers: (hidden, weight, tokens) of all tokens in a row -> log-probabilities (N,)


def logprobs(solve: Callable) -> Callable:
    def all_of(args: tuple, kwargs: dict) -> Tensor:
        hidden, weight, tokens = args
        return solve(hidden.flatten(0, -2), weight, tokens.flatten()).view(tokens.shape)

    return all_of


def pg_loss(solve: Callable) -> Callable:
    all_of = logprobs(solve)

    def loss(args: tuple, kwargs: dict) -> Tensor:
        hidden, weight, tokens, mask, preference = args
        found = all_of((hidden, weight, tokens), kwargs).float()
        return (pg_weights(found, mask, preference, kwargs) * found).sum()

    return loss


def _logprobs(device: str) -> list[tuple[str, Callable, str]]:
    """(name, solver, why it is missing)"""
    torch_2_13 = (
        "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs torch 2.13 or later"
    )
    liger = gpu_only("liger_kernel.ops", device)
    cut = absent("cut_cross_entropy")
    found = [
        ("torch linear_cross_entropy", torch_linear, torch_2_13),
        ("torch linear_cross_entropy, chunked", torch_chunked, torch_2_13),
        ("Liger fused linear cross entropy", liger_linear, liger),
        ("TRL chunked log-probabilities", trl_chunked, absent("trl.trainer.utils")),
    ]
    if device == "cuda":
        return [
            *found,
            ("Cut Cross Entropy", cut_kernel, cut),
            # without leaving out what is too small to matter
            ("Cut Cross Entropy, exact", cut_exact, cut),
        ]
    return [
        *found,
        ("Cut Cross Entropy, torch_compile", cut_compiled, cut),
        ("Cut Cross Entropy", cut_kernel, gpu_only("cut_cross_entropy", device)),
    ]


def torch_linear(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, tokens, reduction="none")


def torch_chunked(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    rows = TORCH_CHUNK[hidden.device.type]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, tokens, reduction="none", options=options
    )


def liger_linear(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    # bias, weights of classes, ignored token, z loss, label smoothing, reduction
    settings = None, None, -100, 0.0, 0.0, "none"
    function = load("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    return -function.apply(hidden, weight, tokens, *settings)[0]


def trl_chunked(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    function = load("trl.trainer.utils")._ChunkedLogProbFunction
    # the bias comes third, the temperature after the tokens; entropy is computed as well
    return function.apply(hidden, weight, None, tokens, 1.0, TRL_CHUNK)[0]


def _cut(hidden: Tensor, weight: Tensor, tokens: Tensor, **settings) -> Tensor:
    solve = load("cut_cross_entropy").linear_cross_entropy
    return -solve(hidden, weight, tokens, reduction="none", **settings)


cut_kernel = functools.partial(_cut, impl="cce")
cut_exact = functools.partial(_cut, impl="cce", filter_eps=None)
cut_compiled = functools.partial(_cut, impl="torch_compile")


# ---- a peer of the whole loss


def liger_grpo(args: tuple, kwargs: dict) -> Tensor:
    """Log-probabilities first, since the advantage of a token depends on those after it.

    The loss "cispo" without clipping, times a ratio per token and over one item, is the same sum as
    ours.
    """
    hidden, weight, tokens, mask, preference = args
    liger = load("liger_kernel.chunked_loss")
    base = load("liger_kernel.chunked_loss.fused_linear_ppo")
    rows = hidden.detach().flatten(0, -2), weight.detach(), tokens.flatten()
    found, _ = base._selective_logprob_forward(*rows)
    weights = -pg_weights(found.view(tokens.shape), mask, preference, kwargs)
    loss = liger.LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="cispo", epsilon_high=1.0,
        chunk_size=len(tokens),
    )  # fmt: skip
    ones = torch.ones_like(preference, dtype=torch.float32)
    return loss(
        hidden, weight, tokens, mask.float(), ones, vllm_is_ratio=weights, num_items_in_batch=1
    )[0]
