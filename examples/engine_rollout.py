"""Responses from an inference engine, corrected for what has happened to the policy since.

Run it as it is: the engine is a toy on this machine that speaks vLLM's /v1/completions over a tiny
random model. With one of your own only the url is needed (and engine="sglang" for SGLang).
"""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import transformers

from nlhf import importance, losses, rollout, serving

EOS, V = 2, 53


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": V}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def engine(model):
    """A handler that draws from the model, a request at a time."""
    lock = threading.Lock()

    class Engine(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = torch.tensor([asked["prompt"]])
            with lock:
                (y,) = rollout.generate(
                    [rollout.Side(model)],
                    None,
                    prompt,
                    torch.ones_like(prompt),
                    max_new_tokens=asked["max_tokens"],
                    eos_token_id=asked["stop_token_ids"],
                    pad_token_id=0,
                    seed=asked["seed"],
                    with_ref=False,
                )
            keep = y.mask[0]
            tokens = y.tokens[0, keep].tolist()
            logprobs = {"token_logprobs": y.sampling_logprobs[0, keep].tolist()}
            reason = "stop" if tokens[-1] == EOS else "length"
            choice = {"token_ids": tokens, "logprobs": logprobs, "finish_reason": reason}
            sent = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    return Engine


def main():
    ref = tiny_model()
    server = ThreadingHTTPServer(("127.0.0.1", 0), engine(ref))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ids, mask = torch.randint(3, V, (16, 4)), torch.ones(16, 4, dtype=torch.int64)
    y = serving.complete(
        f"http://127.0.0.1:{server.server_port}/v1",
        ids,
        mask,
        max_new_tokens=8,
        end_tokens=[EOS],
        pad_token_id=0,
        seed=0,
    )
    server.shutdown()
    server.server_close()
    print(
        f"{int(y.mask.sum())} tokens, mean log-probability {y.sampling_logprobs[y.mask].mean():.3f}"
    )

    # the policy has moved on since the engine got its weights
    policy = copy.deepcopy(ref)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # y' plays no part in the loss but through the preference
    pair = rollout.Pair(ids, mask, y, y)
    now = losses.frozen_logprobs(policy, pair, y, temperature=1.0)
    weights = importance.weights(now, y.sampling_logprobs, y.mask, level="sequence", cap=1.5)
    wins = torch.rand(16)
    result = importance.corrected_pg(policy, ref, pair, wins, importance=weights, tau=0.05)
    result.loss.backward()
    for name, value in importance.metrics([result], "sequence", filtered=False).items():
        print(f"{name} {value:.4f}")


if __name__ == "__main__":
    main()
