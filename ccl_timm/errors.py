"""Errors that a user can mend. The command line prints them as one sentence and exits with 2."""

import difflib
from collections.abc import Iterable

__all__ = ['PluginLoadError', 'UnknownNameError', 'UserError', 'did_you_mean']


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
