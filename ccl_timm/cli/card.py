"""`ccl-timm card`."""

import argparse

from ccl_timm.cli.common import add_output, add_source
from ccl_timm.console.arguments import Parser
from ccl_timm.hub.publish import write_card

__all__ = ['HELP', 'add_arguments', 'run']

HELP = "Print a run's model card, as `ccl-timm push` would send it."


def add_arguments(parser: Parser) -> None:
    add_card(parser, required=False)
    add_output(parser, 'DIR', 'write the card to this new folder, with the records it is written from')


def add_card(parser: Parser, required: bool) -> None:
    """The flags that `push` has too."""
    add_source(parser, 'folder of a run, or a checkpoint file in one')
    add = parser.add_argument
    add('--repo-id', required=required, default=None, metavar='OWNER/NAME', help='the repository on the Hub')
    add('--baseline', default=None, metavar='RUN', help='the same recipe with --loss ce, for the card')
    add('--license', default='apache-2.0', metavar='NAME', help='of the weights, default apache-2.0')
    add('--note', default='', metavar='TEXT', help='what else a reader of the card must know of the data')


def run(args: argparse.Namespace) -> int:
    card = write_card(
        args.source,
        repo_id=args.repo_id,
        use_ema=args.use_ema,
        baseline=args.baseline,
        license=args.license,
        note=args.note,
        output=args.output,
    )
    print(card, end='')
    return 0
