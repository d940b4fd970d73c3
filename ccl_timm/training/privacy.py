"""What is private to a machine and an account, taken out of settings and commands before they are published."""

import re
import shlex
from typing import Any

__all__ = ['public_command', 'without_private']

_ACCOUNT = 'wandb_'  # settings of somebody's account
_VERBATIM = {'class_names', 'label_names'}  # names of classes, some of which look like paths: Open Images has /m/01g317

_USER = re.compile(r'//[^/?#\s]*@')
_SECRET = re.compile(r'(?i)([?&][\w-]*(?:token|key|secret|password|signature|sig)=)[^&#\s]+')
# --flag= or key=, then a scheme: of a folder that is a model (local-dir:), a URL (file://) or a data set (hfds/)
_PREFIX = re.compile(r'(?:[\w-]+=)?(?:local-dir:|file://|\w+/(?=[/~]))?')
_ROOT = r'(?:~[\w.-]*|[A-Za-z]:)?[/\\]'
_FOLDER = re.compile(_ROOT + r'.*', re.DOTALL)
_NAME = r'[^\s/\\,;:\'"=()\[\]{}]'
_FOLDER_WITHIN = re.compile(rf'(?<![\w./\\~-])(?!//){_ROOT}(?:{_NAME}+[/\\])+{_NAME}*')


def without_private(value: Any) -> Any:
    """A setting, an argument of a command, or a dict or list of them without what is private.

    Of an absolute folder only the last name stays, also after ``--flag=``, ``key=``, ``local-dir:`` or within a text.
    URLs lose user names, passwords and keys in their query. Settings called ``wandb_...`` are left out. Names of
    classes stay.
    """
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not str(key).startswith(_ACCOUNT)}
        return {key: item if key in _VERBATIM else without_private(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [without_private(item) for item in value]
    return _public_text(value) if isinstance(value, str) else value


def _public_text(text: str) -> str:
    text = _SECRET.sub(r'\1...', _USER.sub('//', text))
    prefix = _PREFIX.match(text).group()
    folder = text[len(prefix) :]
    if _FOLDER.fullmatch(folder):
        return prefix + _last_name(folder)
    return _FOLDER_WITHIN.sub(lambda match: _last_name(match.group()), text)


def _last_name(path: str) -> str:
    return re.split(r'[/\\]', path.rstrip('/\\'))[-1]


def public_command(command: str) -> str:
    """A command line without what is private; empty if it cannot be read."""
    try:
        arguments = shlex.split(command)
    except ValueError:
        return ''
    kept, skipping = [], False
    for argument in arguments:
        skipping = argument.startswith('--wandb-') or (
            skipping and not argument.startswith('-')
        )  # with the flag's values
        if not skipping:
            kept.append(without_private(argument))
    return shlex.join(kept)
