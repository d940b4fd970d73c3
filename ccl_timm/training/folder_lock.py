"""The lock on a run's folder: one process at a time writes into it."""

import os
from pathlib import Path

from ccl_timm.console import is_primary, log_warning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['FolderLock']

_held: set[int] = set()  # file descriptors


class FolderLock:
    """A lock on a run's folder, as a context manager that releases it; the kernel does where the process is killed.

    Of several processes that train together, the first one holds it. It is an advisory lock (``flock``) on the file
    ``.lock`` in the folder. Where the file system has no locks, a warning is logged and the run continues.

    Attributes:
        folder: that is locked, or None.
    """

    def __init__(self):
        self.folder: Path | None = None
        self._file: int | None = None

    def __enter__(self) -> 'FolderLock':
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def take(self, folder: Path) -> bool:
        """Lock an existing folder and release the one locked before.

        Returns:
            False if another process holds the lock.

        Raises:
            OSError: the folder cannot be written.
        """
        self.release()
        if is_primary() and fcntl is None:
            log_warning(f"there are no locks on this system: start no second process on '{folder}'.")
        elif is_primary() and not self._lock(folder):
            return False
        self.folder = folder
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._file is not None:
            _held.discard(self._file)
            os.close(self._file)
        self.folder = self._file = None

    def _lock(self, folder: Path) -> bool:
        file = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError as error:
            log_warning(f"'{folder}' cannot be locked ({error.strerror}): start no second process on it.")
        _held.add(file)
        self._file = file
        return True


def _close_in_child() -> None:
    # a worker process that outlives its killed parent must not keep the lock
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_close_in_child)
