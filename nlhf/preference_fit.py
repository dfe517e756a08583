"""How a preference model is trained from pairs, and how any preference is measured on them."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

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


@dataclass
class State:
    """What the next step of a fit depends on, beside its settings and the pairs.

    metrics: a row a step: `step` from 1, `loss` and `grad_norm` (before it is clipped; neither in a
    step that was skipped), `learning_rate` and `skipped`, how many were, so far.
    """

    model: PreferenceModel
    optimizer: torch.optim.AdamW
    metrics: list[dict[str, float]] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """How many steps were skipped, so far."""
        return int(self.metrics[-1]["skipped"]) if self.metrics else 0

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the last steps were, without one between that was not."""
        good = (i for i, row in enumerate(reversed(self.metrics)) if "loss" in row)
        return next(good, len(self.metrics))

    def tensors(self) -> dict[str, Tensor]:
        """Weights, AdamW's state and that of the random generators, as they are, not copied."""
        device = self.model.head.weight.device
        found = {"random|cpu": torch.get_rng_state()}
        if device.type == "cuda":
            found["random|cuda"] = torch.cuda.get_rng_state(device)
        for name, weight in self._weights().items():
            found[f"weights|{name}"] = weight.detach()
            for key, moment in self.optimizer.state.get(weight, {}).items():
                found[f"optimizer|{name}|{key}"] = moment
        return found

    def restore(self, tensors: dict[str, Tensor], metrics: list[dict[str, float]]) -> None:
        """Takes what `tensors` returned, and its metrics; ValueError if it is of another model."""
        weights = self._weights()
        shapes = {f"weights|{name}": (x.shape, x.dtype) for name, x in weights.items()}
        held = {k: (x.shape, x.dtype) for k, x in tensors.items() if k.startswith("weights|")}
        if held != shapes:
            raise ValueError("its weights are those of another model")
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
        for key, value in tensors.items():
            kind, _, rest = key.partition("|")
            if kind == "optimizer":
                name, _, of = rest.rpartition("|")
                if name not in weights or value.shape not in ((), weights[name].shape):
                    raise ValueError(f"its {key} is of another model")
                moments[name][of] = value
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[f"weights|{name}"])
                self.optimizer.state[weight] = {
                    # AdamW counts its steps on the CPU
                    key: x if key == "step" else x.to(weight.device)
                    for key, x in moments[name].items()
                }
        torch.set_rng_state(tensors["random|cpu"])
        device = self.model.head.weight.device
        # a run that has moved from a CPU to a GPU draws anew
        if device.type == "cuda" and "random|cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random|cuda"], device)
        self.metrics = list(metrics)

    def _weights(self) -> dict[str, Tensor]:
        return {n: x for n, x in self.model.named_parameters() if x.requires_grad}


class Recorder(Protocol):
    """Who keeps what a fit has reached; nlhf.preference_run.Run keeps it in a folder."""

    def features(self, model: PreferenceModel) -> Callable[[list[tuple[int, ...]]], Tensor]:
        """What computes, or remembers, `model.features`."""
        ...

    def restore(self, state: State, steps: int) -> None:
        """Before the first step: put what was kept into `state`, if anything was."""
        ...

    def record(self, state: State, steps: int) -> None:
        """After each of `steps`: keep what is worth it; may raise to break the fit off."""
        ...


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
    max_skipped: int = 10,
    recorder: Recorder | None = None,
) -> list[float]:
    """Trains in place by cross-entropy with soft labels; the losses of its steps.

    A frozen trunk is run once over every distinct text, and the head is then the minimum of a
    convex problem, found by L-BFGS over all pairs: `l2` weighs half the squared norm of the head
    on standardised features, the other settings are not used. A trainable trunk takes `epochs` of
    AdamW over shuffled batches, `lr` warmed up over a tenth of the steps and decayed to 0. A step
    whose loss or gradient is not finite changes nothing, is logged, and has no loss in the list.
    Deterministic given `seed`, also if a `recorder` breaks it off and restores it.

    Raises:
        ValueError: an empty data set, bad settings; the first step is not finite, or more than
            `max_skipped` in a row, or the loss of the first pairs in the end.
    """
    if len(preferences) == 0:
        raise ValueError("fit: the preferences are empty")
    # a step of more than float32 holds is an error of AdamW's own
    if epochs < 1 or batch_size < 1 or not 0 < lr <= 1e30 or not l2 >= 0 or max_skipped < 0:
        raise ValueError(
            "fit: epochs and batch_size must be at least 1, lr above 0 and at most 1e30, l2 and "
            f"max_skipped at least 0, got {epochs}, {batch_size}, {lr}, {l2}, {max_skipped}"
        )
    if model.frozen:
        losses = _fit_head(model, preferences, l2, progress, recorder)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        state = State(model, optimizer)
        _fit_all(state, preferences, epochs, batch_size, lr, seed, progress, max_skipped, recorder)
        losses = [row["loss"] for row in state.metrics if "loss" in row]
    some = preferences.select(range(min(batch_size, len(preferences))))
    with torch.no_grad():
        answers = model.logits(*some.texts())
    # the last update, or steps that were skipped in the end, may hide that the weights are lost
    if not (torch.isfinite(torch.tensor(losses)).all() and torch.isfinite(answers).all()):
        raise ValueError("fit: the loss is not finite; lower lr, or use a float32 trunk")
    return losses


def _fit_head(
    model: PreferenceModel,
    preferences: Preferences,
    l2: float,
    progress: bool,
    recorder: Recorder | None,
) -> list[float]:
    compute = recorder.features(model) if recorder else None
    x, a, b = model.cached_features(*preferences.texts(), progress=progress, compute=compute)
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
    state: State,
    preferences: Preferences,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: bool,
    max_skipped: int,
    recorder: Recorder | None,
) -> None:
    model, columns = state.model, preferences.texts()
    device = model.head.weight.device
    target = torch.tensor(preferences.probability, dtype=torch.float32, device=device)
    batches = -(-len(target) // batch_size)
    steps = epochs * batches
    warmup = max(1, steps // 10)
    shuffle = torch.Generator().manual_seed(seed)
    # dropout draws from the global generators, which are given back as they were
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if recorder:
            recorder.restore(state, steps)
        done, epoch = len(state.metrics), -1
        model.train()
        with Progress("preference, steps", steps, done, show=progress) as bar:
            for step in range(done, steps):
                # those of the epochs that lie behind are drawn again
                while epoch < step // batches:
                    order = torch.randperm(len(target), generator=shuffle).tolist()
                    epoch += 1
                rows = order[step % batches * batch_size :][:batch_size]
                texts = ([column[i] for i in rows] for column in columns)
                state.optimizer.param_groups[0]["lr"] = lr * min(
                    (step + 1) / warmup, (steps - step) / max(1, steps - warmup)
                )
                row, problem = _step(state, texts, target[rows])
                state.metrics.append(row)
                if problem:
                    _skip(state, problem)
                bar.advance(text=f"loss {row['loss']:.4f}" if "loss" in row else "skipped")
                if recorder:
                    recorder.record(state, steps)
                if state.skipped_in_a_row > max_skipped:
                    raise ValueError(
                        f"fit: {state.skipped_in_a_row} steps in a row were skipped, up to step "
                        f"{step + 1}: {problem}; lower lr, or use a float32 trunk"
                    )
    model.eval()


def _step(state: State, texts, target: Tensor) -> tuple[dict[str, float], str]:
    """The metrics of a step, and why it changed nothing; "" if it did."""
    model, optimizer = state.model, state.optimizer
    row = {"step": len(state.metrics) + 1, "learning_rate": optimizer.param_groups[0]["lr"]}
    optimizer.zero_grad()
    loss = preference_loss(model.logits(*texts), target)
    if not math.isfinite(value := loss.item()):
        return row | {"skipped": state.skipped + 1}, f"the loss is {value}"
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not math.isfinite(norm):
        return row | {"skipped": state.skipped + 1}, f"the norm of the gradient is {norm}"
    optimizer.step()
    return row | {"loss": value, "grad_norm": norm, "skipped": state.skipped}, ""


def _skip(state: State, problem: str) -> None:
    step = len(state.metrics)
    if state.skipped == step:
        # no step was good yet: it is the settings, and not the time
        raise ValueError(f"fit: step {step}: {problem}; lower lr, or use a float32 trunk")
    logging.getLogger(__name__).warning("step %d is skipped: %s", step, problem)


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
    if not torch.isfinite(p).all():
        i = int((~torch.isfinite(p)).nonzero()[0])
        raise ValueError(f"evaluate: the preference of pair {i} is {p[i].item()}")
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
