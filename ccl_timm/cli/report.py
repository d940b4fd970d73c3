"""`ccl-timm report`."""

import argparse
from pathlib import Path

from ccl_timm.cli.common import add_output
from ccl_timm.console import log_info
from ccl_timm.console.arguments import Parser
from ccl_timm.errors import UserError, require_writable
from ccl_timm.experiments import plots
from ccl_timm.experiments.matching import match_rows
from ccl_timm.experiments.rendering import FORMATS, Report
from ccl_timm.experiments.report import plain_report, show_differences, table_report
from ccl_timm.experiments.results import Result, read_results, write_record
from ccl_timm.experiments.tables import read_table, select

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    "Put finished runs into the papers' tables, or into one of their own. It reads what runs record (args.yaml, "
    'summary.csv, environment.json), or files that --record has written.'
)


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='folder of a run or one that holds some, or a file of --record')
    add('--table', default=None, metavar='NAME', help='such as cc-table1; `ccl-timm reproduce` lists them')
    add('--rows', nargs='+', default=[], metavar='ROW', help="some of the table's rows; default all")
    add('--format', default='md', choices=tuple(FORMATS), help='md: Markdown (default); html: one file, with pictures')
    add_output(parser, 'FILE', 'write to this new file')
    add('--plot', default='', metavar='FILE', help='draw accuracy over the epochs to this new .svg or .png file')
    add('--record', default='', metavar='FILE', help='record the runs in this file (.jsonl), one line per run')
    add('--diff', action='store_true', help='settings, versions and data in which two runs differ, then their results')


def run(args: argparse.Namespace) -> int:
    if args.diff:
        others = (args.table, args.rows, args.output, args.plot, args.record)
        if len(args.runs) != 2 or any(others) or args.format != 'md':
            raise UserError('--diff takes the folders of two runs, and no other option.')
        print(show_differences(*map(Path, args.runs)))
        return 0
    if args.rows and not args.table:
        raise UserError('--rows are those of a table: give its name with --table.')
    if args.output:
        require_writable(args.output)
    if args.plot:
        require_writable(args.plot)
        plots.check_name(args.plot)
    found = read_results(args.runs)
    report = _report_rows(args.table, args.rows, found) if args.table else plain_report(found)
    if args.plot:
        _plot(report, Path(args.plot))
    text = FORMATS[args.format](report)
    if args.record:
        write_record(Path(args.record), found)
        log_info(f'{len(found)} runs recorded: {args.record}')
    if args.output:
        with open(args.output, 'x', encoding='utf-8', newline='\n') as file:
            file.write(text)
        log_info(f'written: {args.output}')
    else:
        print(text, end='')
    return 0


def _report_rows(name: str, rows: list[str], found: list[Result]) -> Report:
    """A table's report with some rows only, each with what it has among all."""
    table = read_table(name)
    chosen = select(table, None, rows).rows
    return table_report(table, [match for match in match_rows(table, found) if match.row in chosen], found)


def _plot(report: Report, path: Path) -> None:
    """Draw the curves of a report of one data set."""
    if len(report.curves) != 1:
        raise UserError(f'--plot draws the runs of one data set; these are of {len(report.curves)}.')
    plots.save(plots.draw_curves(*next(iter(report.curves.items()))), path)
    log_info(f'written: {path}')
