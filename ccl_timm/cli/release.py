"""`ccl-timm release`."""

import argparse

from ccl_timm.console import table
from ccl_timm.console.arguments import Parser
from ccl_timm.hub.release import list_releases, read_release, release

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Train one of our checkpoints as hub_cards/ describes it, check its accuracy, write its card, and push it. Without '
    'NAME: list them.'
)


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add('name', nargs='?', default=None, metavar='NAME', help='such as resnet18_cam.cc_digits')
    add('--data-dir', default=None, metavar='DIR', help='folder of its data, as for `timm train.py`')
    add('--run', dest='trained', default=None, metavar='RUN', help='take this finished run, and train nothing')
    add('--output', default='output/release', metavar='DIR', help='folder of runs and cards, default output/release')
    add('--private', action='store_true', help='make a new repository private')
    add('--dry-run', action='store_true', help='train, check and write the card, and send nothing')


def run(args: argparse.Namespace) -> int:
    if not args.name:
        found = [read_release(name) for name in list_releases()]
        rows = [(r.name, f'{r.top1:.2f} ± {r.tolerance:g}', r.license, r.train) for r in found]
        print(table(rows, ('name', 'top-1 %', 'license', 'timm train.py')))
        return 0
    address = release(args.name, args.data_dir, args.trained, args.output, args.dry_run, args.private)
    if address:
        print(address)
        print(f"load it: import ccl_timm; ccl_timm.create_model('{args.name}', pretrained=True)")
    return 0
