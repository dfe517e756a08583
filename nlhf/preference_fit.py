"""How a preference model is trained from pairs, and how any preference is measured on them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nlhf.data import Preferences
from nlhf.preference import Preference, PreferenceModel
from nlhf.progress import Progress


def preference_loss(logits: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy with soft labels: mean of -q log p - (1 - q) log(1 - p), p = sigmoid(logits).

    logits, probability: (B,), the latter q in [0, 1].
    """
    return F.binary_cross_entropy_with_logits(logits, probability)


def fit(
    model: PreferenceModel,
    preferences: Preferences,
    *,
    epochs: int = 1,
    batch_size: int = 16,
    lr: float = 1e-4,
    l2: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Trains in place by cross-entropy with soft labels; the losses of its steps.

    A frozen trunk is run once over every distinct text, and the head is then the minimum of a
    convex problem, found by L-BFGS over all pairs: `l2` weighs half the squared norm of the head
    on standardised features, the other settings are not used. A trainable trunk takes `epochs` of
    AdamW over shuffled batches, `lr` warmed up over a tenth of the steps and decayed to 0.
    Deterministic given `seed`. ValueError for an empty data set, bad settings or a lost loss.
    """
    if len(preferences) == 0:
        raise ValueError("fit: the preferences are empty")
    if epochs < 1 or batch_size < 1 or not lr > 0 or not l2 >= 0:
        raise ValueError(
            "fit: epochs and batch_size must be at least 1, lr above 0 and l2 at least 0, "
            f"got {epochs}, {batch_size}, {lr}, {l2}"
        )
    if model.frozen:
        losses = _fit_head(model, preferences, l2, progress)
    else:
        losses = _fit_all(model, preferences, epochs, batch_size, lr, seed, progress)
    if not torch.isfinite(torch.tensor(losses)).all():
        raise ValueError("fit: the loss is not finite; lower lr, or use a float32 trunk")
    return losses


def _fit_head(
    model: PreferenceModel, preferences: Preferences, l2: float, progress: bool
) -> list[float]:
    x, a, b = model.cached_features(*preferences.texts(), progress=progress)
    target = torch.tensor(preferences.probability, dtype=torch.float32, device=x.device)
    scale = x.std(0).clamp(min=1e-6)
    # the mean cancels in the difference of two scores
    x = (x - x.mean(0)) / scale
    weight = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        score = x @ weight
        loss = preference_loss(model.scale * (score[a] - score[b]), target)
        losses.append(loss.item())
        loss = loss + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.head.weight.data.copy_((weight.detach() / scale)[None])
    return losses


def _fit_all(
    model: PreferenceModel,
    preferences: Preferences,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: bool,
) -> list[float]:
    prompts, chosen, rejected = preferences.texts()
    device = model.head.weight.device
    target = torch.tensor(preferences.probability, dtype=torch.float32, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    batches = -(-len(prompts) // batch_size)
    steps = epochs * batches
    warmup = max(1, steps // 10)
    losses = []
    shuffle = torch.Generator().manual_seed(seed)
    # dropout draws from the global generators, which are given back as they were
    devices = [device] if device.type == "cuda" else []
    model.train()
    with (
        torch.random.fork_rng(devices),
        Progress("preference, steps", steps, show=progress) as bar,
    ):
        torch.manual_seed(seed)
        for step in range(steps):
            if step % batches == 0:
                order = torch.randperm(len(prompts), generator=shuffle).tolist()
            rows = order[step % batches * batch_size :][:batch_size]
            optimizer.param_groups[0]["lr"] = lr * min(
                (step + 1) / warmup, (steps - step) / max(1, steps - warmup)
            )
            texts = ([column[i] for i in rows] for column in (prompts, chosen, rejected))
            loss = preference_loss(model.logits(*texts), target[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.advance(text=f"loss {losses[-1]:.4f}")
    model.eval()
    return losses


def evaluate(
    preference: Preference, preferences: Preferences, *, margins: tuple[float, ...] = (0.0,)
) -> dict[str, float]:
    """Measures a preference on labelled pairs.

    Returns `pairs`, `cross_entropy` against the soft labels, `calibration_error` (expected, over
    ten equal bins of p, each pair counted in both orders), and for each margin m `accuracy_m`: the
    share of pairs with |label - 1/2| > m that it ranks as the label does, p = 1/2 counting half.
    """
    if len(preferences) == 0:
        raise ValueError("evaluate: the preferences are empty")
    p = preference(*preferences.texts()).double().cpu()
    label = torch.tensor(preferences.probability, dtype=torch.float64)
    # a preference may answer exactly 0 or 1
    q = p.clamp(1e-6, 1 - 1e-6)
    result = {
        "pairs": len(p),
        "cross_entropy": F.binary_cross_entropy(q, label).item(),
        "calibration_error": _calibration_error(
            torch.cat([p, 1 - p]), torch.cat([label, 1 - label])
        ),
    }
    right = torch.where(p == 0.5, 0.5, ((p > 0.5) == (label > 0.5)).double())
    for margin in margins:
        clear = (label - 0.5).abs() > margin
        result[f"accuracy_{margin:g}"] = right[clear].mean().item() if clear.any() else float("nan")
    return result


def _calibration_error(p: Tensor, label: Tensor, bins: int = 10) -> float:
    which = (p * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=p.dtype).index_add_(0, which, p - label)
    return (gap.abs().sum() / len(p)).item()
