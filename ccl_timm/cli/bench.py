"""`ccl-timm bench`."""

import argparse
import json
import os
import shlex
from typing import Any

import timm
import torch

from ccl_timm import losses
from ccl_timm.cli.common import add_loading
from ccl_timm.console import log_info, table
from ccl_timm.console.arguments import COUNT, Parser
from ccl_timm.errors import UserError
from ccl_timm.experiments.bench import bench_cc, bench_layouts, bench_loaders, bench_photos, bench_steps, bench_train
from ccl_timm.training.evaluation import pick_device

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Time losses, training steps, loading and whole runs against what they replace, in turn. A ratio is the time '
    'divided by that of the first line.'
)
_WHAT = """\
cc: CC-Loss and the paper's N x N form; steps: all losses and cross-entropy; loaders: images in memory and timm's
loader; photos: JPEG files of 704 x 480, likewise; layouts: steps in each memory layout and precision; train: the
built-in script and timm's train.py, whose arguments follow --"""


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add('what', choices=('cc', 'steps', 'loaders', 'photos', 'layouts', 'train'), help=_WHAT)
    add('--rounds', type=COUNT, default=5, metavar='N', help='how often each is timed, default 5')
    add('--json', action='store_true', help='print JSON')
    add_loading(parser, batch_size=128, workers=2)
    add('--classes', type=COUNT, default=None, metavar='K', help='default 1000 for cc, 100 for steps')
    add('--samples', type=COUNT, default=16384, metavar='N', help='cc: attention vectors, default 16384')
    add('--width', type=COUNT, default=512, metavar='D', help='cc: their length, default 512')
    add('--backbone', default='resnet18', metavar='NAME', help='steps, layouts: timm architecture, default resnet18')
    add('--losses', nargs='+', default=[], metavar='NAME', help='steps: default all')
    add('--img-size', type=COUNT, default=None, metavar='N', help='height and width, default 32, for photos 224')
    add('--images', type=COUNT, default=None, metavar='N', help='per epoch: default 20000 for loaders, 1024 for photos')
    add('--script', metavar='FILE', help="train: timm's train.py")
    parser.trailing = 'train_args'


def run(args: argparse.Namespace) -> int:
    if args.train_args and args.what != 'train':
        raise UserError(f'bench {args.what} trains with no script: leave out {shlex.join(args.train_args)} after --.')
    device = torch.device(pick_device(args.device))
    log_info(f'timm {timm.__version__}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads')
    if args.what == 'cc':
        rows = bench_cc(args.samples, args.width, args.classes or 1000, args.rounds, device)
    elif args.what == 'steps':
        names = args.losses or losses.list_losses()
        sizes = (args.img_size or 32, args.batch_size, args.classes or 100, args.rounds)
        rows = bench_steps(args.backbone, names, *sizes, device)
    elif args.what == 'layouts':
        rows = bench_layouts(args.backbone, args.img_size or 32, args.batch_size, args.classes or 100, device)
    elif args.what == 'train':
        if not args.script or not os.path.isfile(args.script):
            raise UserError("bench train needs timm's train.py: give its path with --script.")
        rows = bench_train(args.script, args.train_args, args.rounds, device)
    else:
        photos = args.what == 'photos'
        sizes = (args.images or (1024 if photos else 20000), args.img_size or (224 if photos else 32))
        bench = bench_photos if photos else bench_loaders
        rows = bench(*sizes, args.batch_size, args.workers, args.rounds, device)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        header = tuple(rows[0])
        print(table([tuple(_shown(row[key]) for key in header) for row in rows], header))
    return 0


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'
