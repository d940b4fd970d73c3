"""`ccl-timm bench`."""

import argparse
import json
import os
import shlex
from collections.abc import Callable
from typing import Any

import timm
import torch

from ccl_timm import losses
from ccl_timm.cli.common import add_loading
from ccl_timm.console import log_info, table
from ccl_timm.console.arguments import COUNT, Parser
from ccl_timm.errors import UserError
from ccl_timm.experiments.bench import (
    bench_cc,
    bench_import,
    bench_layouts,
    bench_loaders,
    bench_photos,
    bench_predict,
    bench_steps,
    bench_train,
)
from ccl_timm.training.evaluation import pick_device

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Time losses, training steps, loading and whole runs against what they replace, in turn. A ratio is the time '
    'divided by that of the first line.'
)
_WHAT = """\
cc: CC-Loss and the paper's N x N form; steps: all losses and cross-entropy; loaders: images in memory and timm's
loader; photos: JPEG files of 704 x 480, likewise; predict: their classes; layouts: steps in each memory layout and
precision; import: this package and timm; train: the built-in script and timm's train.py, whose arguments follow --"""


def _train(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    if not args.script or not os.path.isfile(args.script):
        raise UserError("bench train needs timm's train.py: give its path with --script.")
    return bench_train(args.script, args.train_args, args.rounds, device)


def _loading(args: argparse.Namespace, images: int, size: int) -> tuple[int, int, int, int, int]:
    return (args.images or images, args.img_size or size, args.batch_size, args.workers, args.rounds)


_BENCHES: dict[str, Callable[[argparse.Namespace, torch.device], list[dict[str, Any]]]] = {
    'cc': lambda a, device: bench_cc(a.samples, a.width, a.classes or 1000, a.rounds, device),
    'steps': lambda a, device: bench_steps(
        a.backbone, a.losses or losses.list_losses(), a.img_size or 32, a.batch_size, a.classes or 100, a.rounds, device
    ),
    'loaders': lambda a, device: bench_loaders(*_loading(a, 20000, 32), device),
    'photos': lambda a, device: bench_photos(*_loading(a, 1024, 224), device),
    'predict': lambda a, device: bench_predict(a.backbone, *_loading(a, 1024, 224), device),
    'layouts': lambda a, device: bench_layouts(
        a.backbone, a.img_size or 32, a.batch_size, a.classes or 100, a.torchcompile, a.rounds, device
    ),
    'import': lambda a, device: bench_import(a.rounds, device),
    'train': _train,
}


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add('what', choices=_BENCHES, help=_WHAT)
    add('--rounds', type=COUNT, default=5, metavar='N', help='how often each is timed, default 5')
    add('--json', action='store_true', help='print JSON')
    add_loading(parser, batch_size=128, workers=2)
    add('--classes', type=COUNT, default=None, metavar='K', help='default 1000 for cc, 100 for steps')
    add('--samples', type=COUNT, default=16384, metavar='N', help='cc: attention vectors, default 16384')
    add('--width', type=COUNT, default=512, metavar='D', help='cc: their length, default 512')
    add('--backbone', default='resnet18', metavar='NAME', help='steps, predict, layouts: default resnet18')
    add('--losses', nargs='+', default=[], metavar='NAME', help='steps: default all')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='layouts: the fastest compiled, too')
    add('--img-size', type=COUNT, default=None, metavar='N', help='height and width, default 32; photos, predict: 224')
    add('--images', type=COUNT, default=None, metavar='N', help='loaders: default 20000; photos, predict: 1024')
    add('--script', metavar='FILE', help="train: timm's train.py")
    parser.trailing = 'train_args'


def run(args: argparse.Namespace) -> int:
    if args.train_args and args.what != 'train':
        raise UserError(f'bench {args.what} trains with no script: leave out {shlex.join(args.train_args)} after --.')
    device = torch.device(pick_device(args.device))
    log_info(f'timm {timm.__version__}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads')
    rows = _BENCHES[args.what](args, device)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        header = tuple(rows[0])
        print(table([tuple(_shown(row[key]) for key in header) for row in rows], header))
    return 0


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'
