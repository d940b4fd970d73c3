"""Loaders of the scripts: timm's, or one over images in memory; with pad-crop, Mixup and CutMix as the settings say."""

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
from ccl_timm.data.config import LoaderConfig
from ccl_timm.data.datasets import Replacing, Splits, targets_of
from ccl_timm.data.in_memory import Augment, InMemoryLoader, decode
from ccl_timm.data.samplers import ClassBalancedSampler
from ccl_timm.errors import UserError
from ccl_timm.ops import rank, world_size

__all__ = ['create_loader', 'evaluation_loader', 'loaders_in_memory', 'make_loaders', 'ordered_training_loader']

_SMALL = 2**30  # bytes: data sets of up to this size go to memory by themselves
_MARGIN = 1.15  # large photos are kept at this multiple of the input size, which leaves room for random crops


def create_loader(dataset: Dataset, *args: Any, pad_crop: int = 0, make: Callable | None = None, **kwargs: Any):
    """timm's ``create_loader`` with one more option.

    Args:
        dataset: as timm's; the other arguments too.
        *args: likewise.
        pad_crop: > 0: in training, zero-pad by this many pixels and crop at random, in the place of timm's random
            resized crop. CC-Loss does so on CIFAR-100 and Cars-196, POD-Loss on all its data but ImageNet.
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


def make_loaders(
    config: LoaderConfig, num_classes: int, device: torch.device, data_config: dict[str, Any], splits: Splits
) -> tuple[Any, Any]:
    """Loaders of the training and the validation split (None without one).

    Raises:
        UserError: the training split is smaller than a batch, or cannot be held in memory though ``--in-memory on``.
    """
    _check_channels(splits.train, data_config['input_size'][0])
    _check_sizes(config, min(data_config['input_size'][-2:]))
    loader = _memory_loader(config, num_classes, device, data_config, splits)
    in_memory = loader is not None
    if not in_memory:
        loader = _file_loader(config, num_classes, device, data_config, splits.train)
    _check_has_batches(loader, config, len(splits.train))
    if splits.validation is None:
        return loader, None
    preprocessing = {name: data_config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    preprocessing |= {'crop_mode': data_config['crop_mode']}
    preprocessing |= {'batch_size': config.validation_batch_size or config.batch_size}
    return loader, evaluation_loader(splits.validation, preprocessing, device, config.workers, in_memory)


def _check_has_batches(loader: Any, config: LoaderConfig, images: int) -> None:
    if len(loader) == 0:
        raise UserError(
            f'The training split has {images} images, fewer than a batch of {config.batch_size} '
            f'(x {world_size()} processes): give a smaller --batch-size.'
        )


def _check_sizes(config: LoaderConfig, size: int) -> None:
    """Raise a UserError unless what is cropped or mixed fits images of ``size`` pixels."""
    if config.pad_crop >= size:
        raise UserError(f'--pad-crop {config.pad_crop} must be less than the image size, {size}.')
    if config.cutmix_minmax and int(size * config.cutmix_minmax[0]) >= int(size * config.cutmix_minmax[1]):
        shown = ' '.join(map(str, config.cutmix_minmax))
        raise UserError(f'--cutmix-minmax {shown} must differ by a pixel or more of {size}.')


def evaluation_loader(
    dataset: Dataset,
    preprocessing: dict[str, Any],
    device: torch.device,
    workers: int,
    in_memory: bool = False,
) -> Any:
    """A loader of images in their order, preprocessed as timm does it; of an unreadable image the label is -1.

    Args:
        dataset: the split.
        preprocessing: ``batch_size`` and timm's ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``crop_mode``.
        device: where batches are wanted.
        workers: processes that read.
        in_memory: read all once, now.
    """
    distributed = world_size() > 1
    shared = {'num_workers': workers, 'device': device, 'distributed': distributed, 'persistent_workers': False}
    loader = create_loader(dataset, is_training=False, **preprocessing, **shared)
    if not in_memory:
        return loader
    images, labels = decode(dataset, dataset.transform, workers)
    images, labels = images.to(device), labels.to(device)
    sampler = OrderedDistributedSampler(labels) if distributed else SequentialSampler(labels)
    return _over(Augment(images, images.shape[-2:]), labels, sampler, preprocessing, device)


def ordered_training_loader(
    config: LoaderConfig, device: torch.device, data_config: dict[str, Any], dataset: Dataset
) -> Any:
    """A loader of all images once, in their order, changed at random as for training; in the place of an image that
    cannot be read it has another.
    """
    loader = _file_loader(config, 0, device, data_config, dataset)
    order = OrderedDistributedSampler(dataset) if world_size() > 1 else SequentialSampler(dataset)
    loader.loader = _with_sampler(loader.loader, order, drop_last=False)
    return loader


def loaders_in_memory(
    config: LoaderConfig,
    device: torch.device,
    train: tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor],
    validation: tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor] | None,
) -> tuple[InMemoryLoader, InMemoryLoader | None]:
    """Loaders over tensors that are ready for the model, in the order that the settings say.

    Args:
        config: batch sizes, and balanced batches.
        device: where batches are wanted.
        train: takes numbers (B,) and returns what belongs to them, as float32; and all labels (N,).
        validation: likewise; None for none.

    Raises:
        UserError: the training split is smaller than a batch.
    """
    draw, labels = train
    sampler = _sampler(config, labels.tolist())
    loader = InMemoryLoader(draw, labels, sampler, config.batch_size, None, None, device, drop_last=True)
    _check_has_batches(loader, config, len(labels))
    if validation is None:
        return loader, None
    draw, labels = validation
    ordered = OrderedDistributedSampler(labels) if world_size() > 1 else SequentialSampler(labels)
    batch = config.validation_batch_size or config.batch_size
    return loader, InMemoryLoader(draw, labels, ordered, batch, None, None, device)


def _file_loader(
    config: LoaderConfig, num_classes: int, device: torch.device, data_config: dict[str, Any], dataset: Dataset
) -> Any:
    names = ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob')
    names += ('gaussian_blur_prob', 'no_aug', 'train_crop_mode', 'pad_crop', 'batch_size')
    loader = create_loader(
        dataset if isinstance(dataset, IterableDataset) else Replacing(dataset),
        is_training=True,
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=config.workers,
        # workers that live on carry random state from epoch to epoch, which no checkpoint holds
        persistent_workers=False,
        pin_memory=config.pin_mem,
        device=device,
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        auto_augment=config.aa,
        interpolation=data_config['interpolation'] if config.no_aug else config.train_interpolation,
        distributed=world_size() > 1,
        collate_fn=_mixing(config, num_classes, FastCollateMixup),
        **{name: getattr(config, name) for name in names},
    )
    if config.samples_per_class:
        loader.loader = _with_sampler(loader.loader, _sampler(config, targets_of(dataset)))
    return loader


def _with_sampler(loader: DataLoader, sampler: Sampler, **changed: Any) -> DataLoader:
    """The same loader in another order, which torch does not let one set."""
    names = ('num_workers', 'collate_fn', 'pin_memory', 'worker_init_fn', 'batch_size', 'drop_last')
    options = {name: getattr(loader, name) for name in names}
    return DataLoader(loader.dataset, sampler=sampler, **{**options, **changed})


def _sampler(config: LoaderConfig, targets: list[int] | None) -> Sampler:
    """The order of training images."""
    if config.samples_per_class:
        if targets is None:
            raise UserError(
                f"--samples-per-class does not work with '{config.dataset}', whose labels cannot be listed."
            )
        shared = (config.batch_size, config.samples_per_class, config.seed, rank(), world_size())
        return ClassBalancedSampler(targets, *shared)
    return DistributedSampler(targets) if world_size() > 1 else RandomSampler(targets)


def _memory_loader(
    config: LoaderConfig, num_classes: int, device: torch.device, data_config: dict[str, Any], splits: Splits
) -> InMemoryLoader | None:
    """A loader over the training split in memory; None where it stays in its files, which a message explains."""
    if config.in_memory == 'off':
        return None
    size = data_config['input_size'][-2:]
    obstacle = _unsupported(config, splits.train) or (config.in_memory == 'auto' and _unfit(config, splits, size))
    read = None
    if not obstacle:
        read = decode(splits.train, _storing(config, data_config, splits.train), config.workers)
        obstacle = None if read else 'its images are not of one size'
    if obstacle and config.in_memory == 'on':
        raise UserError(f'--in-memory on does not work here: {obstacle}; give --in-memory off.')
    if obstacle:
        log_info(f'images are read by {config.workers} workers, not from memory: {obstacle}')
        return None
    images, labels = read[0].to(device), read[1]
    crops = not (config.no_aug or config.pad_crop)
    augment = Augment(
        images,
        size,
        pad_crop=config.pad_crop,
        scale=tuple(config.scale) if crops else None,
        ratio=tuple(config.ratio),
        hflip=0.0 if config.no_aug else config.hflip,
        vflip=0.0 if config.no_aug else config.vflip,
    )
    log_info(f'{len(labels)} training images in memory, {augment.images.numel() / 2**20:.0f} MiB')
    preprocessing = {**data_config, 'batch_size': config.batch_size}
    erasing = None
    if config.reprob and not config.no_aug:
        erasing = RandomErasing(config.reprob, mode=config.remode, max_count=config.recount, device=device)
    sampler = _sampler(config, labels.tolist())
    mixup = _mixing(config, num_classes, Mixup)
    return _over(augment, labels, sampler, preprocessing, device, drop_last=True, random_erasing=erasing, mixup=mixup)


def _over(
    images: Augment, labels: torch.Tensor, sampler: Sampler, preprocessing: dict[str, Any], device, **kwargs: Any
) -> InMemoryLoader:
    mean, std = (adapt_to_chs(preprocessing[name], preprocessing['input_size'][0]) for name in ('mean', 'std'))
    return InMemoryLoader(images, labels, sampler, preprocessing['batch_size'], mean, std, device, **kwargs)


def _unsupported(config: LoaderConfig, dataset: Dataset) -> str | None:
    """Why the data cannot be augmented from memory."""
    if isinstance(dataset, IterableDataset):
        return 'the data set is a stream'
    if config.no_aug:
        return None
    flags = ('aa', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')
    single = [f'--{name.replace("_", "-")}' for name in flags if getattr(config, name)]
    if config.train_crop_mode not in (None, 'rrc') and not config.pad_crop:
        single.append('--train-crop-mode')
    return f'{", ".join(single)} work on one image at a time' if single else None


def _unfit(config: LoaderConfig, splits: Splits, size: tuple[int, int]) -> str | None:
    """Why the data should stay in its files: results would suffer, or it is large."""
    width, height = _first(splits.train).size
    if not (config.no_aug or config.pad_crop):
        if config.train_interpolation != 'bilinear':
            return f'--train-interpolation {config.train_interpolation} is not bilinear'
        if height > size[0] or width > size[1]:
            return f'its images ({width} x {height}) are larger than the input'
    pixels = (size[0] + 2 * config.pad_crop) * (size[1] + 2 * config.pad_crop)
    count = len(splits.train) * (2 if config.hflip and not config.no_aug else 1) + len(splits.validation or [])
    needed = count * pixels * len(_first(splits.train).getbands())
    return f'it would take {needed / 2**30:.1f} GiB' if needed > _SMALL else None


def _storing(config: LoaderConfig, data_config: dict[str, Any], dataset: Dataset) -> Callable:
    """How images are made ready for memory: what comes before the random steps of timm's transform."""
    size = tuple(data_config['input_size'][-2:])
    if config.no_aug:
        steps = timm.data.create_transform(size, is_training=True, no_aug=True, use_prefetcher=True,
                                           interpolation=data_config['interpolation']).transforms  # fmt: skip
        return transforms.Compose(steps)
    if config.pad_crop:
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


def _mixing(config: LoaderConfig, num_classes: int, kind: type) -> Any:
    """Mixup and CutMix as timm's class of that kind; None where they are off."""
    if not config.mixes:
        return None
    return kind(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )
