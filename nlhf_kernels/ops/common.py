"""What every op's contract needs: registration of raw ops, checks, the write-back for eager."""

from collections.abc import Callable

import torch
from torch import Tensor

from nlhf_kernels import eager, registry

LIBRARY = torch.library.Library("nlhf", "DEF")
LARGEST = torch.finfo(torch.float32).max
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# characters of a word, or bits of a number, that a message repeats
_LONGEST = 80
NUMBERS = (int, float, torch.SymFloat, torch.SymInt)
_STRIDED = torch.strided
# seen at a glance to be no DTensor
PLAIN = (Tensor, torch.nn.Parameter)


def define(schema: str, body: Callable, fake: Callable) -> None:
    """Register a raw op ``torch.ops.nlhf.<name>`` with its body for CPU and CUDA and its fake."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, body, key)
    torch.library.register_fake(f"nlhf::{name}", fake, lib=LIBRARY)


def define_backward(op: str, arguments: str) -> None:
    """Two raw ops: ``<op>_bwd`` returns the gradient, ``<op>_bwd_`` writes it over the logits.

    ``arguments`` is their schema after the logits, the backend last.
    """

    def empty(logits, *_):
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)

    def write(grad_logits, logits, *arguments):
        *arguments, backend = arguments
        registry.load(f"{op}_bwd", backend)(grad_logits, logits, *arguments)

    def out_of_place(logits, *arguments):
        grad_logits = empty(logits)
        write(grad_logits, logits, *arguments)
        return grad_logits

    def in_place(logits, *arguments):
        write(logits, logits, *arguments)
        # the schema's Tensor(a!) alone does not bump it
        torch.autograd.graph.increment_version(logits)

    define(f"{op}_bwd(Tensor logits, {arguments}) -> Tensor", out_of_place, empty)
    define(f"{op}_bwd_(Tensor(a!) logits, {arguments}) -> ()", in_place, lambda *_: None)


def backward(op: str, inplace: bool, logits: Tensor, *arguments) -> Tensor:
    """The gradient of the logits by a raw op, over them or beside them."""
    if not inplace:
        return getattr(torch.ops.nlhf, f"{op}_bwd")(logits, *arguments)
    grad = logits.detach()
    getattr(torch.ops.nlhf, f"{op}_bwd_")(grad, *arguments)
    return grad


def call(raw_op: str, body: Callable, part, *arguments):
    """A raw op; its body itself where ranks share the vocabulary, which no schema can hold."""
    if part is None:
        return getattr(torch.ops.nlhf, raw_op)(*arguments)
    return body(*arguments, part=part)


def run_eager(op: str, *arguments, **settings):
    """``eager``'s function, which counts as a call where nobody traces it."""
    if not torch.compiler.is_compiling():
        registry.count(op, "eager")
    return getattr(eager, op)(*arguments, **settings)


def plain(x: Tensor) -> torch.autocast:
    """Within it autocast does not round what is multiplied."""
    return torch.autocast(x.device.type, enabled=False)


def given(grad: Tensor | None, like: Tensor | None = None) -> Tensor | None:
    """What autograd hands over as kernels take it; zeros like ``like`` if nothing came."""
    if grad is not None:
        return grad.contiguous()
    return None if like is None else torch.zeros_like(like)


def require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{op}: {message}")


def describe(x: object) -> str:
    """On one line, and short, whatever it is."""
    if isinstance(x, Tensor):
        kind = str(x.dtype).removeprefix("torch.")
        if x.is_nested:
            return f"a nested {kind} tensor"
        layout = "" if x.layout == torch.strided else f", {x.layout}"
        return f"{kind} {tuple(x.shape)} on {x.device}{layout}"
    if isinstance(x, str):
        return repr(x if len(x) <= _LONGEST else x[:_LONGEST] + "...")
    if isinstance(x, int) and x.bit_length() > _LONGEST:
        # Python refuses to write thousands of digits
        return f"an integer of {x.bit_length()} bits"
    return repr(x) if isinstance(x, int | float | None) else type(x).__name__


def is_dense(x: Tensor) -> bool:
    """Neither sparse nor nested, whose memory is no array."""
    return x.layout is _STRIDED and not x.is_nested


def check_flag(op: str, name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise ValueError(f"{op}: {name} must be True or False, got {describe(x)}")


def check_local(op: str, name: str, x: object) -> None:
    """No DTensor: a kernel would take the memory of a part for the whole."""
    # by what only it has: to import its class takes longer than all that torch imports
    if isinstance(x, Tensor) and hasattr(x, "full_tensor"):
        raise ValueError(
            f"{op}: {name} is a DTensor: give {name}.full_tensor(), or this rank's part, "
            f"{name}.to_local(), with group= where the ranks share the vocabulary"
        )


def check_logits(op: str, name: str, logits: Tensor, dims: tuple[int, ...]) -> None:
    if type(logits) not in PLAIN:
        check_local(op, name, logits)
    # what is usual is seen at a glance: a decode step asks for every token
    usual = isinstance(logits, Tensor) and logits.dim() in dims and logits.dtype in FLOATS
    if (
        usual
        and is_dense(logits)
        and logits.stride(-1) == 1
        and logits.shape[-1]
        and not logits.is_meta
    ):
        return
    shapes = " or ".join({2: "(N, V)", 3: "(B, T, V)"}[d] for d in dims)
    check_matrix(op, name, logits, dims, shapes, "vocabulary")


def check_matrix(
    op: str, name: str, x: Tensor, dims: tuple[int, ...], shapes: str, axis: str
) -> None:
    """A real floating tensor, its last dimension, called ``axis``, not empty and of stride 1."""
    if type(x) not in PLAIN:
        check_local(op, name, x)
    # what is wrong is put into words only then: a decode step checks every token
    real = isinstance(x, Tensor) and x.dtype in FLOATS and is_dense(x)
    if not real or x.dim() not in dims:
        wanted = f"float16, bfloat16, float32 or float64 {shapes}"
        raise ValueError(f"{op}: {name} must be {wanted}, got {describe(x)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has an empty {axis}: {describe(x)}")
    if x.stride(-1) != 1 and x.shape[-1] != 1 and x.numel() != 0:
        raise ValueError(
            f"{op}: {name} must have stride 1 along the {axis}, got strides {tuple(x.stride())}: "
            "call .contiguous()"
        )
    if x.device.type == "meta":
        raise ValueError(f"{op}: {name} is on the meta device: give it a real tensor")


def check_ref_logits(op: str, ref_logits: Tensor, logits: Tensor) -> None:
    check_logits(op, "ref_logits", ref_logits, dims=(logits.dim(),))
    same = ref_logits.shape == logits.shape and ref_logits.device == logits.device
    if not same:
        raise ValueError(
            f"{op}: ref_logits must have the shape and device of logits, got "
            f"{describe(ref_logits)} beside {describe(logits)}"
        )


def check_tensor(
    op: str, name: str, x: Tensor, shape: tuple, dtypes: tuple, device: torch.device
) -> None:
    if type(x) not in PLAIN:
        check_local(op, name, x)
    fits = isinstance(x, Tensor) and is_dense(x) and x.shape == shape
    if not fits or x.dtype not in dtypes or x.device != device:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        wanted = f"{kinds} {tuple(shape)} on {device}"
        raise ValueError(f"{op}: {name} must be {wanted}, got {describe(x)}")


def check_number(op: str, name: str, x: object, low: float, high: float, wanted: str) -> None:
    """A finite Python number within [low, high]; inside torch.compile it may be symbolic."""
    number = isinstance(x, NUMBERS) and not isinstance(x, bool)
    # NaN fails the comparison
    if not (number and low <= x <= high):
        # written only here: torch.compile cannot format a symbol
        raise ValueError(f"{op}: {name} must be {wanted}, got {describe(x)}")


def check_whole(op: str, name: str, x: object, low: int, high: int, wanted: str) -> None:
    """As ``check_number``, of an integer."""
    if isinstance(x, float | torch.SymFloat):
        raise ValueError(f"{op}: {name} must be {wanted}, got {describe(x)}")
    check_number(op, name, x, low, high, wanted)


def check_scaling(op: str, temperature: float, softcap: float | None) -> None:
    # smaller ones leave no finite score in float32
    check_number(op, "temperature", temperature, 1e-30, LARGEST, "above 0 (1e-30) and finite")
    check_softcap(op, softcap)


def check_softcap(op: str, softcap: float | None) -> None:
    if softcap is not None:
        check_number(op, "softcap", softcap, 1e-30, LARGEST, "above 0 (1e-30) and finite, or None")


def wants_inplace(op: str, logits: Tensor, inplace_backward: bool) -> bool:
    """Rows that share their memory, as ``expand`` makes them, cannot hold their own gradients."""
    check_flag(op, "inplace_backward", inplace_backward)
    if not inplace_backward or torch.compiler.is_compiling():
        return False
    # as .imag of a conjugate is: in memory stands the opposite
    stored = not logits.is_neg()
    require(stored, op, "inplace_backward needs logits that are no negated view: clone them")
    end = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            require(
                stride >= end,
                op,
                "inplace_backward needs logits whose rows do not share memory: clone them",
            )
            end += stride * (size - 1)
    return True


MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tokens(op: str, tokens: Tensor, mask: Tensor | None, logits: Tensor) -> None:
    """One token, and one number of the mask, for each row of logits or hidden states."""
    check_tensor(op, "tokens", tokens, logits.shape[:-1], (torch.int64,), logits.device)
    if mask is not None:
        check_tensor(op, "mask", mask, logits.shape[:-1], MASKS, logits.device)


def check_token_ids(op: str, tokens: Tensor, mask: Tensor | None, V: int) -> None:
    """On the CPU, where looking costs nothing: every id that is read lies in [0, V)."""
    if tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (tokens < 0) | (tokens >= V)
    if mask is not None:
        wrong &= mask != 0
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{op}: token {int(tokens[place])} at {place} is outside [0, {V})")


class WriteBack(torch.autograd.Function):
    """``inplace_backward`` for eager: an identity whose backward overwrites the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.view_as(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        # reading the saved tensor is what raises on a second backward: copy_ bumps its version
        (logits,) = ctx.saved_tensors
        return logits.detach().copy_(grad)


def kept(mask: Tensor | None) -> Tensor | None:
    """The mask as kernels take it."""
    return None if mask is None else (mask != 0).contiguous()


def resolve(op: str, logits: Tensor, backend: str, features: tuple[str, ...] = ()) -> str:
    device = "cpu" if logits.is_cpu else logits.device.type
    return registry.resolve(op, device, backend, features)
