"""`ccl-timm models`."""

import argparse

from ccl_timm import losses, models
from ccl_timm.console import table
from ccl_timm.console.arguments import Parser
from ccl_timm.errors import UserError

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'List our models: timm backbones with another classifier, their parameters, the losses that suit them.'


def add_arguments(parser: Parser) -> None:
    parser.add_argument('pattern', nargs='?', default='*', metavar='PATTERN', help="such as '*_cam'; also of plugins")


def run(args: argparse.Namespace) -> int:
    rows = [
        (name, f'{size / 1e6:.1f} M', ', '.join(losses.losses_for(head, outputs)))
        for name, size, head, outputs in models.overview(args.pattern)
    ]
    if not rows:
        raise UserError(f"No model of ours matches '{args.pattern}'; any <timm architecture>_<head> works by its name.")
    print(table(rows, ('name', 'parameters', 'losses')))
    print('\nAny other timm architecture by its name too, such as convnext_tiny_cam.')
    return 0
