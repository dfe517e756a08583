"""The folder of a preference that is being trained: what ``nlhf preference --resume`` goes on from.

Beside what is saved in the end it holds ``config.yaml``, ``metrics.jsonl``, a line a step, and with
a trainable trunk ``checkpoints/`` (``nlhf.snapshots``): weights, AdamW's moments, the state of the
random generators and the metrics so far. The order of the pairs follows from the seed. With a
frozen trunk ``features/`` holds what the trunk has made of the texts, until the preference is
saved; the head is then one problem, solved from the start.
"""

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from nlhf import config, snapshots
from nlhf.config import FitConfig
from nlhf.data import Preferences
from nlhf.preference import CONFIG, PreferenceModel
from nlhf.preference_fit import State
from nlhf.stopping import Stop, Stopped

METRICS, RESULT = "metrics.jsonl", "fit.json"
# a file is a copy in memory while it is written
_FILE_BYTES = 2**30


class Run:
    """A fit in ``settings.output``, a ``nlhf.preference_fit.Recorder``.

    ``opened`` and ``reached`` say how far it is, for whoever stopped it. After a step, or the
    saving, that a signal came into, ``Stopped`` is raised.
    """

    def __init__(self, settings: FitConfig, stop: Stop):
        self.settings, self.stop = settings, stop
        self.output = Path(settings.output)
        self.checkpoints = self.output / "checkpoints"
        self.opened, self.reached = False, "before the first step"
        self._pairs = ""

    def result(self) -> dict | None:
        """What a run that ended found; None if it has not."""
        if not self.saved or not (self.output / RESULT).exists():
            return None
        # a kill may have left them
        self._forget_features()
        return json.loads(self._read(RESULT))

    @property
    def saved(self) -> bool:
        """Whether the preference is in its place."""
        return (self.output / CONFIG).exists()

    def open(self, pairs: Preferences, started: bool) -> None:
        """Make the folder, or take away what a kill has left in it.

        started: whether what is there already is of these settings.
        """
        digest = hashlib.sha256()
        for row in zip(*pairs.texts(), pairs.probability, strict=True):
            digest.update(repr(row).encode("utf-8"))
        self._pairs = digest.hexdigest()
        self.output.mkdir(parents=True, exist_ok=True)
        for folder in (self.output, self.checkpoints, self._features):
            snapshots.clean(folder)
        # first of all, since it says whose folder this is
        if not started:
            snapshots.write(self.output / "config.yaml", config.dump(self.settings))
        self.opened = True
        self.checkpoints.mkdir(exist_ok=True)

    def features(self, model: PreferenceModel) -> Callable[[list[tuple[int, ...]]], Tensor]:
        """``model.features``, of texts that were read before from the folder."""
        self.reached = "before all texts were read"
        return Features(model, self._features)

    def restore(self, state: State, steps: int) -> None:
        """The last checkpoint that can be used; metrics of steps after it are forgotten.

        Raises:
            ValueError: there are checkpoints, and none of them can be used.
        """
        snapshots.newest(self.checkpoints, lambda path: self._load(path, state))
        # a kill may have come between the last one and this
        snapshots.forget(self.checkpoints, self.settings.keep_checkpoints)
        self._write_metrics(state.metrics)
        if state.metrics:
            self._count(state, steps)

    def record(self, state: State, steps: int) -> None:
        """Write the metrics of a step, and a checkpoint where one is due or a signal has come."""
        done = len(state.metrics)
        with (self.output / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(state.metrics[-1]) + "\n")
        every = self.settings.checkpoint_every
        # also before what may be the end of a run that goes wrong
        due = done % every == 0 or done == steps or state.skipped_in_a_row == 1 if every else False
        if due or self.stop.asked:
            self._save(state)
            self._count(state, steps)
        if self.stop.asked:
            raise Stopped(self.stop.asked)

    def save(self, model: PreferenceModel, losses: list[float]) -> None:
        """Put the preference in its place, whole or not at all."""
        with self.stop.finishing():
            if model.frozen:
                rows = [{"step": i, "loss": loss} for i, loss in enumerate(losses, start=1)]
                self._write_metrics(rows)
            beside = self.output / ".model"
            shutil.rmtree(beside, ignore_errors=True)
            try:
                model.save_pretrained(beside)
                snapshots.pour(beside, self.output, last=CONFIG)
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"preference: cannot be saved in {self.output}: {error}; make room, then go "
                    "on with --resume"
                ) from error
            self.reached = "after the preference was saved, before it was measured"
        if self.stop.asked:
            raise Stopped(self.stop.asked)

    def losses(self) -> list[float]:
        """Those of a run whose preference is saved."""
        rows = map(json.loads, self._read(METRICS).splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    def end(self, result: dict) -> None:
        """Write the result, with which the run has ended."""
        with self.stop.finishing():
            snapshots.write(self.output / RESULT, json.dumps(result, indent=1))
            self._forget_features()

    @property
    def _features(self) -> Path:
        return self.output / "features"

    def _forget_features(self) -> None:
        if self._features.exists():
            shutil.rmtree(self._features)

    def _count(self, state: State, steps: int) -> None:
        self.reached = f"after step {len(state.metrics)} of {steps}, saved"

    def _read(self, name: str) -> str:
        try:
            text = (self.output / name).read_text(encoding="utf-8")
            for line in [text] if name == RESULT else text.splitlines():
                json.loads(line)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"preference: {self.output / name}: cannot be read: {error}; delete "
                f"{self.output / CONFIG} to go on from the last checkpoint"
            ) from None
        return text

    def _write_metrics(self, rows: list[dict]) -> None:
        snapshots.write(self.output / METRICS, _lines(rows))

    def _save(self, state: State) -> None:
        step = len(state.metrics)
        tensors = state.tensors()
        before = itertools.accumulate((x.nbytes for x in tensors.values()), initial=0)
        numbers = dict(zip(tensors, (n // _FILE_BYTES for n in before), strict=False))
        with (
            snapshots.said(self.checkpoints, step, safetensors.SafetensorError),
            snapshots.new(self.checkpoints, step) as place,
        ):
            for number in sorted(set(numbers.values())):
                part = {k: x.contiguous() for k, x in tensors.items() if numbers[k] == number}
                save_file(part, place / f"state-{number:05d}.safetensors")
            (place / METRICS).write_text(_lines(state.metrics), encoding="utf-8")
            of = config.identity(self.settings)
            snapshots.seal(place, step, settings=of, pairs=self._pairs)
        snapshots.forget(self.checkpoints, self.settings.keep_checkpoints)

    def _load(self, checkpoint: Path, state: State) -> None:
        try:
            found = snapshots.checked(checkpoint)
            if other := config.difference(self.settings, found.get("settings", {})):
                raise ValueError(f"it is of a run with {other}")
            if found.get("pairs") != self._pairs:
                raise ValueError(f"it is of other pairs than {self.settings.pairs} has now")
            tensors = {}
            for path in sorted(checkpoint.glob("*.safetensors")):
                tensors |= load_file(path)
            text = (checkpoint / METRICS).read_text(encoding="utf-8")
            metrics = [json.loads(line) for line in text.splitlines()]
            if len(metrics) != found["step"]:
                raise ValueError(f"{METRICS} has {len(metrics)} lines")
            state.restore(tensors, metrics)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            safetensors.SafetensorError,
        ) as error:
            raise ValueError(f"checkpoint {checkpoint}: cannot be used: {error}") from None


class Features:
    """``model.features`` by way of a folder, a file a batch.

    A file is named after what went in (trunk, pooling, tokens) and the hash of what is in it.
    """

    def __init__(self, model: PreferenceModel, folder: Path):
        self.model, self.folder = model, folder
        folder.mkdir(parents=True, exist_ok=True)
        names = [path.stem.partition("-") for path in folder.glob("*-*.safetensors")]
        self._kept = {key: digest for key, _, digest in names}
        about = json.dumps(model.settings) + model.trunk.config.to_json_string()
        digest = hashlib.sha256(about.encode("utf-8"))
        for name, weight in model.trunk.state_dict().items():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
        self._trunk = digest.hexdigest()

    def __call__(self, batch: list[tuple[int, ...]]) -> Tensor:
        key = hashlib.sha256(f"{self._trunk} {batch}".encode()).hexdigest()[:32]
        if key in self._kept:
            path = self.folder / f"{key}-{self._kept[key]}.safetensors"
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == self._kept[key]:
                return load(content)["features"].to(self.model.head.weight.device)
            logging.getLogger(__name__).warning(
                "features %s: does not match its hash; the texts are read again", path
            )
            path.unlink()
        found = self.model.features(batch)
        content = save({"features": found.cpu().contiguous()})
        digest = hashlib.sha256(content).hexdigest()
        snapshots.write_bytes(self.folder / f"{key}-{digest}.safetensors", content)
        return found


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
