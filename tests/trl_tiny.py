"""A trainer of a tiny model with TRL's interface, and what its draws are compared with."""

import torch

from nlhf.trl_compat import NashMDConfig, NashMDTrainer
from tests import tiny

CHAT = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)


def prefer_even(prompts, first, second):
    """P is larger for the text with more even words, and never 0 or 1."""

    def even(text):
        return sum(int(word[1:]) % 2 == 0 for word in text.split())

    return torch.tensor([even(a) - even(b) for a, b in zip(first, second, strict=True)]).sigmoid()


def prompts(count: int) -> list[dict]:
    return [{"prompt": f"w{i} w{i + 1} w{i + 2}"[: 3 + 3 * (i % 3)].strip()} for i in range(count)]


def settings(folder, cls=NashMDConfig, **changes):
    """Of a short run, as our configuration or as TRL's own."""
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_new_tokens": 5,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return cls(**values | changes)


def trainer(folder, *, model=None, data=None, opinion=None, tokenizer=None, more=None, **changes):
    """A trainer of a tiny model; ``more`` goes to the constructor, ``changes`` to its settings."""
    rows = prompts(16) if data is None else data
    return NashMDTrainer(
        model=tiny.llama() if model is None else model,
        args=settings(folder, **changes),
        train_dataset=rows,
        eval_dataset=rows[:6],
        processing_class=tokenizer or tiny.tokenizer(),
        **(opinion or {"judge": prefer_even}),
        **(more or {}),
    )


def weights(found: NashMDTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in found.model.parameters()])


def classifier(seed: int = 0, words: int = tiny.V):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=words, num_attention_heads=2, num_labels=1, **sizes)
    return LlamaForSequenceClassification(config).eval()


def log_mixture(policy, ref, ids, mask, coef, temperature):
    """(B, L, V) the definition: both models over the whole prefix, in float64."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        pi, mu = policy(**inputs).logits, ref(**inputs).logits
    return (((1 - coef) * pi + coef * mu) / temperature).log_softmax(-1)
