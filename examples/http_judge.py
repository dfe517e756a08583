"""A judge behind an OpenAI-compatible server: here a toy on this machine that likes short answers.

Run it as it is. With a server of your own only the configuration is needed: url, model, and in
api_key_env the name of the environment variable that holds the key.
"""

import json
import math
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nlhf.preference import HTTPJudge, JudgeConfig

PROMPTS = ["What is a kernel?"] * 2
FIRST = ["A function that runs on a GPU.", "Well, that is a long story, and it begins in 1971."]
SECOND = ["It depends on whom you ask, and when, and why.", "A function that runs on a GPU."]


class Judge(BaseHTTPRequestHandler):
    """Log-probabilities of A and B, with some love for what comes first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _, first, second = body["messages"][-1]["content"].split("\n")
        p = 1 / (1 + math.exp(-(len(second) - len(first)) / 10 - 0.5))
        tops = [{"token": "A", "logprob": math.log(p)}, {"token": "B", "logprob": math.log1p(-p)}]
        answer = "A" if p > 0.5 else "B"
        content = [{"token": answer, "logprob": max(tops[0]["logprob"], tops[1]["logprob"])}]
        content[0]["top_logprobs"] = tops
        message = {"role": "assistant", "content": answer}
        reply = {"choices": [{"message": message, "logprobs": {"content": content}}]}
        sent = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


def main():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        settings = JudgeConfig(
            url=f"http://127.0.0.1:{server.server_port}/v1",
            model="toy",
            template="{prompt}\n{first}\n{second}",
            cache=f"{folder}/judge.db",
        )
        judge = HTTPJudge(settings)
        for p, first in zip(judge(PROMPTS, FIRST, SECOND).tolist(), FIRST, strict=True):
            print(f"P = {p:.3f} for {first!r}")
        print(f"asked: {judge.stats}")
        again = HTTPJudge(settings)
        again(PROMPTS, SECOND, FIRST)
        print(f"again, in the other order: {again.stats}")
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    main()
