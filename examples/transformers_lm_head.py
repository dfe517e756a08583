"""A causal model's loss, gradients and token log-probabilities without its logits in memory."""

import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from nlhf_kernels import integrations


def main() -> None:
    lm_head = integrations.transformers
    torch.manual_seed(0)
    # a tied head and a soft cap
    config = Gemma2Config(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(3, 1000, (2, 12))
    # the prompt has no labels
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    own = model(ids, labels=labels).loss

    lm_head.patch_lm_head(model)
    output = model(ids, labels=labels)
    output.loss.backward()
    print(f"loss {output.loss:.5f}, the model's own {own:.5f}; logits: {output.logits}")
    print(f"norm of the tied embeddings' gradient: {model.lm_head.weight.grad.norm():.5f}")

    with torch.no_grad():
        logprobs, entropy = lm_head.token_logprobs(model, ids)
        print(f"log-probabilities {tuple(logprobs.shape)}, mean entropy {entropy.mean():.3f} nats")
        # without labels the forward is the model's own, so that it generates
        print(f"generated: {model.generate(ids[:1], max_new_tokens=4)[0, 12:].tolist()}")
    lm_head.unpatch_lm_head(model)


if __name__ == "__main__":
    main()
