"""Errors that a user can fix. The command line prints them as one sentence and exits with 2."""

import contextlib
import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = [
    'LIBRARY_ERRORS', 'PluginLoadError', 'UnknownNameError', 'UserError', 'did_you_mean', 'reason', 'require_absent',
    'require_writable',
    'require_finite', 'user_errors',
]  # fmt: skip

# what libraries raise over a value that a user gave
LIBRARY_ERRORS = (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class UserError(ValueError):
    """What was asked for cannot be done. The message says what, where, the value, and the remedy."""


class UnknownNameError(UserError):
    """No model, loss, recipe or data set has this name."""


class PluginLoadError(UserError):
    """A plugin's object was found but could not be imported, or breaks its contract."""


def reason(error: BaseException, line: int = -1) -> str:
    """One line of an exception's text, without its full stop, or the name of its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[line].strip().rstrip('.')


@contextlib.contextmanager
def user_errors(
    what: str,
    errors: tuple[type[BaseException], ...] = LIBRARY_ERRORS,
    explain: Callable[[BaseException], str | None] = reason,
    hint: str = '',
) -> Iterator[None]:
    """Turn the exceptions that libraries raise over what a user asked for into one sentence.

    Args:
        what: the sentence's beginning, such as ``"'model.pt' cannot be loaded"``.
        errors: the exceptions to turn; a UserError and a lack of memory always pass through as they are.
        explain: the reason for an exception, without a full stop; for None it passes through, too.
        hint: the sentence's end, such as ``': give another file'``.

    Raises:
        UserError: ``what: reason hint.``
    """
    try:
        yield
    except errors as error:
        passes = isinstance(error, (UserError, MemoryError)) or type(error).__name__ == 'OutOfMemoryError'  # of torch
        because = None if passes else explain(error)
        if because is None:
            raise
        raise UserError(f'{what}: {because}{hint}.') from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End a sentence: ``"; did you mean 'x'?"`` with the closest of ``known``, or ``'.'`` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else '.'


def require_absent(path: str | os.PathLike) -> None:
    """Raise a UserError if a file that is to be written exists."""
    if os.path.lexists(path):
        raise UserError(f"'{path}' exists already: name another file.")


def require_writable(path: str | os.PathLike) -> None:
    """Raise a UserError if a file that is to be written exists, or its folder does not."""
    require_absent(path)
    if not os.path.isdir(folder := os.path.dirname(path) or '.'):
        raise UserError(f"There is no folder '{folder}' to write '{os.path.basename(path)}' into: create it first.")


def require_finite(name: str, value: Any) -> None:
    """Raise a UserError if an option's value is infinite or not a number, also inside lists and dicts, or as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            require_finite(f'{name} {key}' if name else str(key), item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            require_finite(name, item)
    elif isinstance(value, (float, int, str)) and not _is_finite(value):
        raise UserError(f"{name} must be a finite number, not '{value}'.")


def _is_finite(value: float | int | str) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
    except ValueError:  # other text
        return True
