"""Contract of ``mixture_sample``."""

from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import MixtureSample
from nlhf_kernels.ops import common, sampling, vocabulary

OP = "mixture_sample"


def _body(policy_logits, ref_logits, *arguments):
    *arguments, backend = arguments
    return registry.load(f"{OP}_fwd", backend)(policy_logits, ref_logits, *arguments)


def _fake(policy_logits, ref_logits, *_):
    dtype = eager.statistics_dtype(policy_logits, ref_logits)
    return sampling.fakes(policy_logits, ref_logits is not None, dtype)


def _eager_body(policy_logits, ref_logits, *arguments):
    pairs = zip(sampling.PARAMETERS, arguments[::2], arguments[1::2], strict=True)
    values = {name: scalar if rows is None else rows for name, scalar, rows in pairs}
    return tuple(common.run_eager(OP, policy_logits, ref_logits, **values))


_TAKES = f"Tensor policy_logits, Tensor? ref_logits, {sampling.schema(sampling.PARAMETERS)}"
common.define(f"{OP}_fwd({_TAKES}, str backend){sampling.RETURNS}", _body, _fake)
# eager, opaque to torch.compile: inductor writes Philox out as one expression and takes minutes
common.define(f"{OP}_eager({_TAKES}){sampling.RETURNS}", _eager_body, _fake)


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
    group: ProcessGroup | None = None,
    backend: str = "",
) -> MixtureSample:
    common.check_logits(OP, "policy_logits", policy_logits, dims=(2,))
    if ref_logits is not None:
        common.check_logits(OP, "ref_logits", ref_logits, dims=(2,))
        if ref_logits.shape != policy_logits.shape or ref_logits.device != policy_logits.device:
            raise ValueError(
                f"{OP}: ref_logits must have the shape and device of policy_logits, got "
                f"{common.describe(ref_logits)} beside {common.describe(policy_logits)}"
            )
    values = {
        "mixture_coef": sampling.check_coefficient(OP, mixture_coef, ref_logits, "ref_logits"),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "position": position,
    }
    check = sampling.check_parameters(OP, values, policy_logits, extrapolate, check)
    vocabulary.check_group(OP, group)
    backend = common.resolve(OP, policy_logits, backend, sampling.features(values))
    if group is not None:
        policy_logits = vocabulary.gathered(policy_logits, group)
        ref_logits = None if ref_logits is None else vocabulary.gathered(ref_logits, group)
    result = sampling.draw(policy_logits, ref_logits, values, backend)
    if check:
        sampling.check_rows(OP, result)
    return result


mixture_sample.__doc__ = eager.mixture_sample.__doc__
