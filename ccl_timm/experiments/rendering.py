"""A report as Markdown, CSV, JSON or one HTML file."""

import base64
import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ccl_timm.console.escape import csv_text, markdown_text, terminal_text

__all__ = ['FORMATS', 'Report', 'Section']


@dataclass(frozen=True)
class Section:
    """A table of a report: its caption, its header, and its rows, all as long as the header."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        title: what it is of.
        sections: for people. Captions, headers and cells are plain text: names in them may hold anything.
        notes: sentences below, in Markdown.
        records: for programs, one a figure, with the same keys in all.
        curves: for each data set the curves to draw, see ``plots.draw_curves``.
        pictures: files to show in HTML.
    """

    title: str
    sections: list[Section]
    notes: list[str]
    records: list[dict[str, Any]]
    curves: dict[str, dict[str, list[list[tuple[int, float]]]]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)


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


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 80rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
td.long { white-space: normal; min-width: 12rem; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
figure { margin: 1rem 0; } img, svg { max-width: 100%; height: auto; }
"""


def _plain(text: str) -> str:
    return escape(terminal_text(text))


def _html(report: Report) -> str:
    parts = [f'<h1>{_plain(report.title)}</h1>']
    for section in report.sections:
        parts += [f'<h2>{_plain(section.caption)}</h2>', _html_table(section)]
    parts += [f'<p>{_plain(note)}</p>' for note in report.notes]
    if report.curves:
        from ccl_timm.experiments import plots

        parts.append('<h2>Top-1 over the epochs</h2>')
        parts += [_figure(plots.as_svg(plots.draw_curves(*item)), item[0]) for item in report.curves.items()]
    if report.pictures:
        parts.append('<h2>Pictures</h2>')
        parts += [_figure(_image(path), f'{path.parent.parent.name}: {path.stem}') for path in report.pictures]
    body = '\n'.join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f'<link rel="icon" href="data:,">\n<title>{_plain(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n{body}\n</body>\n</html>\n'
    )


def _html_table(section: Section) -> str:
    head = ''.join(f'<th>{_plain(cell)}</th>' for cell in section.header)
    body = '\n'.join(f'<tr>{"".join(map(_html_cell, row))}</tr>' for row in section.rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _html_cell(cell: str) -> str:
    kind = ' class="long"' if len(cell) > 24 else ''
    return f'<td{kind}>{_plain(cell)}</td>'


def _figure(content: str, caption: str) -> str:
    return f'<figure>{content}<figcaption>{_plain(caption)}</figcaption></figure>'


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_plain(path.stem)}" src="data:image/png;base64,{data}">'


FORMATS: dict[str, Callable[[Report], str]] = {'md': _markdown, 'csv': _csv, 'json': _json, 'html': _html}
