"""The peers of the ops over logits: what else people call for the same result.

A peer takes the arguments of the public op and solves as much of it as it can; its name says what
it leaves out. Peers that are not here, or cannot run here, are returned with the reason. Nobody
needs one to be installed: they are imported when they are asked for.
"""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import nlhf_kernels as nk
from bench import gates
from bench.problem import Contender
from nlhf_kernels.testing.case import F32, Case

# package -> what installs it; without their dependencies, of which an unpinned torch is one
INSTALL = {
    "cut_cross_entropy": "pip install --no-deps cut-cross-entropy==25.1.1",
    "flashinfer": "pip install flashinfer-python",
    "liger_kernel": "pip install --no-deps liger-kernel==0.8.5",
    "trl": "pip install --no-deps trl==1.13.0",
}
NEEDS_GPU = "needs a CUDA GPU"
# the options of a case that every peer can express; all others belong to tests
_EXPRESSED = {
    "mixture_sample": {"ref_dtype", "coef", "temperature", "scale", "filters", "seed", "position"},
    "linear_mixture_sample": {"heads", "coef", "temperature", "seed", "position"},
    "token_logprobs": {"temperature", "softcap", "scale", "inplace_backward"},
    "token_kl": {"temperature", "near", "ref_dtype", "inplace_backward"},
    "pairwise_pg_loss": {"temperature", "softcap", "masked", "tau", "baseline", "inplace_backward"},
    "linear_token_logprobs": set(),
    "linear_token_kl": {"ref"},
    "linear_pairwise_pg_loss": {"masked", "tau", "baseline"},
}
# of the loss with an exact KL
_EXPRESSED_EXACT = _EXPRESSED["pairwise_pg_loss"] - {"softcap"} | {"kl", "ref"}


def contenders(case: Case, device: str) -> tuple[Contender, ...]:
    """The peers of a case on "cpu" or "cuda"; ``missing`` says why one cannot run."""
    # it is made of what is here
    from bench import heads

    found = {
        "mixture_sample": _samplers,
        "linear_mixture_sample": _linear_samplers,
        "token_logprobs": _logprobs,
        "token_kl": _kls,
        "pairwise_pg_loss": _exact_losses if case.options.get("kl") == "exact" else _pg_losses,
        **dict.fromkeys(heads.OVER_LOGITS, heads.contenders),
    }[case.op](case, device)
    if beyond := _beyond(case):
        why = f"peers do not express {', '.join(sorted(beyond))} of this case"
        found = [dataclasses.replace(x, missing=why) for x in found]
    return tuple(found)


def _beyond(case: Case) -> set[str]:
    exact = case.options.get("kl") == "exact"
    found = set(case.options) - (_EXPRESSED_EXACT if exact else _EXPRESSED[case.op])
    if case.op == "mixture_sample" and case.options.get("ref_dtype", F32) is None:
        found.add("ref_dtype")
    if case.op.endswith("pairwise_pg_loss") and case.options.get("masked") != "none":
        found.add("masked")
    return found


# ---- what is here


# a look-up at each call would be timed with the peer
@functools.cache
def load(module: str):
    """Import a peer without what it does to the warnings of everyone else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


@functools.cache
def absent(module: str) -> str:
    """Why the package of a module cannot be used; "" if it can."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"not installed: {INSTALL[package]}"
    try:
        load(module)
    except (ImportError, OSError, RuntimeError) as error:
        # a package that was built against others than are here
        return f"cannot be imported: {' '.join(str(error).split())[:100]}"
    return ""


def gpu_only(module: str, device: str) -> str:
    """Why a peer that runs on CUDA alone cannot be used; "" if it can."""
    return absent(module) or ("" if device == "cuda" else NEEDS_GPU)


def compiled(function: Callable) -> Callable:
    """torch.compile for the shapes of this one problem.

    Code objects share their graphs and the limit on their number, so each problem needs its own.
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, dynamic=False)


# ---- samplers


def _samplers(case: Case, device: str) -> list[Contender]:
    def contender(name, solve, missing="", gate=gates.sample):
        return Contender(name, True, solve, functools.partial(gate, solve, case, device), missing)

    filters = case.options.get("filters", {})
    rows = any(isinstance(x, Tensor) for x in filters.values())
    per_batch = "its filters are one for the batch" if rows else ""
    no_min_p = "no min-p from logits" if "min_p" in filters else ""
    no_filters = "no filters" if filters else ""
    noise = _gumbel_triton if device == "cuda" else _gumbel_torch
    return [
        contender("Hugging Face path", hugging_face(_hugging_face), per_batch),
        contender(
            "Hugging Face path, torch.compile", hugging_face(compiled(_hugging_face)), per_batch
        ),
        contender(
            "FlashInfer (tokens only)",
            flashinfer,
            gpu_only("flashinfer.sampling", device) or no_min_p,
        ),
        contender("yardstick: Gumbel per element (tokens only)", noise, no_filters),
        # reads and exponentiates what a sampler must, and draws nothing
        contender("yardstick: two logsumexp (no draw)", two_logsumexp, gate=gates.logsumexps),
    ]


def hugging_face(path: Callable) -> Callable:
    @torch.no_grad()
    def solve(args: tuple, kwargs: dict) -> tuple:
        return path(*args, kwargs["mixture_coef"], kwargs["temperature"], _warpers(kwargs))

    return solve


def _hugging_face(policy, ref, coef, temperature, warpers) -> tuple:
    policy, ref = policy.float(), ref.float()
    mixture = ((1 - coef) * policy + coef * ref) / temperature
    for warper in warpers:
        mixture = warper(None, mixture)
    probabilities = mixture.softmax(-1)
    tokens = torch.multinomial(probabilities, 1)
    of_models = [(x / temperature).log_softmax(-1).gather(-1, tokens) for x in (policy, ref)]
    # what was drawn has a probability above 0
    drawn = probabilities.gather(-1, tokens).log()
    return tuple(x[:, 0] for x in (tokens, *of_models, drawn))


def _warpers(kwargs: dict) -> list:
    """The filters of transformers, in the order of its ``generate``."""
    names = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}
    asked = [(name, kwargs[filter]) for filter, name in names.items() if filter in kwargs]
    if not asked:
        return []
    transformers = load("transformers")
    return [getattr(transformers, name)(value) for name, value in asked]


def _mixed(args: tuple, kwargs: dict) -> Tensor:
    policy, ref = (x.float() for x in args)
    coef = kwargs["mixture_coef"]
    return ((1 - coef) * policy + coef * ref) / kwargs["temperature"]


@torch.no_grad()
def flashinfer(args: tuple, kwargs: dict) -> tuple:
    sampling, mixture = load("flashinfer.sampling"), _mixed(args, kwargs)
    if "top_k" not in kwargs and "top_p" not in kwargs:
        return (sampling.sampling_from_logits(mixture),)
    top_k = kwargs.get("top_k", 0) or mixture.shape[-1]
    top_p = kwargs.get("top_p", 1.0)
    return (sampling.top_k_top_p_sampling_from_logits(mixture, top_k, top_p),)


@torch.no_grad()
def _gumbel_torch(args: tuple, kwargs: dict) -> tuple:
    mixture = _mixed(args, kwargs)
    # the negative logarithm of an exponential variable is a Gumbel one
    return ((mixture - torch.empty_like(mixture).exponential_().log_()).argmax(-1),)


# noise of its own at each call
_calls = itertools.count()


def _gumbel_triton(args: tuple, kwargs: dict) -> tuple:
    from bench import yardsticks

    settings = {name: kwargs[name] for name in ("mixture_coef", "temperature")}
    return (yardsticks.gumbel_sample(*args, **settings, seed=next(_calls)),)


@torch.no_grad()
def two_logsumexp(args: tuple, kwargs: dict) -> tuple:
    return tuple(x.float().logsumexp(-1) for x in args)


# ---- samplers from hidden states: nobody fuses two models, so what others do is a product first


def _linear_samplers(case: Case, device: str) -> list[Contender]:
    ours = (
        "matmul, then mixture_sample",
        lambda args, kwargs: nk.mixture_sample(*args, **kwargs)[:4],
    )
    found = []
    for name, sampler in (("matmul, then Hugging Face path", hugging_face(_hugging_face)), ours):
        solve = after_matmul(sampler)
        gate = functools.partial(gates.sample, solve, case, device)
        found.append(Contender(name, True, solve, gate, ""))
    return found


def after_matmul(sampler: Callable) -> Callable:
    @torch.no_grad()
    def solve(args: tuple, kwargs: dict) -> tuple:
        return sampler(gates.model_logits(args), kwargs)

    return solve


# ---- log-probabilities: (args, kwargs) -> (log-probabilities, entropies or None)


def _logprobs(case: Case, device: str) -> list[Contender]:
    def contender(name, solve, missing="", inplace=False):
        gate = functools.partial(gates.logprobs, solve, case, device)
        return Contender(name, True, lambda a, k: solve(a, k)[0], gate, missing, inplace)

    whole = ("torch.compile", compiled(formula))
    return [contender(*known) for known in (whole, *_partial(case, device))]


def _partial(case: Case, device: str) -> list[tuple]:
    """(name, solver, why it is missing, whether it writes over the logits) without entropy."""
    hot = "" if case.options.get("temperature", 1.0) == 1 else "it has no temperature"
    liger = gpu_only("liger_kernel.ops", device) or hot
    return [
        ("torch log_softmax (no entropy)", log_softmax, "", False),
        ("Liger cross entropy (no entropy)", liger_cross_entropy, liger, True),
        (
            "TRL selective_log_softmax (no entropy)",
            selective_log_softmax,
            absent("trl.trainer.utils"),
            False,
        ),
    ]


def _scores(logits: Tensor, kwargs: dict) -> Tensor:
    if (softcap := kwargs.get("softcap")) is not None:
        logits = softcap * torch.tanh(logits / softcap)
    temperature = kwargs.get("temperature", 1.0)
    return logits if temperature == 1 else logits / temperature


def formula(args: tuple, kwargs: dict) -> tuple:
    logits, tokens = args
    logs = _scores(logits.float(), kwargs).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, tokens[..., None])[..., 0], entropy


def log_softmax(args: tuple, kwargs: dict) -> tuple:
    logits, tokens = args
    logs = _scores(logits.float(), kwargs).log_softmax(-1)
    return logs.gather(-1, tokens[..., None])[..., 0], None


def liger_cross_entropy(args: tuple, kwargs: dict) -> tuple:
    """Its forward writes the gradient of the loss over the logits."""
    logits, tokens = args
    # weight, ignored token, z loss, label smoothing, reduction, soft cap, three extra outputs
    settings = None, -100, 0.0, 0.0, "none", kwargs.get("softcap"), False, False, False
    rows = logits.reshape(-1, logits.shape[-1])
    function = load("liger_kernel.ops").LigerCrossEntropyFunction
    return -function.apply(rows, tokens.reshape(-1), *settings)[0].view(tokens.shape), None


def selective_log_softmax(args: tuple, kwargs: dict) -> tuple:
    logits, tokens = args
    solve = load("trl.trainer.utils").selective_log_softmax
    return solve(_scores(logits, kwargs), tokens), None


# ---- the exact KL: nobody fuses what it takes, so what others do is written out and compiled


def _kls(case: Case, device: str) -> list[Contender]:
    whole = compiled(kl_formula)

    def solve(args: tuple, kwargs: dict) -> Tensor:
        logprobs, _, _, kl = whole(args, kwargs)
        return logprobs + kl

    gate = functools.partial(gates.gradients, solve, case, device)
    return [Contender("torch.compile", True, solve, gate)]


def kl_formula(args: tuple, kwargs: dict) -> tuple:
    """Log-probabilities of both, entropy and exact KL."""
    logits, refs, tokens = args
    logs, ref_logs = (_scores(x.float(), kwargs).log_softmax(-1) for x in (logits, refs))
    p = logs.exp()
    at_tokens = [x.gather(-1, tokens[..., None])[..., 0] for x in (logs, ref_logs)]
    return *at_tokens, -(p * logs).sum(-1), (p * (logs - ref_logs)).sum(-1)


def _exact_losses(case: Case, device: str) -> list[Contender]:
    whole = compiled(exact_formula)
    gate = functools.partial(gates.gradients, whole, case, device)
    return [Contender("torch.compile", True, whole, gate)]


def exact_formula(args: tuple, kwargs: dict) -> Tensor:
    """A token is charged with the KL of those after it, and each with the gradient of its own."""
    logits, tokens, mask, preference = args
    logprobs, _, _, kl = kl_formula((logits, kwargs["ref_logits"], tokens), kwargs)
    kl = kl * mask
    # as if each were the log-ratio of the token before it
    later = torch.nn.functional.pad(kl.detach()[:, 1:], (0, 1))
    settings = kwargs | {"ref_logprobs": logprobs.detach() - later}
    weights = pg_weights(logprobs, mask, preference, settings)
    return (weights * logprobs).sum() + kwargs["tau"] * kl.sum() / len(preference)


# ---- the policy-gradient loss


def _pg_losses(case: Case, device: str) -> list[Contender]:
    def contender(name, solve, missing="", inplace=False, **options):
        gate = functools.partial(gates.pg_loss, solve, case, device, **options)
        return Contender(name, True, solve, gate, missing, inplace)

    whole = compiled(pg_formula)
    missing = gpu_only("liger_kernel.ops", device)
    if "softcap" in case.options:
        missing = missing or "it has no soft cap"
    return [
        contender("torch.compile", lambda args, kwargs: whole(args, kwargs)[0]),
        *(contender(name, pg_loss(f), *more) for name, f, *more in _partial(case, device)),
        # its logits have a row more than there are tokens
        contender(
            "Liger GRPO loss (T - 1 tokens, no entropy)", liger_grpo, missing, True, unused=1
        ),
    ]


def pg_weights(logprobs: Tensor, mask: Tensor, preference: Tensor, kwargs: dict) -> Tensor:
    """What multiplies each log-probability: -(preference - baseline - tau * reward-to-go) / B."""
    mask = mask.float()
    ell = (logprobs.detach() - kwargs["ref_logprobs"]) * mask
    reward_to_go = ell.flip(-1).cumsum(-1).flip(-1)
    advantage = preference[:, None] - kwargs.get("baseline", 0.5) - kwargs["tau"] * reward_to_go
    return -advantage * mask / len(preference)


def pg_loss(logprobs_of: Callable) -> Callable:
    def solve(args: tuple, kwargs: dict) -> Tensor:
        logits, tokens, mask, preference = args
        logprobs = logprobs_of((logits, tokens), kwargs)[0].float()
        return (pg_weights(logprobs, mask, preference, kwargs) * logprobs).sum()

    return solve


def pg_formula(args: tuple, kwargs: dict) -> tuple:
    """The loss and, detached like ours, all that the op returns beside it."""
    logits, tokens, mask, preference = args
    logprobs, _ = log_softmax((logits, tokens), kwargs)
    _, entropy = formula((logits.detach(), tokens), kwargs)
    loss = (pg_weights(logprobs, mask, preference, kwargs) * logprobs).sum()
    kl = logprobs.detach() - kwargs["ref_logprobs"]
    return loss, logprobs.detach(), entropy * mask, kl * mask


def liger_grpo(args: tuple, kwargs: dict) -> Tensor:
    """Log-probabilities first, since the advantage of a token depends on those after it.

    The loss "cispo" without clipping, times a ratio per token, is the same sum as ours.
    """
    logits, tokens, mask, preference = args
    tokens, mask = tokens[:, :-1].contiguous(), mask[:, :-1].contiguous()
    temperature = kwargs.get("temperature", 1.0)
    load("liger_kernel.ops")
    liger = load("liger_kernel.transformers.grpo_loss")
    logprobs = liger.fused_selective_log_softmax(logits.detach(), tokens, temperature, mask)
    kwargs = kwargs | {"ref_logprobs": kwargs["ref_logprobs"][:, :-1]}
    weights = -pg_weights(logprobs, mask, preference, kwargs)
    loss, *_ = liger.triton_grpo_loss(
        logits, None, None, tokens, torch.ones_like(preference), mask,
        temperature=temperature, beta=0.0, eps_high=1.0, loss_type="cispo", vllm_is_ratio=weights,
    )  # fmt: skip
    return loss.sum()
