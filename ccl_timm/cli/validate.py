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
from ccl_timm.errors import UserError, require_writable
from ccl_timm.experiments import plots
from ccl_timm.training import validation
from ccl_timm.training.checkpoints import Trained, load_trained
from ccl_timm.training.evaluation import Evaluation, choose_data, pick_device
from ccl_timm.training.measures import reliability

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'Evaluate a trained model. Preprocessing and data are those of its run.'
_PERCENT = (
    'top1_many', 'top1_medium', 'top1_few', 'recall_at_1', 'recall_at_5', 'map_at_r', 'knn', 'ece', 'ece_calibrated',
)  # fmt: skip


def add_arguments(parser: Parser) -> None:
    add_source(parser, nargs='?', default='')
    add_data(parser)
    add_loading(parser)
    add = parser.add_argument
    add('--checkpoint', default='', metavar='FILE', help='the same as RUN')
    add('--per-class', default='', metavar='CSV', help="write each class's accuracy to this new file")
    add('--confusion', default='', metavar='CSV', help='write the confusion matrix to this new file')
    add('--save-split', action='store_true', help="keep the results of --split in the run's extra_splits.csv")
    add('--calibration', action='store_true', help='NLL and ECE (15 bins), also with the temperature of the model')
    text = 'fit a temperature on these images and keep it with the run, for `predict --calibrated` and exports'
    add('--fit-temperature', action='store_true', help=text)
    add('--plot', default='', metavar='FILE', help='draw the reliability diagram to this new .svg or .png file')
    text = 'R@1, R@5 and MAP@R: are the nearest other images, by features, of the same class?'
    add('--recall', action='store_true', help=f'{text} Also for classes never trained on')
    add('--knn', type=COUNT, metavar='K', help='accuracy of the K nearest training images, by features')
    text = 'accuracy of classes with few (< 20), medium and many (> 100) training images'
    add('--by-count', action='store_true', help=text)
    text = 'how well softmax, energy, nearest training feature and norm detect the unknown images of this folder'
    add('--ood', default=None, metavar='DIR', help=text)
    text = 'test-time augmentation: average the logits over each image and its mirror image'
    add('--tta', action='store_true', help=text)


def run(args: argparse.Namespace) -> int:
    for path in filter(None, (args.confusion, args.per_class, args.plot)):
        require_writable(path)
    if args.plot:
        plots.check_name(args.plot)
    if args.source and args.checkpoint:
        raise UserError(f"'{args.source}' and --checkpoint {args.checkpoint} name two models: give one of them.")
    source, device = args.source or args.checkpoint, torch.device(pick_device(args.device))
    trained = load_trained(source, args.use_ema)
    if args.save_split:
        other = args.data_dir is not None or args.dataset is not None
        validation.check_save(source, trained, args.split, other_data=other)
    if args.fit_temperature:
        validation.check_save_temperature(source, trained)
    data = choose_data(trained.settings, args.data_dir, args.dataset, args.split, args.batch_size)
    calibration = args.calibration or bool(args.plot)
    wanted = validation.Measures(
        calibration,
        args.fit_temperature,
        args.recall,
        args.knn,
        args.by_count,
        args.ood,
        args.tta,
        of_classes=bool(args.per_class or args.confusion or args.save_split),
    )
    found = validation.evaluate_split(trained, data, args.split is not None, device, args.workers, wanted)
    _log(found)
    _write_files(args, found, trained)
    if args.save_split:
        validation.save_split(source, trained, f'{args.split}+tta' if args.tta else args.split, found)
    if args.fit_temperature:
        validation.save_temperature(source, trained, found)
    result = {'model': trained.name, **found.metrics, 'images': found.images}
    print(f'--result\n{json.dumps({**result, "img_size": trained.data_config["input_size"][-1]}, indent=4)}')
    return 0


def _log(found: Evaluation) -> None:
    metrics = found.metrics
    if 'top1' in metrics:
        log_info(f'top-1 {metrics["top1"]:.3f}%  top-5 {metrics["top5"]:.3f}%  loss {metrics["loss"]:.4f}')
    measured = [f'{name} {metrics[name]:.3f}%' for name in _PERCENT if name in metrics]
    measured += [f'{name} {metrics[name]:.4f}' for name in ('nll', 'nll_calibrated') if name in metrics]
    if measured:
        log_info('  '.join(measured))
    for name in filter(lambda name: name.endswith('_auroc'), metrics):
        score, missed = name.removesuffix('_auroc'), metrics[name.replace('_auroc', '_fpr95')]
        shown = f'AUROC {metrics[name]:.2f}%, FPR at 95% TPR {missed:.2f}%'
        log_info(f'unknown images by {score.removeprefix("ood_")}: {shown}')
    if found.unreadable:
        log_warning(f'{found.unreadable} images could not be read and are not counted')


def _write_files(args: argparse.Namespace, found: Evaluation, trained: Trained) -> None:
    names = trained.labels
    if args.per_class:
        counts = found.confusion.sum(1).tolist()
        rows = [['class', 'images', 'accuracy'], *zip(names, counts, found.accuracies, strict=True)]
        _write_csv(args.per_class, rows)
    if args.confusion:
        rows = [[name, *row] for name, row in zip(names, found.confusion.tolist(), strict=True)]
        _write_csv(args.confusion, [['class \\ predicted', *names], *rows])
    if args.plot:
        outputs, temperature = found.outputs, found.metrics.get('temperature')
        series = {'as trained': reliability(outputs['logits'], outputs['labels'])}
        if temperature:
            name = f'with temperature {temperature:.3g}'
            series[name] = reliability(outputs['logits'], outputs['labels'], temperature)
        plots.save(plots.draw_reliability(series, trained.name), Path(args.plot))
        log_info(f'written: {args.plot}')


def _write_csv(path: str, rows: list) -> None:
    with open(path, 'x', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows(map(csv_text, row) for row in rows)
    log_info(f'written: {path}')
