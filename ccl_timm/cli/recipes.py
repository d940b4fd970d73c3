"""`ccl-timm recipes`."""

import argparse

from ccl_timm.console import table
from ccl_timm.console.arguments import Parser
from ccl_timm.experiments import tables
from ccl_timm.training import recipes

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'List the packaged recipes, or print one.'


def add_arguments(parser: Parser) -> None:
    parser.add_argument('name', nargs='?', default=None, metavar='NAME', help='print this one')


def run(args: argparse.Namespace) -> int:
    if args.name:
        print(recipes.find_recipe(args.name).read_text(encoding='utf-8'))
        return 0
    rows = []
    for name in recipes.list_recipes():
        title, data = recipes.describe(name)
        served = [f'{own.name} ({len(own.rows)})' for own in tables.tables_of(name)]
        rows.append((name, title, data, ', '.join(served) or '-'))
    print(table(rows, ('name', 'what', 'data', 'tables (rows)')))
    return 0
