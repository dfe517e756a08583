"""What the constructor of the trainer makes of its arguments."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    ProcessorMixin,
    set_seed,
)

from nlhf import policy as policies
from nlhf.trl_compat import rewards
from nlhf.trl_compat.config import NashMDConfig
from nlhf.trl_compat.wrapper import base_or, rollout_settings


def tokenizer_of(processing_class: Any) -> Any:
    is_processor = isinstance(processing_class, ProcessorMixin)
    tokenizer = processing_class.tokenizer if is_processor else processing_class
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policies.check_tokenizer(tokenizer, "NashMDTrainer")
    return tokenizer


def models(
    model: nn.Module | str, ref_model: nn.Module | str | None, peft_config: Any, args: NashMDConfig
) -> tuple[nn.Module, nn.Module | None]:
    """The policy, with its adapters if any, and the frozen reference or None."""
    if args.model_init_kwargs is not None and not isinstance(model, str):
        raise ValueError(
            "NashMDTrainer: model_init_kwargs are for a model that is given by name, got a model"
        )
    # no pickle is read, unless it is asked for by name
    options = {"trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    options |= args.model_init_kwargs or {}
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **options)
    if isinstance(ref_model, str):
        ref_model = AutoModelForCausalLM.from_pretrained(ref_model, **options)
    if model.config.is_encoder_decoder:
        raise ValueError("NashMDTrainer: model must be a decoder, got an encoder and a decoder")
    ref_model = base_or(model, ref_model)
    adapters = policies.has_adapters(model)
    if peft_config is not None and adapters:
        raise ValueError(
            "NashMDTrainer: peft_config must be left out for a model that has adapters already"
        )
    if ref_model is not None:
        policies.check_same_vocabulary(model, ref_model)
    elif peft_config is None and not adapters:
        ref_model = copy.deepcopy(model)
    if peft_config is not None:
        from peft import get_peft_model

        # as Trainer does, which comes too late for the adapters' first values
        set_seed(args.seed)
        with warnings.catch_warnings():
            # peft still asks transformers by a name that 5.23 deprecates
            warnings.filterwarnings(
                "ignore", message=".*gradient_checkpointing", category=FutureWarning
            )
            model = get_peft_model(model, peft_config)
    if ref_model is None:
        # raises where the base cannot be had
        policies.AdaptersOff(model)
    else:
        ref_model.requires_grad_(False).eval()
    if args.disable_dropout:
        for part in [model] if ref_model is None else [model, ref_model]:
            _disable_dropout(part)
    return model, ref_model


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # layers that call the function keep its rate as a number
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def opinion(
    found: list, judge: Any, preference: Any, args: NashMDConfig
) -> tuple[Callable | None, Any]:
    """The judge, or the one reward function; the other is None."""
    functions = [f for x in found for f in (x if isinstance(x, list | tuple) else [x])]
    judges = [x for x in (judge, preference) if x is not None]
    if len(functions) + len(judges) != 1:
        raise ValueError(
            "NashMDTrainer: give one reward function as reward_funcs, or one judge, got "
            f"{len(functions)} and {len(judges)}"
        )
    weights = args.reward_weights
    if weights is not None and (judges or len(weights) != 1):
        raise ValueError(
            f"NashMDTrainer: reward_weights must hold one number a reward, got {weights!r}"
        )
    if functions:
        return None, functions[0]
    if args.missing_eos_penalty is not None:
        raise ValueError(
            "NashMDTrainer: missing_eos_penalty is taken off a reward, and a judge has none; leave "
            "it out"
        )
    return rewards.as_preference(judges[0]), None


def sampling(args: NashMDConfig, tokenizer: Any) -> dict[str, Any]:
    """How ``rollout.generate`` draws a response."""
    asked = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": True,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = GenerationConfig(**asked | (args.generation_kwargs or {}))
    settings = rollout_settings(config, "NashMDTrainer")
    if settings.pop("n_samples") != 1 or not settings["temperature"]:
        raise ValueError("NashMDTrainer: generation_kwargs must sample one response a prompt")
    return settings


def reward(function: Any, processing_classes: Any, tokenizer: Any, args: NashMDConfig) -> Any:
    """The function, or what asks a reward model, given as one or by name, with its tokenizer."""
    given = processing_classes
    given = given[0] if isinstance(given, list | tuple) else given
    if isinstance(function, str):
        code = {"trust_remote_code": args.trust_remote_code}
        given = given or AutoTokenizer.from_pretrained(function, **code)
        function = AutoModelForSequenceClassification.from_pretrained(
            function, num_labels=1, use_safetensors=True, **code
        )
        # of one family, as a rule: then the ids are read as they are
        given = None if given.get_vocab() == tokenizer.get_vocab() else given
    if not isinstance(function, nn.Module):
        if not callable(function):
            raise ValueError(
                "NashMDTrainer: reward_funcs must be a model, its name or a function, got "
                f"{type(function).__name__}"
            )
        return function
    shared = given is None or given is tokenizer
    return rewards.ModelReward(function, tokenizer if shared else given, shared=shared)
