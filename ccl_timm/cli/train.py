"""`ccl-timm train`, which is also `timm train.py` where there is no such file."""

import argparse

from ccl_timm.console import log_info
from ccl_timm.console.arguments import Parser
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.train import train

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    "Train an image classifier. Names and defaults are those of timm's train.py; without any data named it trains on "
    'the embedded handwritten digits.'
)


def add_arguments(parser: Parser) -> None:
    TrainConfig.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    config = TrainConfig.from_args(args, args.prog)
    _log_hint(config)
    train(config, args.argv)
    return 0


def _log_hint(config: TrainConfig) -> None:
    if config.config == 'digits' and config.source('config') != 'cli':
        log_info('No data given: training on the embedded handwritten digits, recipe digits. Yours: --data-dir DIR')
    elif not any((config.config, config.pretrained, config.pretrained_path, config.initial_checkpoint, config.resume)):
        log_info(
            "hint: this is training from scratch with timm's defaults, which is seldom enough for a small folder; "
            'recipe finetune starts from pretrained weights: --config finetune'
        )
