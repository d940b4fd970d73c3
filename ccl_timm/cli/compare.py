"""`ccl-timm compare`."""

import argparse
from pathlib import Path

from ccl_timm.cli.common import add_plan, shared_args
from ccl_timm.console.arguments import RATE, Parser
from ccl_timm.experiments.compare import comparison, write_result
from ccl_timm.experiments.reproduce import plan_of, run_plan

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Compare losses with cross-entropy on your own images. Each has the head made for it, and cross-entropy on that '
    'same head is its control, all with the same split, epochs, seeds and learning rates. Finished runs are skipped. '
    'Arguments after -- go to `timm train.py`, such as -- --val-fraction 0.2 --pretrained-path FILE.'
)


def add_arguments(parser: Parser) -> None:
    parser.usage = f'{parser.prog} --data-dir DIR --losses A B [options] [-- arguments of the training script]'
    add = parser.add_argument
    add('--losses', nargs='+', default=['ce', 'cc', 'arcface'], metavar='NAME', help='default ce cc arcface')
    add('--backbone', default='resnet18', metavar='NAME', help='a timm architecture, default resnet18')
    add('--lr', nargs='+', type=RATE, default=[], metavar='X', help="learning rates to try; default the recipe's")
    add('--config', default='finetune', metavar='RECIPE', help='settings that all rows share, default finetune')
    add_plan(parser, 'output/compare')


def run(args: argparse.Namespace) -> int:
    chosen = comparison(args.backbone, args.config, args.losses, args.lr, shared_args(args))
    plan = plan_of(chosen, args.seeds or chosen.seeds, Path(args.output), args.train_args)
    return run_plan(plan, write_result, args.dry_run, args.estimate)
