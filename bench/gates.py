"""What a peer's results must agree with before its time counts: the same in float64, by eager.

Each gate runs a solver on the inputs of a case and raises AssertionError if it is wrong. Peers keep
less precision than our own ops must, so these tolerances are wider than those of ``check``.
What is right is worked out once for all contenders of a problem.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf_kernels.testing import Case
from nlhf_kernels.testing.cases import HEADS
from nlhf_kernels.testing.compare import Answers, grad_outputs, widened
from nlhf_kernels.testing.draw import Draw
from nlhf_kernels.testing.gradients import leaves, named, sequences

# by dtype of the logits: absolute for log-probabilities, of the norm for gradients
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# a sampler's draws are judged by their mean log-probability: so many rows, so many deviations
DRAWS, DEVIATIONS = 64, 6
# numbers that are compared in float64
_AT_ONCE = 2**18
# logits that the oracle makes at a time, several times in float64
_LOGITS = 2**22
# where others round logits to 16 bits: they are of deviation 1, and none is larger
_LARGEST_LOGIT = 8


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within ``tolerance``, and beside it the rounding of results that a peer gives in 16 bits."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, must be {tuple(want.shape)}"
    rounding = torch.finfo(got.dtype).eps / 2 * want.abs() if got.dtype.itemsize == 2 else 0
    off = (got.detach().double() - want).abs() - rounding
    # written so that NaN fails
    assert bool((off <= tolerance).all()), f"{name}: off by {off.max():.2g}, {tolerance:g} allowed"


class Distance:
    """||got - want|| / ||want|| over pieces, which may be all that there is in memory at a time."""

    def __init__(self):
        self._wrong = self._whole = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape, f"gradient {tuple(got.shape)}, must be {tuple(want.shape)}"
        # in float64 a little at a time: memory that is new costs more than the sums
        rows = max(1, _AT_ONCE // max(1, want.shape[-1]))
        pieces = (x.reshape(-1, x.shape[-1]).split(rows) for x in (got, want))
        for some, exact in zip(*pieces, strict=True):
            exact = exact.double().flatten()
            off = some.double().flatten() - exact
            self._wrong += float(off.dot(off))
            self._whole += float(exact.dot(exact))

    def require(self, tolerance: float, name: str = "gradient") -> None:
        off = (self._wrong / self._whole) ** 0.5
        assert off <= tolerance, f"{name}: off by {off:.2g} of its norm, {tolerance:g} allowed"


# ---- what is right


# (what is judged, device, answers) of the latest problem alone
_latest: list[tuple[Any, str, Answers]] = []


def answers(of: Any, device: str, inputs: Callable[[], tuple[tuple, dict]]) -> Answers:
    """The same for every gate of a problem, until another comes or ``forget``."""
    if not _latest or _latest[0][0] is not of or _latest[0][1] != device:
        # never two at a time
        forget()
        _latest.append((of, device, Answers(inputs())))
    return _latest[0][2]


def of_case(case: Case, device: str) -> Answers:
    return answers(case, device, functools.partial(case.inputs, 0, device, device))


def forget() -> None:
    _latest.clear()


# ---- losses over logits


def logprobs(solve: Callable, case: Case, device: str) -> None:
    """``solve`` returns log-probabilities and entropies, or None for these."""
    known = of_case(case, device)
    (leaf, tokens), kwargs = known.inputs()
    tolerance = TOLERANCE[case.dtype]
    got, entropy = solve((leaf.requires_grad_(), tokens), kwargs)
    assert got.shape == tokens.shape, f"log-probabilities {tuple(got.shape)}"
    weights = _weights(tokens)
    (grad,) = torch.autograd.grad(got, leaf, weights.to(got.dtype))
    logprobs, entropies, gradients = known.once("log-probabilities", _logprobs)
    close("log-probabilities", got, logprobs, tolerance)
    if entropy is not None:
        close("entropy", entropy, entropies, tolerance)
    distance = Distance()
    for some, want in gradients:
        distance.add(grad[some], want)
    distance.require(tolerance)


def _weights(tokens: Tensor) -> Tensor:
    """What the log-probabilities are multiplied by, so that a gradient cannot forget it."""
    return grad_outputs([torch.empty(tokens.shape, device="meta")])[0].to(tokens.device)


def _logprobs(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, list[tuple[slice, Tensor]]]:
    logits, tokens = args
    settings = {name: kwargs[name] for name in ("temperature", "softcap") if name in kwargs}
    weights, found, gradients = _weights(tokens), [], []
    rows = 1 if logits.dim() == 3 else 64
    for start in range(0, len(logits), rows):
        some = slice(start, start + rows)
        wide = logits[some].double().requires_grad_()
        want = nk.token_logprobs(wide, tokens[some], **settings, backend="eager")
        gradients.append((some, torch.autograd.grad(want.logprobs, wide, weights[some])[0]))
        found.append([x.detach() for x in want])
    return *map(torch.cat, zip(*found, strict=True)), gradients


def pg_loss(solve: Callable, case: Case, device: str, unused: int = 0) -> None:
    """``solve`` returns the loss; it leaves out the last ``unused`` tokens of every sequence."""
    known = of_case(case, device)
    (leaf, *args), kwargs = known.inputs()
    tolerance = TOLERANCE[case.dtype]
    got = solve((leaf.requires_grad_(), *args), kwargs)
    (grad,) = torch.autograd.grad(got, leaf)
    used = leaf.shape[1] - unused
    assert not bool(grad[:, used:].any()), "gradient of tokens that are left out"
    losses, gradients = known.once(f"loss of {used}", functools.partial(_pg_loss, used))
    distance = Distance()
    for b, want in enumerate(gradients):
        distance.add(grad[b : b + 1, :used], want)
    # what the sum is made of may be far larger than the sum
    scale = max(1.0, float(losses.abs().sum()))
    close("loss", got, losses.sum(), tolerance * scale)
    distance.require(tolerance)


def _pg_loss(used: int, args: tuple, kwargs: dict) -> tuple[Tensor, list[Tensor]]:
    """Of the first ``used`` tokens: the losses (B,) that make up the mean, and their gradients."""
    settings = {name: x for name, x in kwargs.items() if name != "inplace_backward"}
    ref_logprobs = settings.pop("ref_logprobs")
    B, losses, gradients = len(args[0]), [], []
    for b in range(B):
        # sequences do not know of each other, but for the mean
        logits, tokens, mask = (x[b : b + 1, :used] for x in args[:3])
        wide = logits.double().requires_grad_()
        preference = args[3][b : b + 1].double()
        ref = ref_logprobs[b : b + 1, :used].double()
        loss = nk.pairwise_pg_loss(
            wide, tokens, mask, preference, ref_logprobs=ref, **settings, backend="eager"
        ).loss
        losses.append(loss.detach() / B)
        gradients.append(torch.autograd.grad(loss / B, wide)[0])
    return torch.stack(losses), gradients


# ---- any loss, from logits or from hidden states


def differentiated(op: str, result: tuple) -> Tensor:
    """What the bench differentiates of an op's results: a loss, or a number for each token."""
    return result.logprobs + result.kl if op.endswith("token_kl") else result[0]


def gradients(solve: Callable, case: Case, device: str) -> None:
    """``solve`` returns what is differentiated, or a result of which it is."""
    known = of_case(case, device)
    args, kwargs = known.inputs()
    own = [x.requires_grad_() for x in leaves(case.op, named(case.op, args, kwargs)).values()]
    got = solve(args, kwargs)
    want, scale, pieces, sums = known.once("gradients", functools.partial(_gradients, case.op))
    grads = torch.autograd.grad(got, own, _weights(got).to(got.dtype) if got.dim() else None)
    tolerance = TOLERANCE[case.dtype]
    rounded = case.op in HEADS and case.dtype.itemsize == 2
    rounding = torch.finfo(case.dtype).eps / 2 * _LARGEST_LOGIT if rounded else 0.0
    close("result", got, want, (tolerance + rounding) * scale)
    distance = Distance()
    for some, exact in pieces:
        distance.add(grads[0][some], exact)
    distance.require(tolerance)
    for grad, exact in zip(grads[1:], sums, strict=True):
        distance = Distance()
        distance.add(grad, exact)
        distance.require(tolerance, "gradient of the weight")


def _gradients(op: str, args: tuple, kwargs: dict) -> tuple:
    """By eager in float64: the result, what it is made of, gradients by rows and of the rest."""
    arguments = named(op, args, kwargs)
    arguments.pop("inplace_backward", None)
    found, pieces, sums = [], [], []
    for some, share, part in sequences(arguments, _LOGITS):
        wide = widened(part)
        own = leaves(op, wide)
        for x in own.values():
            x.requires_grad_()
        value = differentiated(op, getattr(nk, op)(**wide, backend="eager"))
        weights = _weights(arguments["tokens"])[some] if value.dim() else value.new_tensor(share)
        first, *others = torch.autograd.grad(value, list(own.values()), weights)
        pieces.append((some, first))
        sums = [x.add_(y) for x, y in zip(sums, others, strict=True)] if sums else others
        found.append(value.detach() if value.dim() else share * value.detach())
    if found[0].dim():
        return torch.cat(found), 1.0, pieces, sums
    # what the sum is made of may be far larger than the sum
    losses = torch.stack(found)
    return losses.sum(), max(1.0, float(losses.abs().sum())), pieces, sums


# ---- sampling


class Mixture:
    """The distributions of a case in float64, as log-probabilities (B, V)."""

    def __init__(self, args: tuple, kwargs: dict):
        args = tuple(widened(dict(enumerate(args))).values())
        kwargs = widened(kwargs)
        policy, ref = model_logits(args)
        coef, temperature = kwargs["mixture_coef"], kwargs["temperature"]
        self.policy, self.ref = (x.div(temperature).log_softmax(-1) for x in (policy, ref))
        mixture = ((1 - coef) * policy + coef * ref) / temperature
        keep = kept(mixture, *(kwargs.get(x, off) for x, off in FILTERS.items()))
        self.sampling = mixture.masked_fill(~keep, -torch.inf).log_softmax(-1)

    def require_typical(self, tokens: Tensor) -> None:
        """The mean log-probability of draws (n, B) is the negative entropy of the mixture."""
        drawn = self.sampling.gather(-1, tokens.T).double()
        assert bool((drawn > -torch.inf).all()), "draws of probability 0"
        mean, variance = _moments(self.sampling)
        off = float((drawn - mean[:, None]).mean())
        # a row that has one token left has no variance
        allowed = DEVIATIONS * float(variance.mean() / drawn.numel()) ** 0.5 + 1e-9
        assert abs(off) <= allowed, f"draws are {off:+.2g} nats from typical, {allowed:.2g} allowed"


FILTERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def model_logits(args: tuple) -> tuple[Tensor, Tensor]:
    """Both models' logits (B, V), which are the arguments, or hidden states times heads."""
    if len(args) == 2:
        return args
    policy_hidden, policy_weight, ref_hidden, ref_weight = args
    if ref_weight is None:
        both = torch.nn.functional.linear(torch.cat([policy_hidden, ref_hidden]), policy_weight)
        return both.chunk(2)
    linear = torch.nn.functional.linear
    return linear(policy_hidden, policy_weight), linear(ref_hidden, ref_weight)


# what a sum of probabilities in float32 may miss
REACH = 1e-6


def contract(solve: Callable, args: tuple, kwargs: dict) -> Draw:
    """What ``check`` holds ours to, its rows sorted by torch: Python takes seconds for each.

    Where top-p ends at another token for a p so near that float32 cannot tell, ``solve`` chooses.
    """
    asked = {name: kwargs.get(name, off) for name, off in FILTERS.items()}
    draw = Draw(*args, **{name: x for name, x in kwargs.items() if name not in FILTERS})
    if asked == FILTERS:
        return draw

    def filtered(rows: Tensor | slice, shift: float) -> Tensor:
        near = asked | ({"top_p": asked["top_p"] + shift} if asked["top_p"] < 1 else {})
        some = draw.whole[rows]
        return some.masked_fill(~kept(some, **near), -torch.inf)

    draw.kept = filtered(slice(None), 0.0)
    claimed, whole = solve(args, kwargs).log_kept_mass, draw.whole.logsumexp(1)
    for shift in (-REACH, REACH):
        doubt = ((draw.kept.logsumexp(1) - whole - claimed).abs() > REACH).nonzero()[:, 0]
        if len(doubt):
            draw.kept[doubt] = filtered(doubt, shift)
    return draw


def kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(B, V) what the filters keep, each on what the one before it left."""
    if (top_k, top_p, min_p) == tuple(FILTERS.values()):
        return torch.ones_like(scores, dtype=torch.bool)
    # of a tie the lowest ids
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = -torch.inf
    mass = ranked.softmax(-1)
    if top_p < 1:
        ranked[mass.cumsum(-1) - mass >= top_p] = -torch.inf
    ranked[mass < min_p * mass[:, :1]] = -torch.inf
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, ranked > -torch.inf)


def _moments(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B,) of the log-probability of a draw."""
    weight = logs.exp()
    finite = logs.masked_fill(weight == 0, 0.0)
    mean = (weight * finite).sum(-1)
    return mean, (weight * (finite - mean[:, None]).square()).sum(-1)


def sample(solve: Callable, case: Case, device: str) -> None:
    """``solve`` returns tokens, then whichever log-probabilities it has of these.

    In the order of the policy, the reference and the filtered mixture.
    """
    known = of_case(case, device)
    args, kwargs = known.inputs()
    mixture, drawn = known.once("mixture", Mixture), []
    B, V = mixture.policy.shape
    # 16-bit logits are converted before anything else, so they are as exact; but those that a
    # product has rounded to 16 bits are not
    tolerance = 1e-4 if len(args) == 2 else 4 * TOLERANCE[case.dtype]
    for _ in range(-(-DRAWS // B)):
        tokens, *logprobs = solve(args, kwargs)
        tokens = tokens.long()
        assert tokens.shape == (B,), f"tokens {tuple(tokens.shape)}, must be ({B},)"
        assert bool(((tokens >= 0) & (tokens < V)).all()), "tokens outside the vocabulary"
        wanted = {"policy": mixture.policy, "ref": mixture.ref, "sampling": mixture.sampling}
        for got, (name, logs) in zip(logprobs, wanted.items(), strict=bool(logprobs)):
            at_token = logs.gather(-1, tokens[:, None])[:, 0]
            close(f"{name} log-probabilities", got, at_token, tolerance)
        drawn.append(tokens)
    mixture.require_typical(torch.stack(drawn))


def logsumexps(solve: Callable, case: Case, device: str) -> None:
    """``solve`` returns the log-sum-exp of each model."""
    known = of_case(case, device)
    found = solve(*known.inputs())
    wanted = known.once("log-sum-exps", lambda args, _: [x.double().logsumexp(-1) for x in args])
    for name, got, want in zip(("policy", "ref"), found, wanted, strict=True):
        close(f"log-sum-exp of the {name}", got, want, 1e-4)
