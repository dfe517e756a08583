"""The "cpp" backend: shims over the compiled module, which sees addresses, shapes and strides."""

# torch first: the compiled module then shares its OpenMP runtime, and with it set_num_threads
import torch
from torch import Tensor

from nlhf_kernels import _native

_CODES = {getattr(torch, name): code for name, code in _native.dtype_codes.items()}
_NO_LOGITS = (0, 0, 0, 1, 0, 0, 0)


def mixture_sample_fwd(
    policy_logits: Tensor, ref_logits: Tensor | None, *parameters: float | Tensor | None
) -> tuple[Tensor, ...]:
    """tokens, policy_logprobs, ref_logprobs, sampling_logprobs, log_kept_mass: each (B,).

    ``parameters``: scalar and rows of mixture_coef, temperature, top_k, top_p, min_p, seed and
    position.
    """
    dtype = _statistics_dtype(policy_logits, ref_logits)
    outputs = _draws(policy_logits, ref_logits is not None, dtype)
    values, _kept = _values(parameters)
    _ops(dtype).mixture_sample(
        _view(policy_logits),
        _NO_LOGITS if ref_logits is None else _view(ref_logits),
        *values,
        *map(_address, outputs),
    )
    return outputs


def linear_mixture_sample_fwd(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float,
    *parameters: float | Tensor | None,
) -> tuple[Tensor, ...]:
    """As ``mixture_sample_fwd``; the parameters are without the three filters."""
    outputs = _draws(policy_hidden, ref_hidden is not None, torch.float32)
    values, _kept = _values(parameters)
    biases = [None if x is None else x.contiguous() for x in (policy_bias, ref_bias)]
    _native.linear_mixture_sample(
        _matrix(policy_hidden),
        _matrix(policy_weight),
        _address(biases[0]),
        _matrix(ref_hidden),
        _matrix(ref_weight),
        _address(biases[1]),
        softcap,
        *values,
        *map(_address, outputs),
    )
    return outputs


def token_logprobs_fwd(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse: each the shape of ``tokens``."""
    dtype = _statistics_dtype(logits)
    outputs = _empty(logits, 3, tokens.shape, dtype)
    small = _contiguous(tokens, mask)
    _ops(dtype).token_logprobs(
        _view(logits), *map(_address, small), temperature, softcap, *map(_address, outputs)
    )
    return tuple(outputs)


def token_logprobs_bwd(
    grad_logits: Tensor,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float,
) -> None:
    """Writes ``grad_logits``, which may be ``logits``; rows under the mask get 0."""
    small = _contiguous(tokens, mask, lse, entropy, grad_logprobs, grad_entropy)
    _ops(lse.dtype).token_logprobs_grad(
        _view(grad_logits), _view(logits), *map(_address, small), temperature, softcap
    )


def token_kl_fwd(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, ref_logprobs, entropy, kl, lse, ref_lse: each the shape of ``tokens``."""
    dtype = _statistics_dtype(logits, ref_logits)
    outputs = _empty(logits, 6, tokens.shape, dtype)
    small = _contiguous(tokens, mask)
    _ops(dtype).token_kl(
        _view(logits),
        _view(ref_logits),
        *map(_address, small),
        temperature,
        softcap,
        *map(_address, outputs),
    )
    return tuple(outputs)


def token_kl_bwd(
    grad_logits: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor,
    entropy: Tensor | None,
    kl: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    grad_kl: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    """Writes ``grad_logits``, which may be ``logits``; rows under the mask get 0."""
    small = _contiguous(
        tokens, mask, lse, ref_lse, entropy, kl, grad_logprobs, grad_entropy, grad_kl
    )
    _ops(lse.dtype).token_kl_grad(
        _view(grad_logits),
        _view(logits),
        _view(ref_logits),
        *map(_address, small),
        temperature,
        softcap,
    )


def pairwise_pg_coef_fwd(
    logprobs: Tensor,
    cost: Tensor | None,
    mask: Tensor | None,
    preference: Tensor,
    cu_seqlens: Tensor | None,
    later: Tensor | None,
    kl: str,
    baseline: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (), coef of the shape of ``logprobs``, sums of the shape of ``preference``."""
    dtype = logprobs.dtype
    (loss,) = _empty(logprobs, 1, (), dtype)
    (coef,) = _empty(logprobs, 1, logprobs.shape, dtype)
    (sums,) = _empty(logprobs, 1, preference.shape, dtype)
    small = _contiguous(logprobs, cost, mask, preference, cu_seqlens, later)
    _ops(dtype).pairwise_pg_coef(
        *map(_address, small),
        logprobs.numel(),
        len(preference),
        kl,
        baseline,
        *map(_address, (loss, coef, sums)),
    )
    return loss, coef, sums


def skinny_linear_fwd(input: Tensor, weight: Tensor) -> Tensor:
    """(..., N), without the bias."""
    N, D = weight.shape
    output = input.new_empty(*input.shape[:-1], N)
    if D == 0:
        return output.zero_()
    if output.numel():
        input = input.contiguous()
        rows = input.numel() // D
        _native.skinny_linear(*map(_address, (input, weight, output)), rows, N, D)
    return output


def pair_loss_fwd(
    logprobs: Tensor,
    other_logprobs: Tensor,
    anchor_logprobs: Tensor,
    other_anchor_logprobs: Tensor,
    preference: Tensor,
    other_preference: Tensor | None,
    weights: list[float],
    form: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (); margins and the gradients at both log-probabilities (B,). All of one dtype."""
    tensors = (logprobs, other_logprobs, anchor_logprobs, other_anchor_logprobs, preference)
    small = [x.contiguous() for x in tensors]
    other = None if other_preference is None else other_preference.contiguous()
    loss = logprobs.new_empty(())
    outputs = [loss, *(logprobs.new_empty(logprobs.shape) for _ in range(3))]
    _ops(logprobs.dtype).pair_loss(
        *map(_address, (*small, other)),
        weights,
        len(logprobs),
        form,
        scale,
        *map(_address, outputs),
    )
    return tuple(outputs)


def ema_update__fwd(
    ema: list[Tensor],
    params: list[Tensor],
    decay: float,
    decay_tensor: Tensor | None,
    seed: int | None,
    seed_tensor: Tensor | None,
) -> None:
    """Writes ``ema``; a tensor, where there is one, is taken for the number before it."""
    _native.ema_update(
        [
            (x.data_ptr(), p.data_ptr(), x.numel(), _CODES[x.dtype], _CODES[p.dtype])
            for x, p in zip(ema, params, strict=True)
        ],
        decay if decay_tensor is None else decay_tensor.item(),
        seed if seed_tensor is None else seed_tensor.item(),
    )


def _statistics_dtype(*logits: Tensor | None) -> torch.dtype:
    for x in logits:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _ops(statistics_dtype: torch.dtype):
    return _native.float64 if statistics_dtype == torch.float64 else _native.float32


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _empty(like: Tensor, count: int, shape, dtype: torch.dtype) -> list[Tensor]:
    return [like.new_empty(shape, dtype=dtype) for _ in range(count)]


def _draws(like: Tensor, has_ref: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs of a sampler, unwritten."""
    B = like.shape[0]
    tokens = like.new_empty(B, dtype=torch.int64)
    policy = like.new_empty(B, dtype=dtype)
    # without a dtype it takes half the time
    ref = policy.new_empty(B if has_ref else 0)
    return tokens, policy, ref, policy.new_empty(B), policy.new_empty(B)


def _values(parameters: tuple) -> tuple[list, list]:
    """Scalars and the addresses of rows, in turns; and what must live as long as these."""
    rows = [None if x is None else x.contiguous() for x in parameters[1::2]]
    values = list(parameters)
    values[1::2] = [0 if x is None else x.data_ptr() for x in rows]
    return values, rows


def _matrix(x: Tensor | None) -> tuple[int, ...]:
    """Rows with stride 1 within: address, dtype, shape, row stride."""
    return (0,) * 5 if x is None else (x.data_ptr(), _CODES[x.dtype], *x.shape, x.stride(0))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _view(logits: Tensor) -> tuple[int, ...]:
    """(N, V) or (B, T, V) as the compiled module takes it: address, dtype, shape, row strides."""
    code = _CODES[logits.dtype]
    if logits.dim() == 2:
        N, V = logits.shape
        return logits.data_ptr(), code, N, 1, V, logits.stride(0), 0
    B, T, V = logits.shape
    return logits.data_ptr(), code, B * T, max(T, 1), V, logits.stride(0), logits.stride(1)
