"""``token_logprobs`` on Triton: the row kernels without a mask."""

from nlhf_kernels.backends.triton import common


def token_logprobs_fwd(logits, tokens, temperature, softcap):
    return tuple(common.row_statistics(logits, tokens, None, temperature, softcap))


def token_logprobs_bwd(
    grad_logits,
    logits,
    tokens,
    lse,
    entropy,
    grad_logprobs,
    grad_entropy,
    temperature,
    softcap,
):
    common.row_gradient(
        grad_logits,
        logits,
        tokens,
        None,
        lse,
        entropy,
        grad_logprobs,
        grad_entropy,
        None,
        temperature,
        softcap,
    )
