"""JSON over HTTP, many requests at once, with retries: how judges and engines are asked."""

import collections
import contextlib
import email.utils
import functools
import ipaddress
import json
import logging
import os
import random
import re
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

import httpx2

from nlhf.names import shown

T = TypeVar("T")

# of a server that is too busy, restarts, or stands behind a proxy that does
_RETRIED = {408, 409, 425, 429, *range(500, 600)}
_LONGEST_WAIT = 60.0
# an answer may take minutes, a connection does not
_LONGEST_CONNECT = 10.0
_MOST_BYTES = 2**26

# a key shorter than this is none, and may be a word of any answer
_LEAST_KEY = 8

# the one has a line for every request, the other shows whatever headers the server sends back
for _chatty in map(logging.getLogger, ("httpx2", "httpcore2")):
    if _chatty.level == logging.NOTSET:
        _chatty.setLevel(logging.WARNING)


class Unavailable(ValueError):
    """Nothing usable came, after all retries: it may come later."""


class BadAnswer(Exception):
    """An answer that is not what was asked for: the request is sent again."""


class Client:
    """Asks one server, with certificates checked and no redirect followed.

    A request is sent again, later and later, after a status that may pass (429, 5xx), a connection
    that failed, a timeout or an answer that cannot be read. ``stats`` counts requests and retries.

    url: of the server, http or https; paths are put behind it.
    name: who it is, for errors.
    key_env: the environment variable that holds the key; "": none. The key goes into the
        Authorization header and nowhere else.
    timeout: seconds for an answer, whole.
    retries: how often a request is sent again.
    concurrency: requests at once.
    backoff: seconds before the first retry, twice as many before each further one, but no less
        than the server's Retry-After; at most a minute.

    Raises:
        ValueError: a bad url, or no key where one was named.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        key_env: str = "",
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 16,
        backoff: float = 0.5,
    ) -> None:
        parsed = _parsed(url, name)
        self.url = str(parsed).rstrip("/")
        self.name = f"{name} {self.url}"
        self.stats = collections.Counter(requests=0, retries=0)
        self._key_env, self._key = key_env, _key(key_env, name)
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._concurrency = concurrency
        self._lock = threading.Lock()
        # of its own, so that nobody's seed is touched
        self._random = random.Random()
        local = _loopback(parsed.host)
        if self._key and parsed.scheme == "http" and not local:
            _warn(self.name)
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, _LONGEST_CONNECT), pool=None),
            limits=httpx2.Limits(max_connections=concurrency),
            # a proxy cannot reach what is on this machine
            trust_env=not local,
        )
        weakref.finalize(self, self._http.close)

    def get(self, path: str, read: Callable[[Any], T]) -> T:
        """``read`` of the answer."""
        return self._ask("GET", path, None, read, threading.Event())

    def post(self, path: str, bodies: Sequence[dict], read: Callable[[int, Any], T]) -> list[T]:
        """``read(i, answer)`` for the i-th body, in order.

        ``read`` is called in threads; ``BadAnswer`` from it has the request sent again.

        Raises:
            ValueError: what ``read`` raises; a status that will not pass; or nothing usable after
                all retries.
        """
        found: dict[int, T] = {}
        stop = threading.Event()

        def ask(i: int) -> None:
            found[i] = self._ask("POST", path, bodies[i], lambda answer: read(i, answer), stop)

        # its threads are daemons: after an error, or Ctrl-C, nobody waits for those under way
        pool = ThreadPool(max(1, min(self._concurrency, len(bodies))))
        try:
            for _ in pool.imap_unordered(ask, range(len(bodies))):
                pass
        finally:
            stop.set()
            pool.terminate()
        return [found[i] for i in range(len(bodies))]

    def _ask(
        self,
        method: str,
        path: str,
        body: dict | None,
        read: Callable[[Any], T],
        stop: threading.Event,
    ) -> T:
        pause, why = self._backoff, ""
        for attempt in range(self._retries + 1):
            if attempt:
                self._count("retries")
                if stop.wait(min(pause, _LONGEST_WAIT)):
                    break
            asked = 0.0
            self._count("requests")
            try:
                status, headers, content = self._send(method, path, body)
                if 200 <= status < 300:
                    return self._read(read, self._cleaned(_decoded(content)))
                why = f"status {status}{self._said(content)}"
                if status not in _RETRIED:
                    raise ValueError(f"{self.name}: {why}{self._hint(status)}")
                asked = _retry_after(headers.get("retry-after", ""))
            except BadAnswer as error:
                why = self._scrubbed(str(error))
            except httpx2.RequestError as error:
                why = self._failure(error)
            # spread, so that requests that failed together do not come back together
            wide = min(self._backoff * 2**attempt, _LONGEST_WAIT)
            pause = max(asked, wide * self._random.uniform(0.5, 1))
        times = f"{self._retries + 1} attempts" if self._retries else "one attempt"
        raise Unavailable(f"{self.name}: {why}, after {times}; is the server up and the url right?")

    def _read(self, read: Callable[[Any], T], answer: Any) -> T:
        try:
            return read(answer)
        except ValueError as error:
            raise ValueError(self.hidden(str(error))) from None

    def _cleaned(self, answer: Any) -> Any:
        """The answer without the key, before anything reads, quotes or cuts it."""
        if len(self._key) < _LEAST_KEY:
            return answer
        try:
            return _mapped(self.hidden, answer)
        except RecursionError:
            raise BadAnswer("an answer that is nested too deep") from None

    def _send(self, method: str, path: str, body: dict | None) -> tuple[int, Any, bytes]:
        start = time.monotonic()
        # ASCII whatever the text, since half a surrogate pair has no UTF-8
        content = None if body is None else json.dumps(body).encode()
        received = bytearray()
        with self._http.stream(
            method,
            self.url + path,
            content=content,
            headers={"Content-Type": "application/json"},
        ) as response:
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) > _MOST_BYTES:
                    raise BadAnswer(f"an answer of more than {_MOST_BYTES // 2**20} MiB")
                # the timeout of the library is for each piece
                if time.monotonic() - start > self._timeout:
                    raise BadAnswer(f"no whole answer within {self._timeout:g} s")
            return response.status_code, response.headers, bytes(received)

    def _failure(self, error: httpx2.RequestError) -> str:
        text = self._scrubbed(str(error) or type(error).__name__)
        if _untrusted(error):
            raise ValueError(
                f"{self.name}: its certificate is not trusted ({text}); SSL_CERT_FILE names "
                "further authorities"
            ) from None
        if isinstance(error, httpx2.ConnectTimeout):
            return "no connection in time"
        if isinstance(error, httpx2.TimeoutException):
            return f"no answer within {self._timeout:g} s"
        if isinstance(error, httpx2.ConnectError):
            return f"no connection ({text})"
        return f"the connection broke ({text})"

    def _said(self, content: bytes) -> str:
        """What the server says of an error, in one line."""
        text = content.decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, BadAnswer):
            found = self._cleaned(json.loads(text))
            error = found.get("error", found) if isinstance(found, dict) else found
            text = str(error["message"] if isinstance(error, dict) else error)
        return f" ({line})" if (line := self._scrubbed(text)) else ""

    def _hint(self, status: int) -> str:
        if status in (401, 403) and self._key_env:
            return f"; is the key in the environment variable {self._key_env} right?"
        if status in (401, 403):
            return "; name the environment variable that holds the key"
        if status == 404:
            return "; is the url right (most end in /v1), and the model one that it serves?"
        if 300 <= status < 400:
            return "; redirects are not followed, give the url that it leads to"
        return ""

    def _scrubbed(self, text: str) -> str:
        """One short line, without the key."""
        printable = "".join(c if c.isprintable() else " " for c in self.hidden(text))
        line = " ".join(printable.split())
        return line if len(line) <= 200 else line[:200] + "..."

    def hidden(self, text: str) -> str:
        """A text of the server's without the key, which it may say back."""
        return text.replace(self._key, "***") if self._key else text

    def _count(self, name: str) -> None:
        with self._lock:
            self.stats[name] += 1


def pick(answer: Any, *path: str | int) -> Any:
    """What lies at a path of keys and places in an answer; ``BadAnswer`` names what is missing."""
    found = answer
    for step in path:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            where = ".".join(map(str, path))
            raise BadAnswer(f"an answer without {where}") from None
    return found


def listed(x: Any) -> list:
    """A list of an answer, else ``BadAnswer``."""
    if not isinstance(x, list):
        raise BadAnswer(f"an answer with {str(x)[:40]!r} for a list")
    return x


def number(x: Any) -> float:
    """A finite number of an answer, else ``BadAnswer``."""
    # written so that NaN counts as wrong
    if isinstance(x, bool) or not isinstance(x, int | float) or not -1e300 < x < 1e300:
        raise BadAnswer(f"an answer with {str(x)[:40]!r} for a number")
    return float(x)


def _mapped(function: Callable[[str], str], x: Any) -> Any:
    """What JSON holds, with a function of each of its strings for it."""
    if isinstance(x, str):
        return function(x)
    if isinstance(x, list):
        return [_mapped(function, y) for y in x]
    if isinstance(x, dict):
        return {function(name): _mapped(function, y) for name, y in x.items()}
    return x


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise BadAnswer("an answer that is not JSON") from None


def _parsed(url: str, name: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError):
        raise ValueError(f"{name}: url is not one; give http(s)://host:port/v1") from None
    # a url may hold a password, so that it is not said back
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError(
            f"{name}: url must hold no user, password, query or fragment; a key belongs into an "
            "environment variable"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{name}: url must be http(s)://host:port/v1, got {shown(url)}")
    return parsed


def _key(variable: str, name: str) -> str:
    if not variable:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        # not said back: it may be the key itself
        raise ValueError(
            f"{name}: give the name of an environment variable in capitals, never a key itself"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{name}: the environment variable {variable} holds no key; set it")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"{name}: what the environment variable {variable} holds is not a key")
    return key


@functools.cache
def _warn(name: str) -> None:
    """Once for each server."""
    logging.getLogger(__name__).warning(
        "%s: the key crosses the network unencrypted; use https", name
    )


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _untrusted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 for none."""
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0
