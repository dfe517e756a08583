"""Fused ops for Nash learning from human feedback: mixture sampling, pairwise policy gradients."""

from nlhf_kernels.eager import (
    PAIR_METHODS,
    MixtureSample,
    PairLoss,
    PairMethod,
    PairwisePGLoss,
    TokenKL,
    TokenLogprobs,
    fold_in,
)
from nlhf_kernels.ops.ema_update import ema_update_
from nlhf_kernels.ops.linear_mixture_sample import linear_mixture_sample
from nlhf_kernels.ops.linear_pairwise_pg_loss import linear_pairwise_pg_loss
from nlhf_kernels.ops.linear_token_kl import linear_token_kl
from nlhf_kernels.ops.linear_token_logprobs import linear_token_logprobs
from nlhf_kernels.ops.mixture_sample import mixture_sample
from nlhf_kernels.ops.pair_loss import pair_loss
from nlhf_kernels.ops.pairwise_pg_loss import pairwise_pg_loss
from nlhf_kernels.ops.skinny_linear import skinny_linear
from nlhf_kernels.ops.token_kl import token_kl
from nlhf_kernels.ops.token_logprobs import token_logprobs
from nlhf_kernels.registry import (
    BACKENDS,
    calls,
    calls_table,
    reason,
    reset_calls,
    resolve,
    use_backend,
)

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "PAIR_METHODS",
    "MixtureSample",
    "PairLoss",
    "PairMethod",
    "PairwisePGLoss",
    "TokenKL",
    "TokenLogprobs",
    "calls",
    "calls_table",
    "ema_update_",
    "fold_in",
    "linear_mixture_sample",
    "linear_pairwise_pg_loss",
    "linear_token_kl",
    "linear_token_logprobs",
    "mixture_sample",
    "pair_loss",
    "pairwise_pg_loss",
    "reason",
    "reset_calls",
    "resolve",
    "skinny_linear",
    "token_kl",
    "token_logprobs",
    "use_backend",
]
