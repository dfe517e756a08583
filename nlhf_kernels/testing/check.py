"""``check(case, backend)``: the one definition of correct.

The oracle is ``eager`` in float64 on the same rounded inputs, its gradients by autograd. The op
under test runs with every allocation filled with NaN, so that nothing unwritten looks right.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf_kernels import eager, registry
from nlhf_kernels.testing.case import Case, copied
from nlhf_kernels.testing.cases import SAMPLERS

# by dtype of the output, whatever the inputs: (rtol, atol). Logits and their statistics are of
# order 10, where one ulp of float32 is 1e-6; 16 bits are for gradients, rounded once
TOLERANCE = {
    torch.float64: (1e-11, 1e-12),
    torch.float32: (1e-5, 5e-6),
    torch.bfloat16: (2.0**-8, 5e-6),
    torch.float16: (2.0**-10, 5e-6),
}
FIELDS = ("policy_logprobs", "ref_logprobs", "sampling_logprobs", "log_kept_mass")


def check(
    case: Case,
    backend: str,
    *,
    seed: int = 0,
    device: str = "cpu",
    generate_on: str = "cpu",
    by_own_logprobs: bool = False,
) -> None:
    """Raise ``AssertionError``, and say what differs, unless the backend is right on this case.

    ``generate_on`` as in ``Case.inputs``. ``by_own_logprobs`` is for a ``pairwise_pg_loss`` over
    hundreds of tokens, where an error in the last digit of every log-probability grows with the
    square of their number: the rest is then judged by the op's own, which must be right themselves.
    """
    answers = Answers(case.inputs(seed, device, generate_on))
    check_by(answers, case.op, backend, by_own_logprobs=by_own_logprobs)


class Answers:
    """The inputs of a case and what is right for them, each worked out once for all who are judged.

    These may be gigabytes: they belong to one problem and go with it.
    """

    def __init__(self, inputs: tuple[tuple, dict]):
        self._inputs = inputs
        self._found: dict[str, tuple[Tensor | None, Any]] = {}

    def inputs(self) -> tuple[tuple, dict]:
        """In memory of their own each time: who is judged may write over them, right or wrong."""
        args, kwargs = self._inputs
        # what is given twice stays one
        own = {id(x): copied(x) for x in (*args, *kwargs.values())}
        return tuple(own[id(x)] for x in args), {name: own[id(x)] for name, x in kwargs.items()}

    def once(self, name: str, make: Callable[[tuple, dict], Any], by: Tensor | None = None) -> Any:
        """``make(args, kwargs)``; once more if ``by``, which it depends on, is another."""
        if name in self._found and not _same(self._found[name][0], by):
            # never two at a time
            del self._found[name]
        if name not in self._found:
            self._found[name] = None if by is None else by.clone(), make(*self._inputs)
        return self._found[name][1]


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and torch.equal(x, y)


def check_by(
    answers: Answers, op: str, backend: str, *, by_own_logprobs: bool = False, inplace: bool = False
) -> None:
    """``check`` by answers that others are judged by too; ``inplace``: with a backward in place."""
    if op in SAMPLERS:
        _check_sample(answers, op, backend)
    else:
        _check_differentiable(answers, op, backend, by_own_logprobs, inplace)


def backends(device: str) -> tuple[str, ...]:
    """The backends that are meant for a type of device, eager first."""
    return tuple(reversed(registry.ORDER[device]))


def unavailable(case: Case, backend: str, device: str) -> str:
    """Why a backend cannot run a case; "" if it can."""
    return registry.reason(case.op, backend, device, case.features)


@contextlib.contextmanager
def poisoned_memory():
    """``torch.empty`` and its kin give NaN, or the largest integer, in Python and in C++."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def compare(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """``want`` is of any dtype; ``got`` must have ``dtype`` and agree by its tolerance."""
    assert isinstance(got, Tensor), f"{name} is {type(got).__name__}, not a tensor"
    assert got.dtype == dtype, f"{name} is {got.dtype}, must be {dtype}"
    assert got.shape == want.shape, f"{name} is {tuple(got.shape)}, must be {tuple(want.shape)}"
    assert got.device == want.device, f"{name} is on {got.device}, must be on {want.device}"
    rtol, atol = TOLERANCE.get(dtype, (0, 0))
    torch.testing.assert_close(
        # NaN and infinities must be where the oracle has them
        got.detach().to(torch.float64), want.detach().to(torch.float64), rtol=rtol, atol=atol,
        equal_nan=True, msg=lambda m: f"{name}: {m}",
    )  # fmt: skip


class Snapshot:
    """The bytes behind tensors, the NaN around a view among them, and their versions."""

    def __init__(self, args: tuple, kwargs: dict):
        named = {f"argument {i}": x for i, x in enumerate(args)} | kwargs
        self.tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
        self.bytes = {name: _bytes(x).clone() for name, x in self.tensors.items()}
        self.versions = {name: x._version for name, x in self.tensors.items()}

    def require_unchanged(self, but: Tensor | None = None) -> None:
        """``but`` may have changed, inside itself only, and then must have a new version."""
        for name, x in self.tensors.items():
            now, before = _bytes(x), self.bytes[name]
            if x is but:
                assert x._version > self.versions[name], f"{name} changed, but not its version"
                before = before.clone()
                view = torch.empty(0, dtype=x.dtype, device=x.device).set_(before.untyped_storage())
                view.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x.detach())
            else:
                assert x._version == self.versions[name], f"{name} has a new version"
            assert torch.equal(now, before), f"{name} changed, or the memory around it"


def _bytes(x: Tensor) -> Tensor:
    raw = torch.empty(0, dtype=torch.uint8, device=x.device)
    return raw.set_(x.detach().untyped_storage())


def widened(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same values with every floating tensor in float64."""

    def wide(x):
        return x.to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(wide, args)), {name: wide(x) for name, x in kwargs.items()}


def grad_outputs(outputs: list[Tensor], seed: int = 7) -> list[Tensor]:
    """Random, in float64: a kernel that forgets to multiply by them is found out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) + 2 for x in outputs]


# ---- differentiable ops


class Oracle(NamedTuple):
    """``eager`` in float64 on the same rounded inputs."""

    outputs: tuple
    # which outputs are differentiated, and what their gradients are multiplied by
    live: list[bool]
    grads: list[Tensor]
    # of the logits, by pieces: (which rows, gradient)
    gradients: list[tuple[slice, Tensor]]


def oracle(op: str, args: tuple, kwargs: dict, at_once: int = 2**25) -> Oracle:
    """Whole sequences, of at most ``at_once`` logits together: 0.3 GB each time they are copied.

    They know of each other only in the mean of a loss, so that parts add up to the whole.
    """
    results, gradients, shares, grads = [], [], [], []
    statistics = eager.statistics_dtype(args[0])
    for some, share, part_args, part_kwargs in _sequences(args, kwargs, at_once):
        logits = part_args[0].detach().to(torch.float64, copy=True).requires_grad_()
        wide_args, wide_kwargs = widened(part_args[1:], part_kwargs)
        result = getattr(eager, op)(logits, *wide_args, **wide_kwargs)
        outputs = [x for x in result if x.requires_grad]
        if not grads:
            # a result is a number for all, or one for each token
            likes = [torch.empty(args[1].shape if x.dim() else ()) for x in outputs]
            grads = [g.to(statistics).to(logits.device) for g in grad_outputs(likes)]
        weights = [g.double()[some] if g.dim() else share * g.double() for g in grads]
        gradients.append((some, torch.autograd.grad(outputs, logits, weights)[0]))
        shares.append(share)
        results.append(result)
    live = [x.requires_grad for x in results[0]]

    def whole(pieces: tuple) -> Tensor:
        pieces = [x.detach() for x in pieces]
        if pieces[0].dim():
            return torch.cat(pieces)
        return sum(share * x for share, x in zip(shares, pieces, strict=True))

    columns = map(whole, zip(*results, strict=True))
    return Oracle(type(results[0])(*columns), live, grads, gradients)


def _sequences(args: tuple, kwargs: dict, at_once: int) -> Iterator[tuple]:
    """(which, their share of the mean, args, kwargs): all at once if they are few, or packed."""
    B = len(args[0])
    size = B
    if B and "cu_seqlens" not in kwargs:
        size = max(1, at_once // max(1, args[0][0].numel()))
    if size >= B:
        yield slice(None), 1.0, args, kwargs
        return
    for start in range(0, B, size):
        some = slice(start, min(start + size, B))

        def cut(x, some=some):
            return x[some] if isinstance(x, Tensor) and x.dim() else x

        share = (some.stop - start) / B
        yield some, share, tuple(map(cut, args)), {name: cut(x) for name, x in kwargs.items()}


def _check_differentiable(
    answers: Answers, op: str, backend: str, by_own_logprobs: bool, inplace: bool
) -> None:
    args, kwargs = answers.inputs()
    inplace |= kwargs.pop("inplace_backward", False)
    logits, tokens = args[0].requires_grad_(), args[1]
    statistics = eager.statistics_dtype(logits)

    before = Snapshot(args, kwargs)
    with poisoned_memory():
        outputs = getattr(nk, op)(*args, **kwargs, inplace_backward=inplace, backend=backend)
    before.require_unchanged()
    own = None
    if by_own_logprobs and op == "pairwise_pg_loss":
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
        (got,) = torch.autograd.grad(outputs, logits, [g.clone() for g in want.grads])
    for some, gradient in want.gradients:
        compare("the gradient", got[some], gradient, logits.dtype)
        if inplace:
            compare("the gradient in place of the logits", logits[some], gradient, logits.dtype)
    before.require_unchanged(but=logits if inplace else None)


# ---- sampling


def _check_sample(answers: Answers, op: str, backend: str) -> None:
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
    return [i for i in ids if weight[i] >= least * weight[ids[0]]]
