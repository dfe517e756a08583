"""Steps of TRL's ``NashMDTrainer``, timed; run by ``bench.train_step`` in TRL's own environment.

    python -m bench.trl_step '{"model": "tiny", "B": 4, "P": 32, "T": 16}' STEPS

In the mode that is right: decoding without a cache, and with LoRA a reference of its own (what the
others compute is ``bench.trl_faults``). The last line of standard output is a JSON object. Needs
trl==1.13.0, transformers==5.17.0, requests, and peft for LoRA.
"""

import json
import sys
import tempfile

import torch

from bench.phases import Phases, measure_step
from bench.setting import Setting, tokenizer, words


def make_trainer(setting: Setting, folder: str, *, ref=None, cached: bool = False):
    """``ref`` None is TRL's default: a copy of the policy; with LoRA what it takes for the base."""
    from datasets import Dataset
    from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

    arguments = NashMDConfig(
        output_dir=folder,
        per_device_train_batch_size=setting.B,
        max_new_tokens=setting.T,
        temperature=setting.temperature,
        mixture_coef=setting.mixture_coef,
        beta=setting.tau,
        learning_rate=setting.learning_rate,
        # TRL's default, and what makes it decode without a cache, the only mode that is correct
        gradient_checkpointing=not cached,
        bf16=False,
        use_cpu=setting.device == "cpu",
        report_to=[],
        # a row that ends early would be a cheaper row
        generation_kwargs={"eos_token_id": None},
    )
    peft_config = None
    if setting.lora_r:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=setting.lora_r,
            lora_alpha=2 * setting.lora_r,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    policy = setting.policy()
    policy.generation_config.eos_token_id = None
    return NashMDTrainer(
        model=policy,
        ref_model=ref,
        reward_funcs=setting.reward(),
        args=arguments,
        processing_class=tokenizer(setting.vocab_size),
        train_dataset=Dataset.from_dict({"prompt": words(setting.prompts())}),
        peft_config=peft_config,
    )


def full_length(setting: Setting, trainer):
    def look(outputs) -> None:
        wanted = (setting.B, setting.P + trainer.generation_config.max_new_tokens)
        if any(rows.shape != wanted for rows in outputs):
            raise SystemExit(f"TRL generated {[tuple(x.shape) for x in outputs]}, not {wanted}")

    return look


def versions() -> dict[str, str]:
    import transformers
    import trl

    return {
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def main() -> None:
    setting, steps = Setting(**json.loads(sys.argv[1])), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        ref = setting.policy(1) if setting.lora_r else None
        trainer = make_trainer(setting, folder, ref=ref)
        trainer.create_optimizer()
        phases = Phases(setting.device)
        phases.wrap(trainer, "_generate_completions", "rollout", full_length(setting, trainer))
        phases.wrap(trainer, "_compute_rewards", "scoring")

        def step(number: int) -> None:
            trainer.training_step(trainer.model, {"prompt": words(setting.prompts(number))})
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        # two tokens bring everything into being: caches, the optimiser's state
        trainer.generation_config.max_new_tokens = 2
        step(steps)
        trainer.generation_config.max_new_tokens = setting.T
        found = [
            measure_step(lambda number=number: step(number), phases, setting.device, trainer.model)
            for number in range(steps)
        ]
    print(json.dumps({"steps": found, "versions": versions()}))


if __name__ == "__main__":
    main()
