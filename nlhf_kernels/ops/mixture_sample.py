"""Contract of ``mixture_sample``."""

import torch
from torch import Tensor

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import MixtureSample
from nlhf_kernels.ops import common

OP = "mixture_sample"
_INTEGERS = ("top_k", "seed", "position")


def _body(policy_logits, ref_logits, *arguments):
    *arguments, backend = arguments
    return registry.load(f"{OP}_fwd", backend)(policy_logits, ref_logits, *arguments)


def _fake(policy_logits, ref_logits, *arguments):
    B = policy_logits.shape[0]
    dtype = eager.statistics_dtype(policy_logits, ref_logits)
    return (
        policy_logits.new_empty(B, dtype=torch.int64),
        policy_logits.new_empty(B, dtype=dtype),
        policy_logits.new_empty(0 if ref_logits is None else B, dtype=dtype),
        policy_logits.new_empty(B, dtype=dtype),
        policy_logits.new_empty(B, dtype=dtype),
    )


def _eager_body(policy_logits, ref_logits, *arguments):
    pairs = zip(_FILTERED, arguments[::2], arguments[1::2], strict=True)
    values = {name: scalar if rows is None else rows for name, scalar, rows in pairs}
    return tuple(eager.mixture_sample(policy_logits, ref_logits, **values))


_SAMPLED = ("mixture_coef", "temperature", "seed", "position")
_FILTERED = ("mixture_coef", "temperature", "top_k", "top_p", "min_p", "seed", "position")

# a scalar and an optional (B,) tensor side by side: under torch.compile a tensor costs no recompile
common.define(
    f"{OP}_fwd(Tensor policy_logits, Tensor? ref_logits,"
    " float mixture_coef, Tensor? mixture_coef_rows, float temperature, Tensor? temperature_rows,"
    " SymInt seed, Tensor? seed_rows, SymInt position, Tensor? position_rows, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _body,
    _fake,
)
# eager, opaque to torch.compile: inductor writes Philox out as one expression and takes minutes
common.define(
    f"{OP}_eager(Tensor policy_logits, Tensor? ref_logits,"
    " float mixture_coef, Tensor? mixture_coef_rows, float temperature, Tensor? temperature_rows,"
    " SymInt top_k, Tensor? top_k_rows, float top_p, Tensor? top_p_rows,"
    " float min_p, Tensor? min_p_rows,"
    " SymInt seed, Tensor? seed_rows, SymInt position, Tensor? position_rows)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _eager_body,
    _fake,
)


def _check_parameters(values: dict, extrapolate: bool) -> None:
    """Python scalars out of range raise at once."""
    # what the statistics can hold, in float32 too
    largest = common.LARGEST
    coef = (-largest, largest, "a finite number") if extrapolate else (0, 1, "in [0, 1]")
    limits = {
        "mixture_coef": coef,
        "temperature": (0, largest, "at least 0 and finite"),
        "top_k": (0, 2**63 - 1, "a 64-bit integer, at least 0"),
        "top_p": (5e-324, 1, "in (0, 1]"),
        "min_p": (0, 1, "in [0, 1]"),
        "seed": (-(2**63), 2**63 - 1, "a 64-bit integer"),
        "position": (0, 2**63 - 1, "a 64-bit integer, at least 0"),
    }
    for name, value in values.items():
        if isinstance(value, Tensor):
            continue
        low, high, wanted = limits[name]
        common.check_number(OP, name, value, low, high, wanted)
        if name in _INTEGERS and isinstance(value, float | torch.SymFloat):
            raise ValueError(f"{OP}: {name} must be {wanted}, got {common.describe(value)}")


def _check_values(values: dict, extrapolate: bool) -> None:
    """``check=True``: the same for every row of the tensors."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            for row, x in enumerate(value.reshape(-1).tolist()):
                try:
                    _check_parameters({name: x}, extrapolate)
                except ValueError as error:
                    raise ValueError(f"{error} in row {row}") from None


def _check_rows(result: MixtureSample) -> None:
    bad = (result.tokens < 0).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"{OP}: row {bad[0]} ({len(bad)} in all) has NaN, +inf or no finite logit: look at the "
            "logits of the two models"
        )


def mixture_sample(
    policy_logits: Tensor,
    ref_logits: Tensor | None = None,
    *,
    mixture_coef: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    position: int | Tensor,
    check: bool = False,
    extrapolate: bool = False,
    backend: str = "",
) -> MixtureSample:
    common.check_logits(OP, "policy_logits", policy_logits, dims=(2,))
    if ref_logits is None:
        none = mixture_coef is None or (not isinstance(mixture_coef, Tensor) and mixture_coef == 0)
        common.require(none, OP, "mixture_coef must be 0 or left out without ref_logits")
        mixture_coef = 0.0
    else:
        common.check_logits(OP, "ref_logits", ref_logits, dims=(2,))
        same = ref_logits.shape == policy_logits.shape and ref_logits.device == policy_logits.device
        common.require(
            same,
            OP,
            f"ref_logits must have the shape and device of policy_logits, got "
            f"{common.describe(ref_logits)} beside {common.describe(policy_logits)}",
        )
        common.require(mixture_coef is not None, OP, "mixture_coef must be given with ref_logits")

    values = {
        "mixture_coef": mixture_coef,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "position": position,
    }
    _check_parameters(values, extrapolate)
    rows = {
        name: common.row_parameter(
            OP,
            name,
            value,
            policy_logits,
            (torch.int64,) if name in _INTEGERS else common.FLOATS,
        )
        for name, value in values.items()
    }
    check = check and not torch.compiler.is_compiling()
    if check:
        _check_values(values, extrapolate)

    features = () if eager.filters_off(top_k, top_p, min_p) else ("filters",)
    backend = common.resolve(OP, policy_logits, backend, features)
    if backend == "eager" and not torch.compiler.is_compiling():
        chosen = {name: values[name] if rows[name] is None else rows[name] for name in values}
        result = eager.mixture_sample(policy_logits, ref_logits, **chosen)
    else:
        dtype = eager.statistics_dtype(policy_logits, ref_logits)
        arguments = []
        for name in _FILTERED if backend == "eager" else _SAMPLED:
            kind, row_dtype = (int, torch.int64) if name in _INTEGERS else (float, dtype)
            row = rows[name]
            arguments += [kind(values[name]), None] if row is None else [kind(0), row.to(row_dtype)]
        logits = (policy_logits.detach(), None if ref_logits is None else ref_logits.detach())
        if backend == "eager":
            outputs = torch.ops.nlhf.mixture_sample_eager(*logits, *arguments)
        else:
            outputs = torch.ops.nlhf.mixture_sample_fwd(*logits, *arguments, backend)
        result = MixtureSample(*outputs)
    if check:
        _check_rows(result)
    return result


mixture_sample.__doc__ = eager.mixture_sample.__doc__
