"""Loaders of the scripts: timm's, or one over images in memory; with pad-crop, Mixup and CutMix as the settings say."""

import argparse
from collections.abc import Callable
from typing import Any

import timm.data
import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import adapt_to_chs
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms

from ccl_timm.console import log_info
from ccl_timm.data.datasets import Replacing, Splits, targets_of
from ccl_timm.data.in_memory import Augment, InMemoryLoader, decode
from ccl_timm.data.samplers import ClassBalancedSampler
from ccl_timm.errors import UserError

__all__ = ['create_loader', 'evaluation_loader', 'make_loaders', 'mixes']

_SMALL = 2**30  # bytes: data sets of up to this size go to memory by themselves
_MARGIN = 1.15  # large photos are kept at so many times the input size, which leaves room for random crops


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
        crop = [_resize(size), transforms.RandomCrop(size, padding=pad_crop)]
        dataset.transform = transforms.Compose([*crop, *steps[1:]])  # timm's first step is its crop
    return loader


def _resize(size: tuple[int, int]) -> transforms.Resize:
    # as at evaluation: a square keeps what the image looks like, and its longer side hangs over
    return transforms.Resize(size[0] if size[0] == size[1] else size)


def mixes(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def make_loaders(
    args: argparse.Namespace, device: torch.device, data_config: dict[str, Any], splits: Splits
) -> tuple[Any, Any]:
    """Loaders of the training and the validation part (None without one).

    Raises:
        UserError: the training part is smaller than a batch, or cannot be held in memory though ``--in-memory on``.
    """
    _check_channels(splits.train, data_config['input_size'][0])
    _check_sizes(args, min(data_config['input_size'][-2:]))
    loader = _memory_loader(args, device, data_config, splits)
    in_memory = loader is not None
    if not in_memory:
        loader = _file_loader(args, device, data_config, splits.train)
    if len(loader) == 0:
        raise UserError(
            f'The training part has {len(splits.train)} images, fewer than a batch of {args.batch_size} '
            f'(x {args.world_size} processes): give a smaller --batch-size.'
        )
    if splits.validation is None:
        return loader, None
    config = {name: data_config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    config |= {'crop_mode': data_config['crop_mode'], 'batch_size': args.validation_batch_size or args.batch_size}
    return loader, evaluation_loader(splits.validation, config, device, args.workers, in_memory, args.distributed)


def _check_sizes(args: argparse.Namespace, size: int) -> None:
    """Raise a UserError unless what is cropped or mixed fits images of ``size`` pixels."""
    if args.pad_crop >= size:
        raise UserError(f'--pad-crop {args.pad_crop} must be less than the image size, {size}.')
    if args.cutmix_minmax and int(size * args.cutmix_minmax[0]) >= int(size * args.cutmix_minmax[1]):
        shown = ' '.join(map(str, args.cutmix_minmax))
        raise UserError(f'--cutmix-minmax {shown} must differ by a pixel or more of {size}.')


def evaluation_loader(
    dataset: Dataset,
    config: dict[str, Any],
    device: torch.device,
    workers: int,
    in_memory: bool = False,
    distributed: bool = False,
) -> Any:
    """A loader of images in their order, preprocessed as timm does it; of an unreadable image the label is -1.

    Args:
        dataset: the part of the data.
        config: ``batch_size`` and timm's ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``crop_mode``.
        device: where batches are wanted.
        workers: processes that read.
        in_memory: read all once, now.
        distributed: processes share the images.
    """
    shared = {'num_workers': workers, 'device': device, 'distributed': distributed, 'persistent_workers': False}
    loader = create_loader(dataset, is_training=False, **config, **shared)
    if not in_memory:
        return loader
    images, labels = decode(dataset, dataset.transform, workers)
    images, labels = images.to(device), labels.to(device)
    sampler = OrderedDistributedSampler(labels) if distributed else SequentialSampler(labels)
    return _over(Augment(images, images.shape[-2:]), labels, sampler, config, device)


def _file_loader(args: argparse.Namespace, device: torch.device, data_config: dict[str, Any], dataset: Dataset) -> Any:
    names = ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob')
    names += ('gaussian_blur_prob', 'no_aug', 'train_crop_mode', 'pad_crop', 'batch_size', 'distributed')
    loader = create_loader(
        dataset if isinstance(dataset, IterableDataset) else Replacing(dataset),
        is_training=True,
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        # workers that live on carry random state from epoch to epoch, which no checkpoint holds
        persistent_workers=False,
        pin_memory=args.pin_mem,
        device=device,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        auto_augment=args.aa,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        collate_fn=_mixing(args, FastCollateMixup),
        **{name: getattr(args, name) for name in names},
    )
    if args.samples_per_class:
        loader.loader = _with_sampler(loader.loader, _sampler(args, targets_of(dataset)))
    return loader


def _with_sampler(loader: DataLoader, sampler: Sampler) -> DataLoader:
    """The same loader in another order, which torch does not let one set."""
    names = ('num_workers', 'collate_fn', 'pin_memory', 'worker_init_fn', 'batch_size', 'drop_last')
    return DataLoader(loader.dataset, sampler=sampler, **{name: getattr(loader, name) for name in names})


def _sampler(args: argparse.Namespace, targets: list[int] | None) -> Sampler:
    """The order of training images."""
    if args.samples_per_class:
        if targets is None:
            raise UserError(f"--samples-per-class does not work with '{args.dataset}', whose labels cannot be listed.")
        shared = (args.batch_size, args.samples_per_class, args.seed, args.rank, args.world_size)
        return ClassBalancedSampler(targets, *shared)
    return DistributedSampler(targets) if args.distributed else RandomSampler(targets)


def _memory_loader(
    args: argparse.Namespace, device: torch.device, data_config: dict[str, Any], splits: Splits
) -> InMemoryLoader | None:
    """A loader over the training part in memory; None where it stays in its files, and why is said."""
    if args.in_memory == 'off':
        return None
    size = data_config['input_size'][-2:]
    obstacle = _unsupported(args, splits.train) or (args.in_memory == 'auto' and _unfit(args, splits, size))
    read = None
    if not obstacle:
        read = decode(splits.train, _storing(args, data_config, splits.train), args.workers)
        obstacle = None if read else 'its images are not of one size'
    if obstacle and args.in_memory == 'on':
        raise UserError(f'--in-memory on does not work here: {obstacle}; give --in-memory off.')
    if obstacle:
        log_info(f'images are read by {args.workers} workers, not from memory: {obstacle}')
        return None
    images, labels = read[0].to(device), read[1]
    crops = not (args.no_aug or args.pad_crop)
    augment = Augment(
        images,
        size,
        pad_crop=args.pad_crop,
        scale=tuple(args.scale) if crops else None,
        ratio=tuple(args.ratio),
        hflip=0.0 if args.no_aug else args.hflip,
        vflip=0.0 if args.no_aug else args.vflip,
    )
    log_info(f'{len(labels)} training images in memory, {augment.images.numel() / 2**20:.0f} MiB')
    config = {**data_config, 'batch_size': args.batch_size}
    erasing = None
    if args.reprob and not args.no_aug:
        erasing = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
    sampler = _sampler(args, labels.tolist())
    mixup = _mixing(args, Mixup)
    return _over(augment, labels, sampler, config, device, drop_last=True, random_erasing=erasing, mixup=mixup)


def _over(images: Augment, labels: torch.Tensor, sampler: Sampler, config: dict[str, Any], device, **kwargs: Any):
    mean, std = (adapt_to_chs(config[name], config['input_size'][0]) for name in ('mean', 'std'))
    return InMemoryLoader(images, labels, sampler, config['batch_size'], mean, std, device, **kwargs)


def _unsupported(args: argparse.Namespace, dataset: Dataset) -> str | None:
    """Why the data cannot be augmented from memory."""
    if isinstance(dataset, IterableDataset):
        return 'the data set is a stream'
    if args.no_aug:
        return None
    flags = ('aa', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')
    single = [f'--{name.replace("_", "-")}' for name in flags if getattr(args, name)]
    if args.train_crop_mode not in (None, 'rrc') and not args.pad_crop:
        single.append('--train-crop-mode')
    return f'{", ".join(single)} work on one image at a time' if single else None


def _unfit(args: argparse.Namespace, splits: Splits, size: tuple[int, int]) -> str | None:
    """Why the data should stay in its files: results would suffer, or it is large."""
    width, height = _first(splits.train).size
    if not (args.no_aug or args.pad_crop):
        if args.train_interpolation != 'bilinear':
            return f'--train-interpolation {args.train_interpolation} is not bilinear'
        if height > size[0] or width > size[1]:
            return f'its images ({width} x {height}) are larger than the input'
    pixels = (size[0] + 2 * args.pad_crop) * (size[1] + 2 * args.pad_crop)
    count = len(splits.train) * (2 if args.hflip and not args.no_aug else 1) + len(splits.validation or [])
    needed = count * pixels * len(_first(splits.train).getbands())
    return f'it would take {needed / 2**30:.1f} GiB' if needed > _SMALL else None


def _storing(args: argparse.Namespace, data_config: dict[str, Any], dataset: Dataset) -> Callable:
    """How images are made ready for memory: what comes before the random steps of timm's transform."""
    size = tuple(data_config['input_size'][-2:])
    if args.no_aug:
        steps = timm.data.create_transform(size, is_training=True, no_aug=True, use_prefetcher=True,
                                           interpolation=data_config['interpolation']).transforms  # fmt: skip
        return transforms.Compose(steps)
    if args.pad_crop:
        return transforms.Compose([_resize(size), transforms.PILToTensor()])
    width, height = _first(dataset).size
    if height <= size[0] and width <= size[1]:
        return transforms.PILToTensor()
    large = tuple(round(_MARGIN * length) for length in size)
    log_info(f'images are kept at {large[1]} x {large[0]}, resized and centre cropped: random crops see less')
    return transforms.Compose([transforms.Resize(max(large)), transforms.CenterCrop(large), transforms.PILToTensor()])


def _first(dataset: Dataset) -> Any:
    dataset.transform = None
    return Replacing(dataset)[0][0]


def _check_channels(dataset: Dataset, channels: int) -> None:
    if isinstance(dataset, IterableDataset):
        return
    found = len(_first(dataset).getbands())
    if found != channels:
        raise UserError(f'The images have {found} channels, the model takes {channels}: give --in-chans {found}.')


def _mixing(args: argparse.Namespace, kind: type) -> Any:
    """Mixup and CutMix as timm's class of that kind; None where they are off."""
    if not mixes(args):
        return None
    return kind(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
