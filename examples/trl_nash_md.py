"""A script written for TRL's Nash-MD trainer, with one import changed.

As it stands it makes a tiny random model and reward model, so that it runs anywhere in seconds:

    python examples/trl_nash_md.py

With a model, a reward model and prompts of your own (a column ``prompt``):

    python examples/trl_nash_md.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
        --reward_model_path trl-lib/Qwen2-0.5B-Reward --dataset_name trl-lib/ultrafeedback-prompt \\
        --learning_rate 5e-7 --max_steps 1000 --max_new_tokens 64 --use_cpu False --bf16 True
"""

import json
import sys
from dataclasses import dataclass

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

# was: from trl.experimental.nash_md import NashMDConfig, NashMDTrainer
from nlhf.trl_compat import NashMDConfig, NashMDTrainer


@dataclass
class ScriptArguments:
    model_name_or_path: str = ""
    dataset_name: str = ""


def tiny():
    """A language model of 60 words, a reward model that has seen nothing, and prompts."""
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(60))]
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
        num_labels=1,
    )
    torch.manual_seed(0)
    data = Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(48)])
    reward = LlamaForSequenceClassification(config)
    # its first weights would judge all alike
    torch.nn.init.normal_(reward.score.weight, std=2.0)
    return LlamaForCausalLM(config), tokenizer, reward, data


def main():
    parser = HfArgumentParser((ScriptArguments, NashMDConfig))
    parser.set_defaults(
        output_dir="nash-md",
        use_cpu=True,
        bf16=False,
        max_steps=20,
        max_new_tokens=8,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        logging_steps=5,
        report_to="none",
    )
    script, training_args = parser.parse_args_into_dataclasses()
    if script.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        reward_model = AutoModelForSequenceClassification.from_pretrained(
            training_args.reward_model_path, num_labels=1
        )
        data = load_dataset(script.dataset_name, split="train")
    else:
        model, tokenizer, reward_model, data = tiny()
    split = data.train_test_split(test_size=min(len(data) // 6, 200), seed=0)

    trainer = NashMDTrainer(
        model=model,
        reward_funcs=reward_model,
        args=training_args,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card()
    sys.stdout.write(json.dumps(trainer.evaluate()) + "\n")


if __name__ == "__main__":
    main()
