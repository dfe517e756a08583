"""What a run says of itself: metrics and samples to files and trackers, progress on stderr."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import logging
import math
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from nlhf import diagnosis
from nlhf.config import Config
from nlhf.names import nearest
from nlhf.progress import Progress

PROJECT = "nlhf"
# samples that TensorBoard shows at a step; the other trackers get a table of all of them
_SHOWN = 8


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with a response of the policy and one of the reference."""

    prompt: str
    completion: str
    ref_completion: str
    preference: float
    """P(completion > ref_completion) under the preference that is trained on"""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, output: Path, settings: Config, done: int):
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run wrote after its checkpoint comes once more
        self._board = SummaryWriter(output / "tensorboard", purge_step=done + 1)

    def log(self, row: dict[str, float], samples: list[Sample]) -> None:
        for name, value in row.items():
            self._board.add_scalar(name, value, row["step"])
        if samples:
            self._board.add_text("samples", _markdown(samples[:_SHOWN]), row["step"])

    def close(self) -> None:
        self._board.close()


class Service:
    """wandb, or trackio, which has the same calls; the folder's name is that of the run.

    The project is nlhf, or what WANDB_PROJECT or TRACKIO_PROJECT says; mode, server and key are the
    service's own settings (WANDB_MODE=offline, TRACKIO_DIR and so on).
    """

    name: str

    def __init__(self, output: Path, settings: Config, done: int):
        self._module = importlib.import_module(self.name)
        failures = OSError, ValueError, RuntimeError, getattr(self._module, "Error", ValueError)
        try:
            self._module.init(
                project=os.environ.get(f"{self.name.upper()}_PROJECT", PROJECT),
                name=output.absolute().name,
                config=dataclasses.asdict(settings),
                **self.options(output, done),
            )
        except failures as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"train: report_to: {self.name} does not start: {first}") from error

    def options(self, output: Path, done: int) -> dict:
        """Further arguments of ``init``."""
        raise NotImplementedError

    def log(self, row: dict[str, float], samples: list[Sample]) -> None:
        values = dict(row)
        if samples:
            columns = [field.name for field in dataclasses.fields(Sample)]
            data = [list(dataclasses.astuple(sample)) for sample in samples]
            values["samples"] = self._module.Table(columns=columns, data=data)
        self._module.log(values, step=row["step"])

    def close(self) -> None:
        self._module.finish()


class Wandb(Service):
    name = "wandb"

    def options(self, output: Path, done: int) -> dict:
        # by its id, since many runs may have one name
        path = output / "wandb-id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return {"id": path.read_text(encoding="utf-8"), "resume": "allow", "dir": str(output)}


class Trackio(Service):
    name = "trackio"

    def options(self, output: Path, done: int) -> dict:
        return {"resume": "allow" if done else "never", "embed": False}


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def trackers(report_to: str) -> list[str]:
    """The names in ``report_to``, of which "auto" is TensorBoard where it is installed.

    Raises:
        ValueError: an unknown name, or a package that is missing.
    """
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",")))
    if names in (["none"], [""]):
        return []
    if names == ["auto"]:
        return ["tensorboard"] if _installed("tensorboard") else []
    for name in names:
        if name not in TRACKERS:
            known = "auto, none, or names with commas between of " + ", ".join(TRACKERS)
            raise ValueError(
                f"config: report_to must be {known}, got {report_to!r}{nearest(name, TRACKERS)}"
            )
        if not _installed(name):
            raise ValueError(
                f"config: report_to names {name}, which is not installed: pip install {name}"
            )
    return names


def _installed(name: str) -> bool:
    # a module that is there need not have been found by its name
    return name in sys.modules or importlib.util.find_spec(name) is not None


class Log:
    """Metrics and samples as JSON lines, as a bar of progress, and to the trackers.

    Args:
        output: folder of the run, which exists.
        settings: the configuration; ``report_to`` names the trackers.
        done: steps that lie behind a run that goes on.
    """

    def __init__(self, output: Path, settings: Config, done: int):
        with contextlib.ExitStack() as stack:
            self._metrics, self._samples = (
                stack.enter_context((output / name).open("a", encoding="utf-8"))
                for name in ("metrics.jsonl", "samples.jsonl")
            )
            self._trackers = []
            for name in trackers(settings.report_to):
                tracker = TRACKERS[name](output, settings, done)
                stack.callback(tracker.close)
                self._trackers.append(tracker)
            self._progress = Progress(settings.algorithm, settings.steps, done)
            # from here on they are closed when the run is over
            self._stack = stack.pop_all()
        self._versus = math.nan

    def __enter__(self) -> "Log":
        self._stack.enter_context(self._progress)
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def __call__(self, row: dict[str, float], samples: list[Sample] = ()) -> None:
        """The metrics of a step, with the samples of a measurement."""
        for file, lines in ((self._metrics, [row]), (self._samples, _rows(row["step"], samples))):
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
        for tracker in self._trackers:
            tracker.log(row, samples)
        self._versus = row.get("preference_vs_ref", self._versus)
        self._progress.advance(text=self._text(row))

    def _text(self, row: dict[str, float]) -> str:
        if "preference" not in row:
            return f"skipped, {row['skipped']} so far"
        # not known before the first measurement
        versus = "" if math.isnan(self._versus) else f"vs ref {self._versus:.3f}, "
        phases = {k.removeprefix("seconds_"): v for k, v in row.items() if "seconds_" in k}
        return (
            f"P {row['preference']:.3f}, {versus}KL {row['kl']:.2f}, "
            f"entropy {row['entropy']:.2f}, {row['tokens_per_second']:.0f} tokens/s, "
            + " ".join(f"{name} {seconds:.1f}s" for name, seconds in phases.items())
        )

    def warn(self, finding: diagnosis.Finding) -> None:
        """A failure signature, as a line of the log."""
        logging.getLogger(__name__).warning("step %d: %s", finding.step, finding.text)


def _rows(step: int, samples: list[Sample]) -> list[dict]:
    return [{"step": step} | dataclasses.asdict(sample) for sample in samples]


def _markdown(samples: list[Sample]) -> str:
    rows = [(s.prompt, s.completion, s.ref_completion, f"{s.preference:.3f}") for s in samples]
    head = [("prompt", "policy", "reference", "P(policy > reference)"), ("---",) * 4]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in head + rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


class Quiet(contextlib.nullcontext):
    """The log of a process that is not the first: none."""

    def __enter__(self) -> "Quiet":
        return self

    def __call__(self, row: dict[str, float], samples: list[Sample] = ()) -> None:
        pass

    def warn(self, finding: diagnosis.Finding) -> None:
        pass
