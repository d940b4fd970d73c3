"""`ccl-timm report`."""

import argparse
from pathlib import Path

from ccl_timm.cli.common import add_output
from ccl_timm.console import log_info
from ccl_timm.console.arguments import Parser
from ccl_timm.errors import UserError, require_absent
from ccl_timm.experiments.matching import match_rows
from ccl_timm.experiments.rendering import FORMATS
from ccl_timm.experiments.report import plain_report, show_differences, table_report
from ccl_timm.experiments.results import read_results, write_record
from ccl_timm.experiments.tables import read_table

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    "Put finished runs into the papers' tables, or into one of their own. It reads what runs record (args.yaml, "
    'summary.csv, environment.json), or files that --record has written.'
)


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='folder of a run or one that holds some, or a file of --record')
    add('--table', default=None, metavar='NAME', help='such as cc-table1; `ccl-timm reproduce` lists them')
    add('--format', default='md', choices=tuple(FORMATS), help='md: Markdown (default); html: one file, with pictures')
    add_output(parser, 'FILE', 'write to this new file')
    add('--record', default='', metavar='FILE', help='record the runs in this file (.jsonl), one line per run')
    add('--diff', action='store_true', help='settings, versions and data in which two runs differ, then their results')


def run(args: argparse.Namespace) -> int:
    if args.diff:
        if len(args.runs) != 2 or args.table or args.format != 'md' or args.output or args.record:
            raise UserError('--diff takes the folders of two runs, and no --table, --format, --output or --record.')
        print(show_differences(*map(Path, args.runs)))
        return 0
    if args.output:
        require_absent(args.output)
    table = read_table(args.table) if args.table else None
    found = read_results(args.runs)
    report = table_report(table, match_rows(table, found), found) if table else plain_report(found)
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
