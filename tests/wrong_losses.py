"""The kernels of losses with planted bugs, and the same without; see ``wrong_kernels``."""

import torch

from nlhf_kernels import eager

TILE = 1024
RAW = (
    "token_logprobs_fwd",
    "token_logprobs_bwd",
    "token_kl_fwd",
    "token_kl_bwd",
    "pairwise_pg_coef_fwd",
)
_ROWS = (
    "half precision inside",
    "tail columns left out of the sum",
    "class off by one",
    "incoming gradient ignored",
    "temperature forgotten in the backward",
    "softcap forgotten in the backward",
    "sign of the entropy's gradient",
    "no shift by the maximum",
    "0 * -inf in the entropy",
    "last row unwritten",
    "mask ignored",
    "mask ignored in the backward",
)
_LOGITS = (
    "tail columns of the gradient unwritten",
    "outputs in the dtype of the logits",
    "float32 for float64",
    "strides ignored",
    "writes into the logits",
    "writes beside the gradient in place",
    "bf16 truncated",
)
_KL = (
    "kl in the wrong direction",
    "kl without its gradient",
    "kl's mean forgotten in the backward",
    "0 * -inf in the kl",
    "policy's normaliser for the reference",
    "temperature forgotten for the reference",
)
_SUMS = (
    "suffix sum exclusive",
    "prefix sum",
    "sums run across packed sequences",
    "sequence taken for reward_to_go",
    "mean over tokens",
    "baseline forgotten",
    "tau forgotten",
    "sign of the loss",
    "own term in the exact sums",
)
_LINEAR = tuple(x for x in _ROWS if "mask" not in x and "last row" not in x)
BUGS = {
    "token_logprobs": (*_ROWS, *_LOGITS),
    "token_kl": (*_ROWS, *_LOGITS, *_KL),
    "pairwise_pg_loss": (
        *(x for x in _ROWS if "entropy's" not in x and "0 *" not in x and "tail" not in x
          and "no shift" not in x),
        "masked rows of the gradient unwritten",
        *_SUMS,
        *_KL[:3],
    ),
    "linear_token_logprobs": tuple(x for x in _LINEAR if "tail" not in x and "no shift" not in x),
    "linear_token_kl": (*(x for x in _LINEAR if "tail" not in x and "no shift" not in x), *_KL),
    "linear_pairwise_pg_loss": (
        "half precision inside",
        "class off by one",
        "temperature forgotten in the backward",
        "softcap forgotten in the backward",
        *(x for x in _SUMS if x != "mean over tokens"),
        "later sums ignored",
        *_KL[:3],
    ),
}  # fmt: skip


class LossKernels:
    def __init__(self, bug: str):
        self.bug = bug

    # ---- rows

    def scores(self, logits, temperature, softcap, dtype=None):
        if self.bug == "strides ignored" and logits.dim() == 2:
            logits = logits.as_strided(logits.shape, (logits.shape[1], 1))
        z = logits.to(dtype or eager.statistics_dtype(logits))
        if self.bug == "half precision inside":
            z = z.bfloat16().to(z.dtype)
        if self.bug == "float32 for float64":
            z = z.float()
        x = softcap * torch.tanh(z / softcap) if softcap else z
        return x / temperature

    def rows(self, s, tokens):
        """Log-probabilities of all ids and of the tokens, entropy, log-sum-exp."""
        whole = s
        if self.bug == "tail columns left out of the sum" and s.shape[-1] > TILE:
            whole = s[..., : s.shape[-1] // TILE * TILE]
        top = s.amax(-1, keepdim=True)
        if self.bug == "no shift by the maximum":
            top = torch.zeros_like(top)
        # a part of a vocabulary may have nothing finite in a row
        top = top.masked_fill(top == -torch.inf, 0)
        log_total = (whole - top).exp().sum(-1, keepdim=True).log()
        logs = s - top - log_total
        p, d = logs.exp(), s - top
        product = p * d
        if self.bug != "0 * -inf in the entropy":
            product = product.masked_fill(p == 0, 0)
        entropy = log_total[..., 0] - product.sum(-1)
        return logs, self.at(logs, tokens), entropy, (log_total + top)[..., 0]

    def at(self, logs, tokens):
        if self.bug == "class off by one":
            tokens = (tokens + 1).clamp(max=logs.shape[-1] - 1)
        return logs.gather(-1, tokens[..., None])[..., 0]

    def cleaned(self, mask, tokens, V, *logits, seen=True):
        """Whatever is under the mask must not matter."""
        if mask is None:
            return None, tokens, *logits
        if not seen:
            mask = torch.ones_like(mask)
        safe = torch.where(mask, tokens, 0).clamp(0, V - 1)
        return mask, safe, *(torch.where(mask[..., None], x, 0) for x in logits)

    def finished(self, results, mask, wanted):
        if mask is not None:
            results = [x.where(mask, 0) for x in results]
        if self.bug == "last row unwritten":
            results = [torch.empty_like(x).copy_(x) for x in results]
            results[0].view(-1)[-1:] = torch.empty(min(1, results[0].numel()))
        return tuple(x.to(wanted) for x in results)

    def dtype(self, logits, *more):
        wanted = eager.statistics_dtype(logits, *more)
        return logits.dtype if self.bug == "outputs in the dtype of the logits" else wanted

    def token_logprobs_fwd(self, logits, tokens, mask, temperature, softcap):
        if self.bug == "writes into the logits":
            logits.sub_(1)
        seen = self.bug != "mask ignored"
        mask, tokens, clean = self.cleaned(mask, tokens, logits.shape[-1], logits, seen=seen)
        found = self.rows(self.scores(clean, temperature, softcap), tokens)[1:]
        return self.finished(found, mask, self.dtype(logits))

    def token_kl_fwd(self, logits, ref_logits, tokens, mask, temperature, softcap):
        if self.bug == "writes into the logits":
            logits.sub_(1)
        wanted, V = eager.statistics_dtype(logits, ref_logits), logits.shape[-1]
        seen = self.bug != "mask ignored"
        mask, tokens, *clean = self.cleaned(mask, tokens, V, logits, ref_logits, seen=seen)
        heat = 1.0 if self.bug == "temperature forgotten for the reference" else temperature
        s = self.scores(clean[0], temperature, softcap, wanted)
        r = self.scores(clean[1], heat, softcap, wanted)
        logs, logprobs, entropy, lse = self.rows(s, tokens)
        refs, ref_logprobs, _, ref_lse = self.rows(r, tokens)
        if self.bug == "policy's normaliser for the reference":
            refs = r - lse[..., None]
        p = logs.exp()
        terms = p * (logs - refs)
        if self.bug == "kl in the wrong direction":
            terms = refs.exp() * (refs - logs)
        if self.bug != "0 * -inf in the kl":
            terms = terms.masked_fill(p == 0, 0)
        found = (logprobs, ref_logprobs, entropy, terms.sum(-1), lse, ref_lse)
        return self.finished(found, mask, self.dtype(logits, ref_logits))

    # ---- gradients

    def slope(self, logits, temperature, softcap, dtype):
        z = logits.to(dtype)
        slope = torch.ones_like(z)
        if softcap and self.bug != "softcap forgotten in the backward":
            slope = 1 - torch.tanh(z / softcap) ** 2
        forgotten = self.bug == "temperature forgotten in the backward"
        return slope if forgotten else slope / temperature

    def of_tokens(self, logs, tokens, entropy, grad_logprobs, grad_entropy):
        """The gradient of the scores by log-probability and entropy."""
        p = logs.exp()
        if self.bug == "incoming gradient ignored":
            grad_logprobs = torch.ones_like(grad_logprobs)
        if self.bug == "class off by one":
            tokens = (tokens + 1).clamp(max=logs.shape[-1] - 1)
        delta = torch.zeros_like(p).scatter_(-1, tokens[..., None], 1)
        grad = grad_logprobs[..., None] * (delta - p)
        if grad_entropy is None:
            return grad
        of_entropy = p * (logs + entropy[..., None])
        of_entropy = of_entropy.masked_fill(p == 0, 0) * grad_entropy[..., None]
        return grad + of_entropy if "entropy's gradient" in self.bug else grad - of_entropy

    def write(self, grad_logits, grad, mask):
        if mask is not None:
            if self.bug == "masked rows of the gradient unwritten":
                grad_logits[mask] = grad[mask].to(grad_logits.dtype)
                return
            grad = torch.where(mask[..., None], grad, 0)
        if self.bug == "bf16 truncated" and grad_logits.dtype == torch.bfloat16:
            grad = (grad.float().view(torch.int32) & -65536).view(torch.float32)
        stop = grad.shape[-1]
        if self.bug == "tail columns of the gradient unwritten" and stop > TILE:
            stop = stop // TILE * TILE
        grad_logits[..., :stop].copy_(grad[..., :stop])
        if self.bug == "writes beside the gradient in place" and grad_logits.stride(-2) > stop:
            size = (*grad_logits.shape[:-1], stop + 1)
            grad_logits.as_strided(size, grad_logits.stride())[..., -1] = 0

    def token_logprobs_bwd(self, grad_logits, logits, tokens, mask, lse, entropy, grad_logprobs,
                           grad_entropy, temperature, softcap):  # fmt: skip
        seen = self.bug != "mask ignored in the backward"
        mask, tokens, clean = self.cleaned(mask, tokens, logits.shape[-1], logits, seen=seen)
        logs = self.scores(clean, temperature, softcap, lse.dtype) - lse[..., None]
        grad = self.of_tokens(logs, tokens, entropy, grad_logprobs, grad_entropy)
        grad = grad * self.slope(clean, temperature, softcap, lse.dtype)
        self.write(grad_logits, grad, mask)

    def token_kl_bwd(self, grad_logits, logits, ref_logits, tokens, mask, lse, ref_lse, entropy,
                     kl, grad_logprobs, grad_entropy, grad_kl, temperature, softcap):  # fmt: skip
        seen, V = self.bug != "mask ignored in the backward", logits.shape[-1]
        mask, tokens, *clean = self.cleaned(mask, tokens, V, logits, ref_logits, seen=seen)
        s, r = (self.scores(x, temperature, softcap, lse.dtype) for x in clean)
        logs, refs = s - lse[..., None], r - ref_lse[..., None]
        grad = self.of_tokens(logs, tokens, entropy, grad_logprobs, grad_entropy)
        p = logs.exp()
        mean = 0 if self.bug == "kl's mean forgotten in the backward" else kl[..., None]
        of_kl = (p * (logs - refs - mean)).masked_fill(p == 0, 0) * grad_kl[..., None]
        if self.bug != "kl without its gradient":
            grad = grad + of_kl
        self.write(grad_logits, grad * self.slope(clean[0], temperature, softcap, lse.dtype), mask)

    # ---- coefficients

    def pairwise_pg_coef_fwd(self, logprobs, cost, mask, preference, cu_seqlens, later, kl,
                             baseline):  # fmt: skip
        if mask is None or self.bug == "mask ignored":
            mask = torch.ones_like(logprobs, dtype=torch.bool)
        B = len(preference)
        if self.bug == "baseline forgotten":
            baseline = 0.0
        if cost is None or self.bug == "tau forgotten":
            cost = torch.zeros_like(logprobs)
        cost = cost.where(mask, 0)
        if later is None or self.bug == "later sums ignored":
            later = torch.zeros_like(preference)
        offsets = None if cu_seqlens is None else cu_seqlens.tolist()
        if offsets is None:
            spans = [(b, slice(None)) for b in range(B)]
        else:
            spans = [slice(offsets[b], offsets[b + 1]) for b in range(B)]
        coef, totals = torch.zeros_like(logprobs), torch.zeros_like(preference)
        everywhere = self.sums(cost, kl)
        for b, span in enumerate(spans):
            across = self.bug == "sums run across packed sequences"
            sums = everywhere[span] if across else self.sums(cost[span], kl)
            if kl != "token":
                sums = sums + later[b]
            count = mask[span].sum() if self.bug == "mean over tokens" else 1
            coef[span] = -(preference[b] - baseline - sums) / (B * count)
            totals[b] = cost[span].sum()
        coef = coef.where(mask, 0)
        if self.bug == "sign of the loss":
            coef = -coef
        return (coef * logprobs).where(coef != 0, 0).sum(), coef, totals

    def sums(self, cost, kl):
        if kl == "token":
            return cost
        if kl == "sequence" or self.bug == "sequence taken for reward_to_go":
            return cost.sum(-1, keepdim=True).expand_as(cost)
        if self.bug == "prefix sum":
            return cost.cumsum(-1)
        suffix = cost.flip(-1).cumsum(-1).flip(-1)
        if kl == "exact":
            return suffix if self.bug == "own term in the exact sums" else suffix - cost
        return suffix - cost if self.bug == "suffix sum exclusive" else suffix
