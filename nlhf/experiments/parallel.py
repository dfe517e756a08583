"""Independent runs on all cores, one thread each: small models gain nothing from a second."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from nlhf.experiments.training import one_thread
from nlhf.progress import Progress

# a new process takes seconds to import torch
_WORTH = 8


def run(function: Callable, jobs: Sequence, title: str) -> list:
    """``[function(job) for job in jobs]``, the same to the bit however many cores there are.

    ``function`` is one of a module, and jobs and results can be pickled.
    """
    workers = min(os.cpu_count() or 1, len(jobs))
    with Progress(title, len(jobs)) as bar:
        if workers == 1 or len(jobs) < _WORTH:
            with one_thread():
                return [_counted(function(job), bar) for job in jobs]
        with ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return [_counted(result, bar) for result in pool.map(function, jobs)]


def _counted(result, bar: Progress):
    bar.advance()
    return result
