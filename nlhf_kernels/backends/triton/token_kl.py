"""``token_kl`` on Triton: the row kernels with a reference."""

from nlhf_kernels.backends.triton import token_rows


def token_kl_fwd(logits, ref_logits, tokens, mask, temperature, softcap):
    return token_rows.row_statistics(logits, ref_logits, tokens, mask, temperature, softcap)


def token_kl_bwd(
    grad_logits,
    logits,
    ref_logits,
    tokens,
    mask,
    lse,
    ref_lse,
    entropy,
    kl,
    grad_logprobs,
    grad_entropy,
    grad_kl,
    temperature,
    softcap,
):
    token_rows.row_gradient(
        grad_logits,
        logits,
        ref_logits,
        tokens,
        mask,
        lse,
        ref_lse,
        entropy,
        kl,
        grad_logprobs,
        grad_entropy,
        grad_kl,
        temperature,
        softcap,
    )
