"""`ccl-timm reproduce`."""

import argparse
from pathlib import Path

from ccl_timm.cli.common import add_plan, shared_args
from ccl_timm.console import table
from ccl_timm.console.arguments import COUNT, Parser
from ccl_timm.errors import UserError
from ccl_timm.experiments import tables
from ccl_timm.experiments.reproduce import plan_of, run_plan, show_results

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    "Run rows of the papers' tables and ours, or estimate the time that takes. Finished runs are skipped, interrupted "
    'ones resume. Without TABLE: list them. Arguments after -- go to `timm train.py`, such as -- --workers 2.'
)


def add_arguments(parser: Parser) -> None:
    parser.usage = f'{parser.prog} [TABLE] [options] [-- arguments of the training script]'
    add = parser.add_argument
    add('table', nargs='?', default=None, metavar='TABLE', help='such as cc-table1')
    add('--dataset', default=None, metavar='NAME', help="the table's column, such as mnist")
    add('--rows', nargs='+', default=[], metavar='ROW', help='such as resnet18:cc resnet18:ce; default all')
    add_plan(parser, 'output/reproduce', "runs per row, 0 to N-1; default the table's")
    add(
        '--jobs', type=COUNT, default=1, metavar='N', help='runs at a time, each with its share of the cores; default 1'
    )


def run(args: argparse.Namespace) -> int:
    if not args.table:
        rows = [(name, tables.read_table(name)) for name in tables.list_tables()]
        print(table([(name, t.title, ', '.join(t.datasets)) for name, t in rows], ('name', 'title', 'data sets')))
        return 0
    chosen = tables.select(tables.read_table(args.table), args.dataset, args.rows)
    if len(chosen.datasets) > 1 and not args.dry_run:
        raise UserError(f"Table '{chosen.name}' has several data sets: give --dataset {'|'.join(chosen.datasets)}.")
    folder, train_args = Path(args.output) / chosen.name, [*shared_args(args), *args.train_args]
    plan = plan_of(chosen, args.seeds or chosen.seeds, folder, train_args)
    return run_plan(plan, show_results, args.dry_run, args.estimate, args.jobs)
