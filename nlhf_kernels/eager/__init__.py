"""The mathematics: every op as plain PyTorch, with no hand-written gradient, on any device.

Legend: B sequences or rows, T tokens, N = B * T, V vocabulary, D hidden. pi is the trained policy,
ref the frozen reference policy. Statistics are float32, or float64 as soon as one input is float64.
"""

from nlhf_kernels.eager.ema_update import ema_update_
from nlhf_kernels.eager.logits import statistics_dtype
from nlhf_kernels.eager.pair_loss import PAIR_METHODS, PairLoss, PairMethod, pair_loss
from nlhf_kernels.eager.pairwise_pg_loss import (
    PairwisePGLoss,
    linear_pairwise_pg_loss,
    pairwise_pg_loss,
)
from nlhf_kernels.eager.sampling import (
    TILE,
    MixtureSample,
    filters_off,
    linear_mixture_sample,
    mixture_sample,
)
from nlhf_kernels.eager.token_kl import TokenKL, linear_token_kl, token_kl
from nlhf_kernels.eager.token_logprobs import (
    TokenLogprobs,
    linear_token_logprobs,
    token_logprobs,
)
from nlhf_kernels.noise import fold_in, gumbel, philox

__all__ = [
    "PAIR_METHODS",
    "TILE",
    "MixtureSample",
    "PairLoss",
    "PairMethod",
    "PairwisePGLoss",
    "TokenKL",
    "TokenLogprobs",
    "ema_update_",
    "filters_off",
    "fold_in",
    "gumbel",
    "linear_mixture_sample",
    "linear_pairwise_pg_loss",
    "linear_token_kl",
    "linear_token_logprobs",
    "mixture_sample",
    "pair_loss",
    "pairwise_pg_loss",
    "philox",
    "statistics_dtype",
    "token_kl",
    "token_logprobs",
]
