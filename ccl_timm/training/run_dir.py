"""A run's folder: where it lies, what it may not overwrite, what it can go on from, and what it was made with."""

import csv
import io
import json
import math
import os
import platform
import shlex
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ccl_timm import registry
from ccl_timm.console import log_warning
from ccl_timm.console.escape import csv_text
from ccl_timm.data.fingerprint import change
from ccl_timm.errors import UserError
from ccl_timm.training import recipes
from ccl_timm.training.config import TrainConfig, diff_settings
from ccl_timm.training.folder_lock import FolderLock
from ccl_timm.training.yaml_files import dump_yaml, read_yaml

__all__ = [
    'best_row',
    'check_intact',
    'check_same_data',
    'check_same_settings',
    'checkpoint_of',
    'restore_saver',
    'create_folder',
    'environment',
    'folder_of',
    'is_done',
    'resolve_run_dir',
    'planned_epochs',
    'read_args',
    'read_checkpoint',
    'read_environment',
    'read_summary',
    'trim_summary',
    'complete_rows',
    'write_run_files',
    'atomic_write',
]


def resolve_run_dir(config: TrainConfig, name: str, lock: FolderLock) -> tuple[Path, Path | None]:
    """Choose the run's folder and the checkpoint to go on from; creates nothing.

    Args:
        config: ``output``, ``experiment`` and ``resume`` count. The name of an experiment that only a recipe has gets
            a number when it is taken.
        name: default name of the folder, after a time stamp.
        lock: locks the folder if the run in it goes on.

    Returns:
        The folder, and a checkpoint or None.

    Raises:
        UserError: the folder holds a run already, or one of other settings, in use or damaged, or there is nothing to
            go on from.
    """
    if config.resume == 'auto' and not config.experiment:
        raise UserError('--resume auto needs --experiment NAME: the run with that name goes on, or begins.')
    folder = _named_folder(config, name)
    checkpoint = None
    if config.resume and config.resume != 'auto':
        checkpoint = Path(config.resume)
        read_checkpoint(checkpoint)
        check_intact(checkpoint)
    if not is_run_dir(folder):
        return folder, checkpoint
    if checkpoint and config.experiment and checkpoint.resolve().parent != folder.resolve():
        raise UserError(f"'{folder}' holds another run than '{checkpoint}' is of: give another --experiment.")
    if config.experiment and config.resume:
        _lock(lock, folder)
        check_same_settings(config, folder)
        read_summary(folder)  # a damaged one is said before anything is written
        return folder, checkpoint or newest_checkpoint(folder)
    if is_named(config):
        raise UserError(
            f"'{folder}' already holds a run: give --resume auto to go on with it, or another --experiment."
        )
    return _free_folder(folder), checkpoint


def _named_folder(config: TrainConfig, name: str) -> Path:
    experiment = config.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{name}'
    output = config.output or os.path.join('output', 'train')
    if Path(experiment).is_absolute() or {'..', '.'} & set(experiment.split(os.sep)) or '\0' in experiment + output:
        raise UserError(
            f'--experiment {experiment!r} must be a name of a folder below --output, such as resnet18-cc: '
            'choose the place with --output.'
        )
    return Path(output, experiment)


def is_named(config: TrainConfig) -> bool:
    """Whether the run must lie in the folder of its name, and in no other with a number added."""
    return bool(config.experiment) and (config.resume == 'auto' or config.source('experiment') == 'cli')


def _lock(lock: FolderLock, folder: Path) -> None:
    if not lock.take(folder):
        raise UserError(
            f"The run in '{folder}' is in use by another process: wait until that has ended, or give another "
            '--experiment.'
        )


def is_run_dir(folder: Path) -> bool:
    """Whether a folder holds (part of) a run."""
    names = ('args.yaml', 'summary.csv', 'environment.json')
    return any((folder / name).exists() for name in names) or any(folder.glob('*.pth.tar'))


def _free_folder(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        free, number = folder.with_name(f'{folder.name}-{number}'), number + 1
    return free


def check_same_settings(config: TrainConfig, folder: Path) -> None:
    """Raise a UserError unless a run's folder was made with these settings, as far as they change what is computed."""
    changed = diff_settings({'train_fraction': None, **read_args(folder)}, config.settings())
    if changed:
        raise UserError(
            f"'{folder}' holds a run of other settings ({', '.join(changed[:3])}): give the same settings to go on "
            'with it, or another --experiment.'
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The intact checkpoint of the highest epoch: neither a kill while one is written nor bit rot loses the run."""
    found = []
    for path in [folder / 'last.pth.tar', folder / 'tmp.pth.tar', *folder.glob('checkpoint-*.pth.tar')]:
        try:
            found.append((read_checkpoint(path)['epoch'], path.name == 'last.pth.tar', path))
        except UserError:
            continue
    for *_, path in sorted(found, reverse=True):
        try:
            check_intact(path)
        except UserError as error:
            log_warning(f'{error} An older one is used.')
            continue
        return path
    return None


def check_intact(path: Path) -> None:
    """Raise a UserError if a checkpoint's check sums do not agree with its content, which is read in full."""
    if not zipfile.is_zipfile(path):
        return  # written by an old torch, without check sums
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        damaged = _first_line(error)
    if damaged:
        raise UserError(f"'{path}' is damaged ({damaged}): take another checkpoint, or a copy of this one.")


def restore_saver(saver: CheckpointSaver, checkpoint: Path) -> None:
    """Let a saver go on where that of a checkpoint stopped, also if it was stopped while it saved.

    timm's saver writes a checkpoint, then its numbered copy, then the copy that is the best. A run killed in between
    would rank its checkpoints in another way than one that was not, or keep no best one: the copies are made up for.
    """
    saver.load_state_dict_from_checkpoint(str(checkpoint))
    content = read_checkpoint(checkpoint)
    epoch, metric = content['epoch'], content.get('metric')
    copy = saver._checkpoint_path(epoch)
    if metric is not None and not os.path.exists(copy):
        full = len(saver.checkpoint_files) >= saver.max_history
        if not full or saver.cmp(metric, saver.checkpoint_files[-1][1]):
            if full:
                saver._cleanup_checkpoints(1)
            saver._duplicate(str(checkpoint), copy)
            saver._track_checkpoint(copy, epoch, metric, update_best_file=False)
    best = Path(saver.checkpoint_dir) / 'model_best.pth.tar'
    its_copy = saver._checkpoint_path(saver.best_epoch)
    if os.path.exists(its_copy) and _epoch_of(best) != saver.best_epoch:
        saver._duplicate(its_copy, str(best))


def _epoch_of(path: Path) -> int | None:
    try:
        return read_checkpoint(path)['epoch']
    except UserError:
        return None


def checkpoint_of(source: Path) -> Path:
    """The checkpoint that a run's folder stands for, its best one; a file stands for itself.

    Raises:
        UserError: there is no such folder or file, or no checkpoint in it.
    """
    if source.is_file():
        return source
    for name in ('model_best.pth.tar', 'last.pth.tar'):
        if (source / name).is_file():
            return source / name
    what = 'holds no checkpoint (model_best.pth.tar or last.pth.tar)' if source.is_dir() else 'does not exist'
    raise UserError(f"'{source}' {what}: name the folder of a finished run, such as output/train/NAME.")


def folder_of(source: Path) -> Path:
    """A run's folder, given that or a checkpoint in it."""
    return source if source.is_dir() else source.parent


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint, tensors memory-mapped, without unpickling anything but plain types.

    Raises:
        UserError: the file does not exist or is not a training checkpoint.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint '{path}'.")
    try:
        content = load_checkpoint_metadata(path)
    except Exception as error:  # a damaged file fails in any of the layers that read it
        raise UserError(f"'{path}' is not a readable training checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict) or not {'state_dict', 'epoch'} <= content.keys():
        raise UserError(f"'{path}' is not a training checkpoint: it has no model and epoch of a run in it.")
    return content


def read_args(folder: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        UserError: the folder has none, or its args.yaml is damaged.
    """
    path = folder / 'args.yaml'
    if not path.is_file():
        raise UserError(f"'{folder}' has no args.yaml: it is not the folder of a run.")
    settings = read_yaml(path)
    if not isinstance(settings, dict) or not isinstance(settings.get('model'), str):
        raise UserError(f"'{folder}' has an args.yaml that is not a run's: it does not name a model. Restore a copy.")
    return settings


def _parsed(path: Path, form: str, parse: Callable[[str], Any]) -> Any:
    """What a file of a run says.

    Raises:
        UserError: it is damaged.
    """
    try:
        return parse(path.read_text(encoding='utf-8'))
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{path}' is not {form}: {_first_line(error)}. Restore a copy of it.") from error


def read_summary(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's summary.csv, oldest first; empty where the run has none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / 'summary.csv'
    return _parsed(path, 'a table of epochs', _numbers) if path.is_file() else []


def _numbers(text: str) -> list[dict[str, float]]:
    rows = []
    lines = list(csv.DictReader(io.StringIO(text, newline='')))
    for index, line in enumerate(lines):
        try:
            row = {key: float(value) for key, value in line.items() if value}
            int(row['epoch'])
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            if index + 1 == len(lines) and not text.endswith('\n'):
                break  # cut while it was written
            raise ValueError(f'row {index + 1} is no epoch with its numbers') from error
        rows.append(row)
    return rows


def trim_summary(folder: Path, epochs: int) -> None:
    """Leave in a run's summary.csv one row for each of so many epochs: those after them will be run again.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / 'summary.csv'
    if not read_summary(folder):
        path.unlink(missing_ok=True)
        return
    with path.open(newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        rows = {int(float(row['epoch'])): row for row in reader if row['epoch'] and float(row['epoch']) < epochs}
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, reader.fieldnames)
    writer.writeheader()
    writer.writerows(rows.values())
    atomic_write(path, text.getvalue())


def complete_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's summary.csv without one that was cut while it was written, which has no end."""
    return [row for row in read_summary(folder) if 'lr' in row]


# of environment.json, what is read again
_ENVIRONMENT = {'command': str, 'versions': dict, 'resumed': list, 'data_fingerprint': str}


def read_environment(folder: Path) -> dict[str, Any]:
    """What a run was made with, from its environment.json; empty without one.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / 'environment.json'
    if not path.is_file():
        return {}
    content = _parsed(path, 'JSON', json.loads)
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is not a run's: it holds no names and values. Restore a copy of it.")
    for name, kind in _ENVIRONMENT.items():
        if not isinstance(content.get(name, kind()), kind):
            raise UserError(f"'{path}' is not a run's: its {name} is {content[name]!r}. Restore a copy of it.")
    return content


def planned_epochs(settings: dict[str, Any]) -> int:
    """Epochs that a run of these settings has when it is done, unless its patience ends before."""
    more = settings.get('warmup_epochs', 0) if settings.get('warmup_prefix') else 0
    return settings['epochs'] + settings.get('cooldown_epochs', 0) + more


def is_done(rows: list[dict[str, float]], settings: dict[str, Any]) -> bool:
    """Whether rows of a summary are those of all epochs, or of those that the setting ``patience`` left.

    Args:
        rows: of :func:`complete_rows`.
        settings: the run's.
    """
    if not rows:
        return False
    last, patience = rows[-1]['epoch'], settings.get('patience')
    if last + 1 >= planned_epochs(settings):
        return True
    best = best_row(rows, settings.get('eval_metric', 'top1'))
    return patience is not None and bool(best) and last - best['epoch'] > patience


def best_row(rows: list[dict[str, float]], metric: str) -> dict[str, float]:
    """The row of the epoch that a run's best checkpoint is of; empty where nothing was measured.

    Args:
        rows: of :func:`read_summary`.
        metric: the setting ``eval_metric``.
    """
    measured = [row for row in rows if math.isfinite(row.get(f'eval_{metric}', math.nan))]
    if not measured:
        return {}
    choose = min if metric == 'loss' else max  # of equal ones the first, as timm's saver does
    return choose(measured, key=lambda row: row[f'eval_{metric}'])


def create_folder(folder: Path, lock: FolderLock, named: bool) -> Path:
    """Create a new run's folder and lock it; other files may lie there, but no run.

    Args:
        folder: from :func:`resolve_run_dir`.
        lock: that locks it.
        named: as :func:`is_named` tells; else, if another run has taken the folder meanwhile, the next free name is
            taken.

    Raises:
        UserError: another run has taken the folder meanwhile.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if named:
            _lock(lock, folder)
        if (named or lock.take(folder)) and not is_run_dir(folder):
            return folder
        if named:
            raise UserError(f"'{folder}' was filled by another run meanwhile: give --resume auto to go on with that.")
        folder = _free_folder(folder)


_CHANGED = {
    'files': "The data changed since the run in '{}' began.",
    'contents': "Images or the validation data changed since the run in '{}' began, under the same training names.",
}


def check_same_data(folder: Path, class_names: list[str] | None, fingerprint: str, held_out: bool) -> list[str]:
    """Compare the data of a run with that it is to go on with.

    Returns:
        Sentences to warn with.

    Raises:
        UserError: the classes are others, or a held-out share would be drawn anew.
    """
    before = read_args(folder).get('class_names')
    if before and class_names and before != class_names:
        raise UserError(f"The classes are no longer those of the run in '{folder}': give another --experiment.")
    recorded = read_environment(folder).get('data_fingerprint')
    changed = change(recorded, fingerprint) if recorded else 'none'
    if changed == 'unknown':
        return [
            f"The run in '{folder}' began under a version that recorded only names and sizes of its training images. "
            'They are the same; whether images or the validation data were replaced is not known.'
        ]
    if changed == 'files' and held_out:
        raise UserError(
            f"The data changed since the run in '{folder}' began, and with it which images --val-fraction holds out: "
            'give another --experiment.'
        )
    return [_CHANGED[changed].format(folder)] if changed in _CHANGED else []


def write_run_files(
    folder: Path,
    settings: dict[str, Any],
    information: dict[str, Any],
    held_out: list[tuple[str, str]] | None,
    continues: bool,
) -> None:
    """Write what the run is made of.

    Args:
        folder: the run's, which exists.
        settings: of the script, as they were given; args.yaml holds them, a recipe that repeats the run.
        information: for environment.json.
        held_out: with a held-out share, the name and part of each training image, for split.csv.
        continues: the run goes on: what it began with stays.
    """
    before = read_environment(folder) if continues else {}
    if before:
        information = _continued(before, information)
    else:
        information = {'recipe': settings.get('config'), **information}
        kept = {key: value for key, value in settings.items() if key != 'config'}
        kept['device_modules'] = recipes.with_autoload(kept.get('device_modules'))
        atomic_write(folder / 'args.yaml', dump_yaml({**kept, 'resume': ''}))
    atomic_write(folder / 'environment.json', json.dumps(information, indent=2) + '\n')
    if held_out:
        text = io.StringIO(newline='')
        rows = [('file', 'part'), *held_out]
        csv.writer(text, lineterminator='\n').writerows(map(csv_text, row) for row in rows)
        atomic_write(folder / 'split.csv', text.getvalue())


def atomic_write(path: Path, text: str) -> None:
    """Write a whole file or none: a kill leaves no half of one."""
    beside = path.with_name(f'{path.name}.tmp')
    beside.write_text(text, encoding='utf-8')
    beside.replace(path)


def _continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {**before, 'resumed': [*before.get('resumed', []), now]}


def environment(argv: list[str], device: str, fingerprint: str) -> dict[str, Any]:
    """What a run was made with: command, versions, commit, device, plugins, data."""
    import ccl_timm

    return {
        'command': shlex.join(['timm', 'train.py', *argv]),
        'started': datetime.now().astimezone().isoformat(timespec='seconds'),
        'versions': {
            'ccl_timm': ccl_timm.__version__,
            'timm': timm.__version__,
            'torch': torch.__version__,
            'torchvision': torchvision.__version__,
            'python': platform.python_version(),
        },
        'git_commit': _git_commit(),
        'platform': platform.platform(),
        'threads': torch.get_num_threads(),
        'processes': int(os.environ.get('WORLD_SIZE', 1)),
        'device': _device_name(device),
        'plugins': registry.used_plugins(),
        'data_fingerprint': fingerprint,
    }


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return None
    command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=40']
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _device_name(device: str) -> str:
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(torch.device(device))
    return f'{device} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)'


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
