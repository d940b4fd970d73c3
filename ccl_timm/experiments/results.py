"""Results as their folders record them: found, read, put together over their seeds, and given to a table's rows."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ccl_timm import losses, models
from ccl_timm.console import log_warning
from ccl_timm.data.datasets import is_folder
from ccl_timm.errors import UserError
from ccl_timm.experiments.tables import Row, Table, run_name, tables_of
from ccl_timm.training import parts, run_dir
from ccl_timm.training.config import TrainConfig, diff_settings

__all__ = [
    'Group',
    'Place',
    'Result',
    'assign',
    'baseline_of',
    'group',
    'head_of',
    'read_results',
    'rows_of',
    'distinguishing_settings',
]

# what may differ between runs of one group, between a run and its row in a paper's table (where the data lies, how fast
# and how long it is trained), and between a run and the cross-entropy run that it is tested against
_FREE_IN_GROUP = {*TrainConfig.names(varies='seed')}
_FREE_IN_TABLE = {*_FREE_IN_GROUP, *TrainConfig.names(varies='budget')}
_FREE_IN_BASELINE = {*_FREE_IN_GROUP, *TrainConfig.names(varies='method')}
# of these, what the report always shows where a run has another value than its row
_SHOWN_IN_TABLE = ('opt', 'opt_kwargs')
_NAMED = 5  # runs that a table has no row for: what they differ in


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: where it was read.
        settings: of args.yaml, with the loss's defaults, and of the data folder only the name.
        rows: of summary.csv, one an epoch.
    """

    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, float]]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings.get('seed', 0)

    @property
    def epochs(self) -> int:
        """Epochs that it was trained for."""
        return int(self.rows[-1]['epoch']) + 1

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Epochs, counted from 1, and top-1 in % after them."""
        return [(int(row['epoch']) + 1, row['eval_top1']) for row in self.rows if 'eval_top1' in row]

    @property
    def last(self) -> float:
        """Top-1 in % after the last epoch."""
        return self.curve[-1][1]

    @property
    def parts(self) -> dict[str, float]:
        """Top-1 in % after the last epoch on further parts of the data, as `validate --record` has written them."""
        return {row['part']: row['top1'] for row in parts.read_parts(self.folder) if row['epoch'] + 1 == self.epochs}

    @property
    def best(self) -> float:
        """Top-1 in % after the epoch that is best in the run's ``eval_metric``."""
        return run_dir.best_row(self.rows, self.settings.get('eval_metric', 'top1'))['eval_top1']


@dataclass(frozen=True)
class Group:
    """Runs of the same settings with different seeds, in the order of these."""

    results: tuple[Result, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Of the first of them."""
        return self.results[0].settings

    @property
    def epochs(self) -> int:
        """That they were trained for; of the longest, where patience ended some."""
        return max(result.epochs for result in self.results)

    @property
    def last(self) -> list[float]:
        """Top-1 in % after each one's last epoch."""
        return [result.last for result in self.results]

    @property
    def best(self) -> list[float]:
        """Top-1 in % after each one's best epoch."""
        return [result.best for result in self.results]

    @property
    def parts(self) -> dict[str, list[float]]:
        """Top-1 in % on further parts of the data, for those measured of all of them."""
        measured = [result.parts for result in self.results]
        return {part: [own[part] for own in measured] for part in measured[0] if all(part in own for own in measured)}


@dataclass(frozen=True)
class Place:
    """A row of a table, with what was run of it.

    Attributes:
        row: the row.
        wanted: its settings.
        groups: of runs, which differ in settings that a row leaves open, such as the epochs; that with the most nearly
            as many epochs as the recipe first. Empty if nothing was run.
    """

    row: Row
    wanted: dict[str, Any]
    groups: tuple[Group, ...]

    @property
    def epochs(self) -> int:
        """Epochs that the row's recipe has."""
        return self.wanted['epochs']

    @property
    def settings(self) -> list[str]:
        """For each group, the settings that tell it from the others, or its optimizer from the row's."""
        return distinguishing_settings(list(self.groups), shown={key: self.wanted[key] for key in _SHOWN_IN_TABLE})


def read_results(paths: list[str]) -> list[Result]:
    """Read all finished runs in folders and their subfolders; what is half-written is named and left out.

    Args:
        paths: of runs, or of folders that hold some.

    Returns:
        In the order of the paths, and within each of the folders' names.

    Raises:
        UserError: a folder does not exist or holds no run, or none is finished.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"There is no folder '{path}': name folders of runs, or one that holds some.")
        folders = sorted({file.parent for name in ('args.yaml', 'summary.csv') for file in path.rglob(name)})
        if not folders:
            raise UserError(f"'{path}' holds no run: there is no args.yaml or summary.csv in it.")
        found += [folder for folder in folders if folder not in found]
    results = []
    for folder in found:
        try:
            results.append(read_result(folder))
        except UserError as error:
            log_warning(f'left out: {error}')
    if not results:
        raise UserError('None of these runs is finished: there is nothing to report.')
    return results


def read_result(folder: Path) -> Result:
    """Read a run.

    Raises:
        UserError: it is not whole, or was not measured.
    """
    try:
        settings = run_dir.read_args(folder)
        rows = run_dir.complete_rows(folder)
        parts.read_parts(folder)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{folder}' has files that cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(settings, dict) or not {'epochs', 'model'} <= settings.keys():
        raise UserError(f"'{folder}' has an args.yaml that is not a run's: it does not tell model and epochs.")
    if not run_dir.is_done(rows, settings):
        done = int(rows[-1]['epoch']) + 1 if rows else 0
        raise UserError(f"'{folder}' is half-written, {done} of {run_dir.planned_epochs(settings)} epochs.")
    if 'eval_top1' not in rows[-1]:
        raise UserError(f"'{folder}' was not measured after its last epoch: its summary.csv has no eval_top1 there.")
    return Result(folder, _effective(settings), rows)


def _effective(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in one form, where different words mean the same."""
    settings = dict(settings)
    loss = settings.get('loss') or 'ce'
    settings['loss'] = loss
    settings.setdefault('train_fraction', None)  # runs from before there was such a share
    settings['loss_kwargs'] = {**_defaults(loss), **(settings.get('loss_kwargs') or {})}
    settings['data_dir'] = Path(settings.get('data_dir') or '').name
    settings['dataset'] = '' if is_folder(settings.get('dataset')) else settings['dataset']
    if 'pretrained' in settings:
        settings['pretrained'] = bool(settings['pretrained'] or settings.get('pretrained_path'))
    return settings


def _defaults(loss: str) -> dict[str, Any]:
    """Options of a loss that have a default; none of one that is not here, such as a plugin's on another machine."""
    if losses.is_timm_loss(loss):
        return {}  # its options follow from other settings
    try:
        known = losses.loss_options(loss)
    except UserError:
        return {}
    return {key: option.default for key, option in known.items() if isinstance(option.default, (bool, int, float, str))}


def group(results: list[Result], free: set[str] = _FREE_IN_GROUP) -> list[Group]:
    """Put runs together that differ in their seeds only; of a seed's second run it is said that it does not count.

    Settings that only one of two runs has, as runs of different versions do, set none apart.
    """
    found: list[list[Result]] = []
    for result in results:
        same = next((own for own in found if not diff_settings(own[0].settings, result.settings, free)), None)
        if same is None:
            found.append([result])
        elif other := next((own for own in same if own.seed == result.seed), None):
            log_warning(f"left out: '{result.folder}' has the settings and the seed of '{other.folder}'")
        else:
            same.append(result)
    return [Group(tuple(sorted(own, key=lambda result: result.seed))) for own in found]


def assign(table: Table, results: list[Result]) -> list[Place]:
    """Give runs to the rows of a table by what was trained; those that fit none are named."""
    wanted = {row: _wanted(row) for row in table.rows}
    found: dict[Row, list[Result]] = {row: [] for row in table.rows}
    unfit = []
    for result in results:
        changed = {row: _against_row(settings, result.settings) for row, settings in wanted.items()}
        fitting = [row for row in changed if not changed[row]]
        if len(fitting) > 1:  # data sets that differ in their folders only
            name = result.settings.get('experiment') or ''
            fitting = [row for row in fitting if name == run_name(row, result.seed)] or fitting
        if len(fitting) == 1:
            found[fitting[0]].append(result)
        elif fitting:
            rows = ', '.join(f'{row.dataset} {row.name}' for row in fitting)
            unfit.append(f"'{result.folder}' fits several rows of {table.name} ({rows})")
        else:
            row = min(changed, key=lambda row: len(changed[row]))
            why = ', '.join(changed[row][:3])
            unfit.append(f"'{result.folder}' is no row of {table.name}; closest: {row.dataset} {row.name}, but {why}")
    for text in unfit[:_NAMED]:
        log_warning(f'left out: {text}')
    if len(unfit) > _NAMED:
        log_warning(f'left out: {len(unfit) - _NAMED} more runs that are no row of {table.name}')
    places = []
    for row, own in found.items():
        epochs = wanted[row]['epochs']
        groups = sorted(
            group(own), key=lambda g: (-(g.settings['train_fraction'] or 1), abs(g.epochs - epochs), -len(g.results))
        )
        places.append(Place(row, wanted[row], tuple(groups)))
    return places


def rows_of(settings: dict[str, Any], recipe: str | None) -> list[tuple[Table, Row, int]]:
    """The rows of the tables, and the epochs of their recipe, that a run is of.

    Args:
        settings: of args.yaml.
        recipe: that the run names.
    """
    own = _effective(settings)
    found = [(table, row, _wanted(row)) for table in tables_of(recipe or '') for row in table.rows]
    return [(table, row, wanted['epochs']) for table, row, wanted in found if not _against_row(wanted, own)]


def _wanted(row: Row) -> dict[str, Any]:
    return _effective(TrainConfig.resolve(list(row.words)).settings())


def _against_row(wanted: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    changed = diff_settings(wanted, settings, _FREE_IN_TABLE)
    classes = wanted.get('num_classes')
    if classes and settings.get('num_classes') not in (None, classes):
        changed.append(f'num_classes was {classes}, is {settings["num_classes"]}')
    return changed


def distinguishing_settings(
    groups: list[Group], told: Collection[str] = (), shown: Mapping[str, Any] = MappingProxyType({})
) -> list[str]:
    """For each group, as text, those of its settings that are not the same in all of them.

    Args:
        groups: of runs; none give none.
        told: settings that are told elsewhere, beside the seed and the epochs.
        shown: settings by name that are also shown where a group has another value than this.
    """
    if not groups:
        return []
    first, free = {**groups[0].settings, **shown}, {*_FREE_IN_GROUP, 'epochs', *told}
    keys = [
        key
        for key in first
        if any(key in g.settings and diff_settings({key: first[key]}, {key: g.settings[key]}, free) for g in groups)
    ]
    texts = []
    for g in groups:
        own = {key: g.settings[key] for key in keys if key in g.settings}
        if 'loss_kwargs' in own:
            usual = _defaults(g.settings['loss'])
            own['loss_kwargs'] = {key: value for key, value in own['loss_kwargs'].items() if usual.get(key) != value}
        texts.append(', '.join(f'{key}={_shown(value)}' for key, value in own.items() if value not in ({}, '')))
    return texts


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return '{' + ', '.join(f'{key}={item}' for key, item in value.items()) + '}'
    return 'x'.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def baseline_of(group: Group, groups: list[Group]) -> Group | None:
    """Our own cross-entropy runs on the same backbone with the same settings; None if there are none.

    Of several, those on the same head, else those with features of the same width, of these those with a linear head.
    """
    own = group.settings
    if own['loss'] == 'ce':
        return None
    found = [
        other
        for other in groups
        if other.settings['loss'] == 'ce'
        and _backbone(other.settings) == _backbone(own)
        and not diff_settings(other.settings, own, _FREE_IN_BASELINE)
    ]
    return min(found, key=lambda other: _distance(other.settings, own), default=None)


def _distance(settings: dict[str, Any], own: dict[str, Any]) -> tuple[bool, bool, bool]:
    same_width = _width(settings) == _width(own)
    return not (same_width and head_of(settings) == head_of(own)), not same_width, head_of(settings) != 'linear'


def _backbone(settings: dict[str, Any]) -> tuple[str, bool]:
    """Architecture without the head, and whether it has the stem for small images."""
    variant = models.split_variant(settings['model'])
    return variant[0] if variant else settings['model'], bool(_model_options(settings).get('small_input'))


def head_of(settings: dict[str, Any]) -> str:
    """Name of the head of a run's model; ``linear`` for timm's own classifier."""
    variant = models.split_variant(settings['model'])
    return variant[1] if variant else 'linear'


def _width(settings: dict[str, Any]) -> int | None:
    """Width of the features that a head was asked for; None for its default."""
    options = _model_options(settings)
    return options.get('feature_dim') or options.get('hidden_features')


def _model_options(settings: dict[str, Any]) -> dict[str, Any]:
    return settings.get('model_kwargs') or {}
