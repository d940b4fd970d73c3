"""What a program, unlike a library, may ask of the C library: to keep memory for its next tensors."""

import contextlib
import ctypes

__all__ = ['keep_freed_memory']

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let the GNU C library keep what is freed for what comes next, in the place of giving it back to the system.

    Otherwise each large tensor on a CPU is made of new pages, which the system has to find and clear: up to a third of
    the time of a training step. It changes the whole process: each process of ours calls it when it starts.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library has no such function
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)
