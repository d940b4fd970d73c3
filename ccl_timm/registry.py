"""Losses, heads and models by name: ours and other packages', found through entry points and imported when named.

The name of an entry point is what a user types, its value is ``module:object``. Ours are declared in our own
pyproject.toml; they cannot be switched off, and no plug-in can take their names.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import os
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from ccl_timm.errors import PluginLoadError, UserError

__all__ = [
    'GROUPS', 'SWITCH', 'Entry', 'describe_error', 'find_plugins', 'load', 'load_all', 'names', 'our_names',
    'plugin_names', 'refresh', 'resource_dir', 'state', 'used_plugins', 'version',
]  # fmt: skip

# kind -> entry point group
GROUPS = {'head': 'ccl_timm.heads', 'loss': 'ccl_timm.losses', 'model': 'ccl_timm.models'}
# environment variable. Unset: all plug-ins. Empty: none. 'dist-a,dist-b': those of these distributions only
SWITCH = 'CCL_TIMM_PLUGINS'

_OURS = 'ccl-timm'
_NAME = re.compile(r'[a-z][a-z0-9_]*')
# the metadata specification allows spaces around the colon and extras, which consumers may ignore
_VALUE = re.compile(r'[\w.]+\s*:\s*[\w.]+\s*(\[.*\])?')

_Verify = Callable[[str, Any], None]
_Guard = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Entry:
    """One entry point of an installed distribution, or a distribution whose entry points cannot be read.

    Attributes:
        kind: a key of GROUPS.
        name: what the user types; it and the value are empty if the entry points cannot be read.
        value: ``module:object``.
        distribution: normalised name (lower case, hyphens), as in the switch.
        version: of the distribution.
        error: what is wrong with the metadata, as a sentence; None if nothing is.
    """

    kind: str
    name: str
    value: str
    distribution: str
    version: str
    error: str | None = None

    def __str__(self) -> str:
        by = f'of {self.distribution} {self.version}'
        return f"{self.kind} plugin '{self.name}' {by} ({self.value})" if self.name else f'{self.kind} plugins {by}'


_loaded: dict[Entry, Any] = {}
_failed: dict[Entry | str, BaseException] = {}  # also by the name of a module


def refresh() -> None:
    """Read the installed packages anew at the next call, and try failed plug-ins again; what is loaded stays."""
    importlib.invalidate_caches()  # else a package installed a moment ago may not be seen
    _scan.cache_clear()
    _failed.clear()


def find_plugins(kind: str | None = None) -> tuple[Entry, ...]:
    """All plug-ins of a kind (None: of every kind), disabled and broken ones too; imports nothing.

    Sorted by kind, name and distribution. The installed packages are read at the first call; see :func:`refresh`.
    """
    return tuple(entry for entry in _scan() if kind in (None, entry.kind) and entry.distribution != _OURS)


def our_names(kind: str) -> list[str]:
    """Names of ours, sorted.

    Raises:
        ImportError: this package is on the path, but not installed.
    """
    found = [entry.name for entry in _scan() if (entry.kind, entry.distribution) == (kind, _OURS)]
    if not found and kind != 'model':
        raise ImportError(
            'ccl_timm is on the path but not installed: run `pip install -e .` beside its pyproject.toml.'
        )
    return found


def version() -> str:
    """The version of this package.

    Raises:
        ImportError: it is on the path, but not installed.
    """
    our_names('loss')
    return importlib.metadata.version(_OURS)


def resource_dir(name: str) -> Path:
    """The path of a top-level folder: inside an installed package, as ``_<name>``, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / f'_{name}'
    return installed if installed.is_dir() else package.parent / name


def plugin_names(kind: str) -> list[str]:
    """Names of plug-ins that can be loaded, sorted: neither disabled, nor broken metadata, nor a name taken twice."""
    return [e.name for e in find_plugins(kind) if _is_enabled(e) and not e.error and not _clash(e)]


def names(kind: str) -> list[str]:
    """Names that :func:`load` knows, sorted."""
    return sorted({*our_names(kind), *plugin_names(kind)})


def load(kind: str, name: str, verify: _Verify | None = None, guard: _Guard = contextlib.nullcontext) -> Any | None:
    """Import the object of this name, and no other.

    Args:
        kind: a key of GROUPS.
        name: of the entry point.
        verify: called as ``verify(name, obj)`` for a plug-in; raises if the object breaks the contract of its kind.
        guard: makes the context manager in which a plug-in is imported.

    Returns:
        The object, or None if there is none of this name.

    Raises:
        PluginLoadError: the plug-in is disabled, its metadata or its import or its contract fails (a failure is
            remembered, the module is not imported again), or two distributions declare the name.
    """
    found = [entry for entry in _scan() if name and (entry.kind, entry.name) == (kind, name)]
    if ours := next((entry for entry in found if entry.distribution == _OURS), None):
        return _import(ours.value, contextlib.nullcontext)
    enabled = [entry for entry in found if _is_enabled(entry)]
    if found and not enabled:
        raise PluginLoadError(
            f'The {found[0]} is disabled by {SWITCH}={os.environ[SWITCH]!r}. '
            f'Unset {SWITCH}, or add {found[0].distribution} to it.'
        )
    return _load(enabled[0], verify, guard) if enabled else None


def load_all(kind: str, verify: _Verify | None = None, guard: _Guard = contextlib.nullcontext) -> dict[str, Any]:
    """Load every enabled plug-in of a kind, as :func:`load` does; one that fails is left out with a warning."""
    loaded = {}
    for entry in filter(_is_enabled, find_plugins(kind)):
        try:
            loaded[entry.name] = _load(entry, verify, guard)
        except PluginLoadError as error:
            warnings.warn(str(error), stacklevel=2)
    return loaded


def used_plugins() -> list[dict[str, str]]:
    """Kind, name, value, distribution and version of the plug-ins that this process has loaded, in that order."""
    return [{key: value for key, value in asdict(entry).items() if key != 'error'} for entry in _loaded]


def state(entry: Entry) -> tuple[str, str | None]:
    """The state of a plug-in and what is wrong with it, as a sentence or None.

    ``'disabled'``, ``'broken'``, ``'clash'`` (its name is taken), ``'loaded'`` or ``'available'``.
    """
    if not _is_enabled(entry):
        return 'disabled', entry.error
    if entry.error or entry in _failed:
        return 'broken', entry.error or describe_error(_failed[entry])
    if clash := _clash(entry):
        return 'clash', clash
    return 'loaded' if entry in _loaded else 'available', None


@functools.cache
def _scan() -> tuple[Entry, ...]:
    # not importlib.metadata.entry_points(): one malformed file of any distribution makes that raise for all
    entries: dict[str, list[Entry]] = {}
    for dist in importlib.metadata.distributions():
        if kinds := _kinds_in(dist):
            name, found = _read(dist, kinds)
            # of two installations of one distribution Python imports the first
            entries.setdefault(name or str(len(entries)), found)
    return tuple(sorted({e for own in entries.values() for e in own}, key=lambda e: (e.kind, e.name, e.distribution)))


def _kinds_in(dist: Distribution) -> list[str]:
    """The kinds whose group the raw text of entry_points.txt mentions, malformed or not."""
    try:
        text = dist.read_text('entry_points.txt') or ''
    except UnicodeDecodeError as error:
        text = bytes(error.object).decode(errors='replace')
    except Exception:
        text = ''  # its owner is unknown
    return [kind for kind, group in GROUPS.items() if group in text]


def _read(dist: Distribution, kinds: list[str]) -> tuple[str, list[Entry]]:
    """Normalised name of a distribution, empty if it cannot be read, and its entries."""
    name, version, file = '', 'unknown', 'METADATA'
    try:
        name = _normalised(dist.metadata['Name'])
        file = 'entry_points.txt'
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # its folder has another name
            dist = importlib.metadata.distribution(name)
        version = dist.version or version
        found = [(k, e.name, e.value) for k in kinds for e in dist.entry_points if e.group == GROUPS[k]]
    except Exception as error:
        reason = f'its {file} cannot be read ({describe_error(error)})'
        shown = name or f'a distribution in {dist.locate_file("")}'
        return name, [Entry(kind, '', '', shown, version, reason) for kind in kinds]
    return name, [Entry(*entry, name, version, _entry_error(*entry)) for entry in found]


def _entry_error(kind: str, name: str, value: str) -> str | None:
    if not _NAME.fullmatch(name):
        return f"the name '{name}' must consist of a letter a-z, then a-z, 0-9 and _"
    return None if _VALUE.fullmatch(value) else f"the value '{value}' must have the form module:object"


def _normalised(name: str | None) -> str:
    if not name:
        raise ValueError('no Name in it')
    return re.sub(r'[-_.]+', '-', name.strip()).lower()


def _is_enabled(entry: Entry) -> bool:
    switch = os.environ.get(SWITCH)
    return switch is None or entry.distribution in (_OURS, *map(_normalised, filter(str.strip, switch.split(','))))


def _clash(entry: Entry) -> str | None:
    same = [e for e in _scan() if e.name and (e.kind, e.name) == (entry.kind, entry.name) and _is_enabled(e)]
    if any(e.distribution == _OURS for e in same):
        return f'ccl_timm has a {entry.kind} of this name'
    if len(same) < 2:
        return None
    by = ' and by '.join(f'{e.distribution} {e.version} ({e.value})' for e in same)
    return (
        f"the {entry.kind} '{entry.name}' is declared by {by}: uninstall one of them, or leave one out, for example "
        f'with {_switch_without({e.distribution for e in same[1:]})}'
    )


def _switch_without(distributions: set[str]) -> str:
    keep = {entry.distribution for entry in find_plugins() if _is_enabled(entry)} - distributions
    return f"{SWITCH}='{','.join(sorted(keep))}'"


def _load(entry: Entry, verify: _Verify | None, guard: _Guard) -> Any:
    if clash := _clash(entry):
        raise PluginLoadError(f'Cannot choose: {clash}.')
    if entry.error:
        raise PluginLoadError(_message(entry, entry.error))
    if entry in _failed:
        raise PluginLoadError(_message(entry, describe_error(_failed[entry]))) from _failed[entry]
    try:
        obj = _loaded[entry] if entry in _loaded else _import(entry.value, guard)
        if verify:
            verify(entry.name, obj)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plug-in must not end the program
        _failed[entry] = error
        _loaded.pop(entry, None)
        raise PluginLoadError(_message(entry, describe_error(error))) from error
    _loaded[entry] = obj
    return obj


def _import(value: str, guard: _Guard) -> Any:
    module, _, path = (text.strip() for text in value.partition('[')[0].partition(':'))
    if module in _failed:  # importing it again would meet names that are registered already
        raise _failed[module]
    try:
        with guard():
            obj = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        _failed[module] = error
        raise
    return functools.reduce(getattr, path.split('.'), obj)


def _message(entry: Entry, cause: str) -> str:
    return (
        f'Cannot load the {entry}: {cause}. Uninstall or repair {entry.distribution}, '
        f'or leave it out with {_switch_without({entry.distribution})}.'
    )


def describe_error(error: BaseException) -> str:
    """A plug-in's exception in one clause: a UserError's text, or the type and text of any other."""
    text = str(error).strip().rstrip('.')
    return text if isinstance(error, UserError) and text else f'{type(error).__name__}: {text}'.rstrip(': ')
