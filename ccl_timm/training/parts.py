"""What was measured of a run on further parts of its data: its parts.csv."""

import csv
import io
from pathlib import Path
from typing import Any

from ccl_timm.errors import UserError
from ccl_timm.training import run_dir

__all__ = ['add_part', 'read_parts']

_NAMES = ('part', 'epoch', 'images', 'top1', 'top5', 'loss')


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """Read a run's parts.csv; no rows without that file.

    Returns:
        Rows with ``part``, ``epoch`` (counted from 0, as in summary.csv), ``images``, ``top1``, ``top5`` and ``loss``.

    Raises:
        UserError: the file is not one that :func:`add_part` wrote.
    """
    path = folder / 'parts.csv'
    if not path.is_file():
        return []
    try:
        with path.open(newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
        return [{key: row[key] if key == 'part' else float(row[key]) for key in _NAMES} for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is no table of parts as `validate --record` writes it: move it away.") from error


def add_part(folder: Path, row: dict[str, Any]) -> Path:
    """Add what was measured to a run's parts.csv, in the place of the same part's after the same epoch.

    Args:
        folder: the run's.
        row: as :func:`read_parts` returns them.

    Returns:
        The file's path.

    Raises:
        UserError: there is a parts.csv of another kind.
    """
    others = [own for own in read_parts(folder) if (own['part'], own['epoch']) != (row['part'], row['epoch'])]
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, _NAMES, lineterminator='\n')
    writer.writeheader()
    writer.writerows([*others, row])
    run_dir.atomic_write(folder / 'parts.csv', text.getvalue())
    return folder / 'parts.csv'
