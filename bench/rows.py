"""The one form of a result: a flat JSON object a line, with where and when it was measured."""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


@functools.cache
def stamp(device: str) -> dict:
    """What every row of this run carries: ``run`` groups them."""
    return {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        # the results themselves are written while a run goes on
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs")),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def device_name(device: str) -> str:
    """As people call it: "NVIDIA H200", "Intel Xeon Processor, 2 cores"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1] for x in lines if x.startswith("model name")), name)
    name = " ".join(re.sub(r"\((R|TM|r|tm)\)|CPU", "", name).split("@")[0].split())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def results_file(device: str) -> Path:
    """``bench/results/<device>.jsonl``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{slug}.jsonl"


def append(path: Path, rows: Iterable[dict]) -> None:
    """Rows are only ever added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _git(*arguments: str) -> str:
    """What git says of this tree; "" where there is none."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
