"""Batches of the data, and of token ids: lists, padded tensors, and back."""

from typing import Any

import torch
from torch import Tensor

from nlhf import rollout
from nlhf.data import Text


def columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def prompts_of(batch: dict[str, Any]) -> list[Text]:
    if "prompt" not in batch:
        raise ValueError(
            f"NashMDTrainer: the data must have a column prompt, got {', '.join(batch) or 'none'}"
        )
    return batch["prompt"]


def completion(x: dict, context_length: int) -> rollout.Completion:
    tokens, mask = (x[name][:, context_length:] for name in ("input_ids", "attention_mask"))
    return rollout.Completion(tokens, mask != 0)


def rows_of(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row that are none of padding."""
    return [row[keep != 0].tolist() for row, keep in zip(ids, mask, strict=True)]


def padded(rows: list[list[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask, int64."""
    L = max(len(row) for row in rows)
    empty = [L - len(row) for row in rows]
    if side == "left":
        ids = [[pad] * n + list(row) for n, row in zip(empty, rows, strict=True)]
        mask = [[0] * n + [1] * (L - n) for n in empty]
    else:
        ids = [list(row) + [pad] * n for n, row in zip(empty, rows, strict=True)]
        mask = [[1] * (L - n) + [0] * n for n in empty]
    return torch.tensor(ids), torch.tensor(mask)
