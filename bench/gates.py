"""What a peer's results must agree with before its time counts: the same in float64, by eager.

Each gate runs a solver on the inputs of a case and raises AssertionError if it is wrong. Peers keep
less precision than our own ops must, so these tolerances are wider than those of ``check``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf_kernels.testing import Case
from nlhf_kernels.testing.check import grad_outputs, widened

# by dtype of the logits: absolute for log-probabilities, of the norm for gradients
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# a sampler's draws are judged by their mean log-probability: so many rows, so many deviations
DRAWS, DEVIATIONS = 64, 6


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within ``tolerance``, and beside it the rounding of results that a peer gives in 16 bits."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, must be {tuple(want.shape)}"
    rounding = torch.finfo(got.dtype).eps / 2 * want.abs() if got.dtype.itemsize == 2 else 0
    off = (got.detach().double() - want).abs() - rounding
    # written so that NaN fails
    assert bool((off <= tolerance).all()), f"{name}: off by {off.max():.2g}, {tolerance:g} allowed"


class Distance:
    """||got - want|| / ||want|| over pieces that never lie in memory together."""

    def __init__(self):
        self._wrong = self._whole = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape, f"gradient {tuple(got.shape)}, must be {tuple(want.shape)}"
        want = want.double()
        self._wrong += float((got.double() - want).square().sum())
        self._whole += float(want.square().sum())

    def require(self, tolerance: float, name: str = "gradient") -> None:
        off = (self._wrong / self._whole) ** 0.5
        assert off <= tolerance, f"{name}: off by {off:.2g} of its norm, {tolerance:g} allowed"


# ---- losses over logits


def logprobs(solve: Callable, case: Case, device: str) -> None:
    """``solve`` returns log-probabilities and entropies, or None for these."""
    (logits, tokens), kwargs = case.inputs(0, device, device)
    settings = {name: kwargs[name] for name in ("temperature", "softcap") if name in kwargs}
    tolerance = TOLERANCE[case.dtype]
    # a copy: some write over what they are given
    leaf = logits.detach().clone().requires_grad_()
    got, entropy = solve((leaf, tokens), kwargs)
    (weights,) = grad_outputs([got])
    weights = weights.to(device)
    (grad,) = torch.autograd.grad(got, leaf, weights.to(got.dtype))

    distance = Distance()
    rows = 1 if logits.dim() == 3 else 64
    for start in range(0, len(logits), rows):
        some = slice(start, start + rows)
        wide = logits[some].double().requires_grad_()
        want = nk.token_logprobs(wide, tokens[some], **settings, backend="eager")
        close("log-probabilities", got[some], want.logprobs, tolerance)
        if entropy is not None:
            close("entropy", entropy[some], want.entropy, tolerance)
        distance.add(grad[some], torch.autograd.grad(want.logprobs, wide, weights[some])[0])
    distance.require(tolerance)


def pg_loss(solve: Callable, case: Case, device: str, unused: int = 0) -> None:
    """``solve`` returns the loss; it leaves out the last ``unused`` tokens of every sequence."""
    args, kwargs = case.inputs(0, device, device)
    tolerance = TOLERANCE[case.dtype]
    leaf = args[0].detach().clone().requires_grad_()
    got = solve((leaf, *args[1:]), kwargs)
    (grad,) = torch.autograd.grad(got, leaf)

    ref_logprobs = kwargs.pop("ref_logprobs")
    kwargs.pop("inplace_backward", None)
    B, used = len(args[0]), args[0].shape[1] - unused
    assert not bool(grad[:, used:].any()), "gradient of tokens that are left out"
    distance, losses = Distance(), []
    for b in range(B):
        # sequences do not know of each other, but for the mean
        logits, tokens, mask = (x[b : b + 1, :used] for x in args[:3])
        wide = logits.double().requires_grad_()
        preference = args[3][b : b + 1].double()
        ref = ref_logprobs[b : b + 1, :used].double()
        loss = nk.pairwise_pg_loss(
            wide, tokens, mask, preference, ref_logprobs=ref, **kwargs, backend="eager"
        ).loss
        losses.append(loss.detach() / B)
        distance.add(grad[b : b + 1, :used], torch.autograd.grad(loss / B, wide)[0])
    losses = torch.stack(losses)
    # what the sum is made of may be far larger than the sum
    scale = max(1.0, float(losses.abs().sum()))
    close("loss", got, losses.sum(), tolerance * scale)
    distance.require(tolerance)


# ---- sampling


class Mixture:
    """The distributions of a case in float64, as log-probabilities (B, V)."""

    def __init__(self, args: tuple, kwargs: dict):
        (policy, ref), kwargs = widened(args, kwargs)
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


def kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(B, V) what the filters keep, each on what the one before it left."""
    if (top_k, top_p, min_p) == tuple(FILTERS.values()):
        return torch.ones_like(scores, dtype=torch.bool)
    ranked, order = scores.sort(-1, descending=True)
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
    args, kwargs = case.inputs(0, device, device)
    B, V = args[0].shape
    mixture, drawn = Mixture(args, kwargs), []
    for _ in range(-(-DRAWS // B)):
        tokens, *logprobs = solve(args, kwargs)
        tokens = tokens.long()
        assert tokens.shape == (B,), f"tokens {tuple(tokens.shape)}, must be ({B},)"
        assert bool(((tokens >= 0) & (tokens < V)).all()), "tokens outside the vocabulary"
        wanted = {"policy": mixture.policy, "ref": mixture.ref, "sampling": mixture.sampling}
        for got, (name, logs) in zip(logprobs, wanted.items(), strict=bool(logprobs)):
            # 16-bit logits are converted before anything else, so they are as exact
            close(f"{name} log-probabilities", got, logs.gather(-1, tokens[:, None])[:, 0], 1e-4)
        drawn.append(tokens)
    mixture.require_typical(torch.stack(drawn))


def logsumexps(solve: Callable, case: Case, device: str) -> None:
    """``solve`` returns the log-sum-exp of each model."""
    args, kwargs = case.inputs(0, device, device)
    for name, got, x in zip(("policy", "ref"), solve(args, kwargs), args, strict=True):
        close(f"log-sum-exp of the {name}", got, x.double().logsumexp(-1), 1e-4)
