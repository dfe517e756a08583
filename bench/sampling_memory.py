"""What one call of ``mixture_sample`` takes beyond its inputs, in a process that made none before.

    python -m bench.sampling_memory '{"model": "gemma2-9b", "B": 16, ...}'

It counts what becomes resident while the call runs, at its highest: heap, stacks, whatever a
library keeps for the next call, and the outputs (40 bytes a row). Pages of files do not count: code
and libraries are there once for all. Threads, imports and the dispatcher are there beforehand, by a
call of another op and by one without any row. Huge pages are off: they would round up to 2 MB.
"""

import ctypes
import json
import sys

import torch

import nlhf_kernels as nk
from bench import logits
from bench.memory import Peak, status_mb
from bench.phases import settle

_PR_SET_THP_DISABLE = 41


def measure(spec: dict) -> dict:
    """{"mb": of the first call, "floor_mb": of one without a row}; None where nobody says."""
    torch.set_num_threads(spec["threads"])
    case = logits.case(spec["model"], spec["B"], torch.float32, spec["filters"], spec["logits"])
    args, kwargs = case.inputs()
    settings = kwargs | {"backend": spec["backend"]}
    empty = tuple(x[:0] for x in args)
    _start_threads(spec["backend"])
    nk.mixture_sample(*empty, **settings)
    return {"floor_mb": _grown(empty, settings), "mb": _grown(args, settings)}


def _start_threads(backend: str) -> None:
    x = torch.randn(64, 5000)
    tokens = torch.zeros(64, dtype=torch.int64)
    nk.token_logprobs(x, tokens, backend=backend)
    # those of torch's own operators
    x.sum()


def _grown(args: tuple, settings: dict) -> float | None:
    settle()
    files = _files_mb()
    with Peak("cpu") as peak:
        kept = nk.mixture_sample(*args, **settings)
    del kept
    if peak.extra_mb is None:
        return None
    return max(0.0, peak.extra_mb - (_files_mb() - files))


def _files_mb() -> float:
    return status_mb("RssFile") if sys.platform == "linux" else 0.0


def main(argv: list[str]) -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    print(json.dumps(measure(json.loads(argv[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
