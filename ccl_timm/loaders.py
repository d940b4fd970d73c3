"""Loaders of the scripts: timm's, with pad-crop, Mixup and CutMix as the settings say."""

import argparse
from collections.abc import Callable
from typing import Any

import timm.data
import torch
from timm.data import FastCollateMixup
from torch.utils.data import Dataset, IterableDataset
from torchvision import transforms

from ccl_timm.data import Splits
from ccl_timm.errors import UserError
from ccl_timm.settings import mixes

__all__ = ['create_loader', 'make_loaders']


def create_loader(dataset: Dataset, *args: Any, pad_crop: int = 0, make: Callable | None = None, **kwargs: Any):
    """timm's ``create_loader`` with one more option.

    Args:
        dataset: as timm's; the other arguments too.
        *args: likewise.
        pad_crop: > 0: in training, zero-pad by so many pixels and crop at random, as both papers do, in the place of
            timm's random resized crop.
        make: what to call in the place of timm's.
        **kwargs: likewise.
    """
    loader = (make or timm.data.create_loader)(dataset, *args, **kwargs)
    if pad_crop and kwargs.get('is_training') and not kwargs.get('no_aug'):
        size = tuple((kwargs.get('input_size') or args[0])[-2:])
        steps = dataset.transform.transforms
        # as at evaluation: a square keeps what the image looks like, and its longer side hangs over
        resized = size[0] if size[0] == size[1] else size
        crop = [transforms.Resize(resized), transforms.RandomCrop(size, padding=pad_crop)]
        dataset.transform = transforms.Compose([*crop, *steps[1:]])  # timm's first step is its crop
    return loader


def make_loaders(
    args: argparse.Namespace, device: torch.device, data_config: dict[str, Any], splits: Splits
) -> tuple[Any, Any]:
    """Loaders of the training and the validation part (None without one).

    Raises:
        UserError: the training part is smaller than a batch.
    """
    shared = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        # workers that live on carry random state from epoch to epoch, which no checkpoint holds
        persistent_workers=False,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        device=device,
    )
    names = ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob')
    names += ('gaussian_blur_prob', 'no_aug', 'train_crop_mode', 'pad_crop')
    loader = create_loader(
        splits.train,
        batch_size=args.batch_size,
        is_training=True,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        auto_augment=args.aa,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        collate_fn=_mixup(args) if mixes(args) else None,
        **{name: getattr(args, name) for name in names},
        **shared,
    )
    if len(loader) == 0:
        raise UserError(
            f'The training part has {len(splits.train)} images, fewer than a batch of {args.batch_size} '
            f'(x {args.world_size} processes): give a smaller --batch-size.'
        )
    _check_channels(splits.train, data_config['input_size'][0])
    if splits.validation is None:
        return loader, None
    return loader, create_loader(
        splits.validation,
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        **shared,
    )


def _check_channels(dataset: Dataset, channels: int) -> None:
    if isinstance(dataset, IterableDataset):
        return
    found = dataset[0][0].shape[0]
    if found != channels:
        raise UserError(f'The images have {found} channels, the model takes {channels}: give --in-chans {found}.')


def _mixup(args: argparse.Namespace) -> FastCollateMixup:
    return FastCollateMixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
