"""`ccl-timm predict`."""

import argparse
import csv
import json
import sys
from typing import Any

from ccl_timm.cli.common import add_device, add_source
from ccl_timm.console import log_warning, table
from ccl_timm.console.arguments import COUNT, Parser
from ccl_timm.console.escape import csv_text
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.evaluation import pick_device
from ccl_timm.training.prediction import find_images, predict

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'Classify images with a trained model. The exit code is 1 if an image could not be read.'


def add_arguments(parser: Parser) -> None:
    add_source(parser)
    add_device(parser, batch_size=32)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, or folders of them')
    parser.add_argument('--topk', type=COUNT, default=1, metavar='N', help='classes per image, default 1')
    parser.add_argument('--format', default='table', choices=('table', 'csv', 'json'), help='default table')


def run(args: argparse.Namespace) -> int:
    paths = find_images(args.images)
    trained = load_trained(args.source, args.use_ema)
    results, unreadable = predict(trained, paths, args.topk, args.batch_size, pick_device(args.device))
    _write(results, args.format)
    for path, reason in unreadable:
        log_warning(f"'{path}' is not a readable image and was left out: {reason}")
    return 1 if unreadable else 0


def _write(results: list[dict[str, Any]], form: str) -> None:
    if form == 'json':
        print(json.dumps(results, indent=2))
        return
    rows = [
        (row['image'], str(rank), p['class'], f'{p["probability"]:.4f}')
        for row in results
        for rank, p in enumerate(row['predictions'], 1)
    ]
    header = ('image', 'rank', 'class', 'probability')
    if form == 'csv':
        writer = csv.writer(sys.stdout)
        writer.writerow(header)
        writer.writerows(map(csv_text, row) for row in rows)
    else:
        print(table(rows, header))
