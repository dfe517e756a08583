"""Where tests run: every backend on every device it has here, Triton interpreted without a GPU."""

import dataclasses
import os
import types
from pathlib import Path
from typing import NamedTuple

import torch

# triton and the registry fix this when they are imported, so it comes before both
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# a choice made outside would decide for every test
os.environ.pop("NLHF_BACKEND", None)

import pytest

from nlhf_kernels import registry
from nlhf_kernels.testing import OPS, Case
from nlhf_kernels.testing.cases import HEADS

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class Target(NamedTuple):
    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether a row costs tens of milliseconds."""
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


# of a machine that is measured in tests
LIMITS = {
    "read": (10.0, "GB/s"),
    "copy": (8.0, "GB/s"),
    "gemm float32": (0.1, "TFLOP/s"),
    "gemm bfloat16": (0.2, "TFLOP/s"),
}


def why_not(backend: str) -> str:
    """Why no op runs on this backend on any device here; empty if all do on one."""
    for device in DEVICES:
        whys = [why for op in registry.OPS if (why := registry.reason(op, backend, device))]
        if not whys:
            return ""
    return whys[0]


def targets(compiled_only: bool = False) -> list:
    """Every backend and device; a missing backend is one skipped entry that says why."""
    found = []
    for backend in registry.BACKENDS:
        if (compiled_only and backend == "eager") or not any(
            backend in paths for paths in [{"eager": ""}, *registry._PATHS.values()]
        ):
            continue
        if why := why_not(backend):
            skip = pytest.mark.skip(reason=f"{backend}: {why}")
            found.append(pytest.param(Target(backend, "cpu"), marks=skip, id=backend))
        found += [
            pytest.param(Target(backend, device), id=f"{backend}-{device}")
            for device in DEVICES
            if not registry.reason(registry.OPS[0], backend, device)
        ]
    return found


def interpret_sooner() -> None:
    """Triton's interpreter replaces the functions of its language once, not at every call.

    It does so at every launch and at every call of one jit function by another, which is half of
    the time that it takes; what is there at the second call is what was there at the first.
    """
    from triton import language
    from triton.runtime import interpreter

    everything = types.SimpleNamespace(__globals__={"tl": language, "core": language.core})
    interpreter._patch_lang(everything)
    kept = types.SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: kept


def pytest_configure() -> None:
    torch.set_num_threads(2)
    if os.environ.get("TRITON_INTERPRET") == "1" and not why_not("triton"):
        interpret_sooner()
    for backend in filter(None, os.environ.get("NLHF_EXPECT_BACKENDS", "").split(",")):
        if why := why_not(backend):
            raise pytest.UsageError(f"NLHF_EXPECT_BACKENDS names {backend}, but {why}")


def pytest_generate_tests(metafunc) -> None:
    """Tests ask for a ``target``, a ``compiled`` one, an ``op``, or a ``case``, by name."""
    names = metafunc.fixturenames
    if "target" in names:
        metafunc.parametrize("target", targets())
    if "compiled" in names:
        metafunc.parametrize("compiled", targets(compiled_only=True))
    if "op" in names:
        metafunc.parametrize("op", registry.OPS)
    if "case" in names:
        cases = [case for op in OPS.values() for case in op.tests]
        metafunc.parametrize("case", cases, ids=str)


def far_apart(near: torch.Tensor, folder: Path) -> torch.Tensor:
    """Two bfloat16 rows, and 4 GiB between them."""
    V = near.shape[1]
    stride = 2**31 + 64
    size = stride + V
    if near.is_cpu:
        # a sparse file: nothing but the pages that are touched takes any room
        path = folder / "logits"
        with open(path, "wb") as file:
            file.truncate(2 * size)
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
    else:
        memory = torch.empty(size, dtype=torch.bfloat16, device=near.device)
    return memory.as_strided((2, V), (stride, 1)).copy_(near)


@pytest.fixture
def real_pairs() -> Path:
    """A file of real preference pairs: third-party texts, so no part of the project."""
    folder = os.environ.get("NLHF_PREFERENCES")
    if folder is None:
        pytest.skip("no real preference pairs here: NLHF_PREFERENCES names no folder with them")
    return Path(folder) / "preferences_dev.jsonl.gz"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Tiny tensors: a second thread gains nothing, and on a busy machine all wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_bench(monkeypatch):
    """A machine with a small cache and known limits, whose ops have small shapes."""
    import bench.__main__ as cli
    from bench import measure

    monkeypatch.setattr(measure, "cache_bytes", lambda device: 2**18)
    monkeypatch.setattr(measure, "limits", lambda device: LIMITS)
    monkeypatch.setattr(cli, "QUICK_SECONDS", 0.02)
    monkeypatch.setattr(cli, "SECONDS", {"cpu": 0.02})
    for op, entry in OPS.items():
        shape = {"mixture_sample": (4, 1100), "linear_mixture_sample": (4, 8, 1100)}
        shape |= dict.fromkeys(HEADS, (2, 3, 8, 1100))
        shape = shape.get(op, (2, 3, 1100))
        options = {"masked": "none"} if op.endswith("pairwise_pg_loss") else {}
        options |= {"ref": "own"} if op == "linear_token_kl" else {}
        cases = (Case(op, "tiny-1b, first", shape, torch.float32, options),
                 Case(op, "other-2b, second", shape, torch.bfloat16, options))  # fmt: skip
        monkeypatch.setitem(OPS, op, dataclasses.replace(entry, bench={"cpu": cases}))
    measure._flushing.cache_clear()
    yield
    measure._flushing.cache_clear()


@pytest.fixture
def plant(monkeypatch):
    """``plant(kernels)``: the backend "cuda" is now these functions, by name of the raw op."""
    load = registry.load

    def planted(kernels: dict) -> str:
        def find(raw_op, backend):
            return kernels[raw_op] if backend == "cuda" else load(raw_op, backend)

        for raw_op in kernels:
            monkeypatch.setitem(registry._PATHS[raw_op], "cuda", "planted")
        monkeypatch.setattr(registry, "load", find)
        return "cuda"

    return planted
