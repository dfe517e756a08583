"""Tiny random models and a tiny tokenizer, made in milliseconds."""

import torch
from torch import nn

V = 53


def _build(name: str, seed: int, dtype: torch.dtype, **settings) -> nn.Module:
    import transformers

    words = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**words | settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # the usual initialisation predicts all tokens alike, whatever the context
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.35)
    return model.to(dtype).eval()


def llama(seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    """Rotary positions, two key-value heads."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return _build("Llama", seed, dtype, **sizes | settings)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    """Absolute positions, a tied head, Conv1D layers; dropout in train mode."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return _build("GPT2", seed, dtype, **sizes | settings)


def gemma2(seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    """A sliding window of 4 in every other layer, and soft caps on scores and logits.

    Its eager attention gives NaN for left padding in float64, so float32.
    """
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "sliding_window": 4,
        "max_position_embeddings": 64,
        "final_logit_softcapping": 5.0,
    }
    return _build("Gemma2", seed, dtype, **sizes | settings)


def mistral(seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    """A sliding window of 4 in every layer."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "sliding_window": 4,
        "max_position_embeddings": 64,
    }
    return _build("Mistral", seed, dtype, **sizes | settings)


def with_lora(model: nn.Module, seed: int = 0, std: float = 0.5, last_layers: int = 0) -> nn.Module:
    """``policy.lora`` with adapters that do something: theirs start at zero."""
    from nlhf import policy

    dtype = model.dtype
    wrapped = policy.lora(model, r=2, alpha=4, last_layers=last_layers).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = (std * noise).to(dtype)
    return wrapped


def prompts(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and mask (P, L), padded to the left with 0."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, V, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, 0), mask.long()


def tokenizer(pad: bool = True, eos: bool = True):
    """Words "w0".."w49" at ids 3 to 52 beside pad, bos and eos; the vocabulary of the models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(V - 3))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>"}
    if pad:
        special["pad_token"] = "<pad>"
    if eos:
        special["eos_token"] = "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)
