"""Signals that end a run: SIGTERM and SIGHUP stop it as ^C does, and none of them while files are written."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ['Stopped', 'WholeBatches', 'stopped_by_signals', 'uninterrupted']

_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal other than SIGINT ended the run.

    Attributes:
        exit_code: 128 plus the signal's number, as shells count.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise :class:`Stopped` on SIGTERM and SIGHUP, once; handlers of others, and ``nohup``, stay as they are."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def stop(number, frame):
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second one must not cut the clean-up short
        raise Stopped(number)

    before = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay ^C and what :func:`stopped_by_signals` handles until the block is done; a second signal is not delayed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *_SIGNALS)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}

    def restore():
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def delay(number, frame):
        came.append(number)
        restore()

    for number in handlers:
        signal.signal(number, delay)
    try:
        yield
    finally:
        if not came:
            restore()
    if came:
        signal.raise_signal(came[0])


class WholeBatches:
    """A loader whose batches are :func:`uninterrupted`: a worker cut short while it hands one over prints a traceback.

    Args:
        loader: has a length.
    """

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            with uninterrupted():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
