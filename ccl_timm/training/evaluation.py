"""Evaluation: one pass over a data set, and the data that a trained model is evaluated on."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn

from ccl_timm.console import Progress, log_warning
from ccl_timm.data import datasets
from ccl_timm.data.config import DataConfig
from ccl_timm.data.fingerprint import change
from ccl_timm.data.loaders import evaluation_loader
from ccl_timm.errors import UserError
from ccl_timm.training.interrupts import WholeBatches
from ccl_timm.training.step_timing import likely_layout

__all__ = [
    'Evaluation', 'MirrorAveraged', 'check_labels', 'choose_data', 'classifier_of', 'evaluate', 'loader_of', 'open_for',
    'pick_device',
]  # fmt: skip


@dataclass
class Evaluation:
    """What a model does on a data set.

    Attributes:
        metrics: mean cross-entropy (``loss``); ``top1``, ``top5`` and the mean accuracy of the classes
            (``macro_top1``) in percent; and the other measures that were asked for.
        confusion: (K, K) counts of images by class (row) and prediction (column); 0 by 0 for data of other classes than
            the model's, of which only retrieval is measured.
        unreadable: images that could not be read, and are not counted.
        images: that are counted.
        outputs: ``logits`` (N, K), ``features`` (N, D) and ``labels`` (N,), where a measure needed them.
        calibration: the temperature fitted on this data, and what data that is; see
            :func:`ccl_timm.training.validation.save_temperature`.
    """

    metrics: dict[str, float]
    confusion: Tensor
    unreadable: int
    images: int
    outputs: dict[str, Tensor] | None = None
    calibration: dict[str, Any] | None = None

    @property
    def accuracies(self) -> list[float | None]:
        """Accuracy of each class in percent; None for one without images."""
        counts = self.confusion.sum(1).tolist()
        hits = self.confusion.diagonal().tolist()
        return [100 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


class MirrorAveraged(nn.Module):
    """A classifier whose logits (N, K) are the mean over each image and its mirror image, left to right.

    Test-time augmentation as in published speed runs on CIFAR-10, for models that were trained with mirrored images.
    It computes twice as much.

    Args:
        model: images (N, C, H, W) to logits (N, K).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return (self.model(images) + self.model(images.flip(-1))) / 2


def classifier_of(trained: Any, tta: bool) -> nn.Module:
    """The model, or with ``tta`` its :class:`MirrorAveraged`; a run that saw no mirrored images is warned of."""
    settings = trained.settings
    same_features = settings.get('freeze_backbone') and settings.get('feature_views', 1) == 1
    if tta and (settings.get('hflip') == 0 or settings.get('no_aug') or same_features):
        log_warning('this model was trained without mirrored images: --tta may lower its accuracy')
    return MirrorAveraged(trained.model) if tta else trained.model


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    autocast: Callable = contextlib.nullcontext,
    memory_format: torch.memory_format | None = None,
    label: str = 'validation',
    log_interval: int = 50,
) -> Evaluation:
    """Measure a model on the whole data set, over all processes.

    Args:
        model: returns logits (N, K).
        loader: timm's loader of a validation split; what a sampler pads it with is not counted, nor is an image of
            label -1, which could not be read.
        device: the model's.
        autocast: makes the context of mixed precision.
        memory_format: of the images; by default the one that is usually faster.
        label: name in front of the progress.
        log_interval: batches between progress lines.

    Raises:
        UserError: no image can be read.
    """
    model.eval()
    memory_format = memory_format or likely_layout(model, device)
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
        raise UserError(f'No image for {label} can be read.')
    classes = math.isqrt(len(confusion))
    confusion = confusion.view(classes, classes).cpu()
    found = Evaluation(dict(evaluator.compute(distributed)), confusion, int(counts), int(confusion.sum()))
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


def choose_data(
    settings: dict[str, Any],
    data_dir: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    batch_size: int = 256,
) -> DataConfig:
    """A run's data, or other data in its place.

    Args:
        settings: of the run; empty for an export.
        data_dir: folder of other data.
        dataset: name of other data.
        split: name of the validation split, in the place of the run's.
        batch_size: images per batch.

    Raises:
        UserError: there is no data, or no split to evaluate on.
    """
    settings = {**settings, 'batch_size': batch_size}
    if data_dir is not None:
        settings |= {'data_dir': data_dir, 'dataset': dataset or '', 'train_fraction': None}
        settings |= {} if dataset else {'input_key': None, 'target_key': None}  # columns of the Hub's data
    elif dataset is not None:
        settings |= {'dataset': dataset, 'train_fraction': None}
    if data_dir is not None or dataset is not None:
        settings |= {'val_split': settings.get('val_split') or 'validation', 'val_fraction': None}
    if split:
        settings['val_split'] = split
    if not settings.get('val_split', 'validation'):
        if settings.get('val_fraction') is None:
            raise UserError('The run had no split to validate on: give --split NAME.')
        settings['val_split'] = 'validation'
    config = DataConfig.of(settings)
    if config.data_dir is None and not config.dataset:
        raise UserError('No data to evaluate on: give --data-dir or --dataset.')
    return config


def loader_of(dataset: Any, config: dict[str, Any], device: torch.device, workers: int) -> Any:
    """A loader of a split, preprocessed as a trained model's ``data_config`` with ``batch_size`` says."""
    names = ('input_size', 'batch_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    return evaluation_loader(dataset, {name: config[name] for name in names}, device, workers)


def open_for(config: DataConfig, split: str, trained: Any, training: bool = False, named: bool = False) -> Any:
    """A split of a run's data; of a training split that the run divided, the share that it used.

    Args:
        config: where the data is.
        split: its name.
        trained: the model, whose class names and number of channels count.
        training: of a training split divided by ``val_fraction`` or ``train_fraction``, the share trained on; else, of
            one divided by ``val_fraction``, the share held out, unless the split was named.
        named: the split was named by the user. Of a folder without splits, which ``val_fraction`` divides, its training
            and validation split are the two shares.

    Raises:
        UserError: there is no such split, or the images have changed and with them the share held out.
    """
    channels = trained.data_config['input_size'][0]
    if named and config.val_fraction is not None and _names_a_share(config, split):
        named, training = False, training or split == config.train_split
    divided = config.val_fraction is not None and (training or not named)
    if not divided and not (training and config.train_fraction):
        return datasets.create_split(config, split, channels, trained.class_names, named)
    splits = datasets.create_splits(config, channels)
    before = trained.fingerprint
    if not training and before and change(before, splits.fingerprint) == 'files':
        raise UserError(
            'The data has changed after training, and with it which images --val-fraction holds out: give others, '
            'which the model was not trained on, with --data-dir.'
        )
    return splits.train if training else splits.validation


def _names_a_share(config: DataConfig, split: str) -> bool:
    """Whether a split is one of the two into which ``val_fraction`` divides a folder that has none."""
    known = split in (config.train_split, 'validation', 'val')
    return known and datasets.is_folder(config.dataset) and not datasets.has_split(config, split)


def check_labels(dataset: Any, trained: Any) -> None:
    """Raise a UserError if the data has labels beyond a trained model's classes."""
    targets = datasets.targets_of(dataset)
    if targets and max(targets) >= trained.model.num_classes:
        raise UserError(
            f'The data has labels up to {max(targets)}, the model {trained.model.num_classes} classes: '
            'evaluate on data of the same classes.'
        )
