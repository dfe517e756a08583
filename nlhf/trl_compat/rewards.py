"""Who says which response is better: pairwise judges, reward models, reward functions."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nlhf.data import Text
from nlhf.preference import Preference
from nlhf.trl_compat import batches


def as_preference(judge: Any) -> Preference:
    """P(prompts, first, second), (B,) float32, of one of these, by its kind:

    an object with ``judge(prompts, completions, shuffle_order)``, TRL's protocol up to 1.0, where
    ``completions`` holds two texts a prompt. An integer that it returns is the index of the better
    text (-1, undecided: 1/2), any other number P(first is better). One that takes
    ``return_scores`` is asked for these probabilities; or

    a callable of ``nlhf``'s own protocol, (prompts, first, second) -> P.

    Raises:
        ValueError: neither; later, an answer that is not one number in [0, 1] a prompt.
    """
    method = getattr(judge, "judge", None)
    if not callable(method) and not callable(judge):
        raise ValueError(
            "judge: must have judge(prompts, completions) or be a callable (prompts, first, "
            f"second) -> P, got {type(judge).__name__}"
        )

    def preference(prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        if callable(method):
            pairs = [list(pair) for pair in zip(first, second, strict=True)]
            answer = _probabilities(method(prompts, pairs, **_options(method)))
        else:
            answer = judge(prompts, first, second)
        answer = torch.as_tensor(answer).detach().to("cpu", torch.float32)
        if answer.shape != (len(prompts),) or not ((answer >= 0) & (answer <= 1)).all():
            raise ValueError(
                f"judge: must return {len(prompts)} numbers in [0, 1], got {answer.tolist()}"
            )
        return answer

    return preference


def _options(method: Callable) -> dict[str, bool]:
    names = inspect.signature(method).parameters
    # a judge that has a bias for one place is asked in a random order
    wanted = {"shuffle_order": True, "return_scores": True}
    return {name: value for name, value in wanted.items() if name in names}


def _probabilities(answer: Any) -> list[float]:
    """Of indices or probabilities, told apart by their type."""
    values = answer.tolist() if hasattr(answer, "tolist") else list(answer)
    of_index = {0: 1.0, 1: 0.0, -1: 0.5}
    found = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"judge: must return indices or probabilities, got {value!r}")
        if isinstance(value, numbers.Integral) and int(value) not in of_index:
            raise ValueError(f"judge: an index must be 0, 1 or -1, got {value!r}")
        integral = isinstance(value, numbers.Integral)
        found.append(of_index[int(value)] if integral else float(value))
    return found


class ModelReward:
    """r(x, y) of a sequence classifier with one label, (B,) float32.

    Args:
        model: of transformers; its padding id becomes that of the tokenizer, by which it finds the
            last token.
        tokenizer: of the policy, whose ids the model then reads as they are; or another one.
        shared: whether the tokenizer is that of the policy.

    Raises:
        ValueError: the model knows fewer ids than the tokenizer, or has several labels.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, shared: bool):
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError(
                "reward_funcs: a reward model must be a sequence classifier of transformers, got "
                f"{type(model).__name__}; give a preference model as judge"
            )
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            hint = "; give its own tokenizer as reward_processing_classes" if shared else ""
            raise ValueError(
                f"reward_funcs: the reward model embeds {rows} tokens, and its tokenizer has "
                f"{len(tokenizer)}{hint}"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.shared = model.eval(), tokenizer, shared

    def __call__(self, prompts: list[Text], responses: list[str], ids: list[list[int]]) -> Tensor:
        """Of the texts, or of ``ids``, prompt and response as the policy has them."""
        return self.of_ids(ids) if self.shared else self.of_texts(prompts, responses)

    def of_texts(self, prompts: list[Text], responses: list[str]) -> Tensor:
        """Strings are joined; messages go through the tokenizer's chat template."""
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            text = _joined(prompt, response, self.tokenizer)
            # a chat template writes its own special tokens
            special = isinstance(prompt, str)
            rows.append(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        return self.of_ids(rows)

    @torch.no_grad()
    def of_ids(self, rows: list[list[int]]) -> Tensor:
        """The model's own token ids of prompt and response, without padding."""
        device = next(self.model.parameters()).device
        ids, mask = batches.padded(rows, self.tokenizer.pad_token_id, "right")
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        if logits.shape[1:] != (1,):
            raise ValueError(
                "reward_funcs: the reward model must have one label, got logits of shape "
                f"{tuple(logits.shape)}; load it with num_labels=1"
            )
        if not logits.isfinite().all():
            raise ValueError("reward_funcs: the reward model returned a number that is not finite")
        return logits[:, 0].float()


def _joined(prompt: Text, response: str, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt + response
    messages = [dict(message) for message in prompt]
    if messages[-1]["role"] == "assistant":
        messages[-1]["content"] += response
    else:
        messages.append({"role": "assistant", "content": response})
    return tokenizer.apply_chat_template(messages, tokenize=False)


def call_reward(
    function: Callable, prompts: list[Text], responses: list[str], ids: list[list[int]], **columns
) -> Tensor:
    """(B,) float32 of a reward function of TRL's protocol: keyword arguments in, numbers out.

    It gets ``prompts``, ``completions`` (messages where the prompts are), ``completion_ids`` and
    the other columns of the data.

    Raises:
        ValueError: the answer is not one finite number a prompt.
    """
    completions: list = responses
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in responses]
    answer = function(prompts=prompts, completions=completions, completion_ids=ids, **columns)
    name = getattr(function, "__name__", type(function).__name__)
    values = answer.tolist() if hasattr(answer, "tolist") else list(answer)
    if not all(isinstance(value, numbers.Real) for value in values):
        raise ValueError(f"reward_funcs: {name} must return numbers, got {values!r}")
    found = torch.tensor(values, dtype=torch.float32)
    if found.shape != (len(prompts),) or not found.isfinite().all():
        raise ValueError(
            f"reward_funcs: {name} must return {len(prompts)} finite numbers, got {values!r}"
        )
    return found
