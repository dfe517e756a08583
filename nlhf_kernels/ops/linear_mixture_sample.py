"""Contract of ``linear_mixture_sample``: one fused kernel, or a matrix product and
``mixture_sample``.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlhf_kernels import eager, registry
from nlhf_kernels.eager import MixtureSample
from nlhf_kernels.ops import common, heads, sampling, vocabulary

OP = "linear_mixture_sample"
# by type of device: where a product with the head has more rows (two for each draw if the models
# share it), a library's and mixture_sample are faster. Measured on a CPU; on a GPU estimated from
# its ratio of arithmetic to memory
FUSED_ROWS = {"cpu": 16, "cuda": 128}
# ids whose weights are converted at a time where the product needs another dtype
_PIECE = 256
# a fused kernel knows no filters
_FUSED = ("mixture_coef", "temperature", "seed", "position")


def _body(policy_hidden, *arguments):
    *arguments, backend = arguments
    return registry.load(f"{OP}_fwd", backend)(policy_hidden, *arguments)


def _fake(policy_hidden, policy_weight, policy_bias, ref_hidden, *_):
    dtype = eager.statistics_dtype(policy_hidden, ref_hidden)
    return sampling.fakes(policy_hidden, ref_hidden is not None, dtype)


# without ref_weight the policy's head is read for both; biases are what each model adds, and a
# softcap of 0 is none
common.define(
    f"{OP}_fwd(Tensor policy_hidden, Tensor policy_weight, Tensor? policy_bias, Tensor? ref_hidden,"
    " Tensor? ref_weight, Tensor? ref_bias, float softcap,"
    f" {sampling.schema(_FUSED)}, str backend){sampling.RETURNS}",
    _body,
    _fake,
)


def _same_memory(x: Tensor, y: Tensor) -> bool:
    if x is y:
        return True
    # a trace has no addresses: two names of one head are then two heads
    if torch.compiler.is_compiling() or x.shape != y.shape or x.dtype != y.dtype:
        return False
    return x.data_ptr() == y.data_ptr() and x.stride() == y.stride()


def _product(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden @ weight.T in ``dtype``, and never a copy of the whole head."""
    if weight.dtype == dtype:
        return hidden @ weight.T
    if weight.is_cuda and dtype == torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    hidden = hidden.to(dtype)
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _PIECE):
        piece = slice(start, start + _PIECE)
        logits[:, piece] = hidden @ weight[piece].to(dtype).T
    return logits


def _finished(products: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """The logits of these products, in their place."""
    if bias is not None:
        products += bias
    return products if softcap is None else products.div_(softcap).tanh_().mul_(softcap)


def _logits(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    shared: bool,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """(B, V) logits of both models in ``dtype``."""
    ref = None
    # autocast would round them
    with torch.autocast(policy_hidden.device.type, enabled=False):
        if shared:
            both = _product(torch.cat([policy_hidden, ref_hidden]), policy_weight, dtype)
            policy, ref = both.chunk(2)
        else:
            policy = _product(policy_hidden, policy_weight, dtype)
            if ref_hidden is not None:
                ref = _product(ref_hidden, ref_weight, dtype)
    if ref is not None:
        ref = _finished(ref, ref_bias, softcap)
    return _finished(policy, policy_bias, softcap), ref


def linear_mixture_sample(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    *,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
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
    heads.check_head(OP, policy_hidden, policy_weight, policy_bias, "policy_", dims=(2,))
    if ref_weight is None:
        common.require(ref_bias is None, OP, "ref_bias must be left out without ref_weight")
    if ref_hidden is None:
        common.require(ref_weight is None, OP, "ref_weight must be left out without ref_hidden")
    else:
        if ref_weight is None:
            ref_weight, ref_bias = policy_weight, policy_bias
        heads.check_head(OP, ref_hidden, ref_weight, ref_bias, "ref_", dims=(2,))
        one = ref_hidden.shape[0] == policy_hidden.shape[0]
        one &= ref_weight.shape[0] == policy_weight.shape[0]
        if not one or ref_hidden.device != policy_hidden.device:
            raise ValueError(
                f"{OP}: ref_hidden and ref_weight must have the B, V and device of the policy's, "
                f"got {common.describe(ref_hidden)} and {common.describe(ref_weight)} beside "
                f"{common.describe(policy_hidden)} and {common.describe(policy_weight)}"
            )
    common.check_softcap(OP, softcap)
    values = {
        "mixture_coef": sampling.check_coefficient(OP, mixture_coef, ref_hidden, "ref_hidden"),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "position": position,
    }
    check = sampling.check_parameters(OP, values, policy_hidden, extrapolate, check)
    vocabulary.check_group(OP, group)
    features = sampling.features(values)
    backend = common.resolve(OP, policy_hidden, backend, features)

    # no gradient
    models = (policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias)
    models = [None if x is None else x.detach() for x in models]
    shared = ref_weight is not None and _same_memory(policy_weight, ref_weight)
    B = policy_hidden.shape[0]
    dtype = eager.statistics_dtype(policy_hidden, ref_hidden)
    fused = registry.has(f"{OP}_fwd", backend) and not features and dtype == torch.float32
    few = B * (1 + shared) <= FUSED_ROWS.get(policy_hidden.device.type, FUSED_ROWS["cuda"])
    if backend == "eager" and not torch.compiler.is_compiling():
        result = common.run_eager(
            OP, policy_hidden, policy_weight, ref_hidden, ref_weight,
            policy_bias=policy_bias, ref_bias=ref_bias, softcap=softcap, group=group, **values,
        )  # fmt: skip
    elif fused and few and group is None:
        if shared:
            models[4] = None
        parameters = sampling.arguments(values, _FUSED, B, dtype)
        outputs = torch.ops.nlhf.linear_mixture_sample_fwd(
            *models, float(softcap or 0), *parameters, backend
        )
        result = MixtureSample(*outputs)
    else:
        if not torch.compiler.is_compiling():
            registry.count(OP, backend)
        logits = _logits(*models, shared, softcap, dtype)
        if group is not None:
            logits = (None if x is None else vocabulary.gathered(x, group) for x in logits)
        result = sampling.draw(*logits, values, backend)
    if check:
        sampling.check_rows(OP, result)
    return result


linear_mixture_sample.__doc__ = eager.linear_mixture_sample.__doc__
