"""Other people's models and losses: found through entry points, listed without import, loaded by name.

The name of an entry point is what a user types, its value is ``module:object``. Our own models and losses are not
here: they stand in tables in ``ccl_timm.models`` and ``ccl_timm.losses``.
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
from typing import Any

from ccl_timm.errors import PluginLoadError, UserError

__all__ = [
    'GROUPS',
    'SWITCH',
    'Plugin',
    'describe',
    'find_plugins',
    'load_all',
    'load_plugin',
    'plugin_names',
    'refresh',
    'used_plugins',
]

# kind -> entry point group
GROUPS = {'model': 'ccl_timm.models', 'loss': 'ccl_timm.losses'}
# environment variable. Unset: all plugins. Empty: none. 'dist-a,dist-b': those of these distributions only
SWITCH = 'CCL_TIMM_PLUGINS'

_OWN_DISTRIBUTION = 'ccl-timm'
_NAME_RULES = {
    'model': (re.compile(r'[a-z0-9_]+'), 'a-z, 0-9 and _'),
    'loss': (re.compile(r'[a-z][a-z0-9_]*'), 'a letter a-z, then a-z, 0-9 and _'),
}
# the metadata specification allows spaces round the colon and extras, which consumers may ignore
_VALUE = re.compile(r'(?P<module>[\w.]+)\s*:\s*(?P<object>[\w.]+)\s*(\[.*\])?')

_Verify = Callable[[str, Any], None]
_Guard = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed distribution, or a distribution whose entry points cannot be read.

    Attributes:
        kind: a key of GROUPS.
        name: what the user types; empty if the entry points cannot be read.
        value: ``module:object``; empty likewise.
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
        by = f'{self.distribution} {self.version}'
        if not self.name:
            return f'{self.kind} plugins of {by}'
        return f"{self.kind} plugin '{self.name}' of {by} ({self.value})"


_loaded: dict[Plugin, Any] = {}
_failed: dict[Plugin, BaseException] = {}
_failed_modules: dict[str, BaseException] = {}
_warned: set[str] = set()


def find_plugins(kind: str | None = None) -> tuple[Plugin, ...]:
    """Return all plugins of a kind (None: of every kind), disabled and broken ones too, without importing any.

    Sorted by kind, name and distribution. The installed packages are read at the first call; see :func:`refresh`.
    """
    return tuple(plugin for plugin in _scan() if kind in (None, plugin.kind))


def refresh() -> None:
    """Read the installed packages anew at the next call, and try failed plugins again; what is loaded stays."""
    importlib.invalidate_caches()  # else a package installed a moment ago may not be seen
    _scan.cache_clear()
    _failed.clear()
    _failed_modules.clear()
    _warned.clear()


def plugin_names(kind: str) -> list[str]:
    """Names that can be loaded, sorted: neither disabled, nor of broken metadata, nor declared twice."""
    return [p.name for p in find_plugins(kind) if _enabled(p) and not p.error and not _clash(p)]


def load_plugin(
    kind: str, name: str, verify: _Verify | None = None, guard: _Guard = contextlib.nullcontext
) -> Any | None:
    """Import the plugin of this name, and no other.

    Args:
        kind: a key of GROUPS.
        name: of the entry point.
        verify: called as ``verify(name, obj)``; raises if the object breaks the contract of its kind.
        guard: makes the context manager in which the import happens.

    Returns:
        The object, or None if no plugin has this name.

    Raises:
        PluginLoadError: the plugin is disabled, its metadata or its import or its contract fails (a failure is
            remembered, the module is not imported again), or two distributions declare the name.
    """
    found = [plugin for plugin in find_plugins(kind) if name and plugin.name == name]
    if not found:
        return None
    enabled = [plugin for plugin in found if _enabled(plugin)]
    if not enabled:
        first = found[0]
        raise PluginLoadError(
            f'The {first} is disabled by {SWITCH}={os.environ[SWITCH]!r}. '
            f'Unset {SWITCH}, or add {first.distribution} to it.'
        )
    return _load(enabled[0], verify, guard)


def load_all(kind: str, verify: _Verify | None = None, guard: _Guard = contextlib.nullcontext) -> dict[str, Any]:
    """Load every enabled plugin of a kind; one that fails is left out with a warning, once.

    Args:
        kind: a key of GROUPS.
        verify: see :func:`load_plugin`.
        guard: likewise, entered for each plugin.

    Returns:
        Name -> object.
    """
    loaded = {}
    for plugin in find_plugins(kind):
        if not _enabled(plugin):
            continue
        try:
            loaded[plugin.name] = _load(plugin, verify, guard)
        except PluginLoadError as error:
            if str(error) not in _warned:
                _warned.add(str(error))
                warnings.warn(str(error), stacklevel=2)
    return loaded


def used_plugins() -> list[dict[str, str]]:
    """Kind, name, value, distribution and version of all that this process has loaded, in that order."""
    return [{key: value for key, value in asdict(plugin).items() if key != 'error'} for plugin in _loaded]


def describe(
    check: Callable[[str, str], Any] | None = None,
    reserved: Callable[[str, str], str | None] = lambda kind, name: None,
) -> list[dict[str, str | None]]:
    """Return a row for each plugin: the fields of :class:`Plugin`, ``state``, and ``error`` (a sentence or None).

    States: available, loaded, disabled, clash (the name is taken, or two distributions declare it), broken. Nothing is
    imported without ``check``.

    Args:
        check: called as ``check(kind, name)`` for what is available or loaded; loads and verifies it. If it raises,
            the state is broken.
        reserved: ``reserved(kind, name)`` says in a sentence that timm or ccl-timm has this name, else None.
    """
    rows = []
    for plugin in find_plugins():
        state, error = _state(plugin, reserved)
        if check and state in ('available', 'loaded'):
            try:
                check(plugin.kind, plugin.name)
                state = 'loaded' if plugin in _loaded else state
            except KeyboardInterrupt:
                raise
            except BaseException as failure:
                state, error = 'broken', _sentence(failure)
        rows.append({**asdict(plugin), 'state': state, 'error': error})
    return rows


def _state(plugin: Plugin, reserved: Callable[[str, str], str | None]) -> tuple[str, str | None]:
    if not _enabled(plugin):
        return 'disabled', plugin.error
    if plugin.error:
        return 'broken', plugin.error
    if clash := _clash(plugin):
        return 'clash', clash
    if plugin in _failed:
        return 'broken', _sentence(_failed[plugin])
    if plugin in _loaded:
        return 'loaded', None
    if _module(plugin) in map(_module, _loaded):
        return 'available', None  # the names that this module registered when it was imported are its own
    taken = reserved(plugin.kind, plugin.name)
    return ('clash', taken) if taken else ('available', None)


def _module(plugin: Plugin) -> str:
    return plugin.value.partition(':')[0].strip()


@functools.cache
def _scan() -> tuple[Plugin, ...]:
    # not importlib.metadata.entry_points(): one malformed file of any distribution makes that raise for all
    plugins: set[Plugin] = set()
    seen = {_OWN_DISTRIBUTION}
    for dist in importlib.metadata.distributions():
        kinds = _kinds_in(dist)
        if not kinds:
            continue
        try:
            name = _distribution_name(dist)
        except Exception as error:
            where = f'a distribution in {dist.locate_file("")}'
            plugins.update(Plugin(kind, '', '', where, 'unknown', _unreadable('METADATA', error)) for kind in kinds)
            continue
        if name not in seen:
            seen.add(name)
            plugins.update(_plugins_of(name, _first_of(name, dist)))
    return tuple(sorted(plugins, key=lambda p: (p.kind, p.name, p.distribution, p.value)))


def _kinds_in(dist: Distribution) -> list[str]:
    """The kinds whose group the raw text of entry_points.txt mentions, malformed or not."""
    try:
        text = dist.read_text('entry_points.txt') or ''
    except UnicodeDecodeError as error:
        text = bytes(error.object).decode(errors='replace')
    except Exception:
        text = ''  # whose it is cannot be told
    return [kind for kind, group in GROUPS.items() if group in text]


def _first_of(name: str, dist: Distribution) -> Distribution:
    # an older installation of the same distribution further down sys.path is not the one that Python imports
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return dist  # its folder is named in another way


def _plugins_of(name: str, dist: Distribution) -> list[Plugin]:
    kinds = _kinds_in(dist)
    version = 'unknown'
    try:
        version = dist.metadata.get('Version') or version
        entries = list(dist.entry_points)
    except Exception as error:
        return [Plugin(kind, '', '', name, version, _unreadable('entry_points.txt', error)) for kind in kinds]
    return [
        Plugin(kind, entry.name, entry.value, name, version, _entry_error(kind, entry.name, entry.value))
        for kind in kinds
        for entry in entries
        if entry.group == GROUPS[kind]
    ]


def _entry_error(kind: str, name: str, value: str) -> str | None:
    rule, words = _NAME_RULES[kind]
    if not rule.fullmatch(name):
        return f"the name '{name}' must consist of {words}"
    if not _VALUE.fullmatch(value):
        return f"the value '{value}' must have the form module:object"
    return None


def _unreadable(file: str, error: Exception) -> str:
    return f'its {file} cannot be read ({_sentence(error)})'


def _distribution_name(dist: Distribution) -> str:
    name = dist.metadata.get('Name')
    if not name:
        raise ValueError('no Name in it')
    return _normalised(name)


def _normalised(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name.strip()).lower()


def _enabled(plugin: Plugin) -> bool:
    switch = os.environ.get(SWITCH)
    return switch is None or plugin.distribution in map(_normalised, switch.split(','))


def _clash(plugin: Plugin) -> str | None:
    same = [p for p in find_plugins(plugin.kind) if p.name == plugin.name and p.name and _enabled(p)]
    if len(same) < 2:
        return None
    by = ' and by '.join(f'{p.distribution} {p.version} ({p.value})' for p in same)
    keep = _switch_without({p.distribution for p in same[1:]})
    return (
        f"the {plugin.kind} '{plugin.name}' is declared by {by}: uninstall one of them, "
        f'or leave one out, for example with {keep}'
    )


def _switch_without(distributions: set[str]) -> str:
    keep = {p.distribution for p in find_plugins() if _enabled(p)} - distributions
    return f"{SWITCH}='{','.join(sorted(keep))}'"


def _load(plugin: Plugin, verify: _Verify | None, guard: _Guard) -> Any:
    if clash := _clash(plugin):
        raise PluginLoadError(f'Cannot choose: {clash}.')
    if plugin.error:
        raise PluginLoadError(_message(plugin, plugin.error))
    if plugin in _failed:
        raise PluginLoadError(_message(plugin, _sentence(_failed[plugin]))) from _failed[plugin]
    try:
        obj = _loaded[plugin] if plugin in _loaded else _import(plugin.value, guard)
        if verify:
            verify(plugin.name, obj)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plug-in must not end the program
        _failed[plugin] = error
        _loaded.pop(plugin, None)
        raise PluginLoadError(_message(plugin, _sentence(error))) from error
    _loaded[plugin] = obj
    return obj


def _import(value: str, guard: _Guard) -> Any:
    match = _VALUE.fullmatch(value)
    module = match['module']
    if module in _failed_modules:
        # another plugin's module too: importing it again would meet names that are registered already
        raise _failed_modules[module]
    try:
        with guard():
            obj = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        _failed_modules[module] = error
        raise
    return functools.reduce(getattr, match['object'].split('.'), obj)


def _message(plugin: Plugin, cause: str) -> str:
    return (
        f'Cannot load the {plugin}: {cause}. Uninstall or repair {plugin.distribution}, '
        f'or leave it out with {_switch_without({plugin.distribution})}.'
    )


def _sentence(error: BaseException) -> str:
    text = str(error).strip().rstrip('.')
    return text if isinstance(error, UserError) and text else f'{type(error).__name__}: {text}'.rstrip(': ')
