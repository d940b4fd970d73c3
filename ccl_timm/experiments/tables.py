"""The papers' tables, and ours, as data: what a row trains, and the value that a paper prints."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ccl_timm.errors import UnknownNameError, UserError, did_you_mean
from ccl_timm.training import recipes

__all__ = [
    'Row', 'Table', 'list_benchmarks', 'list_tables', 'read_benchmark', 'read_table', 'run_name', 'select', 'tables_of',
    'to_cli_args',
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One value of a table.

    Attributes:
        name: such as ``'resnet18:cc'``.
        dataset: column of the table; '' if it has one only.
        args: of the training script, without seed and folders.
        paper: the value that the paper prints, top-1 in %, and the largest deviation from it or None; None for no
            paper.
    """

    name: str
    dataset: str
    args: tuple[str, ...]
    paper: tuple[float, float | None] | None = None

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return self.args[self.args.index('--config') + 1]


@dataclass(frozen=True)
class Table:
    """A table's rows in the order of its data sets, and the number of runs per value."""

    name: str
    title: str
    seeds: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def datasets(self) -> list[str]:
        """The columns, in their order."""
        return list(dict.fromkeys(row.dataset for row in self.rows))


def list_tables() -> list[str]:
    """Names of the papers' tables and of ours."""
    return sorted({path.stem for path in _folder().glob('*.yaml')} - {*list_benchmarks()})


def list_benchmarks() -> list[str]:
    """Names of the comparisons that ``ccl-timm compare --table`` makes."""
    return sorted(path.stem for path in _folder().glob('benchmark-*.yaml'))


def read_benchmark(name: str) -> dict[str, Any]:
    """A comparison as data: ``backbone``, ``losses``, ``config``, ``trials``, ``seeds``, ``metric``, what to ``set``.

    It may have ``head_options``: options of heads by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in list_benchmarks():
        known = list_benchmarks()
        raise UnknownNameError(f"Unknown benchmark '{name}'{did_you_mean(name, known)} Benchmarks: {', '.join(known)}.")
    return recipes.read_recipe(_folder() / f'{name}.yaml')


def read_table(name: str) -> Table:
    """Read one of the papers' tables, or one of ours.

    Its file has ``title``, ``seeds``, ``notes``, ``datasets`` (each with ``recipe`` and settings to ``set``) and
    ``rows`` (each with ``model``, ``loss``, settings to ``set``, settings ``in`` single data sets, perhaps a ``recipe``
    of its own, and the ``paper``'s values: a data set without one is not in the row). Rows without ``paper`` are ours,
    and in every column.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in list_tables():
        raise UnknownNameError(
            f"Unknown table '{name}'{did_you_mean(name, list_tables())} Tables: {', '.join(list_tables())}."
        )
    content = recipes.read_recipe(_folder() / f'{name}.yaml')
    rows = [
        _row(row_name, row, dataset, column)
        for dataset, column in content['datasets'].items()
        for row_name, row in content['rows'].items()
        if 'paper' not in row or dataset in row['paper']
    ]
    return Table(name, content['title'], content['seeds'], tuple(rows), tuple(content.get('notes', ())))


def select(table: Table, dataset: str | None, names: Iterable[str]) -> Table:
    """The table with the chosen rows only.

    Args:
        table: see :func:`read_table`.
        dataset: its column; None for all.
        names: of rows; none for all.

    Raises:
        UserError: it has no such data set, or none of its rows there has such a name.
    """
    if dataset is not None and dataset not in table.datasets:
        raise UnknownNameError(
            f"Table '{table.name}' has no data set '{dataset}'{did_you_mean(dataset, table.datasets)} "
            f'It has {", ".join(table.datasets)}.'
        )
    rows = [row for row in table.rows if dataset in (None, row.dataset)]
    found = list(dict.fromkeys(row.name for row in rows))
    for name in names:
        if name not in found:
            raise UnknownNameError(
                f"Table '{table.name}' has no row '{name}'"
                f'{f" for {dataset}" if dataset else ""}{did_you_mean(name, found)} Rows: {", ".join(found)}.'
            )
    chosen = tuple(row for row in rows if not names or row.name in names)
    return replace(table, rows=chosen)


def tables_of(recipe: str) -> list[Table]:
    """The tables that use a recipe, with its rows only."""
    found = []
    for table in map(read_table, list_tables()):
        if rows := tuple(row for row in table.rows if row.recipe == recipe):
            found.append(replace(table, rows=rows))
    return found


def run_name(row: Row, seed: int) -> str:
    """Name of a row's run, made of data set, row and seed; ``args.yaml`` keeps it as ``experiment``."""
    return '-'.join(part for part in (row.dataset, *row.name.split(':'), f'seed{seed}') if part)


def to_cli_args(settings: dict[str, Any]) -> list[str]:
    """Settings by name as arguments of the training script: ``{'batch_size': 8}`` to ``['--batch-size', '8']``."""
    args = []
    for key, value in settings.items():
        args.append(f'--{key.replace("_", "-")}')
        if isinstance(value, dict):
            args += [f'{name}={option}' for name, option in value.items()]
        elif isinstance(value, list):
            args += [str(item) for item in value]
        elif value is False:
            raise UserError(f"'{key}: false' cannot be given on a command line: a flag can only be set.")
        elif value is not True:
            args.append(str(value))
    return args


def _folder() -> Path:
    return recipes.recipe_folder() / 'tables'


def _row(name: str, row: dict[str, Any], dataset: str, column: dict[str, Any]) -> Row:
    settings = {
        'config': row.get('recipe') or column['recipe'],
        'model': row['model'],
        'loss': row['loss'],
        **column.get('set', {}),
        **row.get('set', {}),
        **row.get('in', {}).get(dataset, {}),
    }
    value = row['paper'][dataset] if 'paper' in row else None
    paper = tuple(value) if isinstance(value, list) else None if value is None else (value, None)
    return Row(name, dataset, tuple(to_cli_args(settings)), paper)
