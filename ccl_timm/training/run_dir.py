"""The folder of a run: which one to train in, and everything that is read from it and written to it."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Collection
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from timm.utils import update_summary

from ccl_timm.console import log_info, log_warning
from ccl_timm.console.escape import csv_text
from ccl_timm.data.fingerprint import change
from ccl_timm.errors import UserError, reason, user_errors
from ccl_timm.training import recipes
from ccl_timm.training.checkpoint_files import check_intact, read_checkpoint
from ccl_timm.training.config import TrainConfig, diff_settings
from ccl_timm.training.folder_lock import FolderLock
from ccl_timm.training.yaml_files import dump_yaml, read_yaml

__all__ = ['RunDir', 'atomic_write', 'best_row', 'check_calibration', 'is_done']

_EXTRA_SPLIT = ('split', 'epoch', 'images', 'top1', 'top5', 'loss')  # columns of extra_splits.csv
_LONGEST_NAME = 255  # bytes, in nearly all file systems
_ENVIRONMENT = {'command': str, 'versions': dict, 'resumed': list, 'data_fingerprint': str}  # what is read again
_CHANGED = {
    'files': "The data changed since the run in '{}' began.",
    'contents': "Images or the validation data changed since the run in '{}' began, under the same training names.",
    'unknown': "The run in '{}' began under a version that recorded only names and sizes of its training images. They "
    'are the same; whether images or the validation data were replaced is not known.',
}


class RunDir:
    """The folder of a run: the only reader and writer of its files.

    ``args.yaml`` has the settings, ``summary.csv`` one row per epoch, ``environment.json`` command, versions and
    machine, ``extra_splits.csv`` accuracies on further splits, ``split.csv`` which images were held out,
    ``calibration.json`` a temperature, ``features.json`` measures of the features; timm's checkpoints are beside them.
    As a context manager it releases its lock.

    Args:
        path: of the folder.

    Attributes:
        path: of the folder.
        checkpoint: to resume from; None for a run from the beginning.
        resumes: whether a run that is in the folder is resumed.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.checkpoint: Path | None = None
        self.resumes = False
        self._named = False
        self._lock = FolderLock()

    def __enter__(self) -> 'RunDir':
        return self

    def __exit__(self, *exception) -> None:
        self._lock.release()

    @classmethod
    def of(cls, source: str | os.PathLike) -> 'RunDir':
        """The folder of a run, given that or a file in it."""
        path = Path(source)
        return cls(path if path.is_dir() else path.parent)

    @classmethod
    def choose(cls, config: TrainConfig, default_name: str) -> 'RunDir':
        """Choose the folder to train in and the checkpoint to resume from. Creates nothing; locks a run that resumes.

        Args:
            config: ``output``, ``experiment`` and ``resume`` count. The name of an experiment that only a recipe has
                gets a number when it is taken.
            default_name: of the folder, after a time stamp.

        Raises:
            UserError: the folder holds a run already, or one of other settings, in use or damaged, or there is nothing
                to resume from.
        """
        if config.resume == 'auto' and not config.experiment:
            raise UserError('--resume auto needs --experiment NAME: the run of that name is resumed, or begins.')
        run = cls(_named_folder(config, default_name))
        run._named = bool(config.experiment) and (config.resume == 'auto' or config.source('experiment') == 'cli')
        if config.resume and config.resume != 'auto':
            run.checkpoint = Path(config.resume)
            read_checkpoint(run.checkpoint)
            check_intact(run.checkpoint)
        if run.exists():
            try:
                run._choose_again(config)
            except BaseException:
                run._lock.release()
                raise
        elif config.resume == 'auto':
            log_info(f"there is no run in '{run.path}' to resume: it begins")
        return run

    def _choose_again(self, config: TrainConfig) -> None:
        """Resume the run in the folder, or choose another folder beside it."""
        if self.checkpoint and config.experiment and self.checkpoint.resolve().parent != self.path.resolve():
            raise UserError(f"'{self.path}' holds another run than '{self.checkpoint}': give another --experiment.")
        if config.experiment and config.resume:
            self._take_lock()
            self.check_settings(config)
            self.rows()  # a damaged summary.csv is reported before anything is written
            self.resumes = True
            self.checkpoint = self.checkpoint or self.newest_checkpoint()
        elif self._named:
            raise UserError(
                f"'{self.path}' already holds a run: give --resume auto to resume it, or another --experiment."
            )
        else:
            self.path = _free_path(self.path)

    def exists(self) -> bool:
        """Whether the folder holds (part of) a run."""
        names = ('args.yaml', 'summary.csv', 'environment.json')
        return any((self.path / name).exists() for name in names) or any(self.path.glob('*.pth.tar'))

    def check_settings(
        self,
        config: TrainConfig,
        remedy: str = 'give the same settings to resume it, or another --experiment',
        ignore: Collection[str] = (),
    ) -> None:
        """Raise a UserError unless the run has these settings, as far as they change what is computed.

        Args:
            config: the settings.
            remedy: what a user can do otherwise.
            ignore: settings that may differ all the same.
        """
        changed = diff_settings({'train_fraction': None, **self.settings()}, config.settings(), ignore)
        if changed:
            raise UserError(f"'{self.path}' holds a run of other settings ({', '.join(changed[:3])}): {remedy}.")

    def check_data(self, class_names: list[str] | None, fingerprint: str, held_out: bool) -> list[str]:
        """Compare the run's data with that to resume it with.

        Args:
            class_names: of the data now; None if unknown.
            fingerprint: of the data now.
            held_out: whether a share of the training images is held out.

        Returns:
            Warnings.

        Raises:
            UserError: the classes are others, or a held-out share would be drawn anew.
        """
        before = self.settings().get('class_names')
        if before and class_names and before != class_names:
            raise UserError(f"The classes are no longer those of the run in '{self.path}': give another --experiment.")
        recorded = self.environment().get('data_fingerprint')
        changed = change(recorded, fingerprint) if recorded else 'none'
        if changed == 'files' and held_out:
            raise UserError(
                f"The data changed since the run in '{self.path}' began, and with it which images --val-fraction holds "
                'out: give another --experiment.'
            )
        return [_CHANGED[changed].format(self.path)] if changed in _CHANGED else []

    def begin(
        self,
        settings: dict[str, Any],
        environment: dict[str, Any],
        held_out: list[tuple[str, str]] | None,
        start_epoch: int,
    ) -> None:
        """Create the folder of a new run and write what it is made of, or note that it resumes.

        Args:
            settings: as they were given; args.yaml holds them, a recipe that repeats the run.
            environment: for environment.json.
            held_out: with a held-out share, the name and split of each training image, for split.csv.
            start_epoch: rows of summary.csv from this epoch on are dropped: their epochs are trained again.

        Raises:
            UserError: another run has taken the folder meanwhile.
        """
        if not self.resumes:
            self.create()
        before = self.environment() if self.resumes else {}
        if before:
            environment = {**before, 'resumed': [*before.get('resumed', []), environment]}
        else:
            environment = {'recipe': settings.get('config'), **environment}
            kept = {key: value for key, value in settings.items() if key != 'config'}
            kept |= {'device_modules': recipes.with_autoload(kept.get('device_modules')), 'resume': ''}
            atomic_write(self.path / 'args.yaml', dump_yaml(kept))
        atomic_write(self.path / 'environment.json', json.dumps(environment, indent=2) + '\n')
        if held_out:
            rows = [('file', 'split'), *held_out]
            atomic_write(self.path / 'split.csv', _csv(map(csv_text, row) for row in rows))
        if self.resumes:
            self._trim_summary(start_epoch)

    def create(self) -> None:
        """Create a new run's folder and lock it; other files may be there, but no run.

        If another run has taken the folder meanwhile, the next free name is taken, unless this one was asked for.

        Raises:
            UserError: another run has taken the folder that was asked for.
        """
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._named:
                self._take_lock()
            if (self._named or self._lock.take(self.path)) and not self.exists():
                return
            if self._named:
                raise UserError(
                    f"'{self.path}' was filled by another run meanwhile: give --resume auto to resume that."
                )
            self.path = _free_path(self.path)

    def _take_lock(self) -> None:
        if not self._lock.take(self.path):
            raise UserError(
                f"The run in '{self.path}' is in use by another process: wait until that has ended, or give another "
                '--experiment.'
            )

    def settings(self) -> dict[str, Any]:
        """The run's settings, from args.yaml.

        Raises:
            UserError: the folder has none, or its args.yaml is damaged.
        """
        path = self.path / 'args.yaml'
        if not path.is_file():
            raise UserError(f"'{self.path}' has no args.yaml: it is not the folder of a run.")
        settings = read_yaml(path)
        if not isinstance(settings, dict) or not isinstance(settings.get('model'), str):
            raise UserError(
                f"'{self.path}' has an args.yaml that is not a run's: it does not name a model. Restore a copy."
            )
        return settings

    def rows(self) -> list[dict[str, float]]:
        """The complete rows of summary.csv, oldest first; none where the run has no such file.

        Raises:
            UserError: the file is damaged.
        """
        rows = _parsed(self.path / 'summary.csv', 'a table of epochs', _numbers, [])
        return [row for row in rows if 'lr' in row]  # the last column: a row cut while it was written lacks it

    def add_row(
        self, epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float] | None, lr: float
    ) -> None:
        """Add an epoch to summary.csv, as timm's train.py does."""
        update_summary(epoch, train_metrics, eval_metrics, filename=str(self.path / 'summary.csv'), lr=lr)

    def environment(self) -> dict[str, Any]:
        """What the run was made with, from environment.json; empty without one.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / 'environment.json'
        content = _parsed(path, 'JSON', json.loads, {})
        if not isinstance(content, dict):
            raise UserError(f"'{path}' is not a run's: it holds no names and values. Restore a copy of it.")
        for name, kind in _ENVIRONMENT.items():
            if not isinstance(content.get(name, kind()), kind):
                raise UserError(f"'{path}' is not a run's: its {name} is {content[name]!r}. Restore a copy of it.")
        return content

    def extra_splits(self) -> list[dict[str, Any]]:
        """What was measured on further splits, from extra_splits.csv; none without that file.

        Returns:
            Rows with ``split``, ``epoch`` (counted from 0, as in summary.csv), ``images``, ``top1``, ``top5``,
            ``loss``.

        Raises:
            UserError: the file is not one that :meth:`add_extra_split` wrote.
        """
        path = self.path / 'extra_splits.csv'
        if not path.is_file():
            return []
        try:
            with path.open(newline='', encoding='utf-8') as file:
                rows = list(csv.DictReader(file))
            return [{key: row[key] if key == 'split' else float(row[key]) for key in _EXTRA_SPLIT} for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"'{path}' was not written by `timm validate.py --save-split`: move it away.") from error

    def add_extra_split(self, row: dict[str, Any]) -> Path:
        """Add what was measured on a split to extra_splits.csv, replacing the same split's row of the same epoch.

        Args:
            row: as :meth:`extra_splits` returns them.

        Returns:
            The file's path.

        Raises:
            UserError: there is an extra_splits.csv of another kind.
        """
        known = {(own['split'], own['epoch']): own for own in self.extra_splits()}
        known.pop((row['split'], row['epoch']), None)
        rows = [_EXTRA_SPLIT, *([own[key] for key in _EXTRA_SPLIT] for own in [*known.values(), row])]
        atomic_write(self.path / 'extra_splits.csv', _csv(rows))
        return self.path / 'extra_splits.csv'

    def features(self) -> dict[str, Any]:
        """``split`` and ``epoch`` of which features were measured, and ``measures`` by name; empty if none were.

        Raises:
            UserError: features.json is damaged.
        """
        path = self.path / 'features.json'
        content = _parsed(path, 'JSON', json.loads, {})
        if content and not (isinstance(content, dict) and {'split', 'epoch', 'measures'} <= content.keys()):
            raise UserError(f"'{path}' was not written by `ccl-timm features`: move it away.")
        return content

    def set_features(self, content: dict[str, Any]) -> Path:
        """Write features.json, over that of an earlier call; see :meth:`features`. Returns its path."""
        path = self.path / 'features.json'
        atomic_write(path, json.dumps(content, indent=2) + '\n')
        return path

    def calibration(self, epoch: int, ema: bool) -> dict[str, Any] | None:
        """The temperature fitted for a checkpoint, and on which data, from calibration.json; None if there is none.

        Args:
            epoch: of the checkpoint, counted from 0.
            ema: whether it is of the moving average of the weights.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / 'calibration.json'
        content = _parsed(path, 'JSON', json.loads, None)
        if content is None:
            return None
        found = check_calibration(content, path)
        return found if (content.get('epoch'), content.get('ema')) == (epoch, ema) else None

    def set_calibration(self, calibration: dict[str, Any]) -> Path:
        """Write calibration.json, over that of an earlier fit; see :meth:`calibration`. Returns its path."""
        path = self.path / 'calibration.json'
        atomic_write(path, json.dumps(calibration, indent=2) + '\n')
        return path

    def best_or_last_checkpoint(self) -> Path:
        """The checkpoint to use the run's model from: the best one, else the last.

        Raises:
            UserError: there is no such folder, or no checkpoint in it.
        """
        for name in ('model_best.pth.tar', 'last.pth.tar'):
            if (self.path / name).is_file():
                return self.path / name
        missing = 'holds no checkpoint (model_best.pth.tar or last.pth.tar)' if self.path.is_dir() else 'does not exist'
        raise UserError(f"'{self.path}' {missing}: name the folder of a finished run, such as output/train/NAME.")

    def newest_checkpoint(self) -> Path | None:
        """The intact checkpoint of the highest epoch: neither a kill during writing nor bit rot loses the run."""
        found = []
        for path in [self.path / 'last.pth.tar', self.path / 'tmp.pth.tar', *self.path.glob('checkpoint-*.pth.tar')]:
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

    def _trim_summary(self, epochs: int) -> None:
        """Leave one row for each of this many epochs."""
        path = self.path / 'summary.csv'
        lines = list(csv.DictReader(io.StringIO(path.read_text(encoding='utf-8')))) if self.rows() else []
        rows = {int(float(row['epoch'])): row for row in lines if row['epoch'] and float(row['epoch']) < epochs}
        if not rows:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline='')
        writer = csv.DictWriter(text, lines[0])
        writer.writeheader()
        writer.writerows(rows.values())
        atomic_write(path, text.getvalue())


def is_done(rows: list[dict[str, float]], settings: dict[str, Any]) -> bool:
    """Whether all epochs of a run were trained, or those that its ``patience`` left.

    Args:
        rows: of :meth:`RunDir.rows`.
        settings: the run's.
    """
    if not rows:
        return False
    last, patience = rows[-1]['epoch'], settings.get('patience')
    if last + 1 >= TrainConfig.of(settings).planned_epochs:
        return True
    best = best_row(rows, settings.get('eval_metric', 'top1'))
    return patience is not None and bool(best) and last - best['epoch'] >= patience


def best_row(rows: list[dict[str, float]], metric: str) -> dict[str, float]:
    """The row of the epoch of a run's best checkpoint; empty where nothing was measured.

    Args:
        rows: of :meth:`RunDir.rows`.
        metric: the setting ``eval_metric``.
    """
    measured = [row for row in rows if math.isfinite(row.get(f'eval_{metric}', math.nan))]
    if not measured:
        return {}
    choose = min if metric == 'loss' else max  # of equal ones the first, as timm's saver does
    return choose(measured, key=lambda row: row[f'eval_{metric}'])


def check_calibration(content: Any, source: str | os.PathLike) -> dict[str, Any]:
    """What a file says of a model's temperature: ``temperature``, ``data``, ``split``, ``images``, ``fingerprint``.

    Raises:
        UserError: it is not of this form, or the temperature is not above 0.
    """
    kinds = {'temperature': (int, float), 'data': str, 'split': str, 'images': int, 'fingerprint': str}
    if isinstance(content, dict) and all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        if 0 < content['temperature'] < math.inf:
            return {key: content[key] for key in kinds}
    raise UserError(f"'{source}' holds a temperature that was not written by `timm validate.py --fit-temperature`.")


def atomic_write(path: Path, text: str) -> None:
    """Write a whole file or none: a kill leaves no half of one."""
    beside = path.with_name(f'{path.name}.tmp')
    beside.write_text(text, encoding='utf-8')
    beside.replace(path)


def _named_folder(config: TrainConfig, default_name: str) -> Path:
    experiment = config.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{default_name}'
    output = config.output or os.path.join('output', 'train')
    names = experiment.split(os.sep)
    if Path(experiment).is_absolute() or {'..', '.'} & set(names) or '\0' in experiment + output:
        raise UserError(
            f'--experiment {experiment!r} must be a name of a folder below --output, such as resnet18-cc: '
            'choose the place with --output.'
        )
    if max(len(os.fsencode(name)) for name in names) > _LONGEST_NAME:
        raise UserError(f'--experiment {experiment!r} is longer than the {_LONGEST_NAME} bytes of a file name.')
    return Path(output, experiment)


def _free_path(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        free, number = path.with_name(f'{path.name}-{number}'), number + 1
    return free


def _parsed(path: Path, form: str, parse: Callable[[str], Any], default: Any) -> Any:
    """The content of a run's file, or the default if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return default
    damage = (ValueError, TypeError, RecursionError, csv.Error)
    with user_errors(f"'{path}' is not {form}", damage, partial(reason, line=0), '. Restore a copy of it'):
        return parse(path.read_text(encoding='utf-8'))


def _numbers(text: str) -> list[dict[str, float]]:
    rows = []
    reader = csv.DictReader(io.StringIO(text, newline=''))
    lines = list(reader)
    if '\n' in text and 'epoch' not in (reader.fieldnames or ()):  # else empty, or cut while it was written
        raise ValueError('its first line does not name the columns')
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


def _csv(rows: Any) -> str:
    text = io.StringIO(newline='')
    csv.writer(text, lineterminator='\n').writerows(rows)
    return text.getvalue()
