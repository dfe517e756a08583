"""``nlhf info``."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import runpy
import sys
from collections.abc import Iterator

from nlhf.commands import common

DESCRIPTION = (
    "Say what is installed and what runs here: versions, devices, threads, which attention a model "
    "would get, the optional packages that were found, and which op runs on which backend or why "
    "not. Needs no model; add its output to a report of a bug."
)
EXAMPLES = "  nlhf info\n  nlhf info | grep triton"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "safetensors")
# package and what it is for
OPTIONAL = {
    "flash_attn": "attention on CUDA in half precision",
    "bitsandbytes": "quantised models and optimisers",
    "deepspeed": "ZeRO",
    "datasets": "data sets of the hub",
    "pyarrow": ".parquet files",
    "tensorboard": "report_to",
    "wandb": "report_to",
    "trackio": "report_to",
    "nvtx": "ranges in Nsight",
}


def add(commands) -> None:
    parser = common.add_parser(
        commands,
        "info",
        "say what is installed and what runs here",
        DESCRIPTION,
        EXAMPLES,
        "README.md, docs/architecture.md",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    for line in report():
        sys.stdout.write(line + "\n")
    sys.stdout.write("\nops and backends\n")
    sys.stdout.flush()
    # the same words as python -m nlhf_kernels
    runpy.run_module("nlhf_kernels", run_name="__main__")


def report() -> Iterator[str]:
    """The lines above the table of ops."""
    # torch takes seconds to import
    import torch

    from nlhf import policy

    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield f"nlhf {_version('nlhf')}, Python {platform.python_version()}, {system}"
    yield ""
    yield from (f"{name:14} {_version(name)}" for name in PACKAGES)
    yield ""
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield f"CPU            {os.cpu_count()} cores"
    yield f"threads        {torch.get_num_threads()} of torch, OMP_NUM_THREADS {threads}"
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{i}         {found.name}, {memory}, sm_{found.major}{found.minor}"
    if not torch.cuda.device_count():
        yield f"GPU            none that this torch can use (CUDA {torch.version.cuda})"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        chosen = policy.attention_for(dtype, device) or "sdpa, or eager for models without it"
        yield f"attention      {str(dtype).removeprefix('torch.')} on {device}: {chosen}"
    yield ""
    for name, purpose in OPTIONAL.items():
        state = _version(name) if importlib.util.find_spec(name) else "not installed"
        yield f"{name:14} {state} ({purpose})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "found, without a version" if importlib.util.find_spec(name) else "not installed"
