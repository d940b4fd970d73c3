"""Evaluation: one pass over a data set, and the built-in `timm validate.py`."""

import argparse
import contextlib
import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn

from ccl_timm.console import Progress, log_info, log_warning
from ccl_timm.console.arguments import COUNT, WORKERS, Parser
from ccl_timm.console.escape import csv_text
from ccl_timm.data import datasets
from ccl_timm.data.config import DataConfig
from ccl_timm.data.loaders import evaluation_loader
from ccl_timm.errors import UserError
from ccl_timm.training import retrieval
from ccl_timm.training.checkpoints import Trained, load_trained
from ccl_timm.training.interrupts import WholeBatches
from ccl_timm.training.run_dir import RunDir

__all__ = ['Evaluation', 'check_labels', 'data_config_of', 'evaluate', 'loader_of', 'main', 'open_for', 'pick_device']


@dataclass
class Evaluation:
    """What a model does on a data set.

    Attributes:
        metrics: mean cross-entropy (``loss``); ``top1``, ``top5`` and the mean accuracy of the classes
            (``macro_top1``) in percent.
        confusion: (K, K) counts of images by class (row) and prediction (column).
        unreadable: images that could not be read, and are not counted.
    """

    metrics: dict[str, float]
    confusion: Tensor
    unreadable: int

    @property
    def accuracies(self) -> list[float | None]:
        """Accuracy of each class in percent; None for one without images."""
        counts = self.confusion.sum(1).tolist()
        hits = self.confusion.diagonal().tolist()
        return [100 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    autocast: Callable = contextlib.nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
    label: str = 'validation',
    log_interval: int = 50,
) -> Evaluation:
    """Measure a model on the whole data set, over all processes.

    Args:
        model: returns logits (N, K).
        loader: timm's loader of a validation part; what a sampler pads it with is not counted, nor is an image of
            label -1, which could not be read.
        device: the model's.
        autocast: makes the context of mixed precision.
        memory_format: of the images.
        label: name in front of the progress.
        log_interval: batches between progress lines.

    Raises:
        UserError: no image can be read.
    """
    model.eval()
    evaluator, confusion = ClassificationEvaluator(device), None
    left = evaluation_sample_limit(loader)  # of this process, without padding
    counts = torch.zeros(1, device=device)
    for images, target in Progress(WholeBatches(loader), label, log_interval):
        with autocast():
            logits = model(images.contiguous(memory_format=memory_format))
        if left is not None:
            logits, target = logits[:left], target[:left]
            left -= len(target)
        readable = target >= 0
        counts += (~readable).sum()
        logits, target = logits[readable], target[readable]
        evaluator.update(logits, target)
        if confusion is None:
            confusion = torch.zeros(logits.shape[1] ** 2, dtype=torch.int64, device=device)
        cells = target * logits.shape[1] + logits.argmax(1)
        confusion.index_add_(0, cells, torch.ones_like(cells))
    distributed = torch.distributed.is_initialized()
    if distributed:
        torch.distributed.all_reduce(confusion)
        torch.distributed.all_reduce(counts)
    if not confusion.any():
        raise UserError(f'Not one image for {label} can be read.')
    classes = math.isqrt(len(confusion))
    found = Evaluation(dict(evaluator.compute(distributed)), confusion.view(classes, classes).cpu(), int(counts))
    accuracies = [accuracy for accuracy in found.accuracies if accuracy is not None]
    found.metrics['macro_top1'] = sum(accuracies) / max(1, len(accuracies))
    return found


def pick_device(name: str) -> str:
    """Resolve ``auto`` to an accelerator if there is one.

    Raises:
        UserError: the device is not there.
    """
    if name == 'auto':
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found.type if found else 'cpu'
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device '{name}' is not available here: give --device cpu, or auto.") from error
    return name


def main(argv: list[str], prog: str = 'timm validate.py') -> int:
    """Evaluate a run, a checkpoint or an exported folder on a part of the data it was trained on, or on other data."""
    args = _parser(prog).parse_strictly(argv)
    for path in filter(None, (args.confusion, args.per_class)):
        if Path(path).exists():
            raise UserError(f"'{path}' exists already: name another file.")
    device = torch.device(pick_device(args.device))
    trained = load_trained(args.source or args.checkpoint, use_ema=args.use_ema)
    if args.save:
        _check_save(args, trained)
    data = data_config_of(args, trained.settings)
    config = {**trained.data_config, 'batch_size': args.batch_size}
    dataset = open_for(data, data.val_split, config['input_size'][0], trained.class_names, named=args.split is not None)
    check_labels(dataset, trained)
    loader = loader_of(dataset, config, device, args.workers)
    model = trained.model.to(device)
    log_info(f'{trained.name}: {len(dataset)} images of {"x".join(map(str, config["input_size"]))}, on {device}')
    found = evaluate(model, loader, device)
    metrics = found.metrics
    if not math.isfinite(metrics['loss']):
        raise UserError(f"The model's loss on this data is {metrics['loss']}: its accuracy would mean nothing.")
    log_info(f'top-1 {metrics["top1"]:.3f}%  top-5 {metrics["top5"]:.3f}%  loss {metrics["loss"]:.4f}')
    if found.unreadable:
        log_warning(f'{found.unreadable} images could not be read, and are not counted')
    if args.recall or args.knn:
        metrics |= _neighbours(args, data, trained, loader, config)
    names = trained.class_names or [str(k) for k in range(len(found.confusion))]
    _write_tables(args, found, names)
    result = {'model': trained.name, **metrics, 'images': len(dataset) - found.unreadable}
    if args.save:
        _save(args, trained, result)
    print(f'--result\n{json.dumps({**result, "img_size": config["input_size"][-1]}, indent=4)}')
    return 0


def loader_of(dataset: Any, config: dict[str, Any], device: torch.device, workers: int) -> Any:
    """A loader of a part of the data, preprocessed as a trained model's ``data_config`` with ``batch_size`` says."""
    names = ('input_size', 'batch_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    return evaluation_loader(dataset, {name: config[name] for name in names}, device, workers)


def _neighbours(args, data, trained, loader, config) -> dict[str, float]:
    """What features alone tell: ``recall_at_1`` within the part, ``knn`` by the training part's images."""
    features, labels = retrieval.extract_features(trained.model, loader)
    found = {}
    if args.recall:
        found['recall_at_1'] = retrieval.recall_at_1(features, labels)
    if args.knn:
        known = open_for(data, data.train_split, config['input_size'][0], trained.class_names, training=True)
        known_loader = loader_of(known, config, features.device, args.workers)
        known_features = retrieval.extract_features(trained.model, known_loader, 'features of the training part')
        found['knn'] = retrieval.knn_accuracy(features, labels, *known_features, args.knn)
    log_info('  '.join(f'{name} {value:.3f}%' for name, value in found.items()))
    return found


def _check_save(args: argparse.Namespace, trained: Trained) -> None:
    """Raise a UserError unless the results can be saved with the run that they belong to."""
    folder = RunDir.of(args.source or args.checkpoint).path
    if trained.epoch is None or not (folder / 'args.yaml').is_file():
        raise UserError(f"--save keeps results with a run, which '{folder}' is not: name a run's folder.")
    if args.split is None or args.data_dir is not None or args.dataset is not None:
        raise UserError("--save keeps results of a split of the run's own data: name it with --split alone.")
    if bool(trained.settings.get('model_ema')) != args.use_ema:
        raise UserError(f"'{folder}' was measured with the moving average of its weights: give --use-ema.")


def _save(args: argparse.Namespace, trained: Trained, result: dict[str, Any]) -> None:
    run = RunDir.of(args.source or args.checkpoint)
    measured = {name: result[name] for name in ('images', 'top1', 'top5', 'loss')}
    path = run.add_extra_split({'split': args.split, 'epoch': trained.epoch, **measured})
    log_info(f'written: {path}, of epoch {trained.epoch + 1}')
    rows = run.rows()
    if rows and trained.epoch != rows[-1]['epoch']:
        log_info(f"reports show results of a run's last epoch: {run.path / 'last.pth.tar'}")


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


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description='Evaluate a trained model. Preprocessing and data are those of its run.')
    add = parser.add_argument
    add('source', nargs='?', default=None, metavar='RUN', help='folder of a run or an export, or a checkpoint file')
    add('--checkpoint', default='', metavar='FILE', help='the same')
    add('--use-ema', action='store_true', help='the moving average of the weights')
    add('--data-dir', default=None, metavar='DIR', help="default: the run's")
    add('--dataset', default=None, metavar='NAME')
    add('--split', default=None, metavar='NAME', help='part to evaluate on')
    add('--per-class', default='', metavar='CSV', help="write each class's accuracy to this new file")
    add('--confusion', default='', metavar='CSV', help='write the confusion matrix to this new file')
    add('--save', action='store_true', help="keep the results of --split in the run's extra_splits.csv")
    add('--recall', action='store_true', help='recall@1: is the nearest other image, by features, of the same class?')
    add(
        '--knn',
        type=COUNT,
        default=None,
        metavar='K',
        help='accuracy of the K nearest training images, by features',
    )
    add('-b', '--batch-size', type=COUNT, default=256, metavar='N')
    add('-j', '--workers', type=WORKERS, default=4, metavar='N')
    add('--device', default='auto')
    return parser


def data_config_of(args: argparse.Namespace, settings: dict[str, Any]) -> DataConfig:
    """A run's data, or the data that the command line names instead."""
    settings = {**settings, 'batch_size': args.batch_size}
    if args.data_dir is not None:
        settings |= {'data_dir': args.data_dir, 'dataset': args.dataset or '', 'train_fraction': None}
    elif args.dataset is not None:
        settings |= {'dataset': args.dataset, 'train_fraction': None}
    if args.data_dir is not None or args.dataset is not None:
        settings |= {'val_split': settings.get('val_split') or 'validation', 'val_fraction': None}
    if args.split:
        settings['val_split'] = args.split
    config = DataConfig.of(settings)
    if config.data_dir is None and not config.dataset:
        raise UserError('No data to evaluate on: give --data-dir or --dataset.')
    return config


def open_for(
    config: DataConfig,
    split: str,
    channels: int,
    class_names: list[str] | None,
    training: bool = False,
    named: bool = False,
) -> Any:
    """A split of a run's data; of a training split that the run divided, the share that it used.

    Args:
        config: where the data is.
        split: its name.
        channels: of the images.
        class_names: of the model; None if unknown.
        training: of a training split divided by ``val_fraction`` or ``train_fraction``, the share trained on; else, of
            one divided by ``val_fraction``, the share held out, unless the split was named.
        named: the split was named on the command line.
    """
    divided = config.val_fraction is not None and (training or not named)
    if not divided and not (training and config.train_fraction):
        return datasets.create_split(config, split, channels, class_names, named)
    splits = datasets.create_splits(config, channels)
    return splits.train if training else splits.validation


def check_labels(dataset: Any, trained: Any) -> None:
    """Raise a UserError if the data has labels beyond a trained model's classes."""
    targets = datasets.targets_of(dataset)
    if targets and max(targets) >= trained.model.num_classes:
        raise UserError(
            f'The data has labels up to {max(targets)}, the model {trained.model.num_classes} classes: '
            'evaluate on data of the same classes.'
        )
