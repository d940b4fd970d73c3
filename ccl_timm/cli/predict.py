"""`ccl-timm predict`."""

import argparse
import csv
import json
import sys
from typing import Any

from ccl_timm.cli.common import add_device, add_source
from ccl_timm.console import log_warning, table
from ccl_timm.console.arguments import COUNT, Parser, real
from ccl_timm.console.escape import csv_text
from ccl_timm.errors import UserError
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.evaluation import pick_device
from ccl_timm.training.gallery import Gallery
from ccl_timm.training.prediction import find_images, predict

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'Classify images with a trained model. The exit code is 1 if an image could not be read.'


def add_arguments(parser: Parser) -> None:
    add_source(parser)
    add_device(parser, batch_size=32)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, or folders of them')
    parser.add_argument('--topk', type=COUNT, default=1, metavar='N', help='classes per image, default 1')
    text = 'divide the logits by the temperature that `validate --fit-temperature` has fitted'
    parser.add_argument('--calibrated', action='store_true', help=text)
    text = 'test-time augmentation: average the logits over each image and its mirror image'
    parser.add_argument('--tta', action='store_true', help=text)
    text = 'answer with the classes of this file of `ccl-timm index`, by the nearest features'
    parser.add_argument('--gallery', default='', metavar='FILE', help=text)
    text = "cosine below which an image is unknown to the gallery, default the gallery's"
    parser.add_argument('--threshold', type=real(-1, 1), default=None, metavar='T', help=text)
    parser.add_argument('--format', default='table', choices=('table', 'csv', 'json'), help='default table')


def run(args: argparse.Namespace) -> int:
    if args.gallery and args.calibrated:
        raise UserError('A gallery gives cosines, not probabilities: leave out --gallery or --calibrated.')
    if args.threshold is not None and not args.gallery:
        raise UserError('--threshold is that of a --gallery.')
    paths = find_images(args.images)
    trained, gallery = load_trained(args.source, args.use_ema), Gallery.load(args.gallery) if args.gallery else None
    device, how = pick_device(args.device), (args.calibrated, gallery, args.threshold, args.tta)
    results, unreadable = predict(trained, paths, args.topk, args.batch_size, device, *how)
    _write(results, args.format, 'similarity' if gallery else 'probability')
    for path, reason in unreadable:
        log_warning(f"'{path}' is not a readable image and was left out: {reason}")
    return 1 if unreadable else 0


def _write(results: list[dict[str, Any]], form: str, value: str) -> None:
    if form == 'json':
        print(json.dumps(results, indent=2))
        return
    header, rows = ('image', 'rank', 'class', value), []
    for row in results:
        known, predictions = row.get('known', True), row['predictions']
        shown = predictions if known else [{'class': '(unknown)', value: predictions[0][value]}]
        rows += [(row['image'], str(rank), p['class'], f'{p[value]:.4f}') for rank, p in enumerate(shown, 1)]
    if form == 'csv':
        writer = csv.writer(sys.stdout)
        writer.writerow(header)
        writer.writerows(map(csv_text, row) for row in rows)
    else:
        print(table(rows, header))
