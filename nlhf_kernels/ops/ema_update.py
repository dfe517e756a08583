"""Contract of ``ema_update_``."""

import functools
from collections.abc import Iterator, Sequence, ValuesView

import torch
from torch import Tensor

from nlhf_kernels import eager, registry
from nlhf_kernels.ops import common

OP = "ema_update_"
LONG = 2**63 - 1
DTYPES = set(common.FLOATS)


def _update(ema, params, decay, decay_tensor, seed, seed_tensor, backend):
    if backend == "eager":
        decay = decay if decay_tensor is None else decay_tensor
        seed = seed if seed_tensor is None else seed_tensor
        return common.run_eager(OP, ema, params, decay=decay, seed=seed)
    numbers = (decay, decay_tensor, seed, seed_tensor)
    registry.load(f"{OP}_fwd", backend)(ema, params, *numbers)
    # the schema's Tensor(a!)[] alone does not bump them; those of inference mode have no version
    if torch.is_inference_mode_enabled():
        ema = [x for x in ema if not x.is_inference()]
    torch.autograd.graph.increment_version(ema)


common.define(
    f"{OP}_fwd(Tensor(a!)[] ema, Tensor[] params, float decay, Tensor? decay_tensor,"
    " int? seed, Tensor? seed_tensor, str backend) -> ()",
    _update,
    lambda *_: None,
)


def _check_lists(ema, params) -> tuple[list[Tensor], list[Tensor]]:
    for name, xs in (("ema", ema), ("params", params)):
        # lists, as always inside of torch.compile, which knows no abstract classes
        if not isinstance(xs, list) and not isinstance(xs, (Sequence, Iterator, ValuesView)):
            got = common.describe(xs)
            raise ValueError(f"{OP}: {name} must be a sequence of tensors, got one thing: {got}")
    ema, params = list(ema), list(params)
    if len(ema) != len(params):
        counts = f"{len(ema)} and {len(params)}"
        raise ValueError(f"{OP}: ema and params must be as many, got {counts} tensors")
    if not torch.compiler.is_compiling() and _usual(ema, params):
        return ema, params
    device = None
    for k, (x, p) in enumerate(zip(ema, params, strict=True)):
        for name, y in ((f"ema[{k}]", x), (f"params[{k}]", p)):
            common.check_local(OP, name, y)
            real = isinstance(y, Tensor) and y.dtype in common.FLOATS and not y.is_meta
            if not real or not common.is_dense(y):
                wanted = "a real float16, bfloat16, float32 or float64 tensor"
                raise ValueError(f"{OP}: {name} must be {wanted}, got {common.describe(y)}")
            device = device or y.device
            if y.device != device:
                raise ValueError(f"{OP}: {name} must be on {device}, got {common.describe(y)}")
        if not torch.compiler.is_compiling() and x.is_neg():
            got = "a negated view, as .imag of a conjugate is"
            raise ValueError(f"{OP}: ema[{k}] must hold its numbers in memory, got {got}")
        if x.shape != p.shape:
            wanted = f"{tuple(x.shape)} like ema[{k}]"
            raise ValueError(f"{OP}: params[{k}] must be {wanted}, got {common.describe(p)}")
        if not (x.is_contiguous() and p.is_contiguous()):
            _check_layout(k, x, p)
    return ema, params


def _usual(ema: list, params: list) -> bool:
    """Whether all is well at a glance: hundreds of tensors come with every step."""
    tensors = ema + params
    return (
        {type(x) for x in tensors} <= {*common.PLAIN}
        and all(map(common.is_dense, tensors))
        and not any(map(Tensor.is_neg, ema))
        and {x.dtype for x in tensors} <= DTYPES
        and len(devices := {x.device for x in tensors}) == 1
        and torch.device("meta") not in devices
        and [x.shape for x in ema] == [p.shape for p in params]
        and all(map(Tensor.is_contiguous, tensors))
    )


def _check_layout(k: int, x: Tensor, p: Tensor) -> None:
    """Dense in memory, with the elements in the same order."""
    if x.numel() == 0:
        return
    strides, others = _strides(x), _strides(p)
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected:
            got = f"strides {tuple(x.stride())} of {tuple(x.shape)}"
            raise ValueError(
                f"{OP}: ema[{k}] must be without gaps and overlaps in memory, got {got}"
            )
        expected *= size
    if strides != others:
        got = f"{tuple(p.stride())}: copy it into torch.empty_like(ema[{k}])"
        wanted = f"{tuple(x.stride())} like ema[{k}]"
        raise ValueError(f"{OP}: strides of params[{k}] must be {wanted}, got {got}")


def _strides(x: Tensor) -> list[tuple[int, int]]:
    # a dimension of one element takes no steps
    return [(s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1]


def _check_memory(ema: list[Tensor], params: list[Tensor]) -> None:
    if torch.compiler.is_compiling():
        return
    spans = tuple((x.data_ptr(), x.numel() * x.itemsize) for x in (*ema, *params))
    if why := _shared(spans):
        raise ValueError(f"{OP}: {why}")


# the same weights come at every step
@functools.lru_cache(maxsize=16)
def _shared(spans: tuple[tuple[int, int], ...]) -> str:
    """Which average shares memory with another tensor; "" if none does."""
    count = len(spans) // 2
    order = sorted((start, size, i) for i, (start, size) in enumerate(spans) if size)

    def name(i: int) -> str:
        return f"ema[{i}]" if i < count else f"params[{i - count}]"

    # the ends that reach furthest so far, of the averages and of all tensors
    reach = {True: (0, -1), False: (0, -1)}
    for start, size, i in order:
        average = i < count
        end, before = max(reach.values()) if average else reach[True]
        if start < end:
            return f"{name(i)} must not share memory with {name(before)}"
        reach[average] = max(reach[average], (start + size, i))
    return ""


def _check_scalar(name: str, x: Tensor, dtypes: tuple, device: torch.device) -> None:
    fits = common.is_dense(x) and x.shape == () and x.dtype in dtypes and x.device == device
    if not fits:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        wanted = f"a number or {kinds} () on {device}"
        raise ValueError(f"{OP}: {name} must be {wanted}, got {common.describe(x)}")


def _check_settings(decay, seed, device: torch.device) -> None:
    wanted = "in [0, 1]"
    if isinstance(decay, Tensor):
        _check_scalar("decay", decay, common.FLOATS, device)
        if decay.is_cpu and not torch.compiler.is_compiling():
            common.check_number(OP, "decay", decay.item(), 0, 1, wanted)
    else:
        common.check_number(OP, "decay", decay, 0, 1, wanted)
    if isinstance(seed, Tensor):
        _check_scalar("seed", seed, (torch.int64,), device)
    elif seed is not None:
        common.check_whole(OP, "seed", seed, -LONG - 1, LONG, "a 64-bit integer or None")


def ema_update_(
    ema: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    decay: float | Tensor,
    seed: int | Tensor | None = None,
    backend: str = "",
) -> None:
    ema, params = _check_lists(ema, params)
    device = ema[0].device if ema else torch.device("cpu")
    if ema or not isinstance(decay, Tensor):
        _check_settings(decay, seed, device)
    if torch.is_grad_enabled() and any(x.requires_grad for x in ema):
        raise ValueError(f"{OP}: ema must not require a gradient: call it under torch.no_grad()")
    _check_memory(ema, params)
    backend = registry.resolve(OP, device.type, backend)
    if not ema:
        return
    # a compiler takes minutes for the rounds of Philox: it gets eager as one operation
    if backend == "eager" and not torch.compiler.is_compiling():
        return common.run_eager(OP, ema, params, decay=decay, seed=seed)
    numbers = (0.0, decay) if isinstance(decay, Tensor) else (float(decay), None)
    seeds = (0, seed) if isinstance(seed, Tensor) else (seed, None)
    with torch.no_grad():
        torch.ops.nlhf.ema_update__fwd(ema, params, *numbers, *seeds, backend)


ema_update_.__doc__ = eager.ema_update_.__doc__
