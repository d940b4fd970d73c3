"""Errors that a user can mend. The command line prints them as one sentence and exits with 2."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

__all__ = ['PluginLoadError', 'UnknownNameError', 'UserError', 'did_you_mean', 'require_finite']


class UserError(ValueError):
    """What was asked for cannot be done. The message says what, where, the value, and the way out."""


class UnknownNameError(UserError):
    """No model, loss, recipe or data set has this name."""


class PluginLoadError(UserError):
    """A plugin's object was found but could not be imported, or breaks its contract."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End a sentence: ``"; did you mean 'x'?"`` with the closest of ``known``, or ``'.'`` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else '.'


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
