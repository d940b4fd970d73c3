"""Flags that several commands share."""

import argparse

from ccl_timm.console.arguments import COUNT, WORKERS, Parser
from ccl_timm.experiments.tables import to_cli_args

__all__ = ['add_data', 'add_device', 'add_loading', 'add_output', 'add_plan', 'add_source', 'shared_args']


def add_source(parser: Parser, text: str = 'folder of a run or of an export, or a checkpoint file', **kwargs) -> None:
    """RUN and --use-ema: a trained model."""
    parser.add_argument('source', metavar='RUN', help=text, **kwargs)
    parser.add_argument('--use-ema', action='store_true', help='use the moving average of the weights')


def add_device(parser: Parser, batch_size: int) -> None:
    """--batch-size and --device."""
    text = f'images per batch, default {batch_size}'
    parser.add_argument('-b', '--batch-size', type=COUNT, default=batch_size, metavar='N', help=text)
    parser.add_argument('--device', default='auto', help='cpu, cuda, ...; auto takes an accelerator if there is one')


def add_loading(parser: Parser, batch_size: int = 256, workers: int = 4) -> None:
    """--batch-size, --device and --workers."""
    add_device(parser, batch_size)
    text = f'loader processes, default {workers}; 0 for none'
    parser.add_argument('-j', '--workers', type=WORKERS, default=workers, metavar='N', help=text)


def add_data(parser: Parser) -> None:
    """--data-dir, --dataset and --split: data in the place of the run's."""
    parser.add_argument('--data-dir', default=None, metavar='DIR', help="folder of the data, default the run's")
    parser.add_argument('--dataset', default=None, metavar='NAME', help='as for `timm train.py`')
    parser.add_argument('--split', default=None, metavar='NAME', help='split to measure on, default the validation one')


def add_output(parser: Parser, metavar: str, text: str) -> None:
    """--output."""
    parser.add_argument('-o', '--output', default='', metavar=metavar, help=text)


def add_plan(parser: Parser, output: str, seeds: str) -> None:
    """The flags of the commands that train many runs; arguments after ``--`` become ``args.train_args``."""
    add = parser.add_argument
    add('--seeds', type=COUNT, default=None, metavar='N', help=seeds)
    add('--epochs', type=COUNT, default=None, metavar='N', help="default the recipe's")
    add('--data-dir', default=None, metavar='DIR', help="the data set's folder, as for `timm train.py`")
    add('--output', default=output, metavar='DIR', help=f'folder of the runs, default {output}')
    add('--dry-run', action='store_true', help='check every row and print its commands')
    add('--estimate', action='store_true', help='time ten steps of every row and print the hours for all')
    parser.trailing = 'train_args'


def shared_args(args: argparse.Namespace) -> list[str]:
    """The training script's arguments that follow from the flags of :func:`add_plan`."""
    return to_cli_args({key: getattr(args, key) for key in ('epochs', 'data_dir') if getattr(args, key)})
