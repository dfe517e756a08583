"""``token_logprobs`` on Triton: the row kernels without a reference."""

from nlhf_kernels.backends.triton import token_rows


def token_logprobs_fwd(logits, tokens, mask, temperature, softcap):
    return token_rows.row_statistics(logits, None, tokens, mask, temperature, softcap)


def token_logprobs_bwd(
    grad_logits,
    logits,
    tokens,
    mask,
    lse,
    entropy,
    grad_logprobs,
    grad_entropy,
    temperature,
    softcap,
):
    token_rows.row_gradient(
        grad_logits,
        logits,
        None,
        tokens,
        mask,
        lse,
        None,
        entropy,
        None,
        grad_logprobs,
        grad_entropy,
        None,
        temperature,
        softcap,
    )
