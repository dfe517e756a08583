"""A sampler that draws noise for every element, in Triton: what fused samplers usually do.

Not ours and nobody's: a yardstick for the hierarchical draw. One launch: each program races one
block of a row, and the last one of a row to arrive decides between the winners of all blocks.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


# another seed at each call must not compile it anew
@triton.jit(do_not_specialize=["seed"])
def gumbel_kernel(
    policy_ptr, ref_ptr, tokens_ptr, best_ptr, winner_ptr, arrived_ptr,
    policy_stride, ref_stride, vocab, seed, coef, temperature,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    count = tl.num_programs(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    policy = tl.load(policy_ptr + row.to(tl.int64) * policy_stride + ids, inside, 0.0)
    ref = tl.load(ref_ptr + row.to(tl.int64) * ref_stride + ids, inside, 0.0)
    mixture = (1.0 - coef) * policy.to(tl.float32) + coef * ref.to(tl.float32)
    # 32-bit offsets: rows * vocab must stay below 2^32
    u = tl.maximum(tl.rand(seed, row * vocab + ids), 2.0**-32)
    scores = tl.where(inside, mixture / temperature - tl.log(-tl.log(u)), float("-inf"))
    place = row * count + block
    tl.store(best_ptr + place, tl.max(scores, 0))
    tl.store(winner_ptr + place, block * BLOCK + tl.argmax(scores, 0))
    tl.debug_barrier()

    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == count - 1:
        blocks = tl.arange(0, BLOCKS)
        places = row * count + blocks
        there = blocks < count
        # .cg: another row's programs may have left an old line in the first-level cache
        best = tl.load(best_ptr + places, there, float("-inf"), cache_modifier=".cg")
        last = tl.argmax(best, 0)
        token = tl.load(winner_ptr + row * count + last, cache_modifier=".cg")
        tl.store(tokens_ptr + row, token.to(tl.int64))
        # ready for the next call
        tl.store(arrived_ptr + row, 0)


@functools.lru_cache(maxsize=16)
def _counters(rows: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, dtype=torch.int32, device=device)


def gumbel_sample(
    policy: Tensor,
    ref: Tensor,
    *,
    mixture_coef: float,
    temperature: float,
    seed: int,
    block: int = BLOCK,
) -> Tensor:
    """(B,) int64 tokens from softmax(((1 - b) policy + b ref) / T), both (B, V), last stride 1."""
    B, V = policy.shape
    count = triton.cdiv(V, block)
    tokens = torch.empty(B, dtype=torch.int64, device=policy.device)
    best = torch.empty(B, count, dtype=torch.float32, device=policy.device)
    gumbel_kernel[(B, count)](
        policy, ref, tokens, best, torch.empty_like(best, dtype=torch.int32),
        _counters(B, policy.device), policy.stride(0), ref.stride(0), V, seed & 0x7FFFFFFF,
        mixture_coef, temperature,
        BLOCK=block, BLOCKS=triton.next_power_of_2(count), num_warps=WARPS,
    )  # fmt: skip
    return tokens
