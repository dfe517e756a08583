"""What a measured training step starts from: the same for us and for every peer.

Imported in the peer's environment too, so it needs torch and transformers alone.
"""

import dataclasses
from dataclasses import dataclass

import torch

# shapes of real models; the weights are random, their values cost no time
MODELS = {
    "tiny": {
        "vocab_size": 4_096,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # no model of this size is well known; its proportions are those of the next
    "llama-35m": {
        "vocab_size": 32_000,
        "hidden_size": 384,
        "intermediate_size": 1_280,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1_536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1_536,
        "intermediate_size": 8_960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
PAD, EOS = 0, 1
CONTEXT = 8_192


@dataclass(frozen=True)
class Setting:
    """B prompts of P tokens, T new tokens for y and as many for y', one optimiser step."""

    model: str
    B: int
    P: int
    T: int
    dtype: str = "float32"
    device: str = "cpu"
    lora_r: int = 0
    temperature: float = 0.9
    mixture_coef: float = 0.5
    tau: float = 0.1
    learning_rate: float = 1e-6
    seed: int = 0

    @property
    def vocab_size(self) -> int:
        return MODELS[self.model]["vocab_size"]

    def config(self, **changes):
        from transformers import LlamaConfig

        shape = MODELS[self.model] | {
            "max_position_embeddings": CONTEXT,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": None,
            # logits of order 1: nearly uniform draws, so that nearly no row ends early
            "initializer_range": 0.02,
        }
        return LlamaConfig(**shape | changes)

    def policy(self, seed: int = 0):
        """A causal language model with random weights."""
        from transformers import LlamaForCausalLM

        return self._make(LlamaForCausalLM, self.config(), self.seed + seed)

    def reward(self):
        """A small reward model on the same tokens, as TRL needs one."""
        from transformers import LlamaForSequenceClassification

        small = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_labels": 1,
        }
        return self._make(LlamaForSequenceClassification, self.config(**small), self.seed + 7)

    def _make(self, kind, config, seed: int):
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            with torch.device(self.device):
                return kind(config).eval()
        finally:
            torch.set_default_dtype(before)

    def prompts(self, step: int = 0) -> torch.Tensor:
        """int64 (B, P), neither padding nor end among them."""
        generator = torch.Generator().manual_seed(1_000 * self.seed + step)
        low = max(PAD, EOS) + 1
        ids = torch.randint(low, self.vocab_size, (self.B, self.P), generator=generator)
        return ids.to(self.device)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def words(ids: torch.Tensor) -> list[str]:
    """The texts that ``tokenizer`` reads back as these ids."""
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def tokenizer(vocab_size: int):
    """One word, one id: ``w17`` is 17. No hub, no special tokens added."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # special tokens are looked for inside words too, so theirs must not begin like one
    names = {PAD: "<pad>", EOS: "<eos>"}
    vocabulary = {names.get(i, f"w{i}"): i for i in range(vocab_size)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=names[PAD]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=names[PAD], eos_token=names[EOS], padding_side="left"
    )
