"""A server on this machine that speaks as judges and engines do, and fails when it is told to."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from nlhf import rollout
from nlhf.preference import HTTPJudge, JudgeConfig

MODEL = "toy"
KEY = "sk-very-secret-0123456789"
TEMPLATE = "{prompt}|{first}|{second}"
PAIRS = (["x", "x", "z"], ["good", "bad", "good"], ["bad", "good", "good"])


class Server(ThreadingHTTPServer):
    """``answer(path, body)`` gives what is sent back, as JSON.

    ``faults``: what is done to the next requests instead, one each: a status, (status, seconds of
    Retry-After), "slow", "garbage", "cut" or "flood". ``seen``: path, headers and body of each.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[str, dict], dict]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.faults: list = []
        self.seen: list[tuple[str, dict, dict]] = []
        self.lock = threading.Lock()
        self.suffix = "/v1"
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{self.suffix}"

    def bodies(self) -> list[dict]:
        return [body for _, _, body in self.seen]

    def handle_error(self, request, client_address):
        """A client that has gone away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve({})

    def do_POST(self):
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body):
        server = self.server
        with server.lock:
            server.seen.append((self.path, dict(self.headers), body))
            fault = server.faults.pop(0) if server.faults else None
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self._reply(fault, body)
        finally:
            with server.lock:
                server.at_once -= 1

    def _reply(self, fault, body):
        headers = {}
        if isinstance(fault, tuple):
            fault, headers["Retry-After"] = fault
        if fault == "slow":
            time.sleep(1.0)
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.close_connection = True
            return
        status, content = 200, b"<html>it works</html>"
        if isinstance(fault, int):
            said = f"told to; you sent {self.headers.get('Authorization')}"
            status, content = fault, json.dumps({"error": {"message": said}}).encode()
        elif fault != "garbage":
            content = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serve(answer: Callable[[str, dict], dict]) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---- judges


def chat(text: str, tops: dict[str, float] | None = None) -> dict:
    """A chat completion; ``tops``: log-probabilities of its first token."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    choice |= {"finish_reason": "stop", "logprobs": None}
    if tops is not None:
        entries = [{"token": token, "logprob": logprob} for token, logprob in tops.items()]
        first = {"token": text, "logprob": tops.get(text, -1.0), "top_logprobs": entries}
        choice["logprobs"] = {"content": [first]}
    return {"object": "chat.completion", "choices": [choice]}


def models(*names: str) -> dict:
    return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


def texts_of(body: dict) -> tuple[str, str, str]:
    """prompt, first and second of a request with the template "{prompt}|{first}|{second}"."""
    return tuple(body["messages"][-1]["content"].split("|"))


def opinion(path, body):
    """Prefers "good", and whatever comes first a little."""
    if path == "/v1/models":
        return models(MODEL)
    _, first, second = texts_of(body)
    margin = 2.0 * (first == "good") - 2.0 * (second == "good") + 0.5
    p = 1 / (1 + math.exp(-margin))
    # in variants of case and spacing, beside what is neither
    tops = {"A": math.log(0.6 * p), " a": math.log(0.3 * p), "B": math.log(0.9 * (1 - p))}
    return chat("A" if p > 0.5 else "B", tops | {"The": math.log(0.1)})


def judge(server, **changes):
    settings = {"url": server.url, "model": MODEL, "template": TEMPLATE, "backoff": 0.001}
    return HTTPJudge(JudgeConfig(**settings | changes))


# ---- engines


class Engine:
    """Answers of a real model as vLLM and SGLang give them.

    logprobs: "raw", "scaled" or "processed", as the server was started; ``ids``: whether it knows
    ``return_token_ids``; ``placeholders``: whether it knows return_tokens_as_token_ids.
    """

    def __init__(self, model, *, logprobs: str, ids: bool = True, placeholders: bool = True):
        self.model, self.logprobs = model, logprobs
        self.ids, self.placeholders = ids, placeholders
        self.lock = threading.Lock()

    def __call__(self, path: str, body: dict) -> dict:
        if path == "/v1/completions":
            tokens, logprobs, reason = self.draw(body["prompt"], body["max_tokens"], body)
            names = [f"token_id:{t}" if self.placeholders else f"w{t}" for t in tokens]
            told = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": None}
            choice = {"index": 0, "text": "", "finish_reason": reason, "logprobs": told}
            if self.ids and body.get("return_token_ids"):
                choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"]}
            return {"object": "text_completion", "choices": [choice]}
        assert path == "/generate", path
        asked = body["sampling_params"]
        tokens, logprobs, reason = self.draw(body["input_ids"], asked["max_new_tokens"], asked)
        meta = {"finish_reason": {"type": reason}, "completion_tokens": len(tokens)}
        rows = zip(logprobs, tokens, strict=True)
        meta["output_token_logprobs"] = [[x, t, None] for x, t in rows]
        return {"text": "", "output_ids": tokens, "meta_info": meta}

    @torch.no_grad()
    def draw(self, prompt: list[int], most: int, asked: dict) -> tuple[list, list, str]:
        ids = torch.tensor([prompt])
        filters = {name: asked[name] for name in ("temperature", "top_p", "min_p")}
        seed = asked["seed"] if "seed" in asked else asked["sampling_seed"]
        with self.lock:
            (y,) = rollout.generate(
                [rollout.Side(self.model)],
                None,
                ids,
                torch.ones_like(ids),
                max_new_tokens=most,
                top_k=max(asked["top_k"], 0),
                eos_token_id=asked["stop_token_ids"],
                pad_token_id=0,
                seed=seed,
                with_ref=False,
                **filters,
            )
            n = int(y.mask.sum())
            tokens = y.tokens[0, :n].tolist()
            whole = torch.cat([ids, y.tokens[:, :n]], -1)
            logits = self.model(whole).logits[0, ids.shape[1] - 1 : -1].double()
        temperature = asked["temperature"] if self.logprobs == "scaled" else 1.0
        found = (logits / temperature).log_softmax(-1).gather(-1, y.tokens[0, :n, None])[:, 0]
        if self.logprobs == "processed":
            found = y.sampling_logprobs[0, :n]
        ended = tokens[-1] in asked["stop_token_ids"]
        return tokens, found.tolist(), "stop" if ended else "length"


def explicit(model, ids, mask, y: rollout.Completion, temperature, n=1) -> torch.Tensor:
    """Log-probabilities of n responses a prompt, a row at a time."""
    found = torch.zeros(y.tokens.shape, dtype=torch.float64)
    for r in range(len(y.tokens)):
        prompt = ids[r // n][mask[r // n] > 0]
        tokens = y.tokens[r][y.mask[r]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        logs = (logits / temperature).log_softmax(-1)
        found[r, : len(tokens)] = logs.gather(-1, tokens[:, None])[:, 0]
    return found
