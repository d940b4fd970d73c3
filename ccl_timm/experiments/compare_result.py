"""The result of a comparison: a table with intervals, what it shows, and how it was made."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ccl_timm.console import table
from ccl_timm.experiments.statistics import (
    EQUIVALENCE,
    Difference,
    differ,
    show_difference,
    show_values,
    verdicts,
)

__all__ = ['Line', 'compare_runs', 'show_comparison']

_Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
_CONTROL = 'linear:ce'
_MEASURES = {'nll': 'NLL', 'ece': 'ECE %', 'recall_at_1': 'R@1 %', 'map_at_r': 'MAP@R %', 'ms_per_step': 'ms a step'}


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


def _same_head(name: str) -> str:
    """Cross-entropy on an entry's head; nothing for the linear one, which every entry is compared with anyway."""
    head = name.split(':', 1)[0]
    return '' if head == 'linear' else f'{head}:ce'


def show_comparison(title: str, runs: _Runs, metric: str, within: float = EQUIVALENCE) -> str:
    """The comparison as text: differences, further measures, what the losses were tuned to, and what it shows."""
    lines = compare_runs(runs, metric, within)
    tests = sum(found is not None and found.p is not None for line in lines for found in (line.plain, line.control))
    header = ('loss', 'head', f'{metric} %', 'seeds', 'minus ce, linear head', 'minus ce, same head')
    rows = [_row(line, within) for line in sorted(lines, key=lambda line: -statistics.fmean(line.values.values()))]
    return '\n'.join([
        title, '', table(rows, header), '', _conclusion(lines), '',
        f'{metric} after the last epoch, mean ± standard deviation over the seeds. Differences are paired by seed,',
        f"with their 95% interval. Better and worse: p < 0.05 after Holm's correction for the {tests} tests of",
        f'this table. Equal: within {within:g} points, by two one-sided tests, corrected alike. Where no difference',
        'is shown, one of the size named would have been, with a probability of 80%.', '',
        *_measures(runs), '', *_settings(runs),
    ])  # fmt: skip


def _row(line: Line, within: float) -> tuple[str, ...]:
    head, loss = line.name.split(':', 1)
    shown = ('' if found is None else show_difference(found, within) for found in (line.plain, line.control))
    label = f'{loss} (control)' if loss == 'ce' else loss
    return (label, head, show_values(list(line.values.values())), str(len(line.values)), *shown)


def _conclusion(lines: list[Line]) -> str:
    """What the table shows, in a sentence or two."""
    judged = [(line.name, line.plain) for line in lines if line.plain is not None]
    by = {kind: [name for name, found in judged if found.verdict == kind] for kind in ('better', 'worse', 'equal')}
    shown = [f'{kind} than plain cross-entropy: {", ".join(by[kind])}' for kind in ('better', 'worse') if by[kind]]
    if by['equal']:
        shown.append(f'as good: {", ".join(by["equal"])}')
    left = len(judged) - sum(map(len, by.values()))
    if left:
        shown.append(f'no difference shown: {left} others' if shown else 'no difference from plain cross-entropy shown')
    return f'Result: {"; ".join(shown)}.' if shown else 'Result: nothing to compare.'


def _measures(runs: _Runs) -> list[str]:
    names = [name for name in _MEASURES if all(name in run for own in runs.values() for run in own.values())]
    rows = []
    for name, own in runs.items():
        head, loss = name.split(':', 1)
        means = (statistics.fmean(run[measure] for run in own.values()) for measure in names)
        rows.append((loss, head, *(f'{mean:.3g}' for mean in means)))
    return ['Further measures, means over the seeds:', table(rows, ('loss', 'head', *(_MEASURES[n] for n in names)))]


def _settings(runs: _Runs) -> list[str]:
    rows = []
    for name, own in runs.items():
        head, loss = name.split(':', 1)
        params = next(iter(own.values()))['params']
        rows.append((loss, head, ' '.join(f'{key}={value:.4g}' for key, value in params.items()) or "the recipe's"))
    return ['Settings of the final runs:', table(rows, ('loss', 'head', 'settings'))]
