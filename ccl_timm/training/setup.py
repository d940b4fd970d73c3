"""What follows from the configuration once data, model and processes are known: computed once, never changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model, parse_model_name

from ccl_timm import losses
from ccl_timm.data.datasets import Splits
from ccl_timm.data.files import read_lines
from ccl_timm.errors import UserError
from ccl_timm.ops import world_size
from ccl_timm.training.config import TrainConfig

__all__ = [
    'Setup', 'class_weights', 'count_classes', 'global_batch', 'input_channels', 'learning_rate', 'loss_options',
    'mixup_smoothing', 'weight_options',
]  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Computed values of a run.

    Attributes:
        num_classes: of the data, or as set.
        class_names: in the order of their numbers; None if the data set has none.
        data_config: timm's ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.
        lr: the learning rate.
        memory_format: of images and model.
        dtype: ``'float32'``, or that of mixed precision.
        cropped: number of convolutions whose kernels are cropped to small images.
    """

    num_classes: int
    class_names: list[str] | None
    data_config: dict[str, Any]
    lr: float
    memory_format: torch.memory_format
    dtype: str
    cropped: int

    def recorded(self, config: TrainConfig) -> dict[str, Any]:
        """Settings for args.yaml and checkpoints: as given, with the classes of the data."""
        classes = {'num_classes': self.num_classes, 'class_names': self.class_names, 'class_map': ''}
        return {**config.settings(), **classes}


def count_classes(config: TrainConfig, splits: Splits) -> int:
    """The number of classes: as set, else that of the training split.

    Raises:
        UserError: neither is known.
    """
    number = config.num_classes or len(splits.class_names or splits.counts or [])
    if not number:
        raise UserError(f"The number of classes of '{config.dataset}' is not known: give --num-classes N.")
    return number


def input_channels(config: TrainConfig) -> int:
    """Number of image channels that the settings, or else the model's default, ask for."""
    if config.in_chans:
        return config.in_chans
    source, name = parse_model_name(config.model)
    cfg = get_pretrained_cfg(name) if source is None and is_model(name.split('.')[0]) else None
    size = {key: value for key, value in config.settings().items() if key not in ('mean', 'std')}
    return resolve_data_config(size, pretrained_cfg=cfg.to_dict() if cfg else None)['input_size'][0]


def weight_options(config: TrainConfig) -> dict[str, Any]:
    """Arguments of create_model for weights from files.

    Raises:
        UserError: there is no such file.
    """
    options: dict[str, Any] = {}
    if config.pretrained_path:
        options['pretrained_cfg_overlay'] = {'file': config.pretrained_path, 'num_classes': -1}
    if config.initial_checkpoint:
        options['checkpoint_path'] = config.initial_checkpoint
    options['pretrained'] = config.pretrained or bool(config.pretrained_path)
    for path in (config.pretrained_path, config.initial_checkpoint):
        if path and not Path(path).is_file():
            raise UserError(f"There is no checkpoint '{path}'.")
    return options


def loss_options(config: TrainConfig, class_weight: list[float] | None = None) -> dict[str, Any]:
    """The loss's options, with label smoothing where the loss has it and Mixup has not applied it already.

    Args:
        config: the settings.
        class_weight: one per class, as :func:`class_weights` returns them.
    """
    known = losses.loss_options(config.loss)
    filled = {'smoothing': 0.0 if config.mixes else config.smoothing, 'soft_targets': config.mixes}
    if class_weight is not None:
        filled[losses.class_weight_option(config.loss)] = class_weight
    return {**{key: value for key, value in filled.items() if key in known}, **config.loss_kwargs}


def mixup_smoothing(config: TrainConfig) -> float:
    """Label smoothing of the targets that Mixup makes: none for a loss without that option."""
    return config.smoothing if 'smoothing' in losses.loss_options(config.loss) else 0.0


def class_weights(config: TrainConfig, splits: Splits) -> list[float] | None:
    """One weight per class as --class-weight says; None without it.

    'balanced' weighs by ``N / (K * count)``; a file has lines of name and weight, and classes that it does not name
    have weight 1.

    Raises:
        UserError: the classes of the data are not known, or the file is not as it should be.
    """
    counts, names = splits.counts, splits.class_names
    if not config.class_weight:
        return None
    if not counts or (config.class_weight != 'balanced' and not names):
        raise UserError(f"--class-weight does not work with '{config.dataset}', whose classes are not known.")
    if config.num_classes and config.num_classes != len(counts):
        raise UserError(
            f'--class-weight weighs the {len(counts)} classes of the data, and --num-classes is {config.num_classes}.'
        )
    if config.class_weight == 'balanced':
        return [sum(counts) / (len(counts) * count) if count else 0.0 for count in counts]
    return _read_class_weights(Path(config.class_weight), names or [])


def _read_class_weights(path: Path, names: list[str]) -> list[float]:
    """Weights from a file with lines of name and weight, 1 for classes that it does not name.

    Raises:
        UserError: there is no such file, or a line is not of this form.
    """
    if not path.is_file():
        raise UserError(f"--class-weight is 'balanced' or a file; there is no file '{path}'.")
    weights = dict.fromkeys(names, 1.0)
    for line in read_lines(path):
        name, _, value = line.strip().rpartition(' ')
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"{path}: '{line.strip()}' is not 'NAME WEIGHT', such as '{names[0]} 2.5'.") from None
        if len(weights) > len(names) or not 0 <= weights[name.strip()] < float('inf'):
            raise UserError(f"{path}: '{line.strip()}' does not weigh one of the classes, such as '{names[0]} 2.5'.")
    return list(weights.values())


def learning_rate(config: TrainConfig) -> float:
    """--lr, scaled with the global batch if --scale-lr says so; or timm's rule, from --lr-base and the global batch.

    Raises:
        UserError: it is lower than --min-lr.
    """
    rate = _learning_rate(config)
    if rate < config.min_lr:
        raise UserError(f'--min-lr {config.min_lr:g} must be at most the learning rate, which is {rate:g}.')
    return rate


def _learning_rate(config: TrainConfig) -> float:
    if config.lr is not None:
        scales = config.scale_lr and config.lr_batch
        return config.lr * global_batch(config) / config.lr_batch if scales else config.lr
    scale = config.lr_base_scale or ('sqrt' if any(o in config.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = global_batch(config) / config.lr_base_size
    return config.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def global_batch(config: TrainConfig) -> int:
    """Images per optimizer step: per process, times processes, times accumulated batches."""
    return config.batch_size * world_size() * config.grad_accum_steps
