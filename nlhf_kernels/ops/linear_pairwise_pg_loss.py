"""Contract of ``linear_pairwise_pg_loss``: loss and gradients in one loop over chunks of tokens.

The loop runs from the last token to the first and carries the sums that later tokens leave for
earlier ones, so that a chunk's coefficients are known as soon as its logits are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import PairwisePGLoss
from nlhf_kernels.ops import common, heads, pg, vocabulary

OP = "linear_pairwise_pg_loss"


class _Loss:
    """One call: what is known of each kept token, filled in chunk by chunk."""

    def __init__(
        self, chunks, head, ref_head, tokens, mask, refs, supplied, offsets, terms, scaling
    ):
        self.chunks, self.head, self.ref_head = chunks, head, ref_head
        self.terms, self.scaling, self.offsets = terms, scaling, offsets
        places = chunks.places
        self.tokens = tokens.view(-1)[places]
        self.supplied = None if supplied is None else supplied.view(-1)[places]
        self.refs = None if refs is None else refs.flatten(-mask.dim())[..., places]
        self.exact = terms.kl == "exact"
        count = len(places)
        self.logprobs, self.entropy, self.lse = head.hidden.new_empty(
            3, count, dtype=head.dtype
        ).unbind()
        if self.exact or (ref_head is not None and self.refs is None):
            self.refs = torch.empty_like(self.logprobs)
        self.kl = None if self.refs is None else torch.empty_like(self.refs)

    def statistics(self, some: slice, places: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Fills in a chunk; returns its hidden states and logits and what its gradient needs."""
        head, chunks, tokens = self.head, self.chunks, self.tokens[some]
        refs = None
        if self.ref_head is not None:
            # an exact KL needs both models' logits at a time, else one buffer serves both
            refs = self.ref_head.logits(self.ref_head.rows(places), chunks.buffers[-1])
            if not self.exact:
                self.refs[some] = chunks.logprobs(refs, tokens, self.scaling)[0]
        rows = head.rows(places)
        logits = head.logits(rows, chunks.buffers[0])
        if self.exact:
            logprobs, ref, entropy, kl, lse, ref_lse = chunks.kl(logits, refs, tokens, self.scaling)
            self.refs[some], self.kl[some] = ref, kl
            residuals = (refs, ref_lse)
        else:
            logprobs, entropy, lse = chunks.logprobs(logits, tokens, self.scaling)
            residuals = ()
        self.logprobs[some], self.entropy[some], self.lse[some] = logprobs, entropy, lse
        if self.kl is not None and not self.exact:
            current = logprobs if self.supplied is None else self.supplied[some]
            self.kl[..., some] = current - self.refs[..., some]
        return rows, logits, residuals

    def coefficients(self, some: slice, preference: Tensor, later: Tensor | None):
        """(loss, coef, sums) of the kept tokens ``some``, the last of which have no later ones."""
        count = some.stop - some.start
        offsets = (self.offsets - some.start).clamp(0, count)
        kl = None if self.kl is None else self.kl[..., some]
        cost = self.terms.cost(kl)
        return self.chunks.run(
            "pairwise_pg_coef_fwd", self.logprobs[some], cost, None, preference, offsets, later,
            self.terms.kl, self.terms.baseline,
        )  # fmt: skip

    def gradient(self, some, places, coef, rows, logits, residuals, weight) -> None:
        ids = self.chunks.ids(self.tokens[some])
        if self.exact and weight:
            refs, ref_lse = residuals
            grad_kl = torch.full_like(coef, weight)
            arguments = (refs, ids, None, self.lse[some], ref_lse, None, self.kl[some], coef, None)
            grad = self.chunks.gradient("token_kl_bwd", logits, *arguments, grad_kl, *self.scaling)
        else:
            arguments = (ids, None, self.lse[some], None, coef, None, *self.scaling)
            grad = self.chunks.gradient("token_logprobs_bwd", logits, *arguments)
        self.head.backward(grad, rows, places)


def _offsets(tokens: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B + 1,) where the sequences start among the kept tokens."""
    kept = torch.nn.functional.pad(mask.reshape(-1).cumsum(0), (1, 0))
    if cu_seqlens is not None:
        return kept[cu_seqlens]
    B, T = tokens.shape
    return kept[torch.arange(B + 1, device=tokens.device) * T]


def _forward(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, tokens, mask, preference, refs,
    supplied, cu_seqlens, kl, tau, baseline, logit_scale, temperature, softcap, budget, to_hidden,
    to_weight, to_bias, backend, part=None,
):  # fmt: skip
    registry.count(OP, backend)
    exact = kl == "exact"
    dtype = eager.statistics_dtype(hidden, ref_hidden if exact else None)
    wanted = to_hidden, to_weight, to_bias
    several = refs is not None and refs.dim() > mask.dim()
    terms = pg.Terms(kl, tuple(tau) if several else tau[0], baseline)
    head = heads.Head(hidden, weight, bias, logit_scale, dtype, wanted)
    ref_head = None
    if ref_hidden is not None:
        ref_head = heads.Head(ref_hidden, ref_weight, ref_bias, logit_scale, dtype)
    chunks = heads.Chunks(head, mask, budget, 1 + exact, part, backend)
    offsets = _offsets(tokens, mask, cu_seqlens)
    scaling = (temperature, softcap)
    state = _Loss(chunks, head, ref_head, tokens, mask, refs, supplied, offsets, terms, scaling)
    everything = slice(0, len(chunks.places))
    weight_of_kl = terms.kl_weight(len(preference))
    loss, later = hidden.new_zeros((), dtype=dtype), torch.zeros_like(preference)
    coef = None
    with common.plain(hidden):
        if kl == "sequence" and any(tau) and any(wanted):
            # the sums of whole sequences come before any gradient: given, or by a pass more
            if supplied is None or state.refs is None or ref_head is not None:
                for some, places in chunks:
                    state.statistics(some, places)
                state.ref_head = None
            else:
                state.kl[...] = state.supplied - state.refs
            # the log-probabilities do not matter to the coefficients
            _, coef, _ = state.coefficients(everything, preference, None)
        for some, places in chunks:
            rows, logits, residuals = state.statistics(some, places)
            if not any(wanted):
                continue
            if coef is None:
                _, here, sums = state.coefficients(some, preference, later)
                later += sums
            else:
                here = coef[some]
            state.gradient(some, places, here, rows, logits, residuals, weight_of_kl)
        loss, _, _ = state.coefficients(everything, preference, None)
    if weight_of_kl:
        loss = loss + weight_of_kl * state.kl.sum()

    def spread(x):
        whole = x.new_zeros(*x.shape[:-1], tokens.numel())
        whole[..., chunks.places] = x
        return whole.view(*x.shape[:-1], *tokens.shape)

    per_token = [hidden.new_empty(0, dtype=dtype) if x is None else spread(x)
                 for x in (state.logprobs, state.refs, state.entropy, state.kl)]  # fmt: skip
    return loss, *per_token, *head.gradients(part)


def _forward_fake(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, tokens, mask, preference, refs,
    supplied, cu_seqlens, kl, *arguments,
):  # fmt: skip
    dtype = eager.statistics_dtype(hidden, ref_hidden if kl == "exact" else None)
    shape = tokens.shape
    ref_shape = (0,) if refs is None else refs.shape
    if ref_hidden is not None:
        ref_shape = shape
    shapes = ((), shape, ref_shape, shape, ref_shape)
    outputs = [hidden.new_empty(x, dtype=dtype) for x in shapes]
    return *outputs, *heads.fake_gradients(hidden, weight, dtype, arguments[-4:-1])


common.define(
    f"{OP}_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight,"
    " Tensor? ref_bias, Tensor tokens, Tensor mask, Tensor preference, Tensor? refs,"
    " Tensor? supplied, Tensor? cu_seqlens, str kl, float[] tau, float baseline,"
    " float logit_scale, float temperature, float softcap, int budget, bool to_hidden,"
    " bool to_weight, bool to_bias, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


class _LinearPairwisePGLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, wanted, *arguments):
        *arguments, backend = arguments
        found = common.call(f"{OP}_fwd", _forward, part, *arguments, *wanted, backend)
        loss, *results = found[:5]
        ctx.save_for_backward(*found[5:])
        ctx.wanted, ctx.like, ctx.others = wanted, arguments[0].dtype, len(arguments) + 1 - 3
        ctx.mark_non_differentiable(*results)
        return loss, *results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        grads = heads.scaled(ctx.saved_tensors, ctx.wanted, grad_loss, ctx.like)
        return None, None, *grads, *[None] * ctx.others


def linear_pairwise_pg_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor,
    preference: Tensor,
    *,
    tau: float | Sequence[float],
    bias: Tensor | None = None,
    ref_logprobs: Tensor | Sequence[Tensor] | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    policy_logprobs: Tensor | None = None,
    kl: str = "reward_to_go",
    baseline: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "",
) -> PairwisePGLoss:
    heads.check_head(OP, hidden, weight, bias)
    pg.check(
        OP, "hidden", hidden, tokens, mask, preference, cu_seqlens, tau, ref_logprobs,
        "ref_hidden", ref_hidden is not None, policy_logprobs, kl, baseline,
    )  # fmt: skip
    common.check_scaling(OP, temperature, softcap)
    heads.check_chunks(OP, logit_scale, memory_budget)
    ref = (None, None, None)
    if ref_hidden is not None:
        heads.check_ref_head(OP, hidden, weight, ref_hidden, ref_weight, ref_bias)
        ref = heads.reference(weight, bias, ref_hidden, ref_weight, ref_bias)
    else:
        common.require(
            ref_weight is None and ref_bias is None,
            OP,
            "ref_weight and ref_bias must be left out without ref_hidden",
        )
    backend = common.resolve(OP, hidden, backend)
    part = vocabulary.part_of(OP, group, weight, 0)
    common.check_token_ids(OP, tokens, mask, part.V if part else len(weight))
    if backend == "eager":
        return common.run_eager(
            OP,
            hidden,
            weight,
            tokens,
            mask,
            preference,
            tau=tau,
            bias=bias,
            ref_logprobs=ref_logprobs,
            ref_hidden=ref[0],
            ref_weight=ref[1],
            ref_bias=ref[2],
            policy_logprobs=policy_logprobs,
            kl=kl,
            baseline=baseline,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            cu_seqlens=cu_seqlens,
            group=group,
        )

    dtype = eager.statistics_dtype(hidden, ref_hidden if kl == "exact" else None)
    mask = common.kept(mask)
    return PairwisePGLoss(
        *_LinearPairwisePGLoss.apply(
            part,
            heads.wanted(hidden, weight, bias),
            hidden,
            weight,
            bias,
            *ref,
            tokens.contiguous(),
            mask,
            preference.detach().to(dtype).contiguous(),
            pg.prepared(ref_logprobs, mask, dtype),
            pg.prepared(policy_logprobs, mask, dtype),
            None if cu_seqlens is None else cu_seqlens.to(torch.int64),
            kl,
            [float(x) for x in tau] if isinstance(tau, Sequence) else [float(tau)],
            float(baseline),
            float(logit_scale),
            float(temperature),
            float(softcap or 0),
            memory_budget or 0,
            backend,
        )
    )


linear_pairwise_pg_loss.__doc__ = eager.linear_pairwise_pg_loss.__doc__
