"""An update of the policy with and without packing and fused heads: ``python -m bench.fast_paths``.

CPU seconds of one thread, the best of a few, so that what else runs matters little.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import nlhf_kernels as nk
from nlhf import losses, memory
from nlhf.rollout import Completion, Pair

V = 16384
# name, rows, longest prompt and response, rows of a micro-batch; lengths go from an eighth of these
SETTINGS = (
    ("ragged, short", 16, 64, 16),
    ("ragged, long", 8, 256, 8),
    ("ragged, long", 8, 256, 2),
    ("ragged, many", 32, 128, 32),
    ("ragged, many", 32, 128, 4),
)


def model() -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()


def ragged(rows: int, longest: int, seed: int = 0) -> tuple[Pair, Tensor]:
    """Prompts and responses of lengths from an eighth of the longest to the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 8, longest + 1, (2, rows), generator=generator)
    lengths[:, 0] = longest
    ids = torch.randint(3, V, (2, rows, longest), generator=generator)
    prompt = torch.arange(longest) >= longest - lengths[0, :, None]
    mask = torch.arange(longest) < lengths[1, :, None]
    known = torch.where(mask, -torch.rand(mask.shape, generator=generator), 0)
    y = Completion(ids[1], mask, None, known)
    return Pair(ids[0], prompt.long(), y, y), torch.rand(rows, generator=generator)


def seconds(run: Callable[[], None], repeats: int = 3) -> float:
    run()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def update(policy: nn.Module, pair: Pair, preference: Tensor, size: int, **choice) -> None:
    policy.zero_grad()
    for rows in torch.arange(len(preference)).split(size):
        with memory.untied(policy):
            result = losses.nash_md_pg(
                policy, None, pair.rows(rows), preference[rows], tau=0.1, **choice
            )
        result.loss.backward()


def packing_table(settings: Sequence[tuple] = SETTINGS) -> None:
    """Real tokens a second of an update."""
    policy = model()
    print("| lengths | rows | longest | micro-batch | real tokens | head | padded | packed |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, rows, longest, size), head in itertools.product(settings, ("logits", "fused")):
        pair, preference = ragged(rows, longest)
        tokens = int(pair.attention_mask.sum() + pair.y.mask.sum())
        took = []
        for packed in (False, True):
            choice = {"head": head, "packing": packed}
            once = functools.partial(update, policy, pair, preference, size, **choice)
            took.append(seconds(once))
        share = tokens / (2 * rows * longest)
        speeds = " | ".join(f"{tokens / x:,.0f}" for x in took)
        print(f"| {name} | {rows} | {longest} | {size} | {share:.0%} | {head} | {speeds} |")


def head_table(B: int = 8, T: int = 48, D: int = 576) -> None:
    """Milliseconds of a loss and its gradient, from hidden states on; a quarter is padding."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[::2, T // 2 :] = False
    tokens = torch.randint(0, V, (B, T), generator=generator)
    known = {"tau": 0.1, "ref_logprobs": -torch.rand(B, T, generator=generator)}
    preference = torch.rand(B, generator=generator)
    print("| head | trained | fused | logits |")
    print("|---|---|---|---|")
    for dtype, trained in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        hidden = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
        weight = (0.05 * torch.randn(V, D, generator=generator)).to(dtype).requires_grad_(trained)
        rest = (tokens, mask, preference)

        def fused(hidden=hidden, weight=weight, rest=rest):
            hidden.grad = weight.grad = None
            nk.linear_pairwise_pg_loss(hidden, weight, *rest, **known).loss.backward()

        def logits(hidden=hidden, weight=weight, rest=rest):
            hidden.grad = weight.grad = None
            made = hidden @ weight.T
            nk.pairwise_pg_loss(made, *rest, **known, inplace_backward=True).loss.backward()

        name = str(dtype).removeprefix("torch.")
        took = " | ".join(f"{1e3 * seconds(run):.0f}" for run in (fused, logits))
        print(f"| {name} | {'yes' if trained else 'no'} | {took} |")


def main() -> None:
    torch.set_num_threads(1)
    head_table()
    print()
    packing_table()


if __name__ == "__main__":
    main()
