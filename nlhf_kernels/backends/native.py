"""The "cpp" backend: shims over the compiled module, which sees addresses, shapes and strides."""

# torch first: the compiled module then shares its OpenMP runtime, and with it set_num_threads
import torch
from torch import Tensor

from nlhf_kernels import _native

_CODES = {getattr(torch, name): code for name, code in _native.dtype_codes.items()}
_NO_LOGITS = (0, 0, 0, 1, 0, 0, 0)


def mixture_sample_fwd(
    policy_logits: Tensor,
    ref_logits: Tensor | None,
    mixture_coef: float,
    mixture_coef_rows: Tensor | None,
    temperature: float,
    temperature_rows: Tensor | None,
    seed: int,
    seed_rows: Tensor | None,
    position: int,
    position_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tokens, policy_logprobs, ref_logprobs, sampling_logprobs, log_kept_mass: each (B,)."""
    dtype = _statistics_dtype(policy_logits, ref_logits)
    B = policy_logits.shape[0]
    tokens = policy_logits.new_empty(B, dtype=torch.int64)
    policy_logprobs, sampling_logprobs, log_kept_mass = _empty(policy_logits, 3, (B,), dtype)
    ref_logprobs = policy_logits.new_empty(0 if ref_logits is None else B, dtype=dtype)
    rows = [
        None if x is None else x.contiguous()
        for x in (mixture_coef_rows, temperature_rows, seed_rows, position_rows)
    ]
    coef_at, temperature_at, seed_at, position_at = map(_address, rows)
    _ops(dtype).mixture_sample(
        _view(policy_logits),
        _NO_LOGITS if ref_logits is None else _view(ref_logits),
        mixture_coef,
        coef_at,
        temperature,
        temperature_at,
        seed,
        seed_at,
        position,
        position_at,
        _address(tokens),
        _address(policy_logprobs),
        _address(ref_logprobs),
        _address(sampling_logprobs),
        _address(log_kept_mass),
    )
    return tokens, policy_logprobs, ref_logprobs, sampling_logprobs, log_kept_mass


def token_logprobs_fwd(
    logits: Tensor, tokens: Tensor, temperature: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse: each the shape of ``tokens``."""
    dtype = _statistics_dtype(logits)
    tokens = tokens.contiguous()
    logprobs, entropy, lse = _empty(logits, 3, tokens.shape, dtype)
    _ops(dtype).token_logprobs(
        _view(logits),
        _address(tokens),
        temperature,
        softcap,
        _address(logprobs),
        _address(entropy),
        _address(lse),
    )
    return logprobs, entropy, lse


def token_logprobs_bwd(
    grad_logits: Tensor,
    logits: Tensor,
    tokens: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    """Writes ``grad_logits``, which may be ``logits``."""
    small = [x.contiguous() for x in (tokens, lse, entropy, grad_logprobs, grad_entropy)]
    _ops(lse.dtype).token_logprobs_grad(
        _view(grad_logits), _view(logits), *map(_address, small), temperature, softcap
    )


def pairwise_pg_loss_fwd(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    preference: Tensor,
    ref_logprobs: Tensor | None,
    policy_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    tau: float,
    kl: str,
    baseline: float,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (); logprobs, entropy, kl ((0,) without ref), lse, coef of the shape of ``tokens``."""
    dtype = _statistics_dtype(logits)
    small = [
        None if x is None else x.contiguous()
        for x in (tokens, mask, preference, ref_logprobs, policy_logprobs, cu_seqlens)
    ]
    (loss,) = _empty(logits, 1, (), dtype)
    logprobs, entropy, lse, coef = _empty(logits, 4, tokens.shape, dtype)
    kl_terms = logits.new_empty(0 if ref_logprobs is None else tokens.shape, dtype=dtype)
    _ops(dtype).pairwise_pg_loss(
        _view(logits),
        *map(_address, small),
        len(preference),
        tau,
        kl,
        baseline,
        temperature,
        softcap,
        *map(_address, (loss, logprobs, entropy, kl_terms, lse, coef)),
    )
    return loss, logprobs, entropy, kl_terms, lse, coef


def pairwise_pg_loss_bwd(
    grad_logits: Tensor,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    lse: Tensor,
    coef: Tensor,
    grad_loss: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    """Writes ``grad_logits``, which may be ``logits``; rows under the mask get 0."""
    small = [x.contiguous() for x in (tokens, mask, lse, coef)]
    _ops(lse.dtype).pairwise_pg_loss_grad(
        _view(grad_logits),
        _view(logits),
        *map(_address, small),
        grad_loss.item(),
        temperature,
        softcap,
    )


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


def _statistics_dtype(*logits: Tensor | None) -> torch.dtype:
    wide = any(x is not None and x.dtype == torch.float64 for x in logits)
    return torch.float64 if wide else torch.float32


def _ops(statistics_dtype: torch.dtype):
    return _native.float64 if statistics_dtype == torch.float64 else _native.float32


def _empty(like: Tensor, count: int, shape, dtype: torch.dtype) -> list[Tensor]:
    return [like.new_empty(shape, dtype=dtype) for _ in range(count)]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _view(logits: Tensor) -> tuple[int, ...]:
    """(N, V) or (B, T, V) as the compiled module takes it: address, dtype, shape, row strides."""
    *batch, V = logits.shape
    steps = batch[1] if len(batch) == 2 else 1
    step_stride = logits.stride(1) if len(batch) == 2 else 0
    rows = batch[0] * steps
    code = _CODES[logits.dtype]
    return logits.data_ptr(), code, rows, max(steps, 1), V, logits.stride(0), step_stride
