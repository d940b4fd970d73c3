"""What settings mean: what cannot work, found before anything is built, and the values computed from others."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model, parse_model_name
from timm.optim import list_optimizers

from ccl_timm import losses, models
from ccl_timm.data.loaders import mixes
from ccl_timm.errors import UserError, did_you_mean, require_finite
from ccl_timm.task import create_loss_for, probe_outputs
from ccl_timm.training.checkpoints import build_model

__all__ = [
    'check_fit',
    'check_settings',
    'class_weights',
    'explained',
    'global_batch',
    'input_channels',
    'learning_rate',
    'loss_settings',
    'weight_settings',
]

_WITH_COLUMNS = ('hfds/', 'hfids/', 'tfds/', 'wds/')  # timm's schemes of data sets with named columns


def check_settings(args: argparse.Namespace) -> None:
    """Find what cannot work before anything is built; imports the modules that the settings name.

    Raises:
        UserError: with the setting and the way out.
    """
    for module in args.device_modules or []:
        with explained(f"--device-modules '{module}' cannot be imported"):
            importlib.import_module(module)
    models.ensure_registered(args.model)
    known = losses.loss_options(args.loss)
    for key in args.loss_kwargs:
        if key not in known:
            losses.create_loss(args.loss, **{key: args.loss_kwargs[key]})  # raises, with the options there are
    for name in ('loss_kwargs', 'model_kwargs', 'opt_kwargs'):
        require_finite(f'--{name.replace("_", "-")}', getattr(args, name))
    if args.class_weight and not losses.class_weight_option(args.loss):
        raise UserError(f"--class-weight does not work with the loss '{args.loss}': it has no weights of classes.")
    if args.pad_crop and (args.no_aug or args.train_crop_mode):
        raise UserError('--pad-crop takes the place of other crops: leave out --no-aug and --train-crop-mode.')
    _check_normalisation(args)
    _check_ranges(args)
    _check_mixing(args)
    if args.opt.lower() not in list_optimizers():
        raise UserError(f"Unknown optimizer '{args.opt}'{did_you_mean(args.opt, list_optimizers())}")
    _check_tracker(args)


def _check_ranges(args: argparse.Namespace) -> None:
    """Settings of several numbers, or whose range depends on another setting."""
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        low, high = getattr(args, name) or (0, 1)
        if low > high or (name == 'cutmix_minmax' and low == high):
            raise UserError(f'--{name.replace("_", "-")} {low} {high} must be the lower and the higher limit.')
    if max(args.scale) > 1 and not (args.train_crop_mode or '').startswith('rk'):
        raise UserError(f'--scale {max(args.scale)} must be at most 1, a share of the image.')
    milestones = args.decay_milestones
    if any(a >= b for a, b in zip(milestones, milestones[1:], strict=False)):
        raise UserError(f'--decay-milestones {" ".join(map(str, milestones))} must be in ascending order.')
    if args.decay_rate > 1 and args.sched != 'poly':  # of which it is the power
        raise UserError(f"--decay-rate {args.decay_rate} must be at most 1 with the schedule '{args.sched}'.")
    if (args.input_key or args.target_key) and not args.dataset.lower().startswith(_WITH_COLUMNS):
        raise UserError('--input-key and --target-key name the columns of a data set such as hfds/owner/name only.')


def _check_tracker(args: argparse.Namespace) -> None:
    name = 'wandb' if args.log_wandb else args.tracker
    if name and importlib.util.find_spec(name) is None:
        raise UserError(f'--tracker {name} needs the package {name}: `pip install {name}`.')


def check_fit(args: argparse.Namespace) -> None:
    """Find out whether model, loss and size of images go together, by their shapes: without data, weights or work.

    Args:
        args: checked settings. Without a number of classes they are tried with ten.

    Raises:
        UserError: they do not.
    """
    options = json.dumps(args.model_kwargs, sort_keys=True)
    size = (args.input_size and tuple(args.input_size), args.img_size, args.in_chans)
    model, available = _shapes(args.model, options, args.num_classes or 10, *size)
    loss = create_loss_for(model, args.loss, available, **loss_settings(args)).to('meta')
    with explained(f"The loss '{args.loss}' cannot take what '{args.model}' gives"):
        loss(SimpleNamespace(**available), torch.zeros(1, dtype=torch.long, device='meta'))


@functools.lru_cache(maxsize=64)
def _shapes(name, options, num_classes, input_size, img_size, in_chans):
    """A model on torch's meta device and what it gives out; the same model has many rows in a table."""
    settings = {'model': name, 'model_kwargs': json.loads(options), 'num_classes': num_classes}
    settings |= {'input_size': input_size, 'img_size': img_size, 'in_chans': in_chans}
    model = build_model(settings, device='meta')
    size = resolve_data_config(settings, model=model)['input_size']
    return model, probe_outputs(model, size)


def _check_mixing(args: argparse.Namespace) -> None:
    if not mixes(args):
        return
    if not losses.takes_soft_targets(args.loss):
        raise UserError(
            f"Mixup and CutMix make soft targets, which the loss '{args.loss}' does not take: "
            'leave out --mixup and --cutmix, or choose another loss.'
        )
    if args.batch_size % 2:
        raise UserError(f'Mixup and CutMix take pairs: --batch-size {args.batch_size} must be even.')


def _check_normalisation(args: argparse.Namespace) -> None:
    channels = input_channels(args)
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, channels):
            raise UserError(f'--{name} has {len(values)} values, images {channels} channels: give 1 or {channels}.')


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors that libraries raise over a user's setting into a sentence: what, and the library's reason."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f'{what}: {lines[-1].strip()}') from error


def input_channels(args: argparse.Namespace) -> int:
    """Number of image channels that the settings, or else the model's default, ask for."""
    source, name = parse_model_name(args.model)
    cfg = get_pretrained_cfg(name) if source is None and is_model(name.split('.')[0]) else None
    size = {key: value for key, value in vars(args).items() if key not in ('mean', 'std')}
    return resolve_data_config(size, pretrained_cfg=cfg.to_dict() if cfg else None)['input_size'][0]


def weight_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of create_model for weights from files.

    Raises:
        UserError: there is no such file.
    """
    weights: dict[str, Any] = {}
    if args.pretrained_path:
        weights['pretrained_cfg_overlay'] = {'file': args.pretrained_path, 'num_classes': -1}
    if args.initial_checkpoint:
        weights['checkpoint_path'] = args.initial_checkpoint
    weights['pretrained'] = args.pretrained or bool(args.pretrained_path)
    for path in (args.pretrained_path, args.initial_checkpoint):
        if path and not Path(path).is_file():
            raise UserError(f"There is no checkpoint '{path}'.")
    return weights


def loss_settings(args: argparse.Namespace, class_weight: list[float] | None = None) -> dict[str, Any]:
    """The loss's options, with label smoothing where the loss has it and Mixup has not applied it already.

    Args:
        args: settings.
        class_weight: of each class, as :func:`class_weights` gives them.
    """
    known = losses.loss_options(args.loss)
    filled = {'smoothing': 0.0 if mixes(args) else args.smoothing, 'soft_targets': mixes(args)}
    if class_weight is not None:
        filled[losses.class_weight_option(args.loss)] = class_weight
    return {**{key: value for key, value in filled.items() if key in known}, **args.loss_kwargs}


def class_weights(args: argparse.Namespace, counts: list[int] | None, names: list[str] | None) -> list[float] | None:
    """Weights of the classes as --class-weight says; None without it.

    Args:
        args: settings.
        counts: training images of each class; 'balanced' weighs by ``N / (K * count)``.
        names: of the classes, which a file weighs line by line; those it does not name have weight 1.

    Raises:
        UserError: the data does not tell its classes, or the file is not as it should be.
    """
    if not args.class_weight:
        return None
    if not counts or (args.class_weight != 'balanced' and not names):
        raise UserError(f"--class-weight does not work with '{args.dataset}', which does not tell its classes.")
    if args.class_weight == 'balanced':
        return [sum(counts) / (len(counts) * count) if count else 0.0 for count in counts]
    path = Path(args.class_weight)
    if not path.is_file():
        raise UserError(f"--class-weight is 'balanced' or a file; there is no file '{path}'.")
    weights = dict.fromkeys(names, 1.0)
    for line in filter(str.strip, path.read_text(encoding='utf-8').splitlines()):
        name, _, value = line.strip().rpartition(' ')
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"{path}: '{line.strip()}' is not 'NAME WEIGHT', such as '{names[0]} 2.5'.") from None
        if len(weights) > len(names) or not 0 <= weights[name.strip()] < float('inf'):
            raise UserError(f"{path}: '{line.strip()}' does not weigh one of the classes, such as '{names[0]} 2.5'.")
    return list(weights.values())


def learning_rate(args: argparse.Namespace) -> float:
    """--lr, scaled with the global batch if --scale-lr says so; or timm's rule, from --lr-base and the global batch.

    Raises:
        UserError: it is lower than --min-lr.
    """
    rate = _learning_rate(args)
    if rate < args.min_lr:
        raise UserError(f'--min-lr {args.min_lr:g} must be at most the learning rate, which is {rate:g}.')
    return rate


def _learning_rate(args: argparse.Namespace) -> float:
    if args.lr is not None:
        scales = args.scale_lr and args.lr_batch
        return args.lr * global_batch(args) / args.lr_batch if scales else args.lr
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = global_batch(args) / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def global_batch(args: argparse.Namespace) -> int:
    """Images an optimizer step: per process, times processes, times accumulated batches."""
    return args.batch_size * args.world_size * args.grad_accum_steps
