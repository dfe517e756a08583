"""Time and memory of calls that take turns, and the limits of the machine in the same run."""

import contextlib
import functools
import gc
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.memory import Peak
from bench.phases import settle
from nlhf_kernels.testing.case import copied

# of all copies of one call's inputs, and of the buffers of a limit
CAP_BYTES = 2 * 10**9
MOST_COPIES = 4096
# short calls are repeated inside a sample until it lasts so long
SAMPLE_SECONDS = 1e-3
SAMPLE_SECONDS_IF_REPEATED = 1e-2
LEAST_ROUNDS, LEAST_ROUNDS_IF_SLOW, MOST_ROUNDS = 5, 3, 100
# what disturbs a call so long is averaged within it
LONG_SECONDS, ROUNDS_IF_LONG = 1.0, 2
GRAPH_REPLAYS = 20
# rows and columns of the matrices whose product is a limit
GEMM = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Variant:
    """``call`` is what is timed, on what ``prepare`` lays out for each call beforehand."""

    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    # empty the cache of what ``prepare`` has left there
    cold: bool = False
    # prepared calls that can wait for their turn at the same time
    at_once: int = 1000
    # so many calls, one after the other, are recorded in a CUDA graph; 0: none
    graph: int = 0
    # timed right after a call that is not, as a loop around the call would
    repeated: bool = False


@dataclass(frozen=True)
class Timing:
    """Milliseconds are (minimum, median, maximum) over samples, of one call.

    ``cpu_us`` is the time of all threads on the CPU, and on CUDA what the host takes until the call
    returns. ``peak_mb`` is what one call needs beyond its inputs, None where nobody says.
    """

    ms: list[float]
    calls: int
    cpu_us: float
    peak_mb: float | None
    graph_ms: list[float] | None = None
    # why there is no graph, where one was asked for
    note: str = ""


def interleave(
    variants: dict[str, Variant], device: str, seconds: float, warm: bool = False
) -> dict[str, Timing]:
    """Round by round each variant gives one sample, so that drift of the machine hits all alike.

    About ``seconds`` for each variant in all, but no fewer than 5 rounds; 3 for one whose single
    call takes longer than that, and 2 if it takes over a second. ``warm``: each has been called
    already.
    """
    with _collected():
        return _interleave(variants, device, seconds, warm)


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """Garbage is looked for in what comes from here on, not in every object of every library.

    That takes a third of a second each time that memory is measured, or falls into a sample.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _interleave(
    variants: dict[str, Variant], device: str, seconds: float, warm: bool
) -> dict[str, Timing]:
    counts, samples, slow, round_seconds = {}, {}, {}, 0.0
    for name, variant in variants.items():
        if not warm:
            # everything that happens once: compilation, tuning, lazy imports, pages
            _sample(variant, device, 1)
        start = time.perf_counter()
        once, cpu = _sample(variant, device, 1)
        samples[name] = [(once, cpu)]
        least = SAMPLE_SECONDS_IF_REPEATED if variant.repeated else SAMPLE_SECONDS
        counts[name] = max(1, min(math.ceil(least / once), variant.at_once))
        if counts[name] > 1:
            start = time.perf_counter()
            samples[name] = [_sample(variant, device, counts[name])]
        if once > seconds:
            slow[name] = ROUNDS_IF_LONG if once > LONG_SECONDS else LEAST_ROUNDS_IF_SLOW
        else:
            round_seconds += time.perf_counter() - start
    quick = len(variants) - len(slow)
    wanted = round(seconds * quick / round_seconds) if quick else 0
    rounds = max(LEAST_ROUNDS, min(wanted, MOST_ROUNDS))

    # that was the first round
    for turn in range(1, rounds):
        for name, variant in variants.items():
            if turn < slow.get(name, rounds):
                samples[name].append(_sample(variant, device, counts[name]))
    return {
        name: _timing(variant, device, samples[name], counts[name])
        for name, variant in variants.items()
    }


def _timing(variant: Variant, device: str, samples: list, count: int) -> Timing:
    graph, note = _graph(variant, device) if variant.graph else (None, "")
    return Timing(
        spread([s for s, _ in samples]),
        count * len(samples),
        statistics.median(cpu for _, cpu in samples) * 1e6,
        _peak_mb(variant, device),
        graph,
        note,
    )


def spread(seconds: list[float]) -> list[float]:
    """(minimum, median, maximum) in milliseconds."""
    return [1e3 * f(seconds) for f in (min, statistics.median, max)]


def _sample(variant: Variant, device: str, count: int) -> tuple[float, float]:
    """Seconds, and seconds of CPU, of one call among ``count``."""
    items = [variant.prepare() for _ in range(count)]
    if variant.cold:
        _flush(device)
    if variant.repeated:
        variant.call(items[0])
    if _is_cuda(device):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.perf_counter()
        start.record()
        for item in items:
            variant.call(item)
        end.record()
        host = time.perf_counter() - begin
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count, host / count
    begin, cpu = time.perf_counter(), time.process_time()
    for item in items:
        variant.call(item)
    return (time.perf_counter() - begin) / count, (time.process_time() - cpu) / count


def _peak_mb(variant: Variant, device: str) -> float | None:
    item = variant.prepare()
    # memory that was freed and kept would be used again unseen
    settle()
    with Peak(device) as peak:
        kept = variant.call(item)
    del kept
    return None if peak.extra_mb is None else max(0.0, peak.extra_mb)


def _graph(variant: Variant, device: str) -> tuple[list[float] | None, str]:
    """Milliseconds of a call when a CUDA graph replays it, or why it cannot be captured."""
    items = [variant.prepare() for _ in range(variant.graph)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        # what a call does the first time on a stream must not be captured
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            variant.call(items[0])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for item in items:
                variant.call(item)
    except RuntimeError as error:
        # a failed capture leaves the device's generator waiting for its end
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator(generator.device))
        return None, f"no CUDA graph: {first_line(error)}"
    seconds = []
    for _ in range(1 + GRAPH_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(items))
    # the first replay also uploads the graph
    return spread(seconds[1:]), ""


def first_line(error: BaseException) -> str:
    """What a person reads of an error in a table."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


# ---- inputs that no cache holds


class Rotation:
    """Copies of one call's inputs, so many that a cache has lost one when its turn comes again.

    ``alone``: one copy, which each call finds as the one before has left it.
    """

    def __init__(self, inputs: tuple[tuple, dict], device: str, alone: bool = False):
        self._inputs = inputs
        self.set_bytes = max(1, sum(x.untyped_storage().nbytes() for x in _tensors(*inputs)))
        cache = cache_bytes(device)
        most = min(CAP_BYTES // self.set_bytes, MOST_COPIES)
        wanted = max(2, min(1 + math.ceil(cache / self.set_bytes), most))
        self.sets = [_copied(*inputs) for _ in range(1 if alone else wanted)]
        # whether they all fit into the cache nevertheless
        self.cached = len(self.sets) * self.set_bytes <= cache
        self._turn: Iterator = itertools.cycle(self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    def next(self, fresh: tuple[int, ...] = ()) -> tuple[tuple, dict]:
        """The next set; the arguments in ``fresh`` get back the values that they began with.

        The turns are common to all variants: the sets that one has just read come last for the
        next.
        """
        args, kwargs = next(self._turn)
        for place in fresh:
            args[place].copy_(self._inputs[0][place])
        return args, kwargs


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def _copied(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same values and strides in memory of their own."""

    return tuple(map(copied, args)), {name: copied(x) for name, x in kwargs.items()}


@functools.cache
def cache_bytes(device: str) -> int:
    """Of the last level, as the platform says; 32 MiB where it does not. VMs claim a lot."""
    if _is_cuda(device):
        return torch.cuda.get_device_properties(device).L2_cache_size
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    found = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"(\d+)([KMG]?)\s*", path.read_text()):
                found.append(int(match[1]) * unit[match[2]])
    return max(found[1:] or found)


def _flush(device: str) -> None:
    """Read more than the cache holds."""
    _flushing(device).sum()


@functools.lru_cache(maxsize=1)
def _flushing(device: str) -> Tensor:
    # not zeros, which may all be one page
    return torch.ones(min(CAP_BYTES, cache_bytes(device) * 5 // 4) // 4, device=device)


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


# ---- limits


@functools.cache
def limits(device: str) -> dict[str, tuple[float, str]]:
    """name -> (value, unit): the best of several tries, beyond the last-level cache.

    ``copy`` counts what is read and what is written. A GEMM in float32 is one in float32: without
    the shorter TF32.
    """
    found = _memory_limits(device)
    n = GEMM[torch.device(device).type]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            seconds = _best(functools.partial(torch.mm, a, b), device)
            name = f"gemm {str(dtype).removeprefix('torch.')}"
            found[name] = (2 * n**3 / seconds / 1e12, "TFLOP/s")
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def _memory_limits(device: str) -> dict[str, tuple[float, str]]:
    size = buffer_bytes(device)
    memory = torch.ones(size // 4, device=device)
    # a reduction that writes nothing to speak of, in the two shapes that a library is fast in
    reads = (memory.sum, functools.partial(memory.view(1024, -1).amax, 1))
    half, other = memory.view(2, -1)
    return {
        "read": (size / min(_best(f, device) for f in reads) / 1e9, "GB/s"),
        "copy": (size / _best(lambda: half.copy_(other), device) / 1e9, "GB/s"),
    }


def buffer_bytes(device: str) -> int:
    """Four times the cache; on a GPU the most, so that a launch is nothing beside it."""
    size = CAP_BYTES if _is_cuda(device) else min(CAP_BYTES, 4 * cache_bytes(device))
    return size // 2**13 * 2**13


def _best(call: Callable[[], Any], device: str, tries: int = 7) -> float:
    variant = Variant(lambda _: call())
    _sample(variant, device, 1)
    return min(_sample(variant, device, 1)[0] for _ in range(tries))
