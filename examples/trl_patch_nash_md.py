"""TRL's own Nash-MD trainer with this library's rollout, and a judge that no reward can replace.

    pip install trl==1.13.0 'transformers==5.17.*'
    python examples/trl_patch_nash_md.py

The judge prefers more words of the next third of the vocabulary: the thirds beat each other in a
circle, as in rock, paper, scissors.
"""

import argparse
import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nlhf.trl_compat import patch_nash_md

WORDS = 60


class Circle:
    """TRL's protocol of pairwise judges, up to its version 1.0."""

    def judge(self, prompts, completions, shuffle_order=True):
        return [self.odds(first, second) for first, second in completions]

    def odds(self, first: str, second: str) -> float:
        x, y = self.shares(first), self.shares(second)
        margin = sum(x[i] * y[i - 1] - x[i - 1] * y[i] for i in range(3))
        return float(torch.sigmoid(torch.tensor(4 * margin)))

    def shares(self, text: str) -> list[float]:
        kinds = [int(word[1:]) % 3 for word in text.split()]
        return [kinds.count(i) / max(len(kinds), 1) for i in range(3)]


def tiny():
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(WORDS))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config), tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="nash-md-patched")
    parser.add_argument("--max_steps", type=int, default=20)
    chosen = parser.parse_args()
    try:
        patch_nash_md()
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

    model, tokenizer = tiny()
    trainer = NashMDTrainer(
        model=model,
        judge=Circle(),
        args=NashMDConfig(
            output_dir=chosen.output_dir,
            use_cpu=True,
            bf16=False,
            max_steps=chosen.max_steps,
            max_new_tokens=8,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(WORDS - 1)]),
        processing_class=tokenizer,
        # without a reference of its own: TRL would mix the policy with itself
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(chosen.output_dir)
    rows = [row for row in trainer.state.log_history if "rewards/probabilities" in row]
    names = ("step", "loss", "loss/kl", "rewards/probabilities", "mixture_coef")
    sys.stdout.write(json.dumps({name: rows[-1][name] for name in names}) + "\n")


if __name__ == "__main__":
    main()
