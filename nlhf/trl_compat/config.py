"""The configuration of the trainer: TRL's fields with TRL's defaults."""

# each default is a field with its help, not what the call would share among instances
# ruff: noqa: RUF009

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

# what a policy gradient with log-probabilities of sampled tokens can have
KL = ("reward_to_go", "sequence", "token")


def _option(default: Any, help: str) -> Any:
    metadata = {"help": help.replace("%", "%%")}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class NashMDConfig(TrainingArguments):
    """Settings of ``NashMDTrainer``: those of TRL 1.13's class of this name, and ``kl``.

    Everything of ``transformers.TrainingArguments`` is there too; of its defaults TRL changes
    ``learning_rate``, ``logging_steps``, ``remove_unused_columns``, ``gradient_checkpointing`` and
    ``bf16`` (on unless ``fp16`` is; on a machine without a GPU give ``use_cpu=True``, and
    ``bf16=False`` for float32).

    Raises:
        ValueError: a value out of range, or a setting that would change the result and that the
            trainer does not serve (``use_vllm``, ``repetition_penalty``, ``loss_type``, ...).
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
    ]

    learning_rate: float = _option(5e-7, "highest learning rate of AdamW")
    remove_unused_columns: bool = _option(False, "whether to drop columns forward does not name")
    logging_steps: float = _option(10, "optimizer steps from one log to the next; below 1: a share")
    gradient_checkpointing: bool | None = _option(True, "compute activations again: less memory")
    bf16: bool | None = _option(None, "mixed precision in bfloat16; None: unless fp16 is on")
    lr_scheduler_kwargs: dict[str, Any] | str | None = _option(None, "arguments of the scheduler")
    use_liger_kernel: bool = _option(False, "let transformers put Liger's layers into the model")
    torch_empty_cache_steps: int | None = _option(None, "steps from one emptied cache to the next")

    mixture_coef: list[float] = _option(
        [0.5], "weight of the reference in the geometric mixture, in [0, 1]; several: one an epoch"
    )
    beta: list[float] = _option(
        [0.1], "strength of the KL term towards the reference, at least 0; several: one an epoch"
    )
    kl: str = _option(
        "reward_to_go", "KL term: reward_to_go or sequence (unbiased), token (TRL's loss)"
    )
    reward_model_path: str | None = _option(None, "reward model, where the trainer is given none")
    max_new_tokens: int = _option(64, "longest response, in tokens")
    max_length: int = _option(512, "prompt and response; longer prompts lose their beginning")
    temperature: float = _option(0.9, "of the sampling, above 0")
    top_p: float = _option(1.0, "keep the smallest set with this probability; 1: off")
    top_k: int = _option(0, "keep the k most probable tokens; 0: off")
    min_p: float | None = _option(None, "keep tokens with this share of the largest probability")
    repetition_penalty: float = _option(1.0, "not served: must be 1")
    generation_kwargs: dict[str, Any] | str | None = _option(
        None, "fields of GenerationConfig that override those above; the served ones alone"
    )
    cache_implementation: str | None = _option(None, "not served: the rollout has its own caches")
    missing_eos_penalty: float | None = _option(
        None, "above 0: taken off the reward of a response that does not end"
    )
    loss_type: str = _option("sigmoid", "of Online DPO; Nash-MD has one loss")
    disable_dropout: bool = _option(True, "dropout of policy and reference off")
    use_vllm: bool = _option(False, "not served: must be False")
    vllm_model_impl: str = _option("vllm", "as in TRL; without effect")
    vllm_structured_outputs_regex: str | None = _option(None, "as in TRL; without effect")
    vllm_gpu_memory_utilization: float | None = _option(0.55, "as in TRL; without effect")
    vllm_mode: str = _option("colocate", "as in TRL; without effect")
    vllm_server_base_url: str | None = _option(None, "as in TRL; without effect")
    vllm_server_host: str = _option("0.0.0.0", "as in TRL; without effect")
    vllm_server_port: int = _option(8000, "as in TRL; without effect")
    vllm_server_timeout: float = _option(240.0, "as in TRL; without effect")
    vllm_group_port: int = _option(51216, "as in TRL; without effect")
    vllm_tensor_parallel_size: int = _option(1, "as in TRL; without effect")
    vllm_enable_sleep_mode: bool = _option(False, "as in TRL; without effect")
    ds3_gather_for_generation: bool = _option(True, "as in TRL; without effect: ZeRO-3 is refused")
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "arguments of from_pretrained, where the model is given by name"
    )
    trust_remote_code: bool = _option(False, "run code that comes with a model")
    reward_weights: list[float] | None = _option(None, "one number: the reward is multiplied by it")

    def __post_init__(self):
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        if "activation_checkpointing" in {f.name for f in dataclasses.fields(TrainingArguments)}:
            # the new name decides where it is given, and the old one warns wherever it is alone
            if self.activation_checkpointing is None:
                self.activation_checkpointing = self.gradient_checkpointing
            if self.activation_checkpointing_kwargs is None:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        for name in ("mixture_coef", "beta"):
            setattr(self, name, _schedule(name, getattr(self, name)))
        self._check()
        self._refuse()

    def _check(self) -> None:
        ranges = {
            "mixture_coef": (lambda x: 0 <= x <= 1, "in [0, 1]"),
            "beta": (lambda x: 0 <= x < math.inf, "at least 0"),
            "max_new_tokens": (lambda x: x >= 1, "at least 1"),
            "temperature": (lambda x: 0 < x < math.inf, "above 0"),
            "missing_eos_penalty": (lambda x: x is None or x > 0, "above 0, or None"),
            "kl": (lambda x: x in KL, f"one of {', '.join(KL)}"),
        }
        for name, (right, wanted) in ranges.items():
            value = getattr(self, name)
            for x in value if isinstance(value, list) else [value]:
                if not right(x):
                    raise ValueError(f"NashMDConfig: {name} must be {wanted}, got {x!r}")
        if self.max_new_tokens >= self.max_length:
            warnings.warn(
                f"max_length = {self.max_length} leaves no room for a prompt beside max_new_tokens "
                f"= {self.max_new_tokens}, so no prompt is cut; give the length of both together",
                stacklevel=3,
            )

    def _refuse(self) -> None:
        neutral = {
            "use_vllm": (False, "the rollout mixes two models; leave it off"),
            "repetition_penalty": (1.0, "the rollout has no such penalty; leave it at 1"),
            "cache_implementation": (None, "the rollout has its own caches; leave it out"),
            "loss_type": ("sigmoid", "Nash-MD has one loss; choose its KL term with kl"),
            "label_smoothing_factor": (0.0, "there are no labels; leave it at 0"),
        }
        for name, (value, why) in neutral.items():
            if getattr(self, name) != value:
                got = getattr(self, name)
                raise ValueError(f"NashMDConfig: {name} = {got!r} is not served: {why}")


def _schedule(name: str, value: Any) -> float | list[float]:
    """A number, or several: one an epoch."""
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise ValueError(f"NashMDConfig: {name} must be a number, or one an epoch, got {value!r}")
    return value[0] if len(value) == 1 else list(value)


def of_epoch(value: float | list[float], epoch: float | None) -> float:
    """Its value in an epoch, counted from 0; the last one stays."""
    if not isinstance(value, list):
        return value
    return value[min(int(epoch or 0), len(value) - 1)]
