"""One run of a comparison: trained in this process without a folder, and measured at its end."""

import contextlib
import io
import math
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ccl_timm.data.datasets import create_split
from ccl_timm.errors import UserError
from ccl_timm.task import read_head
from ccl_timm.training.checks import check_config
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.evaluation import loader_of
from ccl_timm.training.frozen import features_of
from ccl_timm.training.measures import calibration, retrieval
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.setup import input_channels
from ccl_timm.training.trainer import Trainer

__all__ = ['run_trial', 'unseen_images']


def run_trial(argv: list[str], complete: bool = False, unseen: str | None = None) -> dict[str, Any]:
    """Train as the arguments of the training script say, and measure the model on the validation split.

    Args:
        argv: of the training script.
        complete: measure more than accuracy.
        unseen: a folder of classes that are not trained, one folder per class, to measure retrieval on.

    Returns:
        ``top1`` after the last epoch, ``curve`` of top-1 by epoch, ``seconds`` and ``ms_per_step``; complete, also
        ``nll``, ``ece``, ``recall_at_1``, ``map_at_r``, and with a folder ``unseen_recall_at_1`` and
        ``unseen_map_at_r``; retrieval only where a class has two images. Of a run that cannot be trained, ``error``:
        the reason.
    """
    with _silence():
        try:
            started = time.perf_counter()
            config = TrainConfig.resolve(argv)
            check_config(config)
            trainer = Trainer(config, RunDir(os.path.join(os.devnull, 'no run')))
            begun = time.perf_counter()
            trainer.fit()
            done = time.perf_counter()
        except UserError as error:
            return {'error': str(error)}
        curve = [round(row['validation']['top1'], 4) for row in trainer.results if 'validation' in row]
        steps = len(trainer.results) * trainer.updates_per_epoch * config.val_interval
        found = {
            'top1': curve[-1], 'curve': curve, 'seconds': round(done - started, 3),
            'ms_per_step': round(1000 * (done - begun) / max(1, steps), 3),
        }  # fmt: skip
        return {**found, **_measures(trainer, unseen)} if complete else found


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What many runs would print and warn of, one after another, tells nobody anything."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield


def _measures(trainer: Trainer, unseen: str | None) -> dict[str, float]:
    logits, features, labels = _outputs(trainer, trainer.loader_eval)
    found = {**calibration(logits, labels), **_retrieval(features, labels)}
    if unseen:
        _, features, labels = _outputs(trainer, _unseen_loader(trainer, unseen))
        found |= {f'unseen_{name}': value for name, value in _retrieval(features, labels).items()}
    return {name: round(value, 4) for name, value in found.items()}


def _retrieval(features: Tensor, labels: Tensor) -> dict[str, float]:
    found = retrieval(features, labels)
    return {name: found[name] for name in ('recall_at_1', 'map_at_r') if not math.isnan(found[name])}


@torch.inference_mode()
def _outputs(trainer: Trainer, loader: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, K), features (N, D) and labels (N,) of all images of a loader, float32."""
    model = trainer.task.get_eval_model(ema=trainer.task.has_ema()).eval()
    rows = []
    for batch, target in loader:
        if not trainer.config.freeze_backbone:
            batch = model.forward_head(model.forward_features(batch), pre_logits=True)
        outputs = read_head(model.get_classifier(), batch)
        rows.append((outputs.logits.float(), outputs.features.float(), target))
    logits, features, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    return logits[labels >= 0], features[labels >= 0], labels[labels >= 0]


def unseen_images(folder: str, channels: int) -> Dataset:
    """Images of other classes, numbered by their own folder."""
    data = TrainConfig.from_settings(data_dir=os.path.dirname(folder.rstrip('/')) or '.', config='')
    return create_split(data, os.path.basename(folder.rstrip('/')), channels, None)


def _unseen_loader(trainer: Trainer, folder: str) -> Any:
    config = trainer.config
    dataset = unseen_images(folder, input_channels(config))
    if config.freeze_backbone:
        model = trainer.task.get_eval_model()
        found = features_of(config, model, trainer.device, trainer.setup.data_config, dataset)
        return [(found.views[0], found.labels.to(trainer.device))]
    preprocessing = {**trainer.setup.data_config, 'batch_size': config.batch_size}
    return loader_of(dataset, preprocessing, trainer.device, config.workers)
