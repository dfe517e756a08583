"""Responses from an inference server, vLLM or SGLang, with the log-probabilities of their draw.

They come back as token ids: text would have to be tokenized again, and would not give the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf import http
from nlhf.config import Config
from nlhf.rollout import Completion

ENGINES = ("vllm", "sglang")
# what a server's log-probabilities are of, and what each engine gives unless told otherwise
LOGPROBS = ("raw", "scaled", "processed")
DEFAULT_LOGPROBS = {"vllm": "raw", "sglang": "scaled"}
# SGLang takes no more than 32 bits
_SEEDS = 2**31 - 1
# of rounding, above which a log-probability is none
_SLACK = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How a server draws, as in ``nk.mixture_sample``; ``end_tokens`` end a response."""

    end_tokens: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def filtered(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def exact(logprobs: str, sampling: Sampling) -> bool:
    """Whether log-probabilities of this kind are those of the distribution that was drawn from.

    "raw" are of the model at temperature 1, "scaled" at the temperature, both before any filter;
    "processed" are after temperature and filters.
    """
    at_temperature = logprobs != "raw" or sampling.temperature == 1
    return logprobs == "processed" or (at_temperature and not sampling.filtered)


class Server:
    """An inference server.

    url: where it listens. It is asked at /v1/completions, as is any server that speaks OpenAI's
        protocol and returns token ids; "sglang" at its own /generate unless the url ends in /v1.
    engine: "vllm" or "sglang".
    model: its name there (of an adapter for example); "": whatever is served.
    logprobs: what its log-probabilities are of (``LOGPROBS``); "": the engine's default. vLLM
        gives "processed" ones when it is started with --logprobs-mode processed_logprobs.
    key_env, timeout, retries, concurrency, backoff: as in ``http.Client``.

    Raises:
        ValueError: a bad url or an unknown engine.
    """

    def __init__(
        self,
        url: str,
        *,
        engine: str = "vllm",
        model: str = "",
        logprobs: str = "",
        **connection,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"serving: engine must be vllm or sglang, got {engine!r}")
        logprobs = logprobs or DEFAULT_LOGPROBS[engine]
        if logprobs not in LOGPROBS:
            raise ValueError(
                f"serving: logprobs must be one of {', '.join(LOGPROBS)}, got {logprobs!r}"
            )
        self.engine, self.model, self.logprobs = engine, model, logprobs
        root = url.rstrip("/").removesuffix("/v1")
        self.native = engine == "sglang" and root == url.rstrip("/")
        self.client = http.Client(root, name="server", **{"timeout": 600.0} | connection)

    def complete(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        *,
        seeds: Tensor,
        n_samples: int = 1,
        pad_token_id: int,
        vocabulary: int | None = None,
    ) -> Completion:
        """Responses to each prompt; sample k of prompt p is at row p * n_samples + k.

        Args:
            input_ids, attention_mask: (P, L) prompts; what lies under the mask is not sent.
            sampling: how to draw.
            seeds: (P,) int64, one a prompt. Sample k draws with fold_in(seed, k), folded to 31
                bits; whether that repeats a draw is the server's to say.
            pad_token_id: fills up the rows.
            vocabulary: ids must be below it.

        Returns:
            A ``Completion`` with ``sampling_logprobs``, float32, where they are known: where the
            server's are of the distribution that was drawn from (``exact``), else ``None``. What
            its filters kept is unknown.

        Raises:
            ValueError: the server cannot be asked; or its answers lack ids, log-probabilities or
                the end token, or contradict what was asked.
        """
        P, device = len(input_ids), input_ids.device
        keep = (attention_mask != 0).tolist()
        prompts = [
            [token for token, real in zip(*row, strict=True) if real]
            for row in zip(input_ids.tolist(), keep, strict=True)
        ]
        samples = torch.arange(n_samples, device=device)
        folded = (nk.fold_in(seeds[:, None], samples) & _SEEDS).tolist()
        asked = [(prompts[p], folded[p][k]) for p in range(P) for k in range(n_samples)]
        ask, path, parse = self._completions, "/v1/completions", _from_completions
        if self.native:
            ask, path, parse = self._generate, "/generate", _from_generate

        def read(i: int, answer: Any) -> Row:
            row = parse(answer, asked[i][0])
            _check(row, sampling, vocabulary)
            return row

        rows = self.client.post(path, [ask(*row, sampling) for row in asked], read)
        T = max((len(row.tokens) for row in rows), default=0)
        tokens = torch.full((len(rows), T), pad_token_id, dtype=torch.int64)
        logprobs = torch.zeros(len(rows), T)
        mask = torch.zeros(len(rows), T, dtype=torch.bool)
        for i, row in enumerate(rows):
            n = len(row.tokens)
            tokens[i, :n], mask[i, :n] = torch.tensor(row.tokens), True
            logprobs[i, :n] = torch.tensor(row.logprobs)
        known = exact(self.logprobs, sampling)
        return Completion(
            tokens.to(device),
            mask.to(device),
            sampling_logprobs=logprobs.to(device) if known else None,
        )

    def _completions(self, prompt: list[int], seed: int, sampling: Sampling) -> dict:
        body = {
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            **_filters(sampling),
            # what is not named comes from the served model's own settings
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "n": 1,
            # older servers give none for 0
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": list(sampling.end_tokens),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }
        if self.engine == "sglang":
            body["no_stop_trim"] = True
        return body | ({"model": self.model} if self.model else {})

    def _generate(self, prompt: list[int], seed: int, sampling: Sampling) -> dict:
        parameters = {
            "max_new_tokens": sampling.max_new_tokens,
            **_filters(sampling),
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": seed,
            "stop_token_ids": list(sampling.end_tokens),
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        body = {"input_ids": prompt, "sampling_params": parameters, "return_logprob": True}
        return body | ({"lora_path": self.model} if self.model else {})


def complete(
    url: str,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    end_tokens: Iterable[int],
    pad_token_id: int,
    seed: int,
    n_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    **server,
) -> Completion:
    """``Server.complete`` of a server that is asked once; prompt p has the seed fold_in(seed, p).

    server: as in ``Server``.
    """
    places = torch.arange(len(input_ids), device=input_ids.device)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return Server(url, **server).complete(
        input_ids,
        attention_mask,
        Sampling(tuple(end_tokens), max_new_tokens, **filters),
        seeds=nk.fold_in(seed, places),
        n_samples=n_samples,
        pad_token_id=pad_token_id,
    )


def from_config(config: Config) -> Server:
    """The server of a run."""
    return Server(
        config.server,
        engine=config.server_engine,
        model=config.server_model,
        logprobs=config.server_logprobs,
        key_env=config.server_key_env,
        concurrency=config.server_concurrency,
        timeout=config.server_timeout,
    )


def sampling(config: Config, end_tokens: Iterable[int]) -> Sampling:
    """How a run draws."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    return Sampling(tuple(end_tokens), **{name: getattr(config, name) for name in names})


def _filters(sampling: Sampling) -> dict:
    return {
        "temperature": sampling.temperature,
        # both engines take -1 for all
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }


# ---- what comes back


@dataclass(frozen=True)
class Row:
    tokens: list[int]
    logprobs: list[float]
    reason: str


def _from_completions(answer: Any, prompt: list[int]) -> Row:
    choice = http.pick(answer, "choices", 0)
    if not isinstance(choice, dict):
        raise http.BadAnswer("a choice that is none")
    logprobs = choice.get("logprobs")
    if logprobs is None:
        raise ValueError("serving: the server gives no log-probabilities; let it (--max-logprobs)")
    tokens = choice.get("token_ids")
    if tokens is None:
        tokens = [_placeholder(token) for token in http.listed(http.pick(logprobs, "tokens"))]
    # vLLM says it beside each answer, SGLang once
    for holder in (choice, answer):
        _check_prompt(holder.get("prompt_token_ids"), prompt)
    given = http.listed(http.pick(logprobs, "token_logprobs"))
    matched = choice.get("matched_stop")
    if isinstance(matched, int) and len(http.listed(tokens)) == len(given) - 1:
        # SGLang may cut the end token off the ids, and says beside them which it was
        tokens = [*tokens, matched]
    return _row(tokens, given, http.pick(choice, "finish_reason"))


def _from_generate(answer: Any, prompt: list[int]) -> Row:
    # a server may answer one request with a list of one
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    meta = http.pick(answer, "meta_info")
    if not isinstance(meta, dict) or meta.get("output_token_logprobs") is None:
        raise ValueError(
            "serving: the server gives no meta_info.output_token_logprobs; is it SGLang?"
        )
    entries = http.listed(meta["output_token_logprobs"])
    tokens = [http.pick(entry, 1) for entry in entries]
    _check_prompt(answer.get("prompt_token_ids"), prompt)
    reason = http.pick(meta, "finish_reason")
    reason = reason.get("type") if isinstance(reason, dict) else reason
    row = _row(tokens, [http.pick(entry, 0) for entry in entries], reason)
    # its list of ids may lack the end token, which is cut off for the text
    ids = answer.get("output_ids")
    if ids is not None and ids not in (row.tokens, row.tokens[:-1]):
        raise http.BadAnswer("output_ids that differ from those of output_token_logprobs")
    return row


def _row(tokens: Any, logprobs: list, reason: Any) -> Row:
    tokens = http.listed(tokens)
    if len(tokens) != len(logprobs):
        raise http.BadAnswer(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise http.BadAnswer(f"{str(token)[:40]!r} for a token id")
    numbers = [http.number(x) for x in logprobs]
    # a server writes -9999 for what cannot be, and that was not drawn
    wrong = [x for x in numbers if not -9999 < x <= _SLACK]
    if wrong:
        raise http.BadAnswer(f"{wrong[0]:g} for the log-probability of a token that was drawn")
    return Row(tokens, [min(x, 0.0) for x in numbers], str(reason))


def _placeholder(token: Any) -> int:
    head, _, number = str(token).partition(":")
    if head != "token_id" or not number.isdecimal():
        raise ValueError(
            "serving: the server gives texts for tokens, and no ids; vLLM since 0.10.2 and SGLang "
            "know return_token_ids, before that start vLLM with --return-tokens-as-token-ids"
        )
    return int(number)


def _check_prompt(used: Any, prompt: list[int]) -> None:
    if used is not None and used != prompt:
        raise ValueError(
            f"serving: the server answers another prompt, {str(used)[:60]} for {str(prompt)[:60]}; "
            "does it cut prompts, or put a token before them?"
        )


def _check(row: Row, sampling: Sampling, vocabulary: int | None) -> None:
    """ValueError unless the row is a response as it was asked for."""
    n, most = len(row.tokens), sampling.max_new_tokens
    limit = 2**31 if vocabulary is None else vocabulary
    wrong = [t for t in row.tokens if not 0 <= t < limit]
    if wrong:
        raise ValueError(
            f"serving: a token id must be in [0, {limit}), got {wrong[0]}; does the server have "
            "another model?"
        )
    if not 0 < n <= most:
        raise ValueError(f"serving: asked for 1 to {most} tokens, the server gives {n}")
    ends = [t for t in row.tokens if t in sampling.end_tokens]
    if row.reason == "stop" and row.tokens[-1] not in sampling.end_tokens:
        raise ValueError(
            f"serving: a response has stopped without one of the end tokens "
            f"{list(sampling.end_tokens)}, its last is {row.tokens[-1]}; does the server have "
            "another end token (--generation-config vllm), or cut it off?"
        )
    if row.reason == "length" and n < most:
        raise ValueError(
            f"serving: a response was cut after {n} of {most} tokens; start the server with a "
            "longer context"
        )
    if row.reason not in ("stop", "length"):
        raise http.BadAnswer(f"a response that ended for the reason {row.reason!r}")
    if len(ends) > (row.tokens[-1] in sampling.end_tokens):
        raise ValueError(
            "serving: a response goes on after an end token; does the server ignore it?"
        )
