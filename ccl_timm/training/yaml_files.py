"""YAML as this package reads and writes it: plain types, and YAML 1.2's numbers, so that 1e-6 is one."""

import re
from pathlib import Path
from typing import Any

import yaml

from ccl_timm.errors import UserError

__all__ = ['dump_yaml', 'read_yaml']

_FLOAT_TAG = 'tag:yaml.org,2002:float'
_FLOAT = re.compile(
    r'[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$'
    r'|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$'
)
_MOST_VALUES = 1_000_000  # of a file, with what its aliases repeat


class _Loader(yaml.SafeLoader):
    """Takes for a float what YAML 1.2 does; PyYAML follows YAML 1.1."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag != _FLOAT_TAG]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for a float: other people's scripts read these files, too."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write each list out."""
        return True


for _cls in (_Loader, _Dumper):
    _cls.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list('-+0123456789.'))


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file: nothing but plain types, and no more values than a settings file can have.

    Raises:
        UserError: it is not YAML, or nested too deeply, or its aliases repeat too much.
        OSError: it cannot be read.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding='utf-8'), _Loader)
        values = _count(content, {})
    except RecursionError as error:
        raise UserError(f"'{path}' is not a settings file: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:  # PyYAML lets all of them out
        raise UserError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    if values > _MOST_VALUES:
        raise UserError(f"'{path}' is not a settings file: its aliases repeat more than {_MOST_VALUES} values.")
    return content


def dump_yaml(data: dict[str, Any]) -> str:
    """Settings as YAML that :func:`read_yaml` reads back as they are."""
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=False)


def _count(value: Any, known: dict[int, int]) -> int:
    """Count the values in nested lists and mappings, each as often as it is repeated.

    Raises:
        RecursionError: one holds itself.
    """
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in items)
    return known[id(value)]
