"""``generate`` samples from the geometric mixture of two models, each with its own KV cache."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nlhf_kernels import integrations


def tiny(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # sharper than a fresh model, which predicts all tokens alike
        model.lm_head.weight.mul_(20)
    return model


def main() -> None:
    policy, ref = tiny(0), tiny(1)
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (prompts != 0).long()
    for mixture_coef in (0.0, 0.5, 1.0):
        mixture = integrations.transformers.MixtureLogitsProcessor(
            policy, ref, mixture_coef=mixture_coef, attention_mask=mask
        )
        torch.manual_seed(2)
        tokens = policy.generate(
            prompts,
            attention_mask=mask,
            logits_processor=[mixture],
            do_sample=True,
            temperature=0.7,
            max_new_tokens=8,
        )
        print(f"mixture_coef {mixture_coef}: {tokens[0, 4:].tolist()}")


if __name__ == "__main__":
    main()
