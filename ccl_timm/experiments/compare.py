"""A fair comparison of losses on your images: each with the head made for it, beside cross-entropy on that head."""

import itertools
import json
from dataclasses import dataclass

from ccl_timm import losses
from ccl_timm.console import table
from ccl_timm.experiments.reproduce import Plan, final_results
from ccl_timm.experiments.statistics import LEVEL, difference, show_values, welch
from ccl_timm.experiments.tables import Row, Table, to_cli_args
from ccl_timm.training.run_dir import atomic_write

__all__ = ['comparison', 'rows_of', 'write_result']

_SEEDS = 3


def comparison(backbone: str, recipe: str, names: list[str], rates: list[float], args: list[str]) -> Table:
    """A table with the rows of :func:`rows_of`.

    Args:
        backbone: a timm architecture.
        recipe: settings that all rows share.
        names: of losses.
        rates: learning rates; none for the recipe's.
        args: further arguments of the training script that all rows share.
    """
    shared = ['--config', recipe, '--smoothing', '0.0', *args]  # not every loss takes smoothing
    return Table('compare', f'{backbone}, recipe {recipe}', _SEEDS, rows_of(backbone, names, rates, shared))


def rows_of(backbone: str, names: list[str], rates: list[float], args: list[str]) -> tuple[Row, ...]:
    """A row for each loss on its head and each learning rate, with cross-entropy on every head that occurs.

    Args:
        backbone: a timm architecture.
        names: of losses. A loss for any head gets the linear one.
        rates: learning rates; none for the recipe's.
        args: of the training script that all rows share; ``--config`` among them.

    Raises:
        UserError: there is no loss of a name.
    """
    pairs = [('linear', 'ce')]
    for name in names:
        head = 'linear' if losses.is_timm_loss(name) else losses.loss_class(name).head or 'linear'
        pairs += [(head, 'ce'), (head, name)]
    rows = []
    for (head, name), rate in itertools.product(dict.fromkeys(pairs), rates or [None]):
        own = to_cli_args({'model': f'{backbone}_{head}', 'loss': name} | ({'lr': rate} if rate else {}))
        rows.append(Row(f'{head}:{name}' + (f':lr{rate:g}' if rate else ''), '', (*args, *own)))
    return tuple(rows)


@dataclass(frozen=True)
class _Entry:
    """A loss on a head, with its best learning rate and the values of its seeds."""

    head: str
    loss: str
    lr: str
    top1: list[float]


def write_result(plan: Plan) -> str:
    """The comparison as text, which is also written beside the runs, with all values as JSON."""
    entries, folder = _best_rates(plan), next(iter(plan.jobs.values()))[0].run.path.parent
    text = _result(plan.table.title, entries)
    atomic_write(folder / 'compare.txt', text + '\n')
    atomic_write(folder / 'compare.json', json.dumps([vars(entry) for entry in entries], indent=2) + '\n')
    return text


def _result(title: str, entries: list[_Entry]) -> str:
    controls = {entry.head: entry.top1 for entry in entries if entry.loss == 'ce'}
    references = [_references(entry, controls) for entry in entries]
    tests = sum(
        welch(entry.top1, own) is not None
        for entry, pair in zip(entries, references, strict=True)
        for own in pair
        if own is not None
    )
    rows = []
    for entry, pair in zip(entries, references, strict=True):
        label = 'ce (control)' if entry.loss == 'ce' and entry.head != 'linear' else entry.loss
        against = ('' if own is None else difference(entry.top1, own, max(1, tests)) for own in pair)
        rows.append((label, entry.head, entry.lr, show_values(entry.top1), str(len(entry.top1)), *against))
    header = ('loss', 'head', 'lr', 'top-1 %', 'seeds', 'against ce, linear head', 'against ce, same head')
    return '\n'.join([
        title, '', table(rows, header), '',
        'Top-1 after the last epoch, mean ± largest deviation over the seeds. Of several learning rates the best for',
        'each row, chosen on the same validation images: a little too optimistic, for every row alike.',
        f"Differences: Welch's t-test over the seeds, p < {LEVEL} / {max(1, tests)} for the {tests} tests made; other",
        'images may give another result. No row has label smoothing, which some of these losses do not take.',
    ])  # fmt: skip


def _references(entry: _Entry, controls: dict[str, list[float]]) -> tuple[list[float] | None, list[float] | None]:
    """Values of cross-entropy on the linear head, and on the same head; None where that is no comparison."""
    is_control = entry.loss == 'ce'
    plain = None if is_control and entry.head == 'linear' else controls['linear']
    return plain, None if is_control or entry.head == 'linear' else controls[entry.head]


def _best_rates(plan: Plan) -> list[_Entry]:
    """For each head and loss, the learning rate with the best mean.

    A rate counts only if as many of its runs are done as of any other of that row.
    """
    found: dict[tuple[str, str], _Entry] = {}
    for row, jobs in plan.jobs.items():
        head, loss, *rate = row.name.split(':')
        values = [result.last for result in final_results(jobs)]
        known = found.get((head, loss))
        if known is None or _rank(values) > _rank(known.top1):
            found[head, loss] = _Entry(head, loss, rate[0][2:] if rate else "the recipe's", values)
    return list(found.values())


def _rank(values: list[float]) -> tuple[int, float]:
    return len(values), sum(values) / max(1, len(values))
