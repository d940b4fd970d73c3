"""Results put together over their seeds, given to the rows of tables, and paired with their baselines."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ccl_timm import heads, models
from ccl_timm.console import log_warning
from ccl_timm.errors import UserError
from ccl_timm.experiments.results import Result, comparable, default_options
from ccl_timm.experiments.tables import Row, Table, run_name, tables_of
from ccl_timm.training.config import TrainConfig, diff_settings

__all__ = [
    'Group',
    'MatchedRow',
    'backbone_of',
    'backbones_of',
    'baseline_of',
    'distinguishing_settings',
    'group_by_seed',
    'head_of',
    'is_repeated',
    'match_row',
    'match_rows',
    'rows_of',
    'usual_settings',
]

# what may differ between runs of one group, between a run and its row in a paper's table (where the data is, how fast
# and how long it is trained), and between a run and the cross-entropy run that it is tested against
_IGNORED_IN_GROUP = {*TrainConfig.names(varies='seed')}
_IGNORED_IN_TABLE = {*_IGNORED_IN_GROUP, *TrainConfig.names(varies='budget')}
_IGNORED_IN_BASELINE = {*_IGNORED_IN_GROUP, *TrainConfig.names(varies='method')}
# of these, what the report always shows where a run has another value than its row
_SHOWN_IN_TABLE = ('opt', 'opt_kwargs')
_NO_USUAL = object()  # in place of a usual value, if there is none
_NAMED = 5  # runs without a row whose differences are printed


@dataclass(frozen=True)
class Group:
    """Runs of the same settings with different seeds, in the order of these."""

    results: tuple[Result, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Of the first of them, in comparable form."""
        return self.results[0].comparable

    @property
    def epochs(self) -> int:
        """That they were trained for; of the longest, where patience ended some."""
        return max(result.epochs for result in self.results)

    @property
    def last(self) -> list[float]:
        """Top-1 in % after each one's last epoch."""
        return [result.last for result in self.results]

    @property
    def by_seed(self) -> dict[int, float]:
        """Top-1 in % after the last epoch, by seed."""
        return {result.seed: result.last for result in self.results}

    @property
    def best(self) -> list[float]:
        """Top-1 in % after each one's best epoch."""
        return [result.best for result in self.results]

    @property
    def extra_top1(self) -> dict[str, list[float]]:
        """Top-1 in % on further splits, for those on which all of them were measured."""
        measured = [result.extra_top1 for result in self.results]
        common = [split for split in measured[0] if all(split in own for own in measured)]
        return {split: [own[split] for own in measured] for split in common}

    @property
    def features(self) -> dict[str, dict[str, list[float]]]:
        """Measures of the last epoch's features by split and name, of all runs that were measured on it."""
        found: dict[str, dict[str, list[float]]] = {}
        for result in self.results:
            measured = result.features
            if measured and measured['epoch'] + 1 == result.epochs:
                for name, value in measured['measures'].items():
                    found.setdefault(measured['split'], {}).setdefault(name, []).append(value)
        return found


@dataclass(frozen=True)
class MatchedRow:
    """A row of a table, with the runs of it.

    Attributes:
        row: the row.
        wanted: its settings, in comparable form.
        groups: of runs, which differ in settings that a row leaves open, such as the epochs; first the one closest to
            the recipe in images and epochs. Empty if nothing was run.
    """

    row: Row
    wanted: dict[str, Any]
    groups: tuple[Group, ...]

    @property
    def epochs(self) -> int:
        """Epochs that the row's recipe has."""
        return self.wanted['epochs']

    @property
    def distinguishing_settings(self) -> list[str]:
        """For each group, the settings that distinguish it from the others, or its optimizer from the row's."""
        return distinguishing_settings(list(self.groups), shown={key: self.wanted[key] for key in _SHOWN_IN_TABLE})


def group_by_seed(results: list[Result]) -> list[Group]:
    """Put runs together that differ in their seeds only; a second run of the same seed is named and left out.

    Settings that only one of two runs has, as runs of different versions do, do not separate them.
    """
    found: list[list[Result]] = []
    for result in results:
        same = next(
            (own for own in found if not diff_settings(own[0].comparable, result.comparable, _IGNORED_IN_GROUP)), None
        )
        if same is None:
            found.append([result])
        elif other := next((own for own in same if own.seed == result.seed), None):
            log_warning(f"left out: '{result.source}' has the settings and the seed of '{other.source}'")
        else:
            same.append(result)
    return [Group(tuple(sorted(own, key=lambda result: result.seed))) for own in found]


def is_repeated(result: Result, among: Iterable[Result]) -> bool:
    """Whether a run of these settings and this seed is among others."""
    same_seed = (own for own in among if own.seed == result.seed)
    return any(not diff_settings(own.comparable, result.comparable, _IGNORED_IN_GROUP) for own in same_seed)


def backbones_of(table: Table) -> list[tuple[str, dict[str, Any]]]:
    """The backbones of a table's rows, see :func:`backbone_of`."""
    return [backbone_of(_wanted(row)) for row in table.rows]


def match_rows(table: Table, results: list[Result]) -> list[MatchedRow]:
    """Give runs to the rows of a table by what was trained; those that fit no row are named."""
    wanted = {row: _wanted(row) for row in table.rows}
    found: dict[Row, list[Result]] = {row: [] for row in table.rows}
    unmatched = []
    for result in results:
        changed = {row: _changes(settings, result.comparable) for row, settings in wanted.items()}
        fitting = _fitting(changed, result)
        if len(fitting) == 1:
            found[fitting[0]].append(result)
        else:
            unmatched.append(_why_unmatched(table, result, fitting, changed))
    for text in unmatched[:_NAMED]:
        log_warning(f'left out: {text}')
    if len(unmatched) > _NAMED:
        log_warning(f'left out: {len(unmatched) - _NAMED} more runs that are no row of {table.name}')
    return [match_row(row, own) for row, own in found.items()]


def _fitting(changed: dict[Row, list[str]], result: Result) -> list[Row]:
    """The rows that a run fits; of data sets that differ in their folders only, the one that the run is named after."""
    fitting = [row for row, changes in changed.items() if not changes]
    if len(fitting) > 1:
        name = result.settings.get('experiment') or ''
        return [row for row in fitting if name == run_name(row, result.seed)] or fitting
    return fitting


def _why_unmatched(table: Table, result: Result, fitting: list[Row], changed: dict[Row, list[str]]) -> str:
    if fitting:
        rows = ', '.join(f'{row.dataset} {row.name}' for row in fitting)
        return f"'{result.source}' fits several rows of {table.name} ({rows})"
    row = min(changed, key=lambda row: len(changed[row]))
    why = ', '.join(changed[row][:3])
    return f"'{result.source}' is no row of {table.name}; closest: {row.dataset} {row.name}, but {why}"


def match_row(row: Row, results: list[Result]) -> MatchedRow:
    """A row with the runs of it."""
    wanted = _wanted(row)

    def distance(group: Group) -> tuple[float, int, int]:
        return -(group.settings['train_fraction'] or 1), abs(group.epochs - wanted['epochs']), -len(group.results)

    return MatchedRow(row, wanted, tuple(sorted(group_by_seed(results), key=distance)))


def rows_of(settings: dict[str, Any], recipe: str | None) -> list[tuple[Table, Row, int]]:
    """The rows of the tables, and the epochs of their recipe, that a run belongs to.

    Args:
        settings: of the run.
        recipe: that the run names.
    """
    own = comparable(settings)
    found = [(table, row, _wanted(row)) for table in tables_of(recipe or '') for row in table.rows]
    return [(table, row, wanted['epochs']) for table, row, wanted in found if not _changes(wanted, own)]


def _wanted(row: Row) -> dict[str, Any]:
    return comparable(TrainConfig.resolve(list(row.args)).settings())


def _changes(wanted: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    changed = diff_settings(wanted, settings, _IGNORED_IN_TABLE)
    classes = wanted.get('num_classes')
    if classes and settings.get('num_classes') not in (None, classes):
        changed.append(f'num_classes was {classes}, is {settings["num_classes"]}')
    return changed


def distinguishing_settings(
    groups: list[Group], ignore: Collection[str] = (), shown: Mapping[str, Any] = MappingProxyType({})
) -> list[str]:
    """For each group, as text, those of its settings that differ from the usual value.

    The usual value is the one that most groups have. If two values are equally common, there is none, and each group
    shows its own.

    Args:
        groups: of runs; none give none.
        ignore: settings that are shown elsewhere, beside the seed and the epochs.
        shown: usual values by name, instead of the most common ones.
    """
    settings, ignored = _without_defaults(groups), {*_IGNORED_IN_GROUP, 'epochs', *ignore}
    usual = {**_usual(settings), **shown}
    # an empty value is shown only where the usual one, not empty, would be assumed
    hidden = {*shown, *(key for key in usual if usual[key] is _NO_USUAL)}
    return [
        _as_text(own, [key for key in _changed(own, usual, ignored) if own[key] not in ({}, '') or key not in hidden])
        for own in settings
    ]


def usual_settings(groups: list[Group], ignore: Collection[str] = ()) -> str:
    """As text, the usual values of those settings that :func:`distinguishing_settings` shows for some groups only."""
    settings, ignored = _without_defaults(groups), {*_IGNORED_IN_GROUP, 'epochs', *ignore}
    usual = _usual(settings)
    changed = {key for own in settings for key in _changed(own, usual, ignored)}
    return _as_text(usual, [key for key in usual if key in changed and usual[key] not in (_NO_USUAL, {}, '')])


def _without_defaults(groups: list[Group]) -> list[dict[str, Any]]:
    """The settings of each group, without those options of the loss that have their default."""
    found = []
    for group in groups:
        defaults, options = default_options(group.settings), group.settings['loss_kwargs']
        changed = {key: value for key, value in options.items() if defaults.get(key) != value}
        found.append({**group.settings, 'loss_kwargs': changed})
    return found


def _usual(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The most common value of each setting; ``_NO_USUAL`` if two values are equally common."""
    usual = {}
    for key in {key: None for own in settings for key in own}:
        values = {_shown(own[key]): own[key] for own in settings if key in own}
        ranked = Counter(_shown(own[key]) for own in settings if key in own).most_common(2)
        tied = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
        usual[key] = _NO_USUAL if tied else values[ranked[0][0]]
    return usual


def _changed(settings: dict[str, Any], usual: dict[str, Any], ignored: set[str]) -> list[str]:
    return [key for key in settings if diff_settings({key: usual[key]}, {key: settings[key]}, ignored)]


def _as_text(settings: dict[str, Any], keys: list[str]) -> str:
    return ', '.join(f'{key}={_shown(settings[key])}' for key in keys)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return '{' + ', '.join(f'{key}={item}' for key, item in value.items()) + '}'
    return 'x'.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def baseline_of(group: Group, groups: list[Group]) -> Group | None:
    """Our own cross-entropy runs on the same backbone with the same settings; None if there are none.

    Of several, those on the same head, of these those with the same options; else those with features of the same
    width, of these those with a linear head.
    Cross-entropy itself has the runs with a linear head, and with that none.
    """
    own = group.settings
    control = own['loss'] == 'ce'
    if control and head_of(own) == 'linear':
        return None
    found = [
        other
        for other in groups
        if other.settings['loss'] == 'ce'
        and not (control and head_of(other.settings) != 'linear')
        and backbone_of(other.settings) == backbone_of(own)
        and not diff_settings(other.settings, own, _IGNORED_IN_BASELINE)
    ]
    return min(found, key=lambda other: _distance(other.settings, own), default=None)


def _distance(settings: dict[str, Any], own: dict[str, Any]) -> tuple[bool, ...]:
    same_width = _width(settings) == _width(own)
    same_head = same_width and head_of(settings) == head_of(own)
    same_options = _model_options(settings) == _model_options(own)
    return not same_head, not same_width, not (same_head and same_options), head_of(settings) != 'linear'


def backbone_of(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Architecture without the head, and its options, such as the stem for small images, without the head's."""
    variant = models.split_variant(settings['model'])
    of_head = _head_options(variant[1]) if variant else []
    options = {name: value for name, value in _model_options(settings).items() if name not in of_head}
    if not options.get('small_input'):
        options.pop('small_input', None)
    return variant[0] if variant else settings['model'], options


def _head_options(name: str) -> list[str]:
    """Names of the options of a head; none of one that cannot be imported here."""
    try:
        return heads.head_options(heads.head_class(name))
    except UserError:
        return []


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
