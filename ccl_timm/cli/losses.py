"""`ccl-timm losses`."""

import argparse

from ccl_timm import losses
from ccl_timm.console import table
from ccl_timm.console.arguments import Parser

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'List the losses, or explain one.'


def add_arguments(parser: Parser) -> None:
    parser.add_argument('name', nargs='?', default=None, metavar='NAME', help='explain this one')
    parser.add_argument('--pml', action='store_true', help='list those of pytorch-metric-learning')


def run(args: argparse.Namespace) -> int:
    overview = losses.pml_overview if args.pml else losses.overview
    print(losses.explain(args.name) if args.name else table(*overview()))
    return 0
