"""The cases of every op: the shapes that tests need and why, the shapes that benchmarks use."""

import math

from nlhf_kernels.testing import heads, losses, sampling
from nlhf_kernels.testing.case import F32, OPS, Case, Op

__all__ = ["HEADS", "OPS", "PER_TOKEN", "SAMPLERS", "Case", "Op", "traffic"]

OPS |= {
    "mixture_sample": sampling.MIXTURE_SAMPLE,
    "linear_mixture_sample": sampling.LINEAR_MIXTURE_SAMPLE,
    "token_logprobs": losses.TOKEN_LOGPROBS,
    "linear_token_logprobs": heads.LINEAR_TOKEN_LOGPROBS,
    "token_kl": losses.TOKEN_KL,
    "linear_token_kl": heads.LINEAR_TOKEN_KL,
    "pairwise_pg_loss": losses.PAIRWISE_PG_LOSS,
    "linear_pairwise_pg_loss": heads.LINEAR_PAIRWISE_PG_LOSS,
}
SAMPLERS = ("mixture_sample", "linear_mixture_sample")
HEADS = ("linear_token_logprobs", "linear_token_kl", "linear_pairwise_pg_loss")
# whose backward makes the logits again: who is given only gradients cannot have kept them
PER_TOKEN = ("linear_token_logprobs", "linear_token_kl")


def traffic(case: Case, backward: bool = False) -> tuple[int, int]:
    """(bytes, FLOPs) that a call cannot avoid: every logit moved once, 4 flops per logit and pass.

    An exponential counts as one. What is per token or row is left out: it is a V-th of the rest.
    Where the logits are made first, a call moves the heads and hidden states, and multiplies them.
    """
    size = math.prod(case.shape)
    itemsize = case.dtype.itemsize
    assert not (backward and case.op in SAMPLERS), "sampling has no gradient"
    if case.op == "mixture_sample":
        ref = case.options.get("ref_dtype", F32)
        # both models and, with a reference, three distributions
        return size * (itemsize + (ref.itemsize if ref else 0)), size * (12 if ref else 4)
    if case.op == "linear_mixture_sample":
        B, D, V = case.shape
        heads = 1 if case.options.get("heads") == "shared" else 2
        return (heads * V + 2 * B) * D * itemsize, 2 * 2 * size
    exact = case.op.endswith("token_kl") or case.options.get("kl") == "exact"
    if case.op in HEADS:
        return _head_traffic(case, backward)
    if backward:
        return (3 if exact else 2) * size * itemsize, 4 * size
    models = 2 if exact or case.options.get("ref") == "logits" else 1
    return models * size * itemsize, models * 4 * size


def _head_traffic(case: Case, backward: bool) -> tuple[int, int]:
    """Of a head that is trained: 2NVD a product, and there and back are three.

    The gradients of a loss are made with its logits, those of single tokens after a second pass.
    """
    *batch, D, V = case.shape
    N = math.prod(batch)
    hidden, weight = N * D * case.dtype.itemsize, V * D * case.dtype.itemsize
    ref, again = case.options.get("ref"), case.op in PER_TOKEN
    # another head, or other hidden states alone
    refs = {"own": hidden + weight, "shared": hidden}.get(ref, 0)
    product = 2 * N * V * D
    logits = product * (2 if refs else 1)
    if not backward:
        return hidden + weight + refs, logits
    # the factors are read once more, and their gradients written; a second pass over the logits of
    # the reference counts as nothing: its own are made again for want of memory alone
    return 2 * (hidden + weight) + refs * again, (2 + again) * product
