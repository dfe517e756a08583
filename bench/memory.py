"""Peak memory of a piece of code: of the GPU, or on Linux what is resident of the process."""

import contextlib
from pathlib import Path

import torch

_MB = 2**20


class Peak:
    """``with Peak("cpu") as peak: ...``, then ``peak.total_mb``, ``before_mb``, ``extra_mb``.

    None where the platform does not say.
    """

    def __init__(self, device: str):
        self._cuda = torch.device(device).type == "cuda"
        self.before_mb: float | None = None
        self.total_mb: float | None = None

    def __enter__(self) -> "Peak":
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before_mb = torch.cuda.memory_allocated() / _MB
        else:
            # 5 sets the high-water mark back to what is resident now
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
                self.before_mb = status_mb("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.total_mb = torch.cuda.max_memory_allocated() / _MB
        elif self.before_mb is not None:
            self.total_mb = status_mb("VmHWM")

    @property
    def extra_mb(self) -> float | None:
        return None if self.total_mb is None else self.total_mb - self.before_mb


def status_mb(field: str) -> float:
    """A field of what Linux says of this process."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) / 1024
