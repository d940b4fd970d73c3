"""`ccl-timm push`."""

import argparse

from ccl_timm.cli.card import add_card
from ccl_timm.console.arguments import Parser
from ccl_timm.hub.publish import push

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'Put a trained model on the Hugging Face Hub: weights, config, card, settings, results.'


def add_arguments(parser: Parser) -> None:
    add_card(parser, required=True)
    add = parser.add_argument
    add('--examples', nargs='+', default=(), metavar='IMAGE',
        help='after RUN: images to show on its page, where everybody sees them')  # fmt: skip
    add('--private', action='store_true', help='make a new repository private')
    add('--revision', default=None, metavar='BRANCH', help='default main; created if it does not exist')
    add('--replace-card', action='store_true', help='overwrite a card that was edited by hand, too')
    add('--dry-run', action='store_true', help='list what would be sent, and send nothing')


def run(args: argparse.Namespace) -> int:
    address = push(
        args.source,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        use_ema=args.use_ema,
        baseline=args.baseline,
        license=args.license,
        note=args.note,
        examples=args.examples,
        replace_card=args.replace_card,
        dry_run=args.dry_run,
    )
    if address:
        print(address)
        print(f"load it: import ccl_timm; ccl_timm.create_model('hf-hub:{args.repo_id}', pretrained=True)")
    return 0
