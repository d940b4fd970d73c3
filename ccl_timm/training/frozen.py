"""Training on a frozen backbone: its features are computed once, and only head and loss train on them.

Features are what the model's head reads: pooled, in evaluation mode, in float32. They are kept in memory, and on disk
under a key of all that they depend on, so that the next run with another head or loss starts at once.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ccl_timm.console import Progress, is_primary, log_info
from ccl_timm.data import loaders
from ccl_timm.data.cache import cache_dir
from ccl_timm.data.datasets import Splits, base_of, content_hash
from ccl_timm.errors import UserError
from ccl_timm.heads import Head, head_options
from ccl_timm.models import split_variant
from ccl_timm.ops import on_all_processes, rank, world_size
from ccl_timm.task import read_head
from ccl_timm.training.config import TrainConfig

__all__ = ['Classifier', 'Features', 'check_freezable', 'feature_loaders', 'features_of', 'freeze_backbone']

_AUGMENTATION = (
    'no_aug', 'pad_crop', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
    'grayscale_prob', 'gaussian_blur_prob', 'aa', 'reprob', 'remode', 'recount', 'train_interpolation', 'seed',
)  # fmt: skip
_PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


@dataclass(frozen=True)
class Features:
    """Features of a split.

    Attributes:
        views: (V, N, D) float32; the first view of each image is that of validation.
        labels: (N,) int64.
    """

    views: Tensor
    labels: Tensor

    def draw(self, indices: Tensor) -> Tensor:
        """Features (B, D) of the images with these numbers (B,), of a view drawn for each."""
        indices = indices.to(self.views.device)
        if len(self.views) == 1:
            return self.views[0, indices]
        return self.views[torch.randint(len(self.views), indices.shape).to(indices), indices]


def freeze_backbone(model: nn.Module) -> None:
    """Let only the model's head learn."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)


class Classifier(nn.Module):
    """A model's head by itself: features (N, D) to logits (N, K)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.head = model.get_classifier()

    def forward(self, features: Tensor) -> Tensor:
        return read_head(self.head, features).logits


def check_freezable(model: nn.Module, requires: tuple[str, ...], name: str, loss: str) -> None:
    """Raise a UserError unless model and loss can be trained on features.

    Args:
        model: the model.
        requires: what the loss requires.
        name: of the model.
        loss: name of the loss.
    """
    if 'feature_map' in requires:
        raise UserError(f"--freeze-backbone keeps pooled features, and the loss '{loss}' requires the feature map.")
    stage = getattr(model.get_classifier(), 'feature_stage', lambda: None)()
    if stage is not None:
        raise UserError(f"--freeze-backbone does not work with '{name}', whose head adds a layer to the feature map.")


def feature_loaders(
    config: TrainConfig, model: nn.Module, device: torch.device, data_config: dict[str, Any], splits: Splits
) -> tuple[Any, Any]:
    """Loaders of the features of the training and the validation split (None without one).

    Args:
        config: the run's settings.
        model: on its device, with the weights that it is to keep.
        device: the model's.
        data_config: timm's ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.
        splits: the data.

    Raises:
        UserError: the data set is a stream, the training split is smaller than a batch, or no image can be read.
    """
    if any(isinstance(split, IterableDataset) for split in (splits.train, splits.validation)):
        raise UserError('--freeze-backbone needs images with numbers, and this data set is a stream.')
    _share_weights(model)
    extract = functools.partial(features_of, config, model, device, data_config)
    train = extract(splits.train, config.feature_views)
    validation = splits.validation and extract(splits.validation, 1)
    return loaders.loaders_in_memory(
        config, device, (train.draw, train.labels), validation and (validation.draw, validation.labels)
    )


def _share_weights(model: nn.Module) -> None:
    """Give all processes the first one's weights, which differ where they were drawn."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def features_of(
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    data_config: dict[str, Any],
    dataset: Dataset,
    number: int = 1,
) -> Features:
    """Features of a data set in a number of views, without the images that cannot be read."""
    # of a divided split all images are computed: the other share is needed as well, by this run or the next
    base, indices = (dataset, None) if config.train_fraction else base_of(dataset)
    facts = _facts(config, model, data_config, base)
    views = []
    for view in range(number):
        changed = {name: getattr(config, name) for name in _AUGMENTATION} if view else {}
        key = _hash(json.dumps([facts, changed, view], sort_keys=True, default=str).encode())
        views.append(_cached(key, functools.partial(_compute, config, model, device, data_config, base, view)))
    labels = views[0]['labels']
    chosen = torch.arange(len(labels)) if indices is None else torch.as_tensor(indices)
    chosen = chosen[labels[chosen] >= 0]
    if not len(chosen):
        raise UserError('Not one image can be read.')
    return Features(torch.stack([view['features'][chosen] for view in views]).to(device), labels[chosen])


def _facts(config: TrainConfig, model: nn.Module, data_config: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """What features depend on."""
    classifier, name = model.get_classifier(), model.pretrained_cfg.get('architecture', type(model).__name__)
    of_head = head_options(type(classifier)) if isinstance(classifier, Head) else []
    head = {id(tensor) for tensor in classifier.state_dict(keep_vars=True).values()}
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in head}
    return {
        'data': content_hash(dataset),
        'images': len(dataset),
        'backbone': variant[0] if isinstance(classifier, Head) and (variant := split_variant(name)) else name,
        'weights': _hash(*(text for name, value in state.items() for text in (name.encode(), _bytes(value)))),
        'options': {name: value for name, value in config.model_kwargs.items() if name not in of_head},
        'settings': [config.gp, config.bn_eps, config.input_img_mode],
        'preprocessing': {name: data_config[name] for name in _PREPROCESSING},
        'versions': [timm.__version__, torch.__version__.split('+')[0]],
    }


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _hash(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


_loaded: dict[str, dict[str, Tensor]] = {}  # of this process's last runs
_KEPT = 8


def _cached(key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Features and labels of a view: from memory, from disk, or computed and written."""
    if key not in _loaded:
        found = _read(cache_dir('features') / f'{key}.safetensors')
        if found is None:
            found = compute()
            if is_primary():
                _write(cache_dir('features') / f'{key}.safetensors', found)
        while len(_loaded) >= _KEPT:
            _loaded.pop(next(iter(_loaded)))
        _loaded[key] = found
    return _loaded[key]


def _read(path: Path) -> dict[str, Tensor] | None:
    """What a file holds; None if there is none, or a damaged one. The same on all processes."""
    found = None
    try:
        found = safetensors.torch.load_file(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, safetensors.SafetensorError):
        log_info(f'{path} is damaged, and is written anew')
    if not on_all_processes(found is not None):  # all of them compute, or none
        return None
    if found is not None:
        log_info(f'features of {len(found["labels"])} images read from {path}')
    return found


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file whole or not at all; without room for it, the run goes on."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix='.tmp', delete=False) as file:
            temporary = file.name
        safetensors.torch.save_file(tensors, temporary)
        os.replace(temporary, path)
        log_info(f'features of {len(tensors["labels"])} images written to {path}')
    except (OSError, safetensors.SafetensorError) as error:
        log_info(f'features are not kept for later runs: {path.parent} cannot be written ({error})')
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


@torch.inference_mode()
def _compute(
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    data_config: dict[str, Any],
    dataset: Dataset,
    view: int,
) -> dict[str, Tensor]:
    """Features (N, D) and labels (N,) of one view of all images; label -1 for those that cannot be read."""
    model.eval()
    preprocessing = {name: data_config[name] for name in _PREPROCESSING}
    preprocessing |= {'batch_size': config.validation_batch_size or config.batch_size}
    if view:
        random_seed(config.seed + view, rank())
        images = loaders.ordered_training_loader(config, device, data_config, dataset)
    else:
        images = loaders.evaluation_loader(dataset, preprocessing, device, config.workers)
    layout = next((p for p in model.parameters() if p.ndim == 4), None)
    last = layout is not None and layout.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    features, labels = [], []
    label = f'features, view {view + 1}' if config.feature_views > 1 else 'features'
    for batch, target in Progress(images, label, config.log_interval):
        pooled = model.forward_head(
            model.forward_features(batch.contiguous(memory_format=memory_format)), pre_logits=True
        )
        features.append(pooled.float().cpu())
        labels.append(target.cpu())
    found = {'features': torch.cat(features), 'labels': torch.cat(labels)}
    return {name: _gathered(tensor)[: len(dataset)].contiguous() for name, tensor in found.items()}


def _gathered(tensor: Tensor) -> Tensor:
    """Rows of all processes, of which each has every W-th, W the number of processes."""
    if world_size() == 1:
        return tensor
    parts: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(parts, tensor)
    return torch.stack(parts, dim=1).flatten(0, 1)
