"""``--profile DIR``: a torch profiler trace with a range around every op and phase, NVTX on a GPU.

    with profile.session(folder):
        with profile.range("rollout"):
            ...

Nsight and torch's profiler cannot watch one GPU at the same time: with ``NLHF_PROFILE=nvtx``, as in
the commands that a session prints, it makes ranges only.
"""

import contextlib
import functools
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import nlhf_kernels as nk
from nlhf_kernels import testing

# the last runs on the CPU only, where there is no Nsight
OPS = (*testing.OPS, "skinny_linear")
_active = False


def active() -> bool:
    """Whether a session is open; outside one a range costs a look at a flag."""
    return _active


@contextlib.contextmanager
def session(directory: str | Path) -> Iterator[None]:
    """Profile what runs inside: ``trace.json`` (Chrome's format) and ``summary.txt`` go there.

    The summary, the hottest ops and the commands for Nsight, is printed too, on standard error:
    standard output belongs to the rows.
    """
    global _active
    assert not _active, "profile sessions do not nest"
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    traced = os.environ.get("NLHF_PROFILE") != "nvtx"
    _active = True
    try:
        with _ranges_around_ops(), _profiler() if traced else contextlib.nullcontext() as profiler:
            yield
    finally:
        _active = False
    if traced:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        trace = f"trace: {folder / 'trace.json'} (open it in https://ui.perfetto.dev)"
        text = "\n".join([_summary(profiler), trace, *commands(folder)])
        (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
        print(text, file=sys.stderr)


@contextlib.contextmanager
def range(name: str) -> Iterator[None]:
    """A named stretch of the run: an op, or a phase of a step. Nothing outside a session."""
    if not _active:
        yield
        return
    push, pop = _nvtx()
    with torch.profiler.record_function(name):
        push(name)
        try:
            yield
        finally:
            pop()


def commands(folder: Path) -> list[str]:
    """This very run once more, under Nsight Systems and under Nsight Compute."""
    again = shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])
    ops = " ".join(f"--nvtx-include {op}/" for op in testing.OPS)
    # scope process: backward kernels are launched from a thread of autograd's own. The clocks stay
    # as they are: on a shared machine they are not ours to set
    return [
        "the same run under Nsight Systems, then every op's first kernels under Nsight Compute:",
        f"NLHF_PROFILE=nvtx nsys profile -t cuda,nvtx -o {folder / 'report'} {again}",
        f"NLHF_PROFILE=nvtx ncu --nvtx --nvtx-push-pop-scope process {ops} --set full "
        f"--clock-control none --launch-count 20 -o {folder / 'kernels'} {again}",
    ]


def _profiler() -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def _summary(profiler: torch.profiler.profile, rows: int = 20) -> str:
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=50)


@functools.cache
def _nvtx() -> tuple[Callable, Callable]:
    """How to open and close an NVTX range here; without a GPU nobody would look at one."""
    if importlib.util.find_spec("nvtx"):
        import nvtx

        return nvtx.push_range, nvtx.pop_range
    if torch.cuda.is_available():
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    return lambda name: None, lambda: None


@contextlib.contextmanager
def _ranges_around_ops() -> Iterator[None]:
    """A range around every public op, wherever it is called from.

    The raw ops show in torch's trace by themselves, but not as NVTX, and not the time around them.
    Everybody looks the functions up in the package when they call them, so replacing them there for
    the length of the session reaches the calls inside a training step too.
    """
    before = {name: getattr(nk, name) for name in OPS}
    for name, function in before.items():
        setattr(nk, name, _wrapped(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(nk, name, function)


def _wrapped(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def inside_range(*args, **kwargs):
        # a trace of torch.compile takes no context managers of ours
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with range(name):
            return function(*args, **kwargs)

    return inside_range
