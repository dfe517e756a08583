"""The model card of a trained policy."""

import os
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import TrainingArguments

import nlhf_kernels as nk
from nlhf import model_card

PAPER = {
    "title": "Nash Learning from Human Feedback",
    "id": model_card.PAPER,
    "citation": model_card.citation("nash_md_pg"),
}

_TEXT = """---
{metadata}
---

# {name}

{origin} It was trained with Nash-MD-PG, a method of [{title}](https://arxiv.org/abs/{id}).

## Framework versions

- nlhf: {nlhf}
- Transformers: {transformers}
- PyTorch: {torch}

## Citation

```bibtex
{citation}
```
"""


def write(
    args: TrainingArguments,
    model: nn.Module,
    name: str | None,
    dataset: str | None,
    tags: list[str],
) -> None:
    """README.md in the output folder of a run; a base that is a local folder is not named."""
    base = getattr(model.config, "_name_or_path", "")
    base = base if base and not os.path.isdir(base) else None
    fields = {"base_model": base, "datasets": dataset, "model_name": name}
    metadata = ModelCardData(
        library_name="peft" if hasattr(model, "peft_config") else "transformers",
        tags=list(dict.fromkeys(tags)),
        **{key: value for key, value in fields.items() if value is not None},
    )
    origin = "A fine-tuned model."
    if base:
        origin = f"A fine-tuned version of [{base}](https://huggingface.co/{base})."
    text = _TEXT.format(
        metadata=metadata.to_yaml(),
        name=name or (args.hub_model_id or "").split("/")[-1] or Path(args.output_dir).name,
        origin=origin,
        nlhf=nk.__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        **PAPER,
    )
    ModelCard(text).save(os.path.join(args.output_dir, "README.md"))
