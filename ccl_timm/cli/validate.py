"""`ccl-timm validate`."""

import argparse
import csv
import json
from pathlib import Path

import torch

from ccl_timm.cli.common import add_data, add_loading, add_source
from ccl_timm.console import log_info, log_warning
from ccl_timm.console.arguments import COUNT, Parser
from ccl_timm.console.escape import csv_text
from ccl_timm.errors import UserError
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.evaluation import Evaluation, check_save, choose_data, evaluate_split, pick_device, save_split

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'Evaluate a trained model. Preprocessing and data are those of its run.'


def add_arguments(parser: Parser) -> None:
    add_source(parser, nargs='?', default='')
    add_data(parser)
    add_loading(parser)
    add = parser.add_argument
    add('--checkpoint', default='', metavar='FILE', help='the same as RUN')
    add('--per-class', default='', metavar='CSV', help="write each class's accuracy to this new file")
    add('--confusion', default='', metavar='CSV', help='write the confusion matrix to this new file')
    add('--save-split', action='store_true', help="keep the results of --split in the run's extra_splits.csv")
    add(
        '--recall',
        action='store_true',
        help='R@1, R@5 and MAP@R: are the nearest other images, by features, of the same class?',
    )
    add('--knn', type=COUNT, metavar='K', help='accuracy of the K nearest training images, by features')


def run(args: argparse.Namespace) -> int:
    for path in filter(None, (args.confusion, args.per_class)):
        if Path(path).exists():
            raise UserError(f"'{path}' exists already: name another file.")
    source, device = args.source or args.checkpoint, torch.device(pick_device(args.device))
    trained = load_trained(source, args.use_ema)
    if args.save_split:
        check_save(source, trained, args.split, other_data=args.data_dir is not None or args.dataset is not None)
    data = choose_data(trained.settings, args.data_dir, args.dataset, args.split, args.batch_size)
    found = evaluate_split(trained, data, args.split is not None, device, args.workers, args.recall, args.knn)
    _log(found)
    _write_tables(args, found, trained.labels)
    if args.save_split:
        save_split(source, trained, args.split, found)
    result = {'model': trained.name, **found.metrics, 'images': found.images}
    print(f'--result\n{json.dumps({**result, "img_size": trained.data_config["input_size"][-1]}, indent=4)}')
    return 0


def _log(found: Evaluation) -> None:
    metrics = found.metrics
    log_info(f'top-1 {metrics["top1"]:.3f}%  top-5 {metrics["top5"]:.3f}%  loss {metrics["loss"]:.4f}')
    names = ('recall_at_1', 'recall_at_5', 'map_at_r', 'knn')
    features = [f'{name} {metrics[name]:.3f}%' for name in names if name in metrics]
    if features:
        log_info('  '.join(features))
    if found.unreadable:
        log_warning(f'{found.unreadable} images could not be read and are not counted')


def _write_tables(args: argparse.Namespace, found: Evaluation, names: list[str]) -> None:
    if args.per_class:
        counts = found.confusion.sum(1).tolist()
        rows = [['class', 'images', 'accuracy'], *zip(names, counts, found.accuracies, strict=True)]
        _write_csv(args.per_class, rows)
    if args.confusion:
        rows = [[name, *row] for name, row in zip(names, found.confusion.tolist(), strict=True)]
        _write_csv(args.confusion, [['class \\ predicted', *names], *rows])


def _write_csv(path: str, rows: list) -> None:
    with open(path, 'x', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows(map(csv_text, row) for row in rows)
    log_info(f'written: {path}')
