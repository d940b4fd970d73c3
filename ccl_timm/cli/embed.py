"""`ccl-timm embed`."""

import argparse

from ccl_timm.cli.common import add_device, add_source
from ccl_timm.console import log_info, log_warning
from ccl_timm.console.arguments import Parser
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.embedding import check_table, embed, write_table
from ccl_timm.training.evaluation import pick_device

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Write features, logits and attention of the images of a folder to a file, for other tools: a row for each image, '
    'with its path and the name of its folder. The exit code is 1 if an image could not be read.'
)


def add_arguments(parser: Parser) -> None:
    add_source(parser)
    add_device(parser, batch_size=32)
    parser.add_argument('folder', metavar='DIR', help='images, or folders of them')
    parser.add_argument('-o', '--output', required=True, metavar='FILE', help='a new .npz or .parquet file')


def run(args: argparse.Namespace) -> int:
    check_table(args.output)
    trained = load_trained(args.source, args.use_ema)
    columns, unreadable = embed(trained, args.folder, args.batch_size, pick_device(args.device))
    write_table(columns, args.output)
    for path, reason in unreadable:
        log_warning(f"'{path}' is not a readable image and was left out: {reason}")
    shown = ', '.join(f'{name} of {column.shape[1]}' for name, column in columns.items() if column.ndim == 2)
    log_info(f'written: {args.output}, {len(columns["path"])} images, {shown}')
    return 1 if unreadable else 0
