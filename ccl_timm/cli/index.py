"""`ccl-timm index`."""

import argparse

import torch

from ccl_timm.cli.common import add_loading, add_source
from ccl_timm.console import log_info
from ccl_timm.console.arguments import Parser
from ccl_timm.console.escape import shell_text
from ccl_timm.errors import require_writable
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.evaluation import pick_device
from ccl_timm.training.gallery import create_gallery

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Make a gallery: features of labelled images, for `predict --gallery`. Its classes may be others than those that '
    'the model was trained on.'
)


def add_arguments(parser: Parser) -> None:
    add_source(parser)
    add_loading(parser)
    add = parser.add_argument
    add('folder', metavar='DIR', help='images, one folder per class')
    add('-o', '--output', default='gallery.safetensors', metavar='FILE', help='a new file; default %(default)s')
    text = 'other images of these classes, from which comes the threshold of unknown images: it accepts 95%% of them'
    add('--validation', default=None, metavar='DIR', help=text)


def run(args: argparse.Namespace) -> int:
    require_writable(args.output)
    trained = load_trained(args.source, args.use_ema)
    device = torch.device(pick_device(args.device))
    gallery = create_gallery(trained, args.folder, args.validation, device, args.batch_size, args.workers)
    gallery.save(args.output)
    limit = 'no threshold' if gallery.threshold is None else f'threshold {gallery.threshold:.4f}'
    log_info(f'written: {args.output}, {len(gallery.labels)} images of {len(gallery.class_names)} classes, {limit}')
    source = shell_text([args.source, *(['--use-ema'] if args.use_ema else [])])
    print(f'use it: ccl-timm predict {source} IMAGES --gallery {shell_text([args.output])}')
    return 0
