"""Threads that work on images side by side, one core each."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

__all__ = ['image_threads']


def image_threads(count: int) -> ThreadPoolExecutor:
    """Threads whose tensor operations take no further threads; those of other threads still do.

    Args:
        count: of threads.
    """
    pool, all_started = ThreadPoolExecutor(count, initializer=_compute_alone), Barrier(count)
    in_others = torch.get_num_threads()
    list(pool.map(lambda _: all_started.wait(), range(count)))
    torch.set_num_threads(in_others)  # each of them has set what new threads begin with, too
    return pool


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread's first use of torch sets its number, over what was set before
    torch.set_num_threads(1)
