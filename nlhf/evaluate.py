"""A trained policy against its reference on held-out prompts."""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf import losses
from nlhf.distributed import World
from nlhf.parts import Parts, plain, seeds
from nlhf.tracking import Sample

Together = Callable[[bool], bool] | None

QUICK, REPORT = -1, -2
_BATCH = 64


def estimate(values: Tensor) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (normal approximation) of (n,) values."""
    values = values.double()
    half = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), half


def distinct(texts: list[str], n: int) -> float:
    """Share of distinct n-grams of words among all of them (Li et al. 2016)."""
    grams = [g for text in texts for g in _grams(text.lower().split(), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def _grams(words: list[str], n: int):
    return itertools.zip_longest(*(words[i : len(words) - n + 1 + i] for i in range(n)))


def quick(parts: Parts, together: Together = None) -> tuple[dict[str, float], list[Sample]]:
    """The training preference against the reference, and the KL, on a few held-out prompts.

    Beside the figures, everything that was drawn for them.
    """
    count = min(len(parts.eval_prompts), parts.config.eval_samples)
    found: list[tuple[Sample, float]] = []
    for ids, ours in _rounds(parts.world, count, count):
        prompts = [parts.eval_prompts[i] for i in ids]
        draw = seeds(parts.config.seed, QUICK, ids, parts.device)
        with torch.no_grad():
            pair = parts.generate_pair(prompts, draw, mixture_coef=1.0, together=together)
            texts = [plain(prompts), parts.decode(pair.y), parts.decode(pair.y_other)]
            wins = parts.preference(*texts)
        kl = (pair.y.policy_logprobs - pair.y.ref_logprobs).sum(-1)
        if ours:
            rows = zip(*texts, wins.tolist(), strict=True)
            found += zip((Sample(*row) for row in rows), kl.tolist(), strict=True)
    found = parts.world.gather(found)
    samples = [sample for sample, _ in found]
    figures = {
        "preference_vs_ref": statistics.fmean(sample.preference for sample in samples),
        "kl_eval": statistics.fmean(kl for _, kl in found),
    }
    return figures, samples


def _rounds(world: World, count: int, size: int) -> Iterator[tuple[list[int], bool]]:
    """This process's prompts out of ``count``, at most ``size`` at once, and whether they count.

    All processes have equally many rounds, since some models run only where all run them.
    """
    mine = list(world.share(range(count)))
    for start in range(0, -(-count // world.size), size):
        yield mine[start : start + size] or [0], start < len(mine)


@torch.no_grad()
def report(parts: Parts, model: torch.nn.Module, together: Together = None) -> dict:
    """Every figure of the final table, with five samples; ``model`` is the trained policy.

    Each process answers its share of the prompts; all of them return the whole. ``together`` as in
    ``rollout.generate``.
    """
    prompts = parts.eval_prompts[: parts.config.report_samples]
    shown = plain(prompts)
    columns: dict[str, list[Tensor]] = {}
    texts: list[str] = []
    texts_ref: list[str] = []
    for ids, ours in _rounds(parts.world, len(prompts), _BATCH):
        batch = [prompts[i] for i in ids]
        draw = seeds(parts.config.seed, REPORT, ids, parts.device)
        how = {"mixture_coef": 1.0, "together": together}
        pair = parts.generate_pair(batch, draw, policy=model, **how)
        y, y_ref = parts.decode(pair.y), parts.decode(pair.y_other)
        rows = _rows(parts, model, pair) | {
            "win_judge": parts.judge([shown[i] for i in ids], y, y_ref),
            "win_preference": parts.preference([shown[i] for i in ids], y, y_ref),
        }
        if not ours:
            continue
        for name, values in rows.items():
            columns.setdefault(name, []).append(values.detach().cpu())
        texts += y
        texts_ref += y_ref
    columns = _joined(parts.world.gather([columns]))
    texts, texts_ref = parts.world.gather(texts), parts.world.gather(texts_ref)
    data = {name: torch.cat(pieces) for name, pieces in columns.items()}
    result = {name: estimate(data[name]) for name in ("win_judge", "win_preference", "kl")}
    for side, side_texts in (("trained", texts), ("reference", texts_ref)):
        length = data[f"length_{side}"]
        result[side] = {
            "length": length.double().mean().item(),
            "distinct_2": distinct(side_texts, 2),
            "distinct_3": distinct(side_texts, 3),
            "perplexity": math.exp(data[f"nll_{side}"].sum().item() / length.sum().item()),
        }
        if parts.lexicon:
            joined = [p + t for p, t in zip(shown, side_texts, strict=True)]
            scores = torch.tensor([parts.lexicon(text) for text in joined])
            result[side]["lexicon"] = scores.mean().item()
    result["prompts"] = len(prompts)
    result["judge_unseen"] = parts.judge is not parts.preference
    result["samples"] = list(zip(shown[:5], texts_ref[:5], texts[:5], strict=False))
    return result


def _joined(columns: list[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """Those of every process; one without prompts brings none."""
    full = [own for own in columns if own]
    return {name: [x for own in full for x in own[name]] for name in full[0]}


def _rows(parts: Parts, model, pair) -> dict[str, Tensor]:
    """(n,) columns: KL at the sampling temperature; length and negative log-likelihood at 1."""
    rows = {"kl": (pair.y.policy_logprobs - pair.y.ref_logprobs).sum(-1)}
    for side, completion in (("trained", pair.y), ("reference", pair.y_other)):
        logits = losses.ref_logits(model, parts.ref, pair, completion)
        safe = torch.where(completion.mask, completion.tokens, 0)
        logprobs = nk.token_logprobs(logits, safe).logprobs
        rows[f"nll_{side}"] = -torch.where(completion.mask, logprobs, 0).sum(-1)
        rows[f"length_{side}"] = completion.mask.sum(-1)
    return rows


def table(result: dict) -> str:
    """The report as Markdown."""
    lines = measures(result)
    lines += ["", "| prompt | reference | trained |", "|---|---|---|"]
    lines += [f"| {' | '.join(map(_cell, sample))} |" for sample in result["samples"]]
    return "\n".join(lines) + "\n"


def measures(result: dict) -> list[str]:
    """The lines of the report that hold figures, and what the run noticed of itself."""
    before, after = result["reference"], result["trained"]
    win, same, kl = (result[k] for k in ("win_judge", "win_preference", "kl"))
    judge = "judge unseen in training" if result["judge_unseen"] else "which training used"
    lines = [
        f"On {result['prompts']} held-out prompts, 95 % intervals:",
        "",
        "| measure | reference | trained |",
        "|---|---|---|",
        f"| **win rate against the reference, {judge}** | 0.500 | {_pm(win)} |",
        f"| win rate against the reference, preference trained on | 0.500 | {_pm(same)} |",
        f"| KL to the reference, nats a completion | 0 | {_pm(kl, 2)} |",
        f"| length, tokens | {before['length']:.1f} | {after['length']:.1f} |",
        f"| distinct-2 | {before['distinct_2']:.3f} | {after['distinct_2']:.3f} |",
        f"| distinct-3 | {before['distinct_3']:.3f} | {after['distinct_3']:.3f} |",
        f"| perplexity under the reference | {before['perplexity']:.1f} "
        f"| {after['perplexity']:.1f} |",
    ]
    if "lexicon" in after:
        lines.append(f"| lexicon score | {before['lexicon']:.3f} | {after['lexicon']:.3f} |")
    found = result.get("findings", [])
    return lines + [""] * bool(found) + [f"* step {f['step']}: {f['text']}" for f in found]


def _pm(value: tuple[float, float], digits: int = 3) -> str:
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def save(result: dict, folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (folder / "report.md").write_text(table(result), encoding="utf-8")
