"""A report as Markdown, CSV, JSON or one HTML file."""

import base64
import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ccl_timm.console.escape import csv_text, markdown_text, terminal_text
from ccl_timm.experiments import plots

__all__ = ['FORMATS', 'Report', 'Section']


@dataclass(frozen=True)
class Section:
    """A table of a report: its caption, its header, and its rows, all as long as the header."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        title: of the table, or of the runs.
        sections: for people. Captions, headers and cells are plain text: names in them may hold anything.
        notes: sentences below, in Markdown.
        records: for programs, one per group of runs, with the same keys in all.
        curves: for each data set the curves to draw, see ``plots.draw_curves``.
        pictures: files to show in HTML.
        forests: for each title the differences to draw in HTML, see ``plots.draw_forest``.
    """

    title: str
    sections: list[Section]
    notes: list[str]
    records: list[dict[str, Any]]
    curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    forests: dict[str, list[plots.ForestRow]] = field(default_factory=dict)


def _markdown(report: Report) -> str:
    lines = [f'**{markdown_text(report.title)}**', '']
    for section in report.sections:
        lines += [f'{markdown_text(section.caption)}:', '', *_markdown_table(section), '']
    return '\n'.join([*lines, *report.notes]) + '\n'


def _markdown_table(section: Section) -> list[str]:
    rows = [[markdown_text(cell) for cell in row] for row in [section.header, *section.rows]]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(section.header))]
    lines = [
        '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |' for row in rows
    ]
    return [lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]]


_NO_NAMES = {'against_ce'}  # text of ours, which may begin with a sign


def _csv(report: Report) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(report.records[0])
    for record in report.records:
        writer.writerow(_cell(value) if key in _NO_NAMES else csv_text(_cell(value)) for key, value in record.items())
    return file.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return ' '.join(f'{key}={_cell(item)}' for key, item in value.items())
    return ';'.join(map(str, value)) if isinstance(value, list) else value


def _json(report: Report) -> str:
    content = {'title': report.title, 'notes': report.notes, 'records': report.records}
    return json.dumps(content, indent=2) + '\n'


def _html(report: Report) -> str:
    forests = {title: plots.as_svg(plots.draw_forest(rows, title)) for title, rows in report.forests.items() if rows}
    curves = {data: plots.as_svg(plots.draw_curves(data, own)) for data, own in report.curves.items()}
    pictures = [
        (
            f'{path.parent.parent.name}: {path.stem}',
            terminal_text(path.stem),
            base64.b64encode(path.read_bytes()).decode(),
        )
        for path in report.pictures
    ]
    return _HTML.get_template('report.html').render(report=report, forests=forests, curves=curves, pictures=pictures)


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else terminal_text(value)


_HTML = jinja2.Environment(
    loader=jinja2.PackageLoader('ccl_timm.experiments', ''),
    autoescape=True,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)

FORMATS: dict[str, Callable[[Report], str]] = {'md': _markdown, 'csv': _csv, 'json': _json, 'html': _html}
