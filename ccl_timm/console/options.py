"""Settings as frozen dataclasses whose fields are declared once: the parser and the checks of a file follow from them.

A field's name is the flag's (``--batch-size`` for ``batch_size``) and the key in recipes and in args.yaml::

    @dataclass(frozen=True, kw_only=True)
    class LoaderConfig(Options, title='loading'):
        batch_size: int = option(128, COUNT, '-b', help='images per step and process')
"""

import argparse
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ccl_timm.console.arguments import KeyValues, Parser

__all__ = ['Options', 'option']


def option(
    default: Any,
    type: Callable[[Any], Any] | None = None,
    *flags: str,
    help: str = '',
    varies: str = '',
    own: bool = False,
    **parsing: Any,
) -> Any:
    """Declare a setting.

    Args:
        default: a bool makes a switch, a dict takes ``NAME=VALUE`` pairs.
        type: converts and checks one value; None for text.
        *flags: further flags, such as ``'-b'``.
        help: for ``--help``.
        varies: the kind of difference that another value makes between two runs: ``''`` a different result,
            ``'nothing'`` none (where it is written, how it is shown), ``'seed'``, ``'budget'`` (how long and how fast
            it is trained), ``'method'`` (model and loss).
        own: timm's train.py does not have the flag.
        **parsing: ``nargs``, ``choices``, ``metavar``, ``const`` as of argparse.
    """
    metadata = {'type': type, 'flags': flags, 'help': help, 'varies': varies, 'own': own, 'parsing': parsing}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of a group of settings. A class may combine several groups by inheriting from them."""

    title: ClassVar[str] = ''

    def __init_subclass__(cls, title: str = '', **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.title = title

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field]:
        """The settings by name, in the order of their declaration."""
        return {field.name: field for field in dataclasses.fields(cls) if field.metadata}

    @classmethod
    def names(cls, **facts: Any) -> list[str]:
        """Names of the settings that were declared with these facts, such as ``own=True`` or ``varies='seed'``."""
        found = cls.options().items()
        return [name for name, own in found if all(own.metadata[key] == fact for key, fact in facts.items())]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of each setting."""
        return {name: _default(field) for name, field in cls.options().items()}

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Add a flag for each setting, group by group; what is not given is absent from the parser's result."""
        known = cls.options()
        for group in cls.__mro__[::-1]:
            own = [name for name in inspect.get_annotations(group) if name in known]
            arguments = parser.add_argument_group(group.title) if own else parser
            for name in own:
                _add_argument(arguments, known[name])

    @classmethod
    def checked(cls, name: str, value: Any) -> Any:
        """A setting's value from a file or from Python, in the type of its flag.

        Raises:
            ValueError: it does not fit, with the reason.
        """
        field = cls.options()[name]
        try:
            return _checked(field, value)
        except (argparse.ArgumentTypeError, TypeError) as error:
            raise ValueError(str(error)) from error

    @classmethod
    def of(cls, settings: dict[str, Any], **changed: Any) -> 'Options':
        """The group's settings out of all that a run recorded; others are left out, missing ones get their default."""
        return cls(**{name: value for name, value in {**settings, **changed}.items() if name in cls.options()})

    def settings(self) -> dict[str, Any]:
        """All settings by name, as plain types."""
        return {name: getattr(self, name) for name in self.options()}


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _add_argument(arguments: Any, field: dataclasses.Field) -> None:
    default, facts = _default(field), field.metadata
    flags = [flag for flag in facts['flags'] if not flag.startswith('--')]
    flags += [f'--{field.name.replace("_", "-")}', *(flag for flag in facts['flags'] if flag.startswith('--'))]
    parsing = {'dest': field.name, 'default': argparse.SUPPRESS, 'help': facts['help'] or None}
    if isinstance(default, bool):
        parsing['action'] = 'store_true'
    elif isinstance(default, dict):
        parsing |= {'action': KeyValues, 'nargs': '*', 'metavar': 'K=V'}
    else:
        parsing |= {'type': facts['type'], **facts['parsing']}
    arguments.add_argument(*flags, **parsing)


def _checked(field: dataclasses.Field, value: Any) -> Any:
    default, nargs = _default(field), field.metadata['parsing'].get('nargs')
    if value is None:
        if default is None or default == '':
            return default
        raise ValueError('it needs a value')
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError('it is true or false')
        return value
    if isinstance(default, dict):
        if not isinstance(value, dict):
            raise ValueError('it is a mapping of names to values')
        return value
    if nargs in ('+', '*') or isinstance(nargs, int):
        if not isinstance(value, (list, tuple)) or (isinstance(nargs, int) and len(value) != nargs):
            raise ValueError(f'it is a list{f" of {nargs}" if isinstance(nargs, int) else ""}')
        return [_scalar(field, item) for item in value]
    return _scalar(field, value)


def _scalar(field: dataclasses.Field, value: Any) -> Any:
    convert, choices = field.metadata['type'], field.metadata['parsing'].get('choices')
    if isinstance(value, (bool, list, dict)):
        raise ValueError('it is a number' if convert else 'it is text')
    value = (convert or str)(value)
    if choices and value not in choices:
        raise ValueError(f'it is one of {", ".join(map(repr, choices))}')
    return value
