"""Whether a draw is right: the contract of sampling once more, in float64."""

import math

import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf_kernels import eager
from nlhf_kernels.testing.compare import Answers, Snapshot, compare, poisoned_memory

FIELDS = ("policy_logprobs", "ref_logprobs", "sampling_logprobs", "log_kept_mass")


def check_draw(answers: Answers, op: str, backend: str) -> None:
    args, kwargs = answers.inputs()
    before = Snapshot(args, kwargs)
    with poisoned_memory():
        got = getattr(nk, op)(*args, **kwargs, backend=backend)
    before.require_unchanged()
    assert type(got) is nk.MixtureSample, f"{op} returns {type(got)}"

    right = {"mixture_sample": Draw, "linear_mixture_sample": linear_draw}[op]
    draw = answers.once("draw", lambda args, kwargs: right(*args, **kwargs))
    compare("tokens where a row is bad", got.tokens < 0, draw.bad, torch.bool)
    assert got.tokens.dtype == torch.int64, f"tokens are {got.tokens.dtype}"
    draw.require_winners(got.tokens)
    want = draw.logprobs(got.tokens)
    for name in FIELDS:
        compare(name, getattr(got, name), want[name], draw.dtype)


def linear_draw(
    policy_hidden, policy_weight, ref_hidden=None, ref_weight=None, *, policy_bias=None,
    ref_bias=None, softcap=None, **settings,
) -> "Draw":  # fmt: skip
    """The draw from logits that are made in float64."""
    models = [(policy_hidden, policy_weight, policy_bias)]
    if ref_hidden is not None:
        shared = ref_weight is None
        models.append((ref_hidden, *(models[0][1:] if shared else (ref_weight, ref_bias))))
    made = [_wide_logits(*model, softcap) for model in models]
    return Draw(
        *(logits for logits, _ in made),
        *[None] * (2 - len(made)),
        **settings,
        dtype=eager.statistics_dtype(policy_hidden, ref_hidden),
        sums=[length for _, length in made],
    )


def _wide_logits(hidden, weight, bias, softcap, at_once: int = 2**24) -> tuple[Tensor, Tensor]:
    """((B, V) logits, (B,) how large a partial sum of one can become)."""
    hidden, pieces, longest = hidden.double(), [], 0.0
    for piece in weight.split(max(1, at_once // weight.shape[1])):
        piece = piece.double()
        pieces.append(torch.einsum("bd,vd->bv", hidden, piece))
        longest = max(longest, float(piece.norm(dim=1).max()))
    logits = torch.cat(pieces, 1)
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits, hidden.norm(dim=1) * longest


class Draw:
    """The contract of ``mixture_sample`` once more, in float64 and in the plainest way.

    The noise is the contract's, in the statistics dtype; the rest is not ``eager``'s code. Where
    the op makes the logits itself, ``sums`` are the (B,) sizes of their partial sums, by model, and
    ``dtype`` is that of its statistics.
    """

    def __init__(self, policy, ref, *, mixture_coef=0.0, temperature=1.0, top_k=0, top_p=1.0,
                 min_p=0.0, seed, position, extrapolate=False, dtype=None,
                 sums=(0.0, 0.0)):  # fmt: skip
        self.dtype = dtype or eager.statistics_dtype(policy, ref)
        B = policy.shape[0]
        device = policy.device

        def row(value, dtype=self.dtype):
            return torch.as_tensor(value, dtype=dtype, device=device).expand(B)[:, None]

        coef, heat = row(mixture_coef).double(), row(temperature).double()
        self.greedy = heat[:, 0] == 0
        self.divisor = torch.where(heat == 0, 1, heat)
        terms = [(1 - coef, policy.double())]
        if ref is not None:
            terms.append((coef, ref.double()))
        self.models = [x for _, x in terms]
        mixture = sum(torch.where(c == 0, 0, c * x) for c, x in terms)
        never = sum(((c != 0) & (x == -torch.inf)).long() for c, x in terms) > 0
        self.mixture = mixture.masked_fill(never, -torch.inf)
        self.bad = ~torch.stack([x.amax(1).isfinite() for x in (*self.models, self.mixture)]).all(0)
        self.bad |= ~((heat[:, 0] >= 0) & heat[:, 0].isfinite())

        self.whole = self._tempered(self.mixture)
        filters = [row(top_k, torch.int64), row(top_p), row(min_p)]
        self.kept = self.whole
        if not eager.filters_off(top_k, top_p, min_p):
            keep = [kept_ids(*(x[b].tolist() for x in (self.whole, *filters))) for b in range(B)]
            out = torch.ones_like(self.whole, dtype=torch.bool)
            for b, ids in enumerate(keep):
                out[b, ids] = False
            self.kept = self.whole.masked_fill(out, -torch.inf)

        whole_batch = torch.arange(B, device=device)
        self.seeds = seed if isinstance(seed, Tensor) else eager.fold_in(seed, whole_batch)
        self.position = row(position, torch.int64)[:, 0]
        # what eight roundings of the largest operands can do to a score
        largest = sum(c.abs()[:, 0] * finite_maximum(x) for c, x in terms)
        self.sums = sums
        # a sum of D terms errs by half an ulp of each partial sum, which is a random walk: for
        # terms of random signs sqrt(D) ulps of a D-th of the whole; four times what that comes to
        summed = sum(c.abs()[:, 0] * x for (c, _), x in zip(terms, sums, strict=False))
        eps = torch.finfo(self.dtype).eps
        self.tie = 8 * eps * (32 + largest / self.divisor[:, 0])
        self.tie += 4 * eps * summed / self.divisor[:, 0]

    def _tempered(self, x: Tensor) -> Tensor:
        return (x - x.amax(1, keepdim=True)) / self.divisor

    def _noise(self, tile: Tensor, stage: int, block: Tensor | int) -> Tensor:
        """The words of each row (B, tiles or blocks, 4) as noise."""
        low, high = (((self.seeds >> bits) & 0xFFFFFFFF)[:, None] for bits in (0, 32))
        place = (self.position & 0xFFFFFFFF)[:, None]
        words = torch.stack(eager.philox((place, tile, stage, block), (low, high)), -1)
        return eager.gumbel(words, self.dtype).double()

    def require_winners(self, tokens: Tensor) -> None:
        """Each token won both races, or lost by no more than rounding explains."""
        V = self.kept.shape[1]
        outside = (tokens < 0) | (tokens >= V)
        self._require_none(outside, tokens, "is outside the vocabulary")
        at = tokens.clamp(0, V - 1)[:, None]
        possible = self.kept.gather(1, at)[:, 0] > -torch.inf
        self._require_none(~possible, tokens, "has probability 0")

        first = self.mixture.gather(1, at)
        behind = self.mixture.amax(1) - first[:, 0]
        self._require_close(behind, tokens, self.greedy, "is below the maximum")
        ids = torch.arange(V, device=tokens.device)
        second = ((self.mixture == first) & (ids < at)).any(1)
        self._require_none(second & self.greedy, tokens, "is not the first of its tie")

        tiles = self.kept.split(eager.TILE, 1)
        levels = torch.stack([x.logsumexp(1) for x in tiles], 1)
        noise = self._noise(torch.arange(len(tiles), device=tokens.device), 1, 0)[:, :, 0]
        winner = at // eager.TILE
        self._require_first(levels + noise, winner, tokens, "tile")
        blocks = torch.arange(eager.TILE // 4, device=tokens.device)
        noise = self._noise(winner, 2, blocks).flatten(1)
        # the last tile may end early
        ids = winner * eager.TILE + torch.arange(eager.TILE, device=tokens.device)
        scores = self.kept.gather(1, ids.clamp(max=V - 1)) + noise
        scores = scores.masked_fill(ids >= V, -torch.inf)
        self._require_first(scores, at % eager.TILE, tokens, "token")

    def _require_first(self, scores: Tensor, drawn: Tensor, tokens: Tensor, stage: str) -> None:
        behind = scores.amax(1) - scores.gather(1, drawn)[:, 0]
        self._require_close(behind, tokens, ~self.greedy, f"lost the race of its {stage}")

    def _require_close(self, behind: Tensor, tokens: Tensor, rows: Tensor, what: str) -> None:
        """In ``rows``, ``behind`` is within rounding; NaN is not."""
        self._require_none(~(behind <= self.tie) & rows, tokens, what, behind)

    def _require_none(
        self, wrong: Tensor, tokens: Tensor, what: str, behind: Tensor | None = None
    ) -> None:
        rows = (wrong & ~self.bad).nonzero()[:, 0].tolist()
        for row in rows[:1]:
            by = "" if behind is None else f" by {behind[row]:.3g}, tie {self.tie[row]:.1g}"
            raise AssertionError(f"row {row} ({len(rows)} in all): token {tokens[row]} {what}{by}")

    def logprobs(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the op must say of these tokens."""
        at = tokens.clamp(min=0)[:, None]

        def at_token(x):
            value = x.log_softmax(1).gather(1, at)[:, 0]
            return value.masked_fill(self.bad, torch.nan)

        of_models = [at_token(self._tempered(x)) for x in self.models]
        zero = torch.zeros_like(of_models[0]).masked_fill(self.bad, torch.nan)
        kept_mass = (self.kept.logsumexp(1) - self.whole.logsumexp(1)).clamp(max=0)
        return {
            "policy_logprobs": of_models[0],
            "ref_logprobs": of_models[1] if len(of_models) > 1 else zero[:0],
            "sampling_logprobs": torch.where(self.greedy, zero, at_token(self.kept)),
            "log_kept_mass": torch.where(self.greedy | self.bad, zero, kept_mass),
        }


def finite_maximum(x: Tensor) -> Tensor:
    return x.abs().nan_to_num(0, 0).amax(1)


def kept_ids(scores: list, top_k: list, top_p: list, min_p: list) -> list[int]:
    """Which ids of one row survive top-k, then top-p, then min-p; step by step, in plain Python."""
    (k,), (p,), (least,) = top_k, top_p, min_p
    top = max(scores)
    weight = [math.exp(x - top) for x in scores]
    ids = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if k:
        ids = ids[:k]
    if p < 1:
        total, reached = math.fsum(weight[i] for i in ids), 0.0
        for count, i in enumerate(ids, 1):
            reached += weight[i] / total
            if reached >= p:
                ids = ids[:count]
                break
    # of weights whose scores differ by next to nothing only the logarithms differ
    lowest = scores[ids[0]] + (math.log(least) if least else -math.inf)
    return [i for i in ids if scores[i] >= lowest]
