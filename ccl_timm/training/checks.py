"""Checks that involve several settings, the registry or the model: what cannot work fails before anything runs."""

import functools
import importlib
import importlib.util
import json
from types import SimpleNamespace

import torch
from timm.optim import list_optimizers

from ccl_timm import losses, models
from ccl_timm.data.loaders import resolve_preprocessing
from ccl_timm.errors import UserError, did_you_mean, require_finite, user_errors
from ccl_timm.task import create_loss_for, probe_outputs
from ccl_timm.training.checkpoints import build_model
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.frozen import check_freezable
from ccl_timm.training.setup import input_channels, loss_options

__all__ = ['check_config', 'check_fit']

_WITH_COLUMNS = ('hfds/', 'hfids/', 'tfds/', 'wds/')  # timm's schemes of data sets with named columns


def check_config(config: TrainConfig) -> None:
    """Find what cannot work before anything is built; imports the modules that ``device_modules`` names.

    Raises:
        UserError: names the setting, its value and the remedy.
    """
    for module in config.device_modules or []:
        with user_errors(f"--device-modules '{module}' cannot be imported"):
            importlib.import_module(module)
    models.ensure_registered(config.model)
    _check_loss(config)
    for name in ('loss_kwargs', 'model_kwargs', 'opt_kwargs'):
        require_finite(f'--{name.replace("_", "-")}', getattr(config, name))
    if config.pad_crop and (config.no_aug or config.train_crop_mode):
        raise UserError('--pad-crop takes the place of other crops: leave out --no-aug and --train-crop-mode.')
    _check_normalisation(config)
    _check_ranges(config)
    _check_mixing(config)
    _check_frozen(config)
    if config.opt.lower() not in list_optimizers():
        raise UserError(f"Unknown optimizer '{config.opt}'{did_you_mean(config.opt, list_optimizers())}")
    tracker = 'wandb' if config.log_wandb else config.tracker
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UserError(f'--tracker {tracker} needs the package {tracker}: `pip install {tracker}`.')


def _check_loss(config: TrainConfig) -> None:
    known = losses.loss_options(config.loss)
    for key, value in config.loss_kwargs.items():
        if key not in known:
            losses.create_loss(config.loss, **{key: value})  # raises, with the options there are
    if config.class_weight and not losses.class_weight_option(config.loss):
        raise UserError(f"--class-weight does not work with the loss '{config.loss}': it has no class weights.")


def _check_ranges(config: TrainConfig) -> None:
    """Settings of several numbers, or whose range depends on another setting."""
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        low, high = getattr(config, name) or (0, 1)
        if low > high or (name == 'cutmix_minmax' and low == high):
            raise UserError(f'--{name.replace("_", "-")} {low} {high} must be the lower and the higher limit.')
    if max(config.scale) > 1 and not (config.train_crop_mode or '').startswith('rk'):
        raise UserError(f'--scale {max(config.scale)} must be at most 1, a share of the image.')
    if config.scale_lr and not (config.lr and config.lr_batch):
        raise UserError('--scale-lr needs --lr and the batch that it is for, --lr-batch N.')
    milestones = config.decay_milestones
    if any(a >= b for a, b in zip(milestones, milestones[1:], strict=False)):
        raise UserError(f'--decay-milestones {" ".join(map(str, milestones))} must be in ascending order.')
    if config.decay_rate > 1 and config.sched != 'poly':  # of which it is the power
        raise UserError(f"--decay-rate {config.decay_rate} must be at most 1 with the schedule '{config.sched}'.")
    if (config.input_key or config.target_key) and not config.dataset.lower().startswith(_WITH_COLUMNS):
        raise UserError('--input-key and --target-key name the columns of a data set such as hfds/owner/name only.')


def _check_mixing(config: TrainConfig) -> None:
    if not config.mixes:
        return
    if not losses.takes_soft_targets(config.loss):
        raise UserError(
            f"Mixup and CutMix make soft targets, which the loss '{config.loss}' does not take: "
            'leave out --mixup and --cutmix, or choose another loss.'
        )
    if config.batch_size % 2:
        raise UserError(f'Mixup and CutMix take pairs: --batch-size {config.batch_size} must be even.')


def _check_frozen(config: TrainConfig) -> None:
    if config.feature_views > 1 and not config.freeze_backbone:
        raise UserError(f'--feature-views {config.feature_views} goes with --freeze-backbone.')
    if config.freeze_backbone and config.mixes:
        raise UserError('--freeze-backbone trains on features, not on images: leave out --mixup and --cutmix.')


def _check_normalisation(config: TrainConfig) -> None:
    channels = input_channels(config)
    for name in ('mean', 'std'):
        values = getattr(config, name)
        if values is not None and len(values) not in (1, channels):
            raise UserError(f'--{name} has {len(values)} values, images {channels} channels: give 1 or {channels}.')


def check_fit(config: TrainConfig) -> None:
    """Check by shapes that model, loss and image size go together, without data, weights or work.

    Args:
        config: has been checked. Without a number of classes, ten are tried.

    Raises:
        UserError: they do not.
    """
    options = json.dumps(config.model_kwargs, sort_keys=True)
    size = (config.input_size and tuple(config.input_size), config.img_size, config.in_chans)
    model, available = _shapes(config.model, options, config.num_classes or 10, *size)
    loss = create_loss_for(model, config.loss, available, **loss_options(config)).to('meta')
    if config.freeze_backbone:
        check_freezable(model, loss.requires, config.model, config.loss)
    with user_errors(f"The loss '{config.loss}' cannot take what '{config.model}' computes"):
        loss(SimpleNamespace(**available), torch.zeros(1, dtype=torch.long, device='meta'))


@functools.lru_cache(maxsize=64)
def _shapes(name, options, num_classes, input_size, img_size, in_chans):
    """A model on torch's meta device and the shapes of its outputs; many rows of a table have the same model."""
    settings = {'model': name, 'model_kwargs': json.loads(options), 'num_classes': num_classes}
    settings |= {'input_size': input_size, 'img_size': img_size, 'in_chans': in_chans}
    model = build_model(settings, device='meta')
    size = resolve_preprocessing(model, settings)['input_size']
    return model, probe_outputs(model, size)
