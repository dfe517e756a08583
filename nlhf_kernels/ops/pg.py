"""What the policy-gradient loss owes from logits and from hidden states alike."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nlhf_kernels.ops import common

KL = ("reward_to_go", "sequence", "token", "exact")


class Terms(NamedTuple):
    """What stands between log-ratios and coefficients."""

    kl: str
    # one for each of several anchors
    tau: float | Sequence[float]
    baseline: float

    def cost(self, ell: Tensor | None) -> Tensor | None:
        """sum_j tau_j ell^j; a tau of 0 leaves its anchor out, because 0 * inf would be NaN."""
        if ell is None:
            return None
        if not isinstance(self.tau, Sequence):
            return self.tau * ell if self.tau else None
        terms = [tau * x for tau, x in zip(self.tau, ell, strict=True) if tau]
        return sum(terms[1:], terms[0]) if terms else None

    def kl_weight(self, sequences: int) -> float:
        """What the exact KL of a token is multiplied with in the loss."""
        return self.tau / max(sequences, 1) if self.kl == "exact" else 0.0


def prepared(x: Tensor | Sequence[Tensor] | None, mask: Tensor, dtype: torch.dtype):
    """Log-probabilities that were given, 0 under the mask; several of them stacked."""
    if x is None:
        return None
    if isinstance(x, Sequence):
        return torch.stack([prepared(one, mask, dtype) for one in x])
    return torch.where(mask, x.detach().to(dtype), 0).contiguous()


def check(
    op: str,
    name: str,
    rows: Tensor,
    tokens: Tensor,
    mask: Tensor,
    preference: Tensor,
    cu_seqlens: Tensor | None,
    tau: float | Sequence[float],
    ref_logprobs: Tensor | Sequence[Tensor] | None,
    ref_name: str,
    has_ref_rows: bool,
    policy_logprobs: Tensor | None,
    kl: str,
    baseline: float,
) -> None:
    """All but the logits, or hidden states, themselves: ``rows``, called ``name``."""
    packed = cu_seqlens is not None
    last = "V" if name == "logits" else "D"
    common.require(
        packed == (rows.dim() == 2),
        op,
        f"{name} must be (B, T, {last}), or (N, {last}) together with cu_seqlens, got "
        f"{common.describe(rows)} {'with' if packed else 'without'} cu_seqlens",
    )
    common.require(mask is not None, op, f"mask must be a tensor, got {common.describe(mask)}")
    common.check_tokens(op, tokens, mask, rows)
    shape, device = rows.shape[:-1], rows.device
    B = shape[0]
    if packed:
        common.require(
            isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 0,
            op,
            f"cu_seqlens must be int32 or int64 (B + 1,), got {common.describe(cu_seqlens)}",
        )
        common.check_tensor(
            op, "cu_seqlens", cu_seqlens, cu_seqlens.shape, (torch.int32, torch.int64), device
        )
        B = len(cu_seqlens) - 1
        _check_offsets(op, cu_seqlens, shape[0])
    common.check_tensor(op, "preference", preference, (B,), common.FLOATS, device)
    known = isinstance(kl, str) and kl in KL
    common.require(known, op, f"kl must be one of {', '.join(KL)}, got {common.describe(kl)}")
    high = common.LARGEST
    common.check_number(op, "baseline", baseline, -high, high, "a finite number")
    if policy_logprobs is not None:
        common.check_tensor(op, "policy_logprobs", policy_logprobs, shape, common.FLOATS, device)
    _check_anchors(op, shape, device, tau, ref_logprobs)
    common.require(
        ref_logprobs is None or not has_ref_rows, op, f"give ref_logprobs or {ref_name}, not both"
    )
    if kl == "exact":
        common.require(has_ref_rows, op, f'kl="exact" needs {ref_name}: an anchor over all ids')
        common.require(
            policy_logprobs is None, op, 'kl="exact" has no use for policy_logprobs: leave them out'
        )
    anchored = ref_logprobs is not None or has_ref_rows
    common.require(
        tau == 0 or anchored,
        op,
        f"tau must be 0 without ref_logprobs or {ref_name}, got {common.describe(tau)}",
    )


def _check_anchors(op: str, shape: torch.Size, device: torch.device, tau, ref_logprobs) -> None:
    if not isinstance(ref_logprobs, Sequence):
        common.check_number(op, "tau", tau, 0, common.LARGEST, "at least 0 and finite")
        if ref_logprobs is not None:
            common.check_tensor(op, "ref_logprobs", ref_logprobs, shape, common.FLOATS, device)
        return
    J = len(ref_logprobs)
    wanted = f"a sequence of {J} numbers, one for each of ref_logprobs"
    common.require(J > 0, op, "ref_logprobs must hold an anchor at least, got none")
    common.require(
        isinstance(tau, Sequence) and len(tau) == J,
        op,
        f"tau must be {wanted}, got {common.describe(tau)}",
    )
    for j in range(J):
        common.check_number(op, f"tau[{j}]", tau[j], 0, common.LARGEST, "at least 0 and finite")
        name = f"ref_logprobs[{j}]"
        common.check_tensor(op, name, ref_logprobs[j], shape, common.FLOATS, device)


def _check_offsets(op: str, cu_seqlens: Tensor, N: int) -> None:
    """On the CPU, where looking costs nothing: the offsets rise from 0 to N."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    good = cu_seqlens[0] == 0 and cu_seqlens[-1] == N and bool((cu_seqlens.diff() >= 0).all())
    common.require(good, op, f"cu_seqlens must rise from 0 to N = {N}, got {cu_seqlens.tolist()}")
