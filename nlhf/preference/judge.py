"""A preference that a language model behind an OpenAI-compatible server gives."""

import collections
import contextlib
import hashlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlhf import config, http
from nlhf.preference.protocol import Unusable, check_texts

LABELS = ("A", "B")
# what stands around a letter in a token or a short answer, the marks of tokenizers included
_AROUND = " \t\r\n*_`'\"()[]{}<>.,:;#\u2581\u0120\u010a"
_FIELDS = ("prompt", "first", "second")
# less than this on both letters together is an answer that is neither
_LEAST_MASS = 0.01


@dataclass(frozen=True)
class JudgeConfig:
    """Everything that a judge's answer depends on. The string under a field is its help."""

    url: str = ""
    """of the server, up to /v1; /chat/completions is put behind it"""
    model: str = ""
    """name that the server knows the model by; "": the only one that it serves"""
    api_key_env: str = ""
    """environment variable that holds the key, which is written nowhere; "": no key"""
    system: str = (
        "You compare two responses to a prompt. Answer with one letter, A or B, and nothing else."
    )
    """the system message; "": none"""
    template: str = (
        "Prompt:\n{prompt}\n\nResponse A:\n{first}\n\nResponse B:\n{second}\n\n"
        "Which response is better? Answer A or B."
    )
    """the user's message around {prompt}, {first} and {second}; the answer is A or B"""
    both_orders: bool = True
    """ask in both orders and take the mean, so that P(a > b) + P(b > a) = 1"""
    top_logprobs: int = 20
    """read P from so many log-probabilities of the answer's token; 0: from its text alone"""
    samples: int = 1
    """answers of which the mean is taken"""
    max_tokens: int = 8
    """longest answer, in tokens"""
    temperature: float = 0.0
    """of the answer's sampling, at least 0; above 0 where samples are several"""
    seed: int = 0
    """of the answer's sampling, where the temperature is above 0"""
    on_unclear: str = "error"
    """an answer that is neither A nor B, twice: "error", or "half" for P = 1/2"""
    cache: str = ""
    """file of answers that are not paid for twice; several processes may share it; "": none"""
    concurrency: int = 16
    """requests at once"""
    timeout: float = 60.0
    """seconds for an answer"""
    retries: int = 5
    """how often a request that failed is sent again"""
    backoff: float = 0.5
    """seconds before the first retry, doubled before each further one"""

    def __post_init__(self):
        limits = (
            ("top_logprobs", 0, 20, "in 0 to 20"),
            ("samples", 1, math.inf, "at least 1"),
            ("max_tokens", 1, math.inf, "at least 1"),
            ("temperature", 0, 1e30, "at least 0 and finite"),
            ("seed", 0, 2**31 - 1, "in [0, 2^31)"),
            ("concurrency", 1, 4096, "in 1 to 4096"),
            ("timeout", 1e-3, 1e6, "above 0 and finite"),
            ("retries", 0, 1000, "in 0 to 1000"),
            ("backoff", 0, 1e6, "at least 0 and finite"),
        )
        for name, low, high, wanted in limits:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"judge: {name} must be {wanted}, got {getattr(self, name)!r}")
        if not self.url:
            raise ValueError("judge: url must be given: http(s)://host:port/v1")
        if self.on_unclear not in ("error", "half"):
            raise ValueError(f"judge: on_unclear must be error or half, got {self.on_unclear!r}")
        if self.samples > 1 and not self.temperature:
            raise ValueError("judge: samples above 1 need a temperature above 0, or all are equal")
        missing = [field for field in _FIELDS if "{" + field + "}" not in self.template]
        if missing:
            raise ValueError(f"judge: template must contain {{{missing[0]}}}")
        try:
            self.template.format(**dict.fromkeys(_FIELDS, ""))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"judge: template has a stray brace or field: {error}") from None


def load_judge(path: str | os.PathLike) -> "HTTPJudge":
    """The judge of a YAML file with the fields of ``JudgeConfig``."""
    if not Path(path).is_file():
        raise ValueError(f"preference {path}: no such file")
    return HTTPJudge(config.load(str(path), kind=JudgeConfig))


class HTTPJudge:
    """P(first > second | prompt) from chat completions; a ``Preference``.

    P is the softmax over A and B of the log-probabilities of the answer's token, their variants in
    case and spacing added up; where the server gives none, 1 for A and 0 for B. With
    ``both_orders`` it is the mean of both, and P(a > b) + P(b > a) is exactly 1. Equal requests
    are sent once. ``stats`` counts answers from the cache (hits) and not (misses), unclear ones,
    requests and retries.

    Raises:
        ValueError: a bad configuration; when it is called, a server that does not answer as it
            should, named with its url and model.
    """

    def __init__(self, settings: JudgeConfig) -> None:
        self.settings = s = settings
        self._client = http.Client(
            s.url.rstrip("/").removesuffix("/chat/completions"),
            name="judge",
            key_env=s.api_key_env,
            timeout=s.timeout,
            retries=s.retries,
            concurrency=s.concurrency,
            backoff=s.backoff,
        )
        self._cache = Cache(s.cache) if s.cache else None
        self._model = s.model
        self._name()
        self._counts = collections.Counter(hits=0, misses=0, unclear=0)

    def _name(self) -> None:
        """Errors name the model too."""
        if self._model:
            self._client.name += f", model {self._model}"

    @property
    def stats(self) -> dict[str, int]:
        """hits, misses, unclear, requests and retries so far."""
        return dict(self._counts) | dict(self._client.stats)

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        """As ``Preference``."""
        check_texts(prompts, first, second)
        pairs = list(zip(prompts, first, second, strict=True))
        wanted = [pair for pair in pairs if not self.settings.both_orders or pair[1] != pair[2]]
        if self.settings.both_orders:
            wanted += [(prompt, b, a) for prompt, a, b in wanted]
        found = self._answers(list(dict.fromkeys(wanted)))
        if not self.settings.both_orders:
            return torch.tensor([found[pair] for pair in pairs], dtype=torch.float32)
        # half of P(a > b) - P(b > a), which changes its sign with the order and nothing else
        margins = torch.tensor(
            [0.0 if a == b else (found[x, a, b] - found[x, b, a]) / 2 for x, a, b in pairs],
            dtype=torch.float64,
        )
        # 1 - p is exact for p in [1/2, 1], so both orders of a pair sum to 1 to the last bit
        larger = (0.5 + margins.abs()).float()
        return torch.where(margins >= 0, larger, 1 - larger)

    def _answers(self, pairs: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], float]:
        """P that the first is better, of each pair as it is ordered."""
        s = self.settings
        if pairs and not self._model:
            self._model = self._client.get("/models", self._only_model)
            self._name()
        asked = [(pair, i) for pair in pairs for i in range(s.samples)]
        keys = [self._key(*pair, i) for pair, i in asked]
        known = self._cache.read(keys) if self._cache else {}
        open_ = [k for k in range(len(asked)) if keys[k] not in known]
        self._counts["hits"] += len(asked) - len(open_)
        self._counts["misses"] += len(open_)
        # a second time with another seed, for an answer that was unclear
        for attempt in range(2 if open_ else 0):
            bodies = [self._body(*asked[k], attempt) for k in open_]
            answers = self._client.post("/chat/completions", bodies, self._keeper(keys, open_))
            unclear = [k for k, p in zip(open_, answers, strict=True) if p is None]
            known |= {keys[k]: p for k, p in zip(open_, answers, strict=True) if p is not None}
            self._counts["unclear"] += len(unclear)
            open_ = unclear
        if open_ and s.on_unclear == "error":
            raise Unusable(
                f"{self._client.name}: an answer is neither A nor B, twice; "
                "make the template clearer, or set on_unclear: half"
            )
        for k in open_:
            known[keys[k]] = self._cache.write(keys[k], 0.5) if self._cache else 0.5
        values = [known[key] for key in keys]
        n = s.samples
        return {pair: sum(values[i * n : i * n + n]) / n for i, pair in enumerate(pairs)}

    def _keeper(self, keys: list[str], places: list[int]) -> Any:
        """Reads an answer and writes it down at once: it is paid for, whatever comes next."""

        def read(i: int, answer: Any) -> float | None:
            p = verdict(answer)
            if p is None or not self._cache:
                return p
            return self._cache.write(keys[places[i]], p)

        return read

    def _body(self, pair: tuple[str, str, str], sample: int, attempt: int) -> dict:
        s = self.settings
        user = s.template.format(**dict(zip(_FIELDS, pair, strict=True)))
        system = [{"role": "system", "content": s.system}] if s.system else []
        body = {
            "model": self._model,
            "messages": [*system, {"role": "user", "content": user}],
            "max_tokens": s.max_tokens,
            "temperature": s.temperature,
        }
        if s.temperature:
            body["seed"] = s.seed + sample + s.samples * attempt
        if s.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": s.top_logprobs}
        return body

    def _key(self, prompt: str, first: str, second: str, sample: int) -> str:
        """Of everything that decides an answer, and of no secret."""
        s = self.settings
        names = ("system", "template", "top_logprobs", "max_tokens", "temperature", "on_unclear")
        decides = [getattr(s, name) for name in names]
        # where nothing is drawn the seed decides nothing
        decides += [s.seed + sample if s.temperature else 0]
        whole = [1, self._client.url, self._model, *decides, prompt, first, second]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def _only_model(self, answer: Any) -> str:
        models = http.pick(answer, "data")
        names = [str(http.pick(model, "id")) for model in http.listed(models)]
        if len(names) != 1:
            raise ValueError(
                f"{self._client.name}: serves {len(names)} models ({', '.join(names[:5])}"
                "); name one in the judge's file (model: ...)"
            )
        return self._client.hidden(names[0])


def verdict(answer: Any) -> float | None:
    """P(A) of a chat completion; ``None`` if it is neither A nor B.

    From the log-probabilities of the first token that is a letter, of the first token if none is;
    without log-probabilities, or with no letter among them, from the text.

    Raises:
        http.BadAnswer: it is no chat completion, or its log-probabilities are none.
    """
    choice = http.pick(answer, "choices", 0)
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    if isinstance(logprobs, dict) and logprobs.get("content"):
        content = http.listed(logprobs["content"])
        tokens = [_label(http.pick(entry, "token")) for entry in content]
        place = next((i for i, label in enumerate(tokens) if label), 0)
        if (p := _from_logprobs(content[place])) is not None:
            return p
    text = http.pick(choice, "message", "content")
    if not isinstance(text, str):
        raise http.BadAnswer("an answer without text")
    # the letters as words of their own: in "a better one" there is none
    found = set(re.findall(r"\b[AB]\b", text)) or {_label(text)} - {None}
    return float(found == {"A"}) if len(found) == 1 else None


def _from_logprobs(entry: Any) -> float | None:
    given = [*http.listed(http.pick(entry, "top_logprobs") or [])]
    # the token itself is not always among the most likely
    if http.pick(entry, "token") not in [http.pick(top, "token") for top in given]:
        given.append(entry)
    mass = dict.fromkeys(LABELS, 0.0)
    for top in given:
        logprob = http.number(http.pick(top, "logprob"))
        if logprob > 1e-3:
            raise http.BadAnswer(f"a log-probability of {logprob:g}, above 0")
        if label := _label(top["token"]):
            mass[label] += math.exp(logprob)
    total = sum(mass.values())
    return mass["A"] / total if total >= _LEAST_MASS else None


def _label(token: Any) -> str | None:
    """The letter that a token, or a short answer, is a variant of."""
    text = token.strip(_AROUND).upper() if isinstance(token, str) else ""
    return text if text in LABELS else None


class Cache:
    """Answers by their key in an SQLite file, which several processes may use at once."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path).expanduser()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"judge: cache {self.path}: {error.strerror}") from None
        with self._open() as file:
            file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, p REAL)")

    def read(self, keys: list[str]) -> dict[str, float]:
        """What is known of these keys."""
        with self._open() as file:
            rows = (
                file.execute("SELECT key, p FROM answers WHERE key = ?", (key,)).fetchone()
                for key in dict.fromkeys(keys)
            )
            return {key: self._checked(p) for key, p in filter(None, rows)}

    def write(self, key: str, p: float) -> float:
        """What is now known of the key: the answer of who came first."""
        with self._open() as file:
            file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, p))
            (kept,) = file.execute("SELECT p FROM answers WHERE key = ?", (key,)).fetchone()
        return self._checked(kept)

    def _checked(self, p: Any) -> float:
        if not isinstance(p, float) or not 0 <= p <= 1:
            raise ValueError(f"judge: cache {self.path} holds {p!r} for a probability; delete it")
        return p

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            # a connection is cheap beside a request, and needs no lock of ours
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as file, file:
                yield file
        except sqlite3.Error as error:
            raise ValueError(f"judge: cache {self.path} cannot be used: {error}") from None
