"""Evaluation: one pass over a data set, and the built-in `timm validate.py`."""

import argparse
import contextlib
import json
from collections.abc import Callable
from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from torch import nn

from ccl_timm import data
from ccl_timm.console import Progress, say
from ccl_timm.errors import UserError
from ccl_timm.loaders import create_loader
from ccl_timm.options import Parser
from ccl_timm.trained import load_trained

__all__ = ['evaluate', 'main', 'pick_device']


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    autocast: Callable = contextlib.nullcontext,
    channels_last: bool = False,
    label: str = 'validation',
    log_interval: int = 50,
) -> dict[str, float]:
    """Mean cross-entropy (``loss``) and ``top1``, ``top5`` in percent, over the whole data set and all processes.

    Args:
        model: returns logits (N, K).
        loader: timm's loader of a validation part; what a sampler pads it with is not counted.
        device: the model's.
        autocast: makes the context of mixed precision.
        channels_last: memory layout of the images.
        label: name in front of the progress.
        log_interval: batches between progress lines.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device, max_samples=evaluation_sample_limit(loader))
    progress = Progress(loader, label, log_interval)
    for images, target in progress:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = model(images)
        evaluator.update(logits, target)
    return dict(evaluator.compute(distributed=torch.distributed.is_initialized()))


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
    device = torch.device(pick_device(args.device))
    trained = load_trained(args.source or args.checkpoint, use_ema=args.use_ema)
    settings = _data_settings(args, trained.settings)
    config = trained.data_config
    dataset = _open(settings, config['input_size'][0], trained.class_names)
    _check_labels(dataset, trained)
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=args.batch_size,
        is_training=False,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        num_workers=args.workers,
        device=device,
    )
    model = trained.model.to(device)
    say(f'{trained.name}: {len(dataset)} images of {"x".join(map(str, config["input_size"]))}, on {device}')
    metrics = evaluate(model, loader, device)
    say(f'top-1 {metrics["top1"]:.3f}%  top-5 {metrics["top5"]:.3f}%  loss {metrics["loss"]:.4f}')
    result = {'model': trained.name, **metrics, 'images': len(dataset), 'img_size': config['input_size'][-1]}
    print(f'--result\n{json.dumps(result, indent=4)}')
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description='Evaluate a trained model. Preprocessing and data are those of its run.')
    add = parser.add_argument
    add('source', nargs='?', default=None, metavar='RUN', help='folder of a run or an export, or a checkpoint file')
    add('--checkpoint', default='', metavar='FILE', help='the same')
    add('--use-ema', action='store_true', help='the moving average of the weights')
    add('--data-dir', default=None, metavar='DIR', help="default: the run's")
    add('--dataset', default=None, metavar='NAME')
    add('--split', default=None, metavar='NAME', help='part to evaluate on')
    add('-b', '--batch-size', type=int, default=256, metavar='N')
    add('-j', '--workers', type=int, default=4, metavar='N')
    add('--device', default='auto')
    return parser


def _data_settings(args: argparse.Namespace, settings: dict[str, Any]) -> argparse.Namespace:
    """The run's data settings, overridden by what was typed."""
    defaults = {'data_dir': None, 'dataset': '', 'val_split': 'validation', 'train_split': 'train', 'seed': 42}
    defaults |= {'val_fraction': None, 'class_map': '', 'class_names': None, 'num_classes': None}
    defaults |= {'dataset_download': False, 'input_img_mode': None, 'input_key': None, 'target_key': None}
    settings = {**defaults, **{key: settings[key] for key in defaults if key in settings}}
    if args.data_dir is not None:
        settings |= {'data_dir': args.data_dir, 'dataset': args.dataset or ''}
    elif args.dataset is not None:
        settings |= {'dataset': args.dataset}
    if args.split is not None or args.data_dir is not None or args.dataset is not None:
        settings |= {'val_split': args.split or settings['val_split'] or 'validation', 'val_fraction': None}
    if settings['data_dir'] is None and not settings['dataset']:
        raise UserError('No data to evaluate on: give --data-dir or --dataset.')
    return argparse.Namespace(**settings, batch_size=args.batch_size, needs_part=args.split is not None)


def _open(settings: argparse.Namespace, channels: int, class_names: list[str] | None) -> Any:
    if settings.val_fraction is None:
        return data.open_part(settings, settings.val_split, channels, class_names, settings.needs_part)
    return data.open_splits(settings, channels).validation


def _check_labels(dataset: Any, trained: Any) -> None:
    targets = data.targets_of(dataset)
    if targets and max(targets) >= trained.model.num_classes:
        raise UserError(
            f'The data has labels up to {max(targets)}, the model {trained.model.num_classes} classes: '
            'evaluate on data of the same classes.'
        )
