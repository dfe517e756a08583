"""Policies: loading, adapters, and the one way in which `nlhf` runs a model forward."""

import contextlib
import copy
import importlib.util
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nlhf.data import replace_folder
from nlhf.loading import check_weights, reading

# ---- loading and saving


def load_tokenizer(path: str | os.PathLike, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name; ValueError if it is missing, or lacks pad or eos."""
    from transformers import AutoTokenizer

    place = _place(path, "tokenizer_config.json", "tokenizer.json")
    with reading(path, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, str(path))
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str = "tokenizer") -> None:
    """ValueError without an end-of-sequence or a padding token."""
    for kind in ("eos", "pad"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise ValueError(
                f"{name}: the tokenizer has no {kind} token; set tokenizer.{kind}_token and save "
                "the tokenizer again"
            )


def load_model(
    path: str | os.PathLike,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The causal language model of a folder or hub name, in eval mode on ``device``.

    ``dtype`` "auto" is that of the file; ``attn_implementation`` None is flash-attn where it can
    run, else sdpa (eager for models without it). Weights are read from safetensors alone.
    ValueError if the model is missing, corrupt or incomplete.
    """
    from transformers import AutoModelForCausalLM

    place = _place(path, "config.json")
    chosen = attn_implementation or attention_for(dtype, device)
    check_weights(place)
    with reading(path, "the model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            attn_implementation=chosen,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    # transformers fills what is missing with noise, and warns
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ValueError(f"{path}: weights are missing, {wrong[0]} among {len(wrong)}")
    _check_no_more_layers(model, info["unexpected_keys"], path)
    return model.to(device).eval() if device is not None else model.eval()


def _check_no_more_layers(model: nn.Module, unexpected: Iterable, path: str | os.PathLike) -> None:
    """ValueError where config.json states fewer layers than there are weights of."""
    stack, place = layers(model)
    indices = [re.match(rf"{re.escape(place)}\.(\d+)\.", str(name)) for name in unexpected]
    most = max((int(found[1]) for found in indices if found), default=-1) + 1
    if most > len(stack):
        raise ValueError(
            f"{path}: config.json states {len(stack)} layers, and there are weights of {most}"
        )


def attention_for(dtype: torch.dtype | str, device: torch.device | str | None) -> str | None:
    """flash-attn on CUDA in half precision where it is installed, else what the model prefers."""
    cuda = device is not None and torch.device(device).type == "cuda"
    half = dtype in (torch.float16, torch.bfloat16, "float16", "bfloat16")
    # not "sdpa" by name: models without it raise, while None takes it wherever it exists
    return "flash_attention_2" if cuda and half and importlib.util.find_spec("flash_attn") else None


def save(model: nn.Module, tokenizer: Any, path: str | os.PathLike) -> None:
    """A folder that ``AutoModelForCausalLM.from_pretrained`` loads; adapters are merged in a copy.

    An existing folder is replaced if it holds a model, else ValueError.
    """
    if _adapter_layers(model):
        # the caller's model stays as it is: merging rounds the base, and could not be undone
        model = copy.deepcopy(model).merge_and_unload()
    with replace_folder(path, "config.json") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _place(path: str | os.PathLike, *files: str) -> str:
    """``path`` as transformers wants it, after a look at what it would say at length."""
    text = os.fspath(path)
    local = Path(text).expanduser()
    if local.is_dir():
        if not any((local / name).is_file() for name in files):
            raise ValueError(f"{text}: holds no {files[0]}; name a folder of save_pretrained")
        return str(local)
    # a hub name is one word, or two with a slash between them
    if local.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise ValueError(f"{text or repr(text)}: no such folder; name a folder or a hub name")
    return text


# ---- adapters and the reference


def lora(
    model: nn.Module, r: int, alpha: float, last_layers: int = 0, dora: bool = False
) -> nn.Module:
    """LoRA adapters (Hu et al. 2021), float32, on every linear of the last layers; 0: of all.

    With ``dora`` the norms of the columns are trained too (Liu et al. 2024). The model is changed
    in place and comes back inside a PeftModel: only adapters are trainable.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    stack, place = layers(model)
    count = len(stack)
    if r < 1 or not 0 <= last_layers <= count:
        raise ValueError(
            f"lora: r must be at least 1 and last_layers in [0, {count}], got {r} and {last_layers}"
        )
    first = count - (last_layers or count)
    linears = {
        f"{place}.{i}.{name}": module
        for i in range(first, count)
        for name, module in stack[i].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_dora=dora,
        target_modules=list(linears),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linears.values()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft still asks transformers by a name that 5.23 deprecates
        warnings.filterwarnings(
            "ignore", message=".*gradient_checkpointing", category=FutureWarning
        )
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def layers(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """The list of a model's transformer layers, and its name; ValueError if there is none."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module, name
    raise ValueError(f"policy: found no list of {count} layers in {type(model).__name__}")


def mixed_names(model: nn.Module, rows: int) -> list[str] | None:
    """For twice ``rows`` rows the adapter of each: first the policy's, then none, for its base.

    ``None`` where peft runs no such batch: more or less than one adapter, DoRA, merged adapters.
    """
    inner, layers = bare(model), _adapter_layers(model)
    # adapters that transformers has put in, without a PeftModel, know of no such batch
    if not hasattr(inner, "get_base_model") or len(inner.active_adapters) != 1 or not layers:
        return None
    names = [*inner.active_adapters * rows, *["__base__"] * rows]
    try:
        # what peft itself asks each layer before it runs one; the layers of some kinds never do
        for layer in layers:
            layer._check_forward_args(names, adapter_names=names)
    except (AttributeError, TypeError, ValueError):
        return None
    return names


def _adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of peft that hold adapters; each has this flag, whatever the kind."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


class AdaptersOff(AbstractContextManager):
    """Inside it a PEFT model computes its base. Can be entered again and again, at next to no cost.

    ``PeftModel.disable_adapter`` walks over the whole model and resets ``requires_grad`` each time,
    too much for every token; this flips the flags of the layers that have one, and puts them back.
    """

    def __init__(self, model: nn.Module):
        self._layers = _adapter_layers(model)
        configs = getattr(bare(model), "peft_config", {}).values()
        outside = any(config.is_prompt_learning for config in configs)
        if (
            outside
            or not self._layers
            or any(getattr(c, "bias", "none") != "none" for c in configs)
        ):
            raise ValueError(
                "reference: the base of this model cannot be had by switching adapters off (none, "
                "prompt tuning, or trained biases); give ref, a model of its own"
            )
        self._before: list[list[bool]] = []

    def __enter__(self) -> None:
        self._before.append([layer._disable_adapters for layer in self._layers])
        for layer in self._layers:
            layer._disable_adapters = True

    def __exit__(self, *_) -> None:
        for layer, before in zip(self._layers, self._before.pop(), strict=True):
            layer._disable_adapters = before


def reference(policy: nn.Module, ref: nn.Module | None) -> tuple[nn.Module, AbstractContextManager]:
    """The module to run for the reference, and the context to run it in.

    ``ref`` None is the base of a PEFT ``policy`` with its adapters off; ValueError otherwise.
    """
    if ref is not None:
        check_same_vocabulary(policy, ref)
        return ref, contextlib.nullcontext()
    if not has_adapters(policy):
        raise ValueError(
            "reference: ref must be a model when the policy is not a PEFT model, got None; load "
            "a second copy of the model"
        )
    return policy, AdaptersOff(policy)


def has_adapters(model: nn.Module) -> bool:
    return bool(getattr(bare(model), "peft_config", None)) or bool(_adapter_layers(model))


def check_same_vocabulary(policy: nn.Module, ref: nn.Module) -> None:
    """ValueError that names both sizes if the two models predict different vocabularies."""
    sizes = vocabulary(policy), vocabulary(ref)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"reference: policy and ref must have one vocabulary, got {sizes[0]} and {sizes[1]} "
            "tokens; take the two from one family, or resize the embeddings of one"
        )


def vocabulary(model: nn.Module) -> int:
    return bare(model).config.get_text_config().vocab_size


# ---- running a model


def end_tokens(model: nn.Module, eos_token_id: int | Iterable[int] | None = None) -> list[int]:
    """The ids that end a response: those given, else those of the model; ValueError without any."""
    found = eos_token_id
    if found is None:
        found = _setting(model, "eos_token_id")
    ids = [found] if isinstance(found, int) else list(found or [])
    _check_ids(model, "eos_token_id", ids)
    return ids


def pad_token(model: nn.Module, pad_token_id: int | None = None) -> int:
    """The id that fills up a response: the one given, else the model's; ValueError without one."""
    found = _setting(model, "pad_token_id") if pad_token_id is None else pad_token_id
    _check_ids(model, "pad_token_id", [] if found is None else [found])
    return found


def _setting(model: nn.Module, name: str) -> Any:
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _check_ids(model: nn.Module, name: str, ids: list) -> None:
    V = vocabulary(model)
    if not ids or not all(isinstance(i, int) and 0 <= i < V for i in ids):
        got = ids or "none, and the model names none"
        raise ValueError(f"rollout: {name} must be in [0, {V}), got {got}; give the tokenizer's")


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Dropout off; each module gets its own mode back, also where only a part was in train mode."""
    training = [m for model in models for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids (B, P) of a padded batch: the first token that is none of padding is at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def bare(model: nn.Module) -> nn.Module:
    """The model of transformers or peft inside of what distributes it, ``model`` if nothing does.

    To look at, not to run: the wrapper's forward pass is the one that its hooks belong to.
    """
    inner = model
    # by class and by children: some wrappers pass on every other name that they are asked for
    while not hasattr(type(inner), "get_output_embeddings") and "module" in dict(
        inner.named_children()
    ):
        inner = inner.module
    return inner


def class_name(model: nn.Module) -> str:
    """Of the model inside of wrappers and adapters."""
    inner = bare(model)
    base = getattr(inner, "get_base_model", None)
    return type(base() if base else inner).__name__


def run(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    keep: int | Tensor,
    cache: Any = None,
    **more,
) -> Tensor:
    """Logits (B, T, V) of the last ``keep`` columns, or of these columns, as the model has them.

    A model that does not know ``logits_to_keep`` returns those of all. ``cache`` is a transformers
    cache that the call reads and extends; ``more`` goes to the model.
    """
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=keep,
        **more,
    ).logits


def kept(x: Tensor, keep: int | Tensor) -> Tensor:
    """The columns (B, T, ...) that ``run`` was asked for."""
    # slicing none off would cost a copy
    if isinstance(keep, int):
        return x if x.shape[1] == keep else x[:, -keep:]
    return x if x.shape[1] == len(keep) else x[:, keep]


def last_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    count: int | Tensor,
    cache: Any = None,
    **more,
) -> Tensor:
    """Logits (B, T, V) of the last ``count`` columns, or of these columns, as in ``run``."""
    head = bare(model).get_output_embeddings()
    # a slice of the hidden states is not contiguous, and that makes a bf16 head slow on the CPU
    hook = head.register_forward_pre_hook(_contiguous) if head else contextlib.nullcontext()
    with hook:
        logits = run(model, input_ids, attention_mask, position_ids, count, cache, **more)
    return kept(logits, count)


def _contiguous(module: nn.Module, inputs: tuple) -> tuple:
    return inputs[0].contiguous(), *inputs[1:]
