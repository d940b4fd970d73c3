"""The papers' tables with our results beside theirs, and what two runs differ in."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from ccl_timm.console import show_share
from ccl_timm.console.escape import terminal_text
from ccl_timm.data.fingerprint import change
from ccl_timm.experiments.features import show_measures
from ccl_timm.experiments.matching import (
    Group,
    MatchedRow,
    backbone_of,
    backbones_of,
    baseline_of,
    distinguishing_settings,
    group_by_seed,
    head_of,
    is_repeated,
    usual_settings,
)
from ccl_timm.experiments.plots import ForestRow
from ccl_timm.experiments.rendering import Report, Section
from ccl_timm.experiments.results import Result
from ccl_timm.experiments.statistics import (
    EQUIVALENCE,
    LEVEL,
    Difference,
    differ,
    one_sample,
    show_difference,
    show_printed,
    show_values,
    verdicts,
)
from ccl_timm.experiments.tables import Row, Table
from ccl_timm.training.config import diff_settings
from ccl_timm.training.run_dir import RunDir

__all__ = ['plain_report', 'show_differences', 'table_report']

_LEGEND = (
    'Top-1 in %, mean ± standard deviation over the seeds; behind the ± of a paper as it prints it. Differences and '
    'tests are of the last epoch. The best epoch is too optimistic: it is chosen on the images that it is measured on.'
)
_COLUMNS = {'data_dir', 'dataset', 'loss', 'model'}  # settings with a column of their own
_BEST_OTHER = (
    'Against the best other: the highest value that the paper prints for another loss on that backbone and data. A p '
    "(one-sample t-test, two-sided) is given only for runs of all the recipe's epochs and images."
)


def table_report(table: Table, matched: list[MatchedRow], found: list[Result]) -> Report:
    """A paper's table: as the paper prints it, then one line per group of runs, with tests.

    Args:
        table: rows with the paper's values.
        matched: the rows to show, with their runs.
        found: all runs, also those of no row: the tests that they allow count, where the backbone is one of the table.
    """
    groups = [group for match in matched for group in match.groups]
    backbones, used = backbones_of(table), [result for group in groups for result in group.results]
    others = [r for r in found if backbone_of(r.comparable) in backbones and not is_repeated(r, used)]
    everything = groups + group_by_seed(others)
    judged = _judged(everything)
    records = []
    for match in matched:
        named = {'row': match.row.name, 'data': match.row.dataset}
        for settings, group in zip(match.distinguishing_settings or [''], match.groups or [None], strict=True):
            ours, theirs = _ours(group, everything, judged), _theirs(match, table, group)
            records.append({**named, 'settings': settings, **ours, **theirs})
    data = [match.row.dataset for match in matched for _ in match.groups]
    names = _distinct([' '.join(filter(None, (r['row'], r['settings']))) for r in records if r['seeds']], data, groups)
    sections = [_layout(table, matched)] + ([_details(records), *_features(groups, names, data)] if groups else [])
    papers = [_BEST_OTHER] if any(row.paper for row in table.rows) else []
    notes = [_LEGEND, *papers, *_note_of_tests(judged), *(f'Note: {note}' for note in table.notes)]
    curves, forests = _curves(groups, names, data), _forests(groups, names, data, judged)
    return Report(table.title, sections, notes, records, curves, _pictures(groups), forests)


def plain_report(found: list[Result]) -> Report:
    """A table of any runs; those that differ in their seeds only are put together."""
    groups = group_by_seed(found)
    judged = _judged(groups)
    records = []
    for group, settings in zip(groups, distinguishing_settings(groups, _COLUMNS), strict=True):
        named = {key: group.settings[key] for key in ('model', 'loss')}
        data = group.settings.get('dataset') or group.settings['data_dir'] or 'images'
        records.append({**named, 'data': data, 'settings': settings, **_ours(group, groups, judged)})
    data = [record['data'] for record in records]
    names = _distinct([', '.join(filter(None, (r['model'], r['loss'], r['settings']))) for r in records], data, groups)
    usual = usual_settings(groups, _COLUMNS)
    notes = [
        _LEGEND,
        *([f'Settings, unless a line shows others: {usual}.'] if usual else []),
        *_note_of_tests(judged),
    ]
    curves, forests = _curves(groups, names, data), _forests(groups, names, data, judged)
    return Report(
        'Runs', [_details(records), *_features(groups, names, data)], notes, records, curves, _pictures(groups), forests
    )


def _ours(own: Group | None, groups: list[Group], judged: dict[int, Difference]) -> dict[str, Any]:
    """What was measured; the same keys without values where nothing was."""
    last, best = (own.last, own.best) if own else ([], [])
    ce = baseline_of(own, groups) if own else None
    found = judged.get(id(own))
    return {
        'seeds': [result.seed for result in own.results] if own else [],
        'epochs': own.epochs if own else None,
        'train_fraction': own.settings['train_fraction'] if own else None,
        **_summary('last_epoch', last),
        **_summary('best_epoch', best),
        'ce_head': head_of(ce.settings) if ce else None,
        'difference_ce': found.mean if found else None,
        'interval_ce': list(found.interval) if found and found.interval else None,
        'p_ce': found.p if found else None,
        'against_ce': show_difference(found) if found else '',
        'extra_splits': own.extra_top1 if own else {},
        'runs': [result.source for result in own.results] if own else [],
    }


def _summary(name: str, values: list[float]) -> dict[str, Any]:
    return {
        name: values,
        f'{name}_mean': statistics.fmean(values) if values else None,
        f'{name}_sd': statistics.stdev(values) if len(values) > 1 else None,
    }


def _theirs(match: MatchedRow, table: Table, own: Group | None) -> dict[str, Any]:
    """What the paper prints, and how ours compares with it."""
    paper, largest = match.row.paper or (None, None)
    other = _best_other(match.row, table)
    last = own.last if own else []
    whole = own is not None and own.epochs == match.epochs and not own.settings['train_fraction']
    return {
        'recipe_epochs': match.epochs,
        'paper': paper,
        'paper_margin': largest,
        'difference': statistics.fmean(last) - paper if last and paper is not None else None,
        'best_other': other.paper[0] if other else None,
        'best_other_row': other.name if other else None,
        'p_best_other': one_sample(last, other.paper[0]) if other and whole else None,
    }


def _best_other(row: Row, table: Table) -> Row | None:
    """The row of another loss, on the same backbone and data, with the highest printed value."""
    backbone, loss = row.name.partition(':')[0], _loss(row)
    others = [
        other
        for other in table.rows
        if other.dataset == row.dataset and other.name.partition(':')[0] == backbone
        if other.paper and _loss(other) != loss
    ]
    return max(others, key=lambda other: other.paper[0], default=None)


def _loss(row: Row) -> str:
    return row.args[row.args.index('--loss') + 1]


def _judged(groups: list[Group]) -> dict[int, Difference]:
    """For each group that has a baseline, by its id, the difference to it; all tests together are one family."""
    pairs = [(own, ce) for own in groups if (ce := baseline_of(own, groups))]
    found = verdicts([differ(own.by_seed, ce.by_seed) for own, ce in pairs])
    return {id(own): difference for (own, _), difference in zip(pairs, found, strict=True)}


def _note_of_tests(judged: dict[int, Difference]) -> list[str]:
    tests = sum(found.p is not None for found in judged.values())
    if not tests:
        return []
    return [
        'Against our ce: difference to cross-entropy on the same head where that was run, else on the linear one, as '
        'for cross-entropy itself (in brackets), with its 95% interval, paired by seed where both have the same seeds. '
        f"Better or worse: t-test, p < {LEVEL} after Holm's correction for the "
        f'{"one test" if tests == 1 else f"{tests} tests"} that the runs of these backbones allow. Equal: within '
        f'{EQUIVALENCE} points, by two one-sided tests, corrected alike. "X would have been": the smallest difference '
        'that this number of seeds shows with a probability of 80%.'
    ]


def _distinct(names: list[str], data: list[str], groups: list[Group]) -> list[str]:
    """Names of groups, different within a data set: a name that is taken gets the epochs, or a number."""
    found: list[str] = []
    taken: set[tuple[str, str]] = set()
    for name, on, own in zip(names, data, groups, strict=True):
        numbered = (f'{name}, {number}' for number in itertools.count(2))
        others = itertools.chain((name, f'{name}, {own.epochs} epochs'), numbered)
        found.append(next(other for other in others if (other, on) not in taken))
        taken.add((found[-1], on))
    return found


def _forests(
    groups: list[Group], names: list[str], data: list[str], judged: dict[int, Difference]
) -> dict[str, list[ForestRow]]:
    """For each data set, the differences to cross-entropy that have an interval."""
    found: dict[str, list[ForestRow]] = {}
    for own, name, on in zip(groups, names, data, strict=True):
        difference = judged.get(id(own))
        if difference and difference.interval:
            row = ForestRow(name, difference.mean, *difference.interval, difference.verdict)
            found.setdefault(f'{on}, top-1 %, difference to cross-entropy', []).append(row)
    return found


def _layout(table: Table, matched: list[MatchedRow]) -> Section:
    """Rows and data sets as the paper has them, ours beside the paper's."""
    printed = any(row.paper for row in table.rows)
    whose = ('ours', "paper's") if printed else ('ours',)
    datasets = dict.fromkeys(match.row.dataset for match in matched)
    header = ['row', *(f'{name}, {one}' for name in datasets for one in whose)]
    cells = {(match.row.name, match.row.dataset): (_cell(match), show_printed(match.row.paper)) for match in matched}
    rows = [
        (name, *(cell for dataset in datasets for cell in cells.get((name, dataset), ('', ''))[: len(whose)]))
        for name in dict.fromkeys(match.row.name for match in matched)
    ]
    caption = 'As the paper prints it, ours after the last epoch' if printed else 'Ours, after the last epoch'
    return Section(caption, tuple(header), rows)


def _cell(match: MatchedRow) -> str:
    if not match.groups:
        return 'not run'
    own = match.groups[0]
    short = '' if own.epochs == match.epochs else f', {own.epochs} of {match.epochs} epochs'
    fraction = own.settings['train_fraction']
    short += f', {show_share(fraction)} of the images' if fraction else ''
    return f'{show_values(own.last)} (n={len(own.last)}{short})'


def _details(records: list[dict[str, Any]]) -> Section:
    """One line for each group of runs; columns that are empty in all lines are left out."""
    rows = [_detail(record) for record in records if record['seeds']]
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    return Section('Group by group', tuple(header), [tuple(row[name] for name in header) for row in rows])


def _detail(record: dict[str, Any]) -> dict[str, str]:
    printed = record.get('paper') is not None
    extra = record['extra_splits'].items()
    return {
        **{name: str(record[name]) for name in ('row', 'model', 'loss', 'data', 'settings') if name in record},
        'last epoch': show_values(record['last_epoch']),
        'seeds': str(len(record['seeds'])),
        'epochs': str(record['epochs']),
        'of the images': show_share(record['train_fraction']),
        "recipe's epochs": str(record.get('recipe_epochs', '')),
        "paper's": show_printed((record['paper'], record['paper_margin'])) if printed else '',
        'difference': f'{record["difference"]:+.2f}' if printed else '',
        'against the best other': _against_other(record) if printed else '',
        'against our ce': record['against_ce'] and f'{record["against_ce"]} [{record["ce_head"]}]',
        'best epoch': show_values(record['best_epoch']),
        'extra splits': ', '.join(f'{split} {show_values(values)}' for split, values in extra),
    }


def _features(groups: list[Group], names: list[str], data: list[str]) -> list[Section]:
    """For each split that features were measured on after the last epoch, a table with a column for each group."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for own, name, on in zip(groups, names, data, strict=True):
        for split, measures in own.features.items():
            found.setdefault(split, {})[name if len({*data}) == 1 else f'{name}, {on}'] = measures
    return [
        Section(f'Features of the {split} split, mean ± standard deviation', ('', *own), show_measures([*own.values()]))
        for split, own in found.items()
    ]


def _against_other(record: dict[str, Any]) -> str:
    if record['best_other'] is None:
        return ''
    p = record['p_best_other']
    gap = record['last_epoch_mean'] - record['best_other']
    named = f'{gap:+.2f} to {record["best_other_row"]} {record["best_other"]:.2f}'
    return named + (f', p = {p:.2g}' if p is not None else '')


def _curves(groups: list[Group], names: list[str], data: list[str]) -> dict[str, dict[str, list]]:
    """For each data set, the curves of each group."""
    found: dict[str, dict[str, list]] = {}
    for own, name, on in zip(groups, names, data, strict=True):
        found.setdefault(f'{on}, top-1 %', {})[name] = [result.curve for result in own.results]
    return found


def _pictures(groups: list[Group]) -> list[Path]:
    """What `ccl-timm features` has drawn of these runs."""
    folders = [Path(run.source) / 'pictures' for group in groups for run in group.results]
    return [path for folder in folders for path in sorted(folder.glob('*.png'))]


def show_differences(first: Path, second: Path) -> str:
    """What two runs differ in, as text: settings, versions and data before the results.

    Raises:
        UserError: one of them is not the folder of a finished run.
    """
    one, two = (Result.of(RunDir(path)).finished() for path in (first, second))
    before, now = one.environment, two.environment
    sections = {
        'other settings, of those that change what is computed': diff_settings(
            one.comparable, two.comparable, ['data']
        ),
        'settings that only one of them has': sorted({*one.settings} ^ {*two.settings}),
        'other versions': _changes(_versions(before), _versions(now)),
        'other machine': _changes(before, now, ('device', 'platform', 'threads', 'processes')),
        'other data': _data_changes(before, now),
    }
    lines = [f'{first.as_posix()} -> {second.as_posix()}']
    for name, changed in sections.items():
        lines += [f'{name}: {"" if changed else "none"}'.rstrip(), *(f'  {text}' for text in changed)]
    if not (before and now):
        lines.append('environment.json is missing in one of them: versions, machine and data are not known.')
    lines.append('top-1 %:')
    for name in ('last', 'best'):
        was, value = getattr(one, name), getattr(two, name)
        lines.append(f'  {name} epoch: {was:.2f} -> {value:.2f} ({value - was:+.2f})')
    lines.append(f'  epochs: {one.epochs} -> {two.epochs}')
    return '\n'.join(map(terminal_text, lines))


def _data_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    prints = [str(environment.get('data_fingerprint', '')) for environment in (before, now)]
    return [] if change(*prints) == 'unknown' else _changes(before, now, ('data_fingerprint',))


def _versions(environment: dict[str, Any]) -> dict[str, Any]:
    plugins = {f'plugin {item["distribution"]}': item['version'] for item in environment.get('plugins', [])}
    return {**environment.get('versions', {}), 'git_commit': environment.get('git_commit'), **plugins}


def _changes(before: dict[str, Any], now: dict[str, Any], names: tuple[str, ...] = ()) -> list[str]:
    """Entries that are not the same, as text."""
    names = names or tuple(dict.fromkeys([*before, *now]))
    return [f'{key} was {before.get(key)!r}, is {now.get(key)!r}' for key in names if before.get(key) != now.get(key)]
