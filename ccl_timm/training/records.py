"""Records: what a run wrote beside its checkpoints, without what is private to the machine and the account."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from ccl_timm.training import parts, run_dir
from ccl_timm.training.yaml_files import dump_yaml

__all__ = ['without_private', 'write_record']

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
    """A setting, a word of a command, or a dict or list of them without what is private.

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


def _public_command(command: str) -> str:
    """A command line without what is private; empty if it cannot be read."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ''
    kept, skipping = [], False
    for word in words:
        skipping = word.startswith('--wandb-') or (skipping and not word.startswith('-'))  # with the flag's values
        if not skipping:
            kept.append(without_private(word))
    return shlex.join(kept)


def write_record(run: Path, folder: Path) -> None:
    """Write a run's settings, figures and environment into a folder.

    Args:
        run: has args.yaml; the others as far as they are there.
        folder: exists.

    Raises:
        UserError: the run's files cannot be read; nothing is written.
    """
    settings = without_private(run_dir.read_args(run))
    run_dir.read_summary(run)  # a damaged one is not copied
    environment, measured = run_dir.read_environment(run), parts.read_parts(run)
    (folder / 'args.yaml').write_text(dump_yaml(settings), encoding='utf-8')
    if (run / 'summary.csv').is_file():
        shutil.copyfile(run / 'summary.csv', folder / 'summary.csv')
    for row in measured:
        parts.add_part(folder, without_private(row))
    if environment:
        environment.pop('resumed', None)  # further commands, which a record does not tell of
        command = _public_command(str(environment.get('command', '')))
        environment = {**without_private(environment), 'command': command}
        (folder / 'environment.json').write_text(json.dumps(environment, indent=2) + '\n', encoding='utf-8')
