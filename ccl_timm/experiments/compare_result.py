"""The result of a comparison: a table with intervals, what it shows, and how it was made."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ccl_timm.console import table
from ccl_timm.errors import UserError
from ccl_timm.experiments.compare import final_runs
from ccl_timm.experiments.plots import ForestRow
from ccl_timm.experiments.statistics import (
    EQUIVALENCE,
    Difference,
    differ,
    show_difference,
    show_values,
    verdicts,
)

__all__ = ['Line', 'compare_runs', 'draw_rows', 'epochs_to', 'show_comparison', 'split_comparisons']

_Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
_CONTROL = 'linear:ce'
_CAVEAT = 'The intervals are over seeds, not over searches: another search may find other settings.'
_MEASURES = {
    'top1': 'top-1 %', 'nll': 'NLL', 'ece': 'ECE %', 'recall_at_1': 'R@1 %', 'map_at_r': 'MAP@R %',
    'unseen_recall_at_1': 'unseen R@1 %', 'unseen_map_at_r': 'unseen MAP@R %', 'ms_per_step': 'ms a step',
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """An entry of the comparison.

    Attributes:
        name: head and loss, such as ``'cam:cc'``.
        values: by seed.
        plain: difference to cross-entropy on the linear head; None for that itself.
        control: difference to cross-entropy on the same head; None where that is the linear one or the entry itself.
    """

    name: str
    values: dict[int, float]
    plain: Difference | None
    control: Difference | None


def compare_runs(runs: _Runs, metric: str, within: float = EQUIVALENCE) -> list[Line]:
    """Compare every entry with cross-entropy on the linear and on its own head; all tests are one family.

    Args:
        runs: final runs by entry and seed.
        metric: what is compared.
        within: margin of equivalence, in points.
    """
    values = {name: {seed: run[metric] for seed, run in own.items()} for name, own in runs.items()}
    pairs = []
    for name in values:
        pairs += [(name, other) for other in (_CONTROL, _same_head(name)) if other in values and other != name]
    found = verdicts([differ(values[name], values[other], within) for name, other in pairs])
    judged = dict(zip(pairs, found, strict=True))
    return [
        Line(name, own, judged.get((name, _CONTROL)), judged.get((name, _same_head(name))))
        for name, own in values.items()
    ]


def _backbone(header: Mapping[str, Any]) -> str:
    """The backbone, and the options of heads, such as ``'resnet18, head cosine with feature_dim=512'``."""
    parts = [header['backbone']]
    for head, options in header.get('head_options', {}).items():
        parts.append(f'head {head} with {" ".join(f"{name}={value}" for name, value in options.items())}')
    return ', '.join(parts)


def _same_head(name: str) -> str:
    """Cross-entropy on an entry's head; nothing for the linear one, which every entry is compared with anyway."""
    head = name.split(':', 1)[0]
    return '' if head == 'linear' else f'{head}:ce'


def split_comparisons(records: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Records of each comparison of a file, in the order of their first lines, which say what was compared.

    Raises:
        UserError: these are other records.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in records:
        if 'key' not in line:
            raise UserError('These are no records of a comparison; for recorded runs there is `ccl-timm report`.')
        found.setdefault(line['key'], []).append(line)
    return list(found.values())


def show_comparison(records: Sequence[Mapping[str, Any]], within: float = EQUIVALENCE) -> str:
    """The comparison as text: differences, further measures, what the losses were tuned to, and what it shows.

    Args:
        records: of one comparison, see :func:`split_comparisons`.
        within: margin of equivalence, in points.

    Raises:
        UserError: none of its final runs was made.
    """
    header, runs = records[0], final_runs(records)
    if not runs:
        raise UserError('This comparison has no final runs yet: start it again without --show.')
    metric = header['metric']
    lines = compare_runs(runs, metric, within)
    tests = sum(found is not None and found.p is not None for line in lines for found in (line.plain, line.control))
    columns = ('loss', 'head', f'{metric} %', 'seeds', 'minus ce, linear head', 'minus ce, same head')
    rows = [_row(line, within) for line in _best_first(lines)]
    paired = 'Differences are paired by seed'
    if len({*map(frozenset, runs.values())}) > 1:
        paired += ' where both have the same'
    return '\n'.join([
        f'{_backbone(header)}, tuning runs for each loss: {header["trials"]}', '', table(rows, columns), '',
        _conclusion(lines), '',
        f'{metric} after the last epoch, mean ± standard deviation over the seeds. {paired},',
        f"with their 95% interval. Better and worse: p < 0.05 after Holm's correction for the {tests} tests of",
        f'this table. Equal: within {within:g} points, by two one-sided tests, corrected alike. Where no difference',
        'is shown, one of the size named would have been, with a probability of 80%.',
        *([_CAVEAT] if header['trials'] else []), '',
        *_measures(runs, _epochs_to_95(records), metric), *_settings(runs),
    ])  # fmt: skip


def draw_rows(records: Sequence[Mapping[str, Any]], within: float = EQUIVALENCE) -> list[ForestRow]:
    """Differences to plain cross-entropy for :func:`ccl_timm.experiments.plots.draw_forest`, the best first."""
    lines = compare_runs(final_runs(records), records[0]['metric'], within)
    return [
        ForestRow(_title(line.name), line.plain.mean, *line.plain.interval, line.plain.verdict)
        for line in _best_first(lines)
        if line.plain and line.plain.interval
    ]


def _title(name: str) -> str:
    """Such as ``'cc on cam'``."""
    head, loss = name.split(':', 1)
    return f'{loss} on {head}'


def _best_first(lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: -statistics.fmean(line.values.values()))


def epochs_to(curve: Sequence[float], share: float = 0.95) -> int:
    """Epochs until a curve first reaches a share of its last value."""
    return next(epoch for epoch, value in enumerate(curve, 1) if value >= share * curve[-1])


def _epochs_to_95(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """By entry: epochs to 95% of the final accuracy, on tuning's held-out share, with the settings that were chosen."""
    chosen = {name: next(iter(own.values()))['params'] for name, own in final_runs(records).items()}
    trials = [line for line in records if 'trial' in line and line.get('curve')]
    return {line['entry']: epochs_to(line['curve']) for line in trials if line['params'] == chosen.get(line['entry'])}


def _row(line: Line, within: float) -> tuple[str, ...]:
    head, loss = line.name.split(':', 1)
    shown = ('' if found is None else show_difference(found, within) for found in (line.plain, line.control))
    label = f'{loss} (control)' if loss == 'ce' else loss
    return (label, head, show_values(list(line.values.values())), str(len(line.values)), *shown)


def _conclusion(lines: list[Line]) -> str:
    """What the table shows, in a sentence or two."""
    judged = [(_title(line.name), line.plain) for line in _best_first(lines) if line.plain is not None]
    kinds = ('better', 'worse', 'equal', 'identical')
    by = {kind: [name for name, found in judged if found.verdict == kind] for kind in kinds}
    shown = [
        f'{kind} than cross-entropy on a linear head: {", ".join(by[kind])}' for kind in ('better', 'worse') if by[kind]
    ]
    for kind, label in (('equal', 'as good'), ('identical', 'identical')):
        if by[kind]:
            shown.append(f'{label}: {", ".join(by[kind])}')
    left = len(judged) - sum(map(len, by.values()))
    if left:
        others = '1 other' if left == 1 else f'{left} others'
        shown.append(
            f'no difference shown: {others}' if shown else 'no difference from cross-entropy on a linear head shown'
        )
    return f'Result: {"; ".join(shown)}.' if shown else 'Result: nothing to compare.'


def _measures(runs: _Runs, epochs: Mapping[str, int], metric: str) -> list[str]:
    names = [name for name in _MEASURES if all(name in run for own in runs.values() for run in own.values())]
    names.remove(metric)
    rows = []
    for name, own in runs.items():
        head, loss = name.split(':', 1)
        means = (statistics.fmean(run[measure] for run in own.values()) for measure in names)
        rows.append((loss, head, *(f'{mean:.3g}' for mean in means), *([str(epochs.get(name, ''))] if epochs else [])))
    columns = ('loss', 'head', *(_MEASURES[n] for n in names), *(['epochs to 95%'] if epochs else []))
    note = ', and epochs of tuning until 95% of the final top-1' if epochs else ''
    return [f'Further measures, means over the seeds{note}:', table(rows, columns)]


def _settings(runs: _Runs) -> list[str]:
    """What tuning chose; nothing without tuning."""
    rows = []
    for name, own in runs.items():
        head, loss = name.split(':', 1)
        params = next(iter(own.values()))['params']
        rows.append((loss, head, ' '.join(f'{key}={value:.4g}' for key, value in params.items())))
    if not any(settings for *_, settings in rows):
        return []
    return ['', 'Settings of the final runs:', table(rows, ('loss', 'head', 'settings'))]
