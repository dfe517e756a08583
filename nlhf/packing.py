"""Prompts and responses without padding: rows of tokens, one sequence after the other."""

import itertools
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nlhf import policy as policies


class Packed(NamedTuple):
    """N tokens of B sequences, the n of which that predict a response lie at ``places``.

    input_ids, position_ids (1, N), the latter from 0 in each sequence; lengths (B,) of the
    sequences; places (n,), in the order of ``tokens[mask]`` of the responses.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: Tensor
    places: Tensor


# tokens of a row where attention is under a block mask, whose cost grows with their square
MOST = {"cpu": 512}
_MOST = 4096

# models by what was found, under the attention that they had
_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def pack(input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor) -> Packed:
    """Prompts (B, L) with their responses (B, T), without what the two masks leave out.

    The last token of a response predicts nothing that is asked for, so it is left out too.
    """
    prompt = attention_mask != 0
    whole = torch.cat([prompt, mask], -1)
    order = whole.long().cumsum(-1)
    last = (order == order[:, -1:]) & mask.any(-1, keepdim=True)
    keep = whole & ~last
    ids = torch.cat([input_ids, tokens], -1)[keep]
    flat = keep.reshape(-1).long()
    # how many tokens come before each: a response token is predicted by the one just before it
    before = (flat.cumsum(0) - flat).view(keep.shape)
    places = before[:, prompt.shape[1] :][mask] - 1
    return Packed(ids[None], (order - 1)[keep][None], keep.sum(-1), places)


def passes(model: nn.Module, lengths: Tensor) -> list[slice]:
    """Sequences (B,) of so many tokens, in order, by the row that they go into.

    One row with flash-attn, whose cost is that of the sequences alone, and where there are several
    processes, which wait for each other in each pass; else one more wherever there would be too
    many tokens in a row.
    """
    several = dist.is_available() and dist.is_initialized()
    if _varlen(model) or several or len(lengths) == 0:
        return [slice(0, len(lengths))]
    most = MOST.get(lengths.device.type, _MOST)
    starts, tokens = [0], 0
    for b, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > most:
            starts.append(b)
            tokens = 0
        tokens += length
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(lengths)])]


def unpacked(x: Tensor, mask: Tensor) -> Tensor:
    """(..., n) of the response tokens as (..., B, T), 0 under the mask."""
    whole = x.new_zeros(*x.shape[:-1], *mask.shape)
    whole[..., mask] = x
    return whole


def offsets(lengths: Tensor) -> Tensor:
    """(B + 1,) int32 where sequences start."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def arguments(model: nn.Module, lengths: Tensor) -> dict[str, Any]:
    """What tells attention where sequences start.

    flash-attn takes the offsets (its varlen kernels); for the rest transformers makes a block mask
    from positions that start anew, if it is given no mask.
    """
    if not _varlen(model):
        return {}
    starts, longest = offsets(lengths), int(lengths.max())
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return dict(zip(names, (starts, starts, longest, longest), strict=True))


def _attention(model: nn.Module) -> str:
    return policies.bare(model).config.get_text_config()._attn_implementation or "eager"


def _varlen(model: nn.Module) -> bool:
    return _attention(model).startswith("flash_attention")


@torch.no_grad()
def check(model: nn.Module, device: torch.device) -> None:
    """Once a model: the sequences of a packed batch do not see each other.

    Raises:
        ValueError: a token of one sequence changes the logits of another, or these are not what
            they are of the sequence alone: layers with a state, or positions of their own making.
    """
    found = _FOUND.setdefault(policies.bare(model), {})
    attention = _attention(model)
    if attention not in found:
        with policies.evaluating(model):
            found[attention] = _leak(model, device)
    if found[attention]:
        raise ValueError(
            f"packing: {policies.class_name(model)} {found[attention]}; set packing: false"
        )


def _leak(model: nn.Module, device: torch.device) -> str:
    """What is wrong, or ""."""
    V = policies.vocabulary(model)
    ids = torch.arange(1, 13, device=device) % V

    def logits(tokens: Tensor, sizes: list[int]) -> Tensor:
        positions = torch.cat([torch.arange(n, device=device) for n in sizes])
        more = arguments(model, torch.tensor(sizes, device=device))
        keep = sizes[-1]
        found = policies.last_logits(model, tokens[None], None, positions[None], keep, **more)
        return found[0].double()

    changed = ids.clone()
    changed[:7] = (changed[:7] + V // 2) % V
    alone, first = logits(ids[7:], [5]), logits(ids, [7, 5])
    other = logits(changed, [7, 5])
    # parts of some float64 models compute in float32
    eps = max(torch.finfo(x).eps for x in (torch.float32, policies.bare(model).dtype))

    def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
        # the median, because some models ban ids by the lowest number there is
        size = float(alone.abs().median())
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size)

    # routed experts add up in another order if they are given other tokens beside
    if not same(first, other, min(64 * eps, 0.05)):
        return "lets one sequence of a packed batch change another"
    if not same(first, alone, eps**0.5):
        return "reads a sequence of a packed batch otherwise than alone"
    return ""
