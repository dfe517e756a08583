"""TRL's own Nash-MD trainer with the rollout of this library."""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationConfig

import nlhf_kernels as nk
from nlhf import parts, rollout
from nlhf.trl_compat import batches, rewards
from nlhf.trl_compat.config import of_epoch
from nlhf.trl_compat.wrapper import Through, random_seed, rollout_settings, with_prompts

TESTED = ("1.9.0", "1.13.0")
_NAME = "patch_nash_md"
# what the class had before, None for what it inherits; empty where it is not patched
_before: dict[str, Any] = {}


def patch_nash_md() -> None:
    """Give TRL's ``NashMDTrainer`` the rollout of this library, for all that import it.

    What changes, each through a method of that class:

    - ``_generate_completions``: y and y' in one decode loop with a cache for each model, instead of
      the whole prefix anew for every token; with LoRA and no ``ref_model`` the mixture is with the
      base model (TRL's is with the policy itself); nothing depends on ``gradient_checkpointing``.
    - the constructor takes ``judge`` or ``preference`` in place of ``reward_funcs``, as
      ``NashMDTrainer`` of this package does, and ``reward_funcs`` may be a function.
    - ``missing_eos_penalty`` looks for the end in the response alone.
    - ``beta`` and ``mixture_coef`` with one value an epoch do not fail in the second step.
    - the reference's log-probabilities under DDP with LoRA.

    The loss stays TRL's. A second call changes nothing more; ``unpatch_nash_md`` undoes it.

    Raises:
        ImportError: this TRL has no Nash-MD trainer. Later, of the patched class, ``ValueError``:
            a generation setting that the rollout does not serve, FSDP or ZeRO-3.
    """
    cls = _host()
    if _before:
        return
    changes = {
        "__init__": _constructor(cls.__init__),
        "_generate_completions": _generate_completions,
        "_compute_rewards": _compute_rewards,
        "_compute_logprobs": _logprobs(cls._compute_logprobs),
        "mixture_coef": property(lambda self: of_epoch(self._mixture_coef, self.state.epoch)),
        "beta": property(lambda self: of_epoch(self._beta, self.state.epoch)),
    }
    for name, new in changes.items():
        _before[name] = vars(cls).get(name)
        setattr(cls, name, new)


def unpatch_nash_md() -> None:
    """Give TRL its own methods back; trainers that were made in between lose theirs too."""
    if not _before:
        return
    cls = _host()
    for name, old in _before.items():
        if old is None:
            delattr(cls, name)
        else:
            setattr(cls, name, old)
    _before.clear()


def _host() -> type:
    try:
        cls = importlib.import_module("trl.experimental.nash_md").NashMDTrainer
        version = importlib.import_module("trl").__version__
    except ImportError as error:
        first, last = TESTED
        raise ImportError(
            f"{_NAME}: TRL {first} to {last} has the trainer that this is for, and none was found "
            f"({error}); nlhf.trl_compat.NashMDTrainer takes its place"
        ) from error
    if not _before and not Version(TESTED[0]) <= Version(version) <= Version(TESTED[1]):
        warnings.warn(
            f"{_NAME}: tested with TRL {TESTED[0]} to {TESTED[1]}, and this is {version}",
            stacklevel=3,
        )
    return cls


def _constructor(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self, *args, judge: Any = None, preference: Any = None, **kwargs):
        judges = [x for x in (judge, preference) if x is not None]
        self.judge = None
        if judges:
            given = inspect.signature(original).bind_partial(self, *args, **kwargs).arguments
            if len(judges) > 1 or given.get("reward_funcs") is not None:
                raise ValueError("NashMDTrainer: give reward_funcs, judge or preference, not two")
            if getattr(given.get("args"), "missing_eos_penalty", None) is not None:
                raise ValueError(
                    "NashMDTrainer: missing_eos_penalty is taken off a reward, and a judge has "
                    "none; leave it out"
                )
            self.judge = rewards.as_preference(judges[0])
            # the original wants one
            kwargs["reward_funcs"] = self.judge
        original(self, *args, **kwargs)
        plugin = self.accelerator.state.deepspeed_plugin
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise ValueError(
                f"{_NAME}: FSDP and DeepSpeed ZeRO-3 split the weights, which the cached rollout "
                "needs whole; use DDP, or unpatch_nash_md()"
            )
        if not isinstance(self.generation_config, GenerationConfig):
            raise ValueError(f"{_NAME}: use_vllm is not served, the rollout mixes two models")
        # a setting that is not served is found before the first step
        rollout_settings(self.generation_config, _NAME)

    return __init__


def _generate_completions(self: Any, model: nn.Module, prompts: dict) -> tuple[Tensor, Tensor]:
    """Ids (B, L + T) of the prompts with y, and with y', each padded to the right."""
    policy = self.accelerator.unwrap_model(model)
    ref = None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
    settings = rollout_settings(self.generation_config, _NAME)
    if settings.pop("n_samples") != 1:
        raise ValueError(f"{_NAME}: num_return_sequences must be 1")
    # around the whole loop, so that weights are cast once and all passes of a model are alike
    with self.accelerator.autocast():
        pair = rollout.generate_pair(
            policy,
            ref,
            prompts["input_ids"],
            prompts["attention_mask"],
            mixture_coef=self.mixture_coef,
            # the processes start from one seed
            seed=nk.fold_in(random_seed(), self.accelerator.process_index),
            **settings,
        )
    return tuple(with_prompts(prompts["input_ids"], y) for y in (pair.y, pair.y_other))


def _compute_rewards(
    self: Any, model_data: dict, mixture_data: dict, context_length: int
) -> tuple[Tensor, Tensor]:
    """(B,) each: the scores of y and y' whose difference is the log-odds of P(y > y')."""
    both = (model_data, mixture_data)
    responses = [batches.completion(x, context_length) for x in both]
    device = model_data["input_ids"].device
    if isinstance(self.reward_funcs, nn.Module):
        get_reward = importlib.import_module("trl.experimental.utils").get_reward
        pad = self.processing_class.pad_token_id
        with torch.no_grad():
            scores = [
                get_reward(self.reward_funcs, x["input_ids"], pad, context_length)[1] for x in both
            ]
    else:
        texts = [parts.decode(self.processing_class, y) for y in responses]
        if self.judge is not None:
            probability = self.judge(parts.plain(model_data["raw"]), *texts).double()
            # the sigmoid of 40 is 1 to the last bit, while an infinity would be in the metrics
            odds = probability.logit().clamp(-40, 40).float().to(device)
            return odds, torch.zeros_like(odds)
        scores = []
        for text, y in zip(texts, responses, strict=True):
            ids = batches.rows_of(y.tokens, y.mask)
            score = rewards.call_reward(self.reward_funcs, model_data["raw"], text, ids)
            scores.append(score.to(device))
    penalty = self.args.missing_eos_penalty
    if penalty is not None:
        eos = self.processing_class.eos_token_id
        ended = [((y.tokens == eos) & y.mask).any(1) for y in responses]
        scores = [s - penalty * ~end for s, end in zip(scores, ended, strict=True)]
    return tuple(scores)


def _logprobs(original: Callable) -> Callable:
    @functools.wraps(original)
    def _compute_logprobs(self: Any, model: nn.Module, *args) -> tuple[Tensor, Tensor]:
        # the original switches adapters off on the model, which a wrapper around it cannot
        return original(self, Through(model, self.accelerator.unwrap_model(model)), *args)

    return _compute_logprobs
