"""Finished runs, read from their folders or from files of recorded runs (one line per run), and recorded in these."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ccl_timm import losses
from ccl_timm.console import log_warning
from ccl_timm.data.datasets import is_folder
from ccl_timm.errors import UserError
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.privacy import public_command, without_private
from ccl_timm.training.run_dir import RunDir, atomic_write, best_row, is_done

__all__ = ['Result', 'comparable', 'default_options', 'is_record', 'read_record', 'read_results', 'write_record']

_FORMAT = 'ccl-timm runs'  # in the first line of a file of recorded runs


@dataclass(frozen=True)
class Result:
    """What a run has recorded.

    Attributes:
        name: of the run, such as that of its folder.
        source: where it was read: its folder, or a file of recorded runs and its name there.
        settings: the training script's, by name.
        rows: epochs, as :meth:`RunDir.rows` returns them.
        environment: command, versions and machine; empty if unknown.
        extra_splits: results on further splits, as :meth:`RunDir.extra_splits` returns them.
        features: measures of the features, as :meth:`RunDir.features` returns them.
    """

    name: str
    source: str
    settings: dict[str, Any]
    rows: list[dict[str, float]]
    environment: dict[str, Any]
    extra_splits: list[dict[str, Any]]
    features: dict[str, Any]

    @classmethod
    def of(cls, run: RunDir) -> 'Result':
        """Read the folder of a run, finished or not.

        Raises:
            UserError: it is not the folder of a run, or a file in it is damaged.
        """
        recorded = (run.settings(), run.rows(), run.environment(), run.extra_splits(), run.features())
        return cls(run.path.name, run.path.as_posix(), *recorded)

    @cached_property
    def comparable(self) -> dict[str, Any]:
        """The settings in a form in which those of two runs can be compared; see :func:`comparable`.

        With ``data``, the fingerprint, unless a share is held out, which differs with the seed.
        """
        data = str(self.environment.get('data_fingerprint') or '')
        known = '-' in data and not self.settings.get('val_fraction')  # there was no second part once
        return comparable(self.settings) | ({'data': data} if known else {})

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings.get('seed', 0)

    @property
    def epochs(self) -> int:
        """Epochs that it was trained for."""
        return int(self.rows[-1]['epoch']) + 1 if self.rows else 0

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Epochs, counted from 1, and top-1 in % after them."""
        return [(int(row['epoch']) + 1, row['eval_top1']) for row in self.rows if 'eval_top1' in row]

    @property
    def last(self) -> float:
        """Top-1 in % after the last epoch."""
        return self.curve[-1][1]

    @property
    def best(self) -> float:
        """Top-1 in % after the epoch that is best in the run's ``eval_metric``."""
        return self.best_row['eval_top1']

    @property
    def best_row(self) -> dict[str, float]:
        """The row of the epoch that is best in the run's ``eval_metric``; empty if nothing was measured."""
        return best_row(self.rows, self.settings.get('eval_metric', 'top1'))

    @property
    def extra_top1(self) -> dict[str, float]:
        """Top-1 in % after the last epoch on further splits."""
        return {row['split']: row['top1'] for row in self.extra_splits if row['epoch'] + 1 == self.epochs}

    def finished(self) -> 'Result':
        """The same, if all of its epochs were trained, or those that its patience left.

        Raises:
            UserError: the run is not finished, or was not measured after its last epoch.
        """
        if not {'epochs', 'model'} <= self.settings.keys():
            raise UserError(f"'{self.source}' has settings that are not a run's: they do not name model and epochs.")
        if not is_done(self.rows, self.settings):
            planned = TrainConfig.of(self.settings).planned_epochs
            raise UserError(f"'{self.source}' is half-written, {self.epochs} of {planned} epochs.")
        if 'eval_top1' not in self.rows[-1]:
            raise UserError(f"'{self.source}' was not measured after its last epoch: its summary has no eval_top1.")
        return self

    def public(self) -> 'Result':
        """The same without what is private to the machine and the account, and without later commands."""
        environment = {key: value for key, value in self.environment.items() if key != 'resumed'}
        if environment:
            command = public_command(str(environment.get('command', '')))
            environment = {**without_private(environment), 'command': command}
        return replace(
            self,
            settings=without_private(self.settings),
            environment=environment,
            extra_splits=without_private(self.extra_splits),
        )


def read_results(paths: Iterable[str | Path]) -> list[Result]:
    """Read all finished runs; those that cannot be read or are not finished are named and left out.

    Args:
        paths: folders of runs, folders that hold some or files of recorded runs, or such files.

    Returns:
        In the order of the paths, and within each of the names of folders and files.

    Raises:
        UserError: a path does not exist or holds no run, or none is finished.
    """
    sources = list(dict.fromkeys(source for path in map(Path, paths) for source in _sources(path)))
    found = [result for source in sources for result in _read_finished(source)]
    if not found:
        raise UserError('None of these runs is finished: there is nothing to report.')
    return found


def _sources(path: Path) -> list[Path]:
    """The folders of runs, and the files of recorded runs, at a path."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"There is no folder '{path}': name folders of runs, or one that holds some.")
    folders = {file.parent for name in ('args.yaml', 'summary.csv') for file in path.rglob(name)}
    sources = sorted(folders | {file for file in path.rglob('*.jsonl') if is_record(file)})
    if not sources:
        raise UserError(f"'{path}' holds no run: there is no args.yaml or summary.csv in it.")
    return sources


def _read_finished(source: Path) -> Iterator[Result]:
    """The finished runs of a folder or a file; why others are left out is logged."""
    try:
        found = read_record(source) if source.is_file() else [Result.of(RunDir(source))]
    except UserError as error:
        log_warning(f'left out: {error}')
        return
    for result in found:
        try:
            yield result.finished()
        except UserError as error:
            log_warning(f'left out: {error}')


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in one form where several mean the same: with the loss's default options, and data by its name only."""
    settings = {**settings, 'loss': settings.get('loss') or 'ce'}
    settings.setdefault('train_fraction', None)  # runs from before there was such a share
    settings['loss_kwargs'] = {**default_options(settings), **(settings.get('loss_kwargs') or {})}
    settings['data_dir'] = Path(settings.get('data_dir') or '').name
    settings['dataset'] = '' if is_folder(settings.get('dataset')) else settings['dataset']
    if 'pretrained' in settings:
        settings['pretrained'] = bool(settings['pretrained'] or settings.get('pretrained_path'))
    return settings


def default_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a run's loss has without ``loss_kwargs``: its defaults, and the smoothing of the other settings.

    None of a loss that is not here, such as a plugin's on another machine.
    """
    loss = settings['loss']
    if losses.is_timm_loss(loss):
        return {}  # its options follow from other settings
    try:
        known = losses.loss_options(loss)
    except UserError:
        return {}
    found = {key: o.default for key, o in known.items() if isinstance(o.default, (bool, int, float, str))}
    if 'smoothing' in found:
        mixes = any(settings.get(key) for key in ('mixup', 'cutmix', 'cutmix_minmax'))
        found['smoothing'] = 0.0 if mixes else settings.get('smoothing', found['smoothing'])
    return found


def is_record(path: Path) -> bool:
    """Whether a file is one of recorded runs, as :func:`write_record` writes it."""
    try:
        with path.open(encoding='utf-8') as file:
            return json.loads(file.readline())['format'] == _FORMAT
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read_record(path: Path) -> list[Result]:
    """Read a file of recorded runs.

    Raises:
        UserError: it is not one.
    """
    if not is_record(path):
        raise UserError(f"'{path}' is not a file of recorded runs, as `ccl-timm report --record` writes it.")
    shared, *lines = path.read_text(encoding='utf-8').splitlines()
    try:
        shared = json.loads(shared)
        return [_from_line(path, json.loads(line), shared) for line in lines]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is a damaged file of recorded runs ({error}): restore a copy of it.") from error


def write_record(path: Path, found: Iterable[Result]) -> None:
    """Record runs, without what is private, in a new file or after those that a file of recorded runs has.

    The file has one line per run, after a first one with what is the same in all of them.

    Raises:
        UserError: the file is not one of recorded runs, or two runs have the same name.
    """
    known = read_record(path) if path.exists() else []
    runs = [*known, *(result.public() for result in found)]
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two runs are called '{twice}': record them in different files.")
    shared = {
        'format': _FORMAT,
        'settings': _shared(run.settings for run in runs),
        'environment': _shared(run.environment for run in runs),
    }
    lines = [json.dumps(line, default=str) for line in (shared, *(_line(run, shared) for run in runs))]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, '\n'.join(lines) + '\n')


def _shared(mappings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all of them have."""
    first, *others = mappings
    return {key: value for key, value in first.items() if all(key in own and own[key] == value for own in others)}


def _line(run: Result, shared: dict[str, Any]) -> dict[str, Any]:
    columns = dict.fromkeys(key for row in run.rows for key in row)
    line = {
        'name': run.name,
        'settings': {key: value for key, value in run.settings.items() if key not in shared['settings']},
        'environment': {key: value for key, value in run.environment.items() if key not in shared['environment']},
        'curve': {key: [row.get(key) for row in run.rows] for key in columns},
    }
    further = {'extra_splits': run.extra_splits, 'features': run.features}
    return line | {key: value for key, value in further.items() if value}


def _from_line(path: Path, line: dict[str, Any], shared: dict[str, Any]) -> Result:
    epochs = zip(*line['curve'].values(), strict=True)
    rows = [{key: float(v) for key, v in zip(line['curve'], row, strict=True) if v is not None} for row in epochs]
    settings, environment = ({**shared[key], **line[key]} for key in ('settings', 'environment'))
    source = f'{path.as_posix()}: {line["name"]}'
    further = line.get('extra_splits', []), line.get('features', {})
    return Result(line['name'], source, settings, rows, environment, *further)
