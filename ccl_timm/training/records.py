"""Records: what a run wrote beside its checkpoints, without folders of the machine that it was made on."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from ccl_timm.training import runs
from ccl_timm.yaml_files import dump_yaml

__all__ = ['without_folders', 'write_record']


def without_folders(value: Any) -> Any:
    """A setting or a word of a command without the folders of the machine that it was given on."""
    if not isinstance(value, str):
        return value
    flag, equals, path = value.rpartition('=')
    return f'{flag}{equals}{Path(path).name}' if Path(path).is_absolute() else value


def write_record(run: Path, folder: Path) -> None:
    """Write a run's settings, figures and environment into a folder.

    Args:
        run: has args.yaml; the others as far as they are there.
        folder: exists.

    Raises:
        UserError: the run's files cannot be read; nothing is written.
    """
    settings = {key: without_folders(value) for key, value in runs.read_args(run).items()}
    environment = runs.read_environment(run)
    (folder / 'args.yaml').write_text(dump_yaml(settings), encoding='utf-8')
    for name in ('summary.csv', 'parts.csv'):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    if environment:
        words = shlex.split(environment.get('command', ''))
        environment['command'] = shlex.join(without_folders(word) for word in words)
        environment['recipe'] = without_folders(environment.get('recipe'))
        environment.pop('resumed', None)  # further commands, which a record does not tell of
        (folder / 'environment.json').write_text(json.dumps(environment, indent=2) + '\n', encoding='utf-8')
