"""Rows to sample from: normal logits of two widths, and those of a real language model."""

import dataclasses
import functools

import torch
from torch import Tensor

from nlhf_kernels.testing.case import VOCABULARY, Case

# as people write distributions: with the variance. A filter of 0.9 keeps 60 % of the first
FLAT, PEAKED, REAL = "N(0, 1)", "N(0, 16)", "SmolLM2-135M"
SCALES = {FLAT: 1.0, PEAKED: 4.0}
FILTERS = {
    "no filter": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
    "all three": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
REAL_MODEL, MOST_ROWS = "smollm2-135m", 64


@dataclasses.dataclass(frozen=True)
class SampleCase(Case):
    """A case of ``mixture_sample`` whose rows are of a named kind."""

    logits: str = PEAKED

    def inputs(
        self, seed: int = 0, device: str = "cpu", generate_on: str = "cpu"
    ) -> tuple[tuple, dict]:
        generator = torch.Generator(generate_on).manual_seed(seed)
        if self.logits == REAL:
            models = (x[: self.shape[0]] for x in real())
        else:
            models = (
                torch.randn(self.shape, generator=generator, device=generate_on).mul_(
                    SCALES[self.logits]
                )
                for _ in range(2)
            )
        args = tuple(x.to(device, self.dtype, copy=True) for x in models)
        settings = {"mixture_coef": 0.25, "temperature": 0.8, "seed": 1234, "position": 3}
        return args, settings | self.options.get("filters", {})


def case(
    model: str, B: int, dtype: torch.dtype, filters: str = "no filter", logits: str = PEAKED
) -> SampleCase:
    options = {"ref_dtype": dtype}
    if FILTERS[filters]:
        options["filters"] = FILTERS[filters]
    shape = (B, VOCABULARY[model])
    return SampleCase("mixture_sample", f"{model}, B={B}", shape, dtype, options, logits)


@functools.cache
def real() -> tuple[Tensor, Tensor]:
    """(64, 49,152) of the quickstart's model: after the first words of reviews, and as reference
    after the same behind an instruction. ValueError if it cannot be fetched.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nlhf import quickstart

    folder = quickstart.fetch_model()
    prompts = quickstart.fetch_ratings().prompts()[0][:MOST_ROWS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")

    @torch.no_grad()
    def last(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        ends = batch.attention_mask.sum(1) - 1
        hidden = model.model(**batch).last_hidden_state
        return model.lm_head(hidden[torch.arange(len(ends)), ends])

    return last(prompts), last([f"{quickstart.INSTRUCTION} {text}" for text in prompts])


def unavailable(logits: str) -> str:
    """Why there are no such rows; "" if there are."""
    if logits != REAL:
        return ""
    try:
        real()
    except (ValueError, OSError, ImportError) as error:
        return " ".join(str(error).split())[:160]
    return ""
