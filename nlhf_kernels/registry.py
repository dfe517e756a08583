"""op x backend -> function, and the one place where a backend is chosen.

A backend is a dotted path, so that this module imports none of them: only the body of a raw op,
which nothing traces, does (``load``). Availability is probed once, from cheap facts.
"""

import collections
import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

BACKENDS = ("eager", "cpp", "triton", "cuda")
ORDER = {"cpu": ("cpp", "eager"), "cuda": ("triton", "eager")}
OPS = (
    "mixture_sample",
    "linear_mixture_sample",
    "token_logprobs",
    "linear_token_logprobs",
    "token_kl",
    "linear_token_kl",
    "pairwise_pg_loss",
    "linear_pairwise_pg_loss",
)
# not of logits: a layer of the model, on the CPU only
LAYERS = ("skinny_linear",)
# of numbers per response, and of weights
UPDATES = ("pair_loss", "ema_update_")

# raw op -> backend -> "module:function"; eager is called straight and has no raw op
_NATIVE, _TRITON = "nlhf_kernels.backends.native", "nlhf_kernels.backends.triton"
_PATHS = {
    "mixture_sample_fwd": {
        "cpp": f"{_NATIVE}:mixture_sample_fwd",
        "triton": f"{_TRITON}.mixture_sample:mixture_sample_fwd",
    },
    "linear_mixture_sample_fwd": {
        "cpp": f"{_NATIVE}:linear_mixture_sample_fwd",
        "triton": f"{_TRITON}.linear_mixture_sample:linear_mixture_sample_fwd",
    },
    "token_logprobs_fwd": {
        "cpp": f"{_NATIVE}:token_logprobs_fwd",
        "triton": f"{_TRITON}.token_logprobs:token_logprobs_fwd",
    },
    "token_logprobs_bwd": {
        "cpp": f"{_NATIVE}:token_logprobs_bwd",
        "triton": f"{_TRITON}.token_logprobs:token_logprobs_bwd",
    },
    "token_kl_fwd": {
        "cpp": f"{_NATIVE}:token_kl_fwd",
        "triton": f"{_TRITON}.token_kl:token_kl_fwd",
    },
    "token_kl_bwd": {
        "cpp": f"{_NATIVE}:token_kl_bwd",
        "triton": f"{_TRITON}.token_kl:token_kl_bwd",
    },
    "pairwise_pg_coef_fwd": {
        "cpp": f"{_NATIVE}:pairwise_pg_coef_fwd",
        "triton": f"{_TRITON}.pairwise_pg_loss:pairwise_pg_coef_fwd",
    },
    "skinny_linear_fwd": {"cpp": f"{_NATIVE}:skinny_linear_fwd"},
    "pair_loss_fwd": {
        "cpp": f"{_NATIVE}:pair_loss_fwd",
        "triton": f"{_TRITON}.pair_loss:pair_loss_fwd",
    },
    "ema_update__fwd": {
        "cpp": f"{_NATIVE}:ema_update__fwd",
        "triton": f"{_TRITON}.ema_update:ema_update__fwd",
    },
}
# op -> whose backends serve it: after a matrix product, where they have no kernel for it; a loss is
# statistics, coefficients and gradients
_THROUGH = {
    "linear_mixture_sample": "mixture_sample",
    "linear_token_logprobs": "token_logprobs",
    "linear_token_kl": "token_kl",
    "pairwise_pg_loss": "pairwise_pg_coef",
    "linear_pairwise_pg_loss": "pairwise_pg_coef",
}
# what a backend has not got, beside whole ops: op -> backend -> feature -> what to do
_LACKS: dict[str, dict[str, dict[str, str]]] = {}
_forced = ""
_warned: set[str] = set()
# (op or part of one, backend) -> how often it ran
_calls: collections.defaultdict[tuple[str, str], int] = collections.defaultdict(int)


def _probe() -> dict[str, str]:
    """Why backends cannot run in this process at all; asked once: a trace must not import."""
    absent = {}
    if importlib.util.find_spec("nlhf_kernels._native") is None:
        absent["cpp"] = (
            "the extension nlhf_kernels._native is not built: reinstall with a C++ compiler"
        )
    if importlib.util.find_spec("triton") is None:
        absent["triton"] = "the package triton is not installed: pip install triton"
    return absent


_ABSENT = _probe()
# triton fixes this mode when it is imported, so do we
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def reason(op: str, backend: str, device: str, features: tuple[str, ...] = ()) -> str:
    """Why ``backend`` cannot serve ``op`` on a device type with these features; empty if it can."""
    if backend not in BACKENDS:
        return f"it is unknown: choose one of {', '.join(BACKENDS)}"
    if backend == "eager":
        return ""
    served = _THROUGH.get(op, op)
    if f"{served}_fwd" not in _PATHS:
        known = ", ".join((*OPS, *LAYERS, *UPDATES))
        raise ValueError(f"reason: op must be one of {known}, got {op!r}")
    if backend not in _PATHS[f"{served}_fwd"]:
        return f"{op} has no {backend} implementation"
    if backend in _ABSENT:
        return _ABSENT[backend]
    if backend == "cpp" and device != "cpu":
        return f"it runs on the CPU only, the tensors are on {device}"
    if backend == "triton" and device == "cpu" and not _INTERPRETED:
        return "on the CPU it runs only in the interpreter: set TRITON_INTERPRET=1 before the start"
    if backend == "triton" and device != "cpu" and _INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which is for the CPU: unset it to run on a GPU"
    lacks = _LACKS.get(served, {}).get(backend, {})
    return next((lacks[feature] for feature in features if feature in lacks), "")


def resolve(op: str, device: str, backend: str = "", features: tuple[str, ...] = ()) -> str:
    """The backend that serves a call: the explicit choice, or the first that can.

    An explicit choice (``backend``, ``use_backend``, ``NLHF_BACKEND``, in that priority) runs or
    raises ``ValueError`` with its reason; it never falls back.
    """
    if not isinstance(backend, str):
        kind = type(backend).__name__
        raise ValueError(f"{op}: backend must be a word, one of {', '.join(BACKENDS)}, got {kind}")
    explicit = backend or _forced or os.environ.get("NLHF_BACKEND", "")
    if explicit:
        if why := reason(op, explicit, device, features):
            raise ValueError(f"{op}: backend {explicit!r} cannot be used: {why}")
        return explicit
    order = ORDER.get(device, ("triton", "eager"))
    chosen = next(name for name in order if not reason(op, name, device, features))
    if chosen == "eager" and device != "cpu":
        _warn_eager(op, device, reason(op, order[0], device, features))
    return chosen


def _warn_eager(op: str, device: str, why: str) -> None:
    if op not in _warned:
        _warned.add(op)
        warnings.warn(f"{op}: falls back to eager on {device}: {why}", stacklevel=4)


def has(raw_op: str, backend: str) -> bool:
    """Whether a backend has a kernel for a raw op, wherever it may run."""
    return backend in _PATHS[raw_op]


def load(raw_op: str, backend: str):
    """The function of a backend, for a call of it, which counts. A broken backend raises here."""
    function, key = _imported(raw_op, backend)
    # no lock, which a fork could leave locked: within this line CPython switches no threads
    _calls[key] += 1
    return function


def count(name: str, backend: str) -> None:
    """One call more. Not to be traced: torch.compile would start again for every number."""
    _calls[name, backend] += 1


def calls() -> dict[tuple[str, str], int]:
    """What ran in this process since ``reset_calls``: (op, backend) -> number of calls.

    An op is counted under its public name and its backward as ``<op>_bwd``, where a backend's
    function is called, not where it was chosen: what is missing here did not run. So are the parts
    of an op: ``pairwise_pg_loss`` on "cpp" is also a call of ``token_logprobs``, or of
    ``token_kl``, and one of ``pairwise_pg_coef``; a ``linear_`` op calls its parts for every chunk,
    or ``mixture_sample`` where it has no kernel for a draw. "eager" has no parts and no backward:
    that is autograd's.

    Not seen: what a CUDA graph replays (its capture counts once). And inside of torch.compile and
    torch.export "eager", but for ``mixture_sample`` and ``ema_update_``, and
    ``linear_mixture_sample`` where it is a product and ``mixture_sample``. What gradient
    checkpointing does again is a call again.
    """
    return {key: _calls[key] for key in sorted(_calls)}


def reset_calls() -> None:
    """Count from 0 again."""
    _calls.clear()


def calls_table(calls: dict[tuple[str, str], int]) -> str:
    """What ``calls`` gave, or the difference of two of them, as lines of op, backend and number."""
    rows = [("op", "backend", "calls")]
    rows += [(op, backend, str(n)) for (op, backend), n in sorted(calls.items()) if n]
    if len(rows) == 1:
        return "no op ran"
    width = max(len(n) for *_, n in rows)
    return "\n".join(f"{op:28} {backend:8} {n:>{width}}" for op, backend, n in rows)


@functools.cache
def _imported(raw_op: str, backend: str) -> tuple[Callable, tuple[str, str]]:
    """The function, and what it counts as."""
    # torch comes first on purpose: it and the extension then share one OpenMP runtime
    assert torch.__version__
    module, name = _PATHS[raw_op][backend].split(":")
    # "_fwd" goes without saying
    return getattr(importlib.import_module(module), name), (raw_op.removesuffix("_fwd"), backend)


def _set_forced(name: str) -> str:
    # a plain global: a ContextVar breaks torch.compile(fullgraph=True)
    global _forced
    before, _forced = _forced, name
    return before


@contextlib.contextmanager
def use_backend(name: str):
    """Within the ``with``, every op runs on this backend or raises; "" chooses automatically."""
    if not isinstance(name, str) or (name and name not in BACKENDS):
        got = repr(name) if isinstance(name, str) else type(name).__name__
        raise ValueError(f"use_backend: {got} is unknown: choose one of {', '.join(BACKENDS)}")
    before = _set_forced(name)
    try:
        yield
    finally:
        _set_forced(before)


def table() -> list[tuple[str, str, str, str]]:
    """(op, backend, device type, reason or "") for every device type of this machine."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        (op, backend, device, reason(op, backend, device))
        for op in (*OPS, *LAYERS, *UPDATES)
        for backend in BACKENDS
        for device in devices
    ]
