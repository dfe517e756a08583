"""What the contracts of the samplers share: parameters, their checks, the draw from logits."""

from collections.abc import Iterable

import torch
from torch import Tensor

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import MixtureSample
from nlhf_kernels.ops import common

_LONG = 2**63 - 1
# name -> (type, lowest, highest, in words); what statistics can hold, in float32 too
_LIMITS = {
    "mixture_coef": (float, 0, 1, "in [0, 1]"),
    "temperature": (float, 0, common.LARGEST, "at least 0 and finite"),
    "top_k": (int, 0, _LONG, "a 64-bit integer, at least 0"),
    "top_p": (float, 5e-324, 1, "in (0, 1]"),
    "min_p": (float, 0, 1, "in [0, 1]"),
    "seed": (int, -_LONG - 1, _LONG, "a 64-bit integer"),
    "position": (int, 0, _LONG, "a 64-bit integer, at least 0"),
}
_EXTRAPOLATED = (float, -common.LARGEST, common.LARGEST, "a finite number")
PARAMETERS = tuple(_LIMITS)
_SCALARS = (int, float, type(None))
RETURNS = " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


def schema(names: Iterable[str]) -> str:
    """A scalar and an optional (B,) tensor side by side: in torch.compile none costs a recompile"""
    kinds = {float: "float", int: "SymInt"}
    return ", ".join(f"{kinds[_LIMITS[name][0]]} {name}, Tensor? {name}_rows" for name in names)


def arguments(values: dict, names: Iterable[str], B: int, dtype: torch.dtype) -> list:
    """What the raw ops take for these parameters, in the order of their schema."""
    found = []
    for name in names:
        value, kind = values[name], _LIMITS[name][0]
        if isinstance(value, Tensor):
            wanted = torch.int64 if kind is int else dtype
            # even what changes nothing takes microseconds
            rows = value if value.dim() else value.expand(B)
            found += [kind(0), rows if rows.dtype == wanted else rows.to(wanted)]
        else:
            found += [kind(value), None]
    return found


def fakes(like: Tensor, has_ref: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs of a raw op, for as many rows as ``like`` has."""
    B = like.shape[0]
    return (
        like.new_empty(B, dtype=torch.int64),
        like.new_empty(B, dtype=dtype),
        like.new_empty(B if has_ref else 0, dtype=dtype),
        like.new_empty(B, dtype=dtype),
        like.new_empty(B, dtype=dtype),
    )


def check_coefficient(op: str, mixture_coef, ref: Tensor | None, name: str) -> float | Tensor:
    """The coefficient, 0 without a reference; ``name`` is the argument that is the reference."""
    if ref is not None:
        common.require(mixture_coef is not None, op, "mixture_coef must be given with " + name)
        return mixture_coef
    zero = isinstance(mixture_coef, common.NUMBERS) and mixture_coef == 0
    common.require(
        mixture_coef is None or zero, op, "mixture_coef must be 0 or left out without " + name
    )
    return 0.0


def check_parameters(op: str, values: dict, like: Tensor, extrapolate: bool, check: bool) -> bool:
    """Scalars out of range raise, and tensors that are not (B,) beside ``like``, (B, ...).

    ``check``: look at every row of the tensors too, which waits for the device. Returns whether
    that can be: nothing can be looked at while it is traced.
    """
    common.check_flag(op, "extrapolate", extrapolate)
    common.check_flag(op, "check", check)
    look = check and not torch.compiler.is_compiling()
    for name, value in values.items():
        kind, low, high, _ = _LIMITS[name]
        # a decode step asks for every token
        if type(value) is kind and low <= value <= high:
            continue
        if not isinstance(value, Tensor):
            _check_scalar(op, name, value, extrapolate)
            continue
        dtypes = (torch.int64,) if kind is int else common.FLOATS
        shape = () if common.is_dense(value) and not value.dim() else like.shape[:1]
        common.check_tensor(op, name, value, shape, dtypes, like.device)
        for row, x in enumerate(value.reshape(-1).tolist() if look else ()):
            try:
                _check_scalar(op, name, x, extrapolate)
            except ValueError as error:
                raise ValueError(f"{error} in row {row}") from None
    return look


def _check_scalar(op: str, name: str, value: object, extrapolate: bool) -> None:
    limits = _EXTRAPOLATED if extrapolate and name == "mixture_coef" else _LIMITS[name]
    kind, low, high, wanted = limits
    check = common.check_whole if kind is int else common.check_number
    check(op, name, value, low, high, wanted)


def check_rows(op: str, result: MixtureSample) -> None:
    bad = (result.tokens < 0).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"{op}: row {bad[0]} ({len(bad)} in all) has NaN, +inf or no finite logit: look at the "
            "logits of the two models"
        )


def features(values: dict) -> tuple[str, ...]:
    """What a backend must be able to do, for the registry."""
    off = eager.filters_off(values["top_k"], values["top_p"], values["min_p"])
    return () if off else ("filters",)


def direct(*arguments) -> bool:
    """Whether a raw op's body may be called without the dispatcher, which takes longer than it.

    Not if somebody traces, intercepts or profiles the calls of operators, and not for tensors whose
    memory is not their values: subclasses, and views of conjugates.
    """
    if torch.compiler.is_compiling():
        return False
    for x in arguments:
        kind = type(x)
        if kind not in _SCALARS and (kind is not Tensor or x.is_neg()):
            return False
    return not torch._C._len_torch_dispatch_stack() and not torch.autograd._profiler_enabled()


def draw(
    policy_logits: Tensor, ref_logits: Tensor | None, values: dict, backend: str
) -> MixtureSample:
    """``mixture_sample`` on a chosen backend, with parameters that have been checked."""
    if backend == "eager" and not torch.compiler.is_compiling():
        return common.run_eager("mixture_sample", policy_logits, ref_logits, **values)
    dtype = eager.statistics_dtype(policy_logits, ref_logits)
    parameters = arguments(values, PARAMETERS, policy_logits.shape[0], dtype)
    if backend == "cpp" and direct(policy_logits, ref_logits, *parameters):
        forward = registry.load("mixture_sample_fwd", backend)
        return MixtureSample(*forward(policy_logits, ref_logits, *parameters))
    logits = (policy_logits.detach(), None if ref_logits is None else ref_logits.detach())
    if backend == "eager":
        return MixtureSample(*torch.ops.nlhf.mixture_sample_eager(*logits, *parameters))
    return MixtureSample(*torch.ops.nlhf.mixture_sample_fwd(*logits, *parameters, backend))
