"""The geometric mixture of two models as one that generates."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from nlhf import policy as policies
from nlhf import rollout

# where a configuration leaves them open, as in transformers
_DEFAULTS = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "num_return_sequences": 1,
}
_SERVED = {*_DEFAULTS, "max_new_tokens", "eos_token_id", "pad_token_id"}
# they change nothing about what the rollout draws, or say nothing beside max_new_tokens
_WITHOUT_EFFECT = {
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
    "max_length",
    "transformers_version",
    "_from_model_config",
}
_OFF = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "cache_implementation": "dynamic",
}


def rollout_settings(generation: GenerationConfig, who: str) -> dict[str, Any]:
    """What a ``GenerationConfig`` asks for, as ``rollout.generate`` takes it.

    ``n_samples`` among it belongs to a ``Side``.

    Raises:
        ValueError: ``who``, the caller, and a setting that changes what is drawn or returned and
            that the rollout does not serve.
    """
    asked = {k: v for k, v in generation.to_dict().items() if v is not None}
    for name in sorted(set(asked) - _SERVED - _WITHOUT_EFFECT):
        # most are off at 0 or False
        if asked[name] and asked[name] != _OFF.get(name):
            raise ValueError(
                f"{who}: {name} = {asked[name]!r} is not served by the cached rollout; leave it "
                f"out (it has {', '.join(sorted(_SERVED))})"
            )
    if "max_new_tokens" not in asked:
        raise ValueError(f"{who}: max_new_tokens must be given in the generation config")
    chosen = {k: v for k, v in (_DEFAULTS | asked).items() if k in _SERVED}
    if not chosen.pop("do_sample"):
        # the most probable token
        chosen["temperature"] = 0.0
    chosen["n_samples"] = chosen.pop("num_return_sequences")
    return chosen


def random_seed() -> int:
    """From torch's generator, so that it follows ``set_seed`` and what a checkpoint restores."""
    return int(torch.randint(2**62, ()))


def with_prompts(input_ids: Tensor, completion: rollout.Completion) -> Tensor:
    """(R, L + T) ids of prompts and responses, as ``generate`` of transformers has them."""
    T = int(completion.mask.sum(-1).max())
    repeats = len(completion.tokens) // len(input_ids)
    return torch.cat([input_ids.repeat_interleave(repeats, 0), completion.tokens[:, :T]], -1)


def base_or(model: nn.Module, ref_model: nn.Module | None) -> nn.Module | None:
    """The reference; None, the base of a PEFT model, also where it is a part of ``model``.

    ``model.get_base_model()`` has the adapters inside, and computes the policy.
    """
    inside = any(part is ref_model for part in model.modules() if part is not model)
    return None if inside and policies.has_adapters(model) else ref_model


class GeometricMixtureWrapper:
    """A policy and a reference that answer as their geometric mixture.

    The interface of TRL's class of this name. ``generate`` is ``nlhf.rollout.generate``, with a
    key-value cache for each model; it is no ``GenerationMixin``, so beam search and the like raise.
    What is not found here is looked up in ``model``.

    Args:
        model: the policy.
        ref_model: the reference, of the same vocabulary. None, or a part of ``model`` such as
            ``model.get_base_model()``: the base of a PEFT policy with its adapters off.
        generation_config: what ``generate`` does where its arguments leave it open.
        mixture_coef: weight of the reference, in [0, 1].
        device: kept as an attribute; None: that of the model.

    Raises:
        ValueError: a coefficient out of range; later, a setting that is not served, or no reference
            for a model that is none of PEFT.
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        generation_config: GenerationConfig,
        mixture_coef: float = 0.5,
        device: torch.device | str | None = None,
    ):
        if not 0 <= mixture_coef <= 1:
            raise ValueError(
                f"GeometricMixtureWrapper: mixture_coef must be in [0, 1], got {mixture_coef!r}"
            )
        self.model = model
        self.config = model.config
        self.ref_model = ref_model
        self.generation_config = generation_config
        self.mixture_coef = mixture_coef
        self.device = next(model.parameters()).device if device is None else device

    def __getattr__(self, name: str) -> Any:
        # a copy asks before it has any attribute
        if name.startswith("__") or "model" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs) -> Any:
        return self.forward(*args, **kwargs)

    @torch.inference_mode()
    def forward(self, *args, **kwargs) -> Any:
        """The output of ``model`` on these arguments, its logits the mixture's log-softmax.

        In the mode, train or eval, that the models are in.

        Raises:
            ValueError: a cache is given, which could serve one model alone.
        """
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "GeometricMixtureWrapper: past_key_values cannot serve two models; call generate, "
                "which has a cache for each"
            )
        kwargs["use_cache"] = False
        # the reference first: its output is gone when that of the policy is changed
        ref, context = policies.reference(self.model, base_or(self.model, self.ref_model))
        with context:
            ref_logits = ref(*args, **kwargs).logits
        output = self.model(*args, **kwargs)
        coef = self.mixture_coef
        # a model without weight may say -inf
        weighted = ((coef, ref_logits), (1 - coef, output.logits))
        output.logits = sum(w * x for w, x in weighted if w).log_softmax(-1)
        return output

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """Those of ``model``, without a cache."""
        kwargs["use_cache"] = False
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        seed: int | None = None,
        **kwargs,
    ) -> Tensor:
        """Prompts (B, L) and responses of the mixture, int64 (B * n, L + T), padded to the right.

        Args:
            input_ids: padded to the left.
            generation_config: in place of that of the constructor, which still fills what it leaves
                open; ``kwargs`` are fields of it and come first. n is ``num_return_sequences``.
            attention_mask: None: 0 for padding, where padding and end of sequence differ; else 1.
            seed: of all draws; None: from torch's generator.

        Raises:
            ValueError: a setting that the rollout does not serve, or bad input.
        """
        chosen = copy.deepcopy(self.generation_config)
        if generation_config is not None:
            given = generation_config.to_dict().items()
            chosen.update(**{k: v for k, v in given if v is not None})
        if unknown := chosen.update(**kwargs):
            raise ValueError(f"GeometricMixtureWrapper: generate has no argument {min(unknown)!r}")
        settings = rollout_settings(chosen, type(self).__name__)
        if attention_mask is None:
            attention_mask = self._mask(input_ids, chosen)
        side = rollout.Side(self.model, self.mixture_coef, settings.pop("n_samples"))
        completion = rollout.generate(
            [side],
            base_or(self.model, self.ref_model),
            input_ids,
            attention_mask,
            seed=random_seed() if seed is None else seed,
            **settings,
        )[0]
        return with_prompts(input_ids, completion)

    @staticmethod
    def _mask(input_ids: Tensor, generation: GenerationConfig) -> Tensor:
        pad, eos = generation.pad_token_id, generation.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        if pad is None or pad in ends:
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()


class Through:
    """A model as a loss sees it: called through what wraps it, and asked as itself.

    A gradient that is to reach all ranks has to go through the wrapper, which knows nothing of
    embeddings, configuration and adapters.
    """

    def __init__(self, wrapped: nn.Module, model: nn.Module):
        self._wrapped, self._model = wrapped, model

    def __call__(self, *args, **kwargs) -> Any:
        return self._wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
