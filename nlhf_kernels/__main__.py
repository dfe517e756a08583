"""python -m nlhf_kernels: which op runs on which backend here, or why not; and what did run when
each was called.
"""

import sys
from collections.abc import Callable

import torch

import nlhf_kernels as nk
from nlhf_kernels import registry

# as small as it gets: interpreted kernels take their time
B, T, V, D = 2, 3, 5, 4


def main() -> None:
    out = sys.stdout.write
    out(f"nlhf_kernels {nk.__version__}, torch {torch.__version__}\n")
    for op, backend, device, why in registry.table():
        out(f"{op:24} {backend:8} {device:6} {'no: ' + why if why else 'yes'}\n")
    devices = sorted({row[2] for row in registry.table()})
    chosen = {}
    for op in (*registry.OPS, *registry.LAYERS, *registry.UPDATES):
        for device in devices:
            try:
                chosen[op, device] = registry.resolve(op, device)
                out(f"{op} on {device} uses {chosen[op, device]}\n")
            except ValueError as error:
                # a choice made by NLHF_BACKEND
                out(f"{error}\n")
    for device in devices:
        out(f"\nwhat ran on {device} when each op was called once, with its backward\n")
        before, examples = nk.calls(), example_calls(device)
        for op in (op for op in examples if (op, device) in chosen):
            try:
                examples[op]()
            except (ImportError, OSError, RuntimeError) as error:
                # a broken kernel must not keep back what is known of the others
                out(f"{op} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}\n")
        out(nk.calls_table({key: n - before.get(key, 0) for key, n in nk.calls().items()}) + "\n")


def example_calls(device: str) -> dict[str, Callable[[], None]]:
    """Op -> a call of it on small tensors, with its backward."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    def trained(op: str, *arguments, **settings) -> Callable[[], None]:
        def call():
            leaf = arguments[0].clone().requires_grad_()
            getattr(nk, op)(leaf, *arguments[1:], **settings)[0].sum().backward()

        return call

    tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
    logits, hidden, weight = rows(B, T, V), rows(B, T, D), rows(V, D)
    loss = {"mask": tokens == 0, "preference": rows(B), "tau": 0.1, "ref_logprobs": rows(B, T)}
    draw = {"mixture_coef": 0.5, "seed": 0, "position": 0}
    sides = [rows(B) for _ in range(4)]
    found = {
        "mixture_sample": lambda: nk.mixture_sample(rows(B, V), rows(B, V), **draw),
        "linear_mixture_sample": lambda: nk.linear_mixture_sample(
            rows(B, D), weight, rows(B, D), **draw
        ),
        "token_logprobs": trained("token_logprobs", logits, tokens),
        "linear_token_logprobs": trained("linear_token_logprobs", hidden, weight, tokens),
        "token_kl": trained("token_kl", logits, logits, tokens),
        "linear_token_kl": trained("linear_token_kl", hidden, weight, hidden, weight, tokens),
        "pairwise_pg_loss": trained("pairwise_pg_loss", logits, tokens, **loss),
        "linear_pairwise_pg_loss": trained(
            "linear_pairwise_pg_loss", hidden, weight, tokens, **loss
        ),
        "pair_loss": trained("pair_loss", *sides, rows(B), method="online_ipo", tau=0.1),
        "ema_update_": lambda: nk.ema_update_([rows(D)], [rows(D)], decay=0.5),
    }
    if device == "cpu":
        found["skinny_linear"] = lambda: nk.skinny_linear(rows(B, D), weight)
    return found


if __name__ == "__main__":
    main()
