"""The least time of a rollout: every weight and every live cache read once a token."""

import torch

from bench.setting import Setting


def rollout_bytes(setting: Setting) -> int:
    """Read by both models, for both sides: weights T times; the caches of 2B rows as they grow.

    Counts no activations, no logits and nothing that is written. Adapters are left out.
    """
    from transformers import LlamaForCausalLM

    config = setting.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    size = getattr(torch, setting.dtype).itemsize
    weights = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        # looked up, not read; a tied one is the head too
        weights -= model.get_input_embeddings().weight.numel()
    cache = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return least_bytes(setting.B, setting.P, setting.T, size, weights, cache)


def least_bytes(B: int, P: int, T: int, size: int, weights: int, cache: int) -> int:
    """Of ``weights`` numbers of ``size`` bytes, and caches of ``cache`` numbers a token."""
    # the pass over the prompts reads no cache, a later one also what it has just written
    columns = sum(P + t for t in range(1, T))
    return 2 * size * (T * weights + 2 * B * columns * cache)
