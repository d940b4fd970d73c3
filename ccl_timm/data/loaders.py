"""Loaders of the scripts: timm's, or one over images in memory; with pad-crop, Mixup and CutMix as the settings say."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import timm.data
import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import adapt_to_chs
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms

from ccl_timm._compat import TimmModel
from ccl_timm.console import log_info
from ccl_timm.data import keeping
from ccl_timm.data.config import LoaderConfig
from ccl_timm.data.datasets import Replacing, Splits, targets_of
from ccl_timm.data.image_cache import DecodedImages
from ccl_timm.data.in_memory import Augment, InMemoryLoader, decode
from ccl_timm.data.photos import RandomPhotos
from ccl_timm.data.samplers import ClassBalancedSampler
from ccl_timm.errors import UserError
from ccl_timm.ops import on_all_processes, rank, world_size

__all__ = [
    'create_loader', 'evaluation_loader', 'loaders_in_memory', 'make_loaders', 'ordered_training_loader',
    'resolve_preprocessing',
]  # fmt: skip


def resolve_preprocessing(model: TimmModel, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """timm's ``resolve_data_config``, with the channels of ``in_chans``, and a mean and standard deviation for each.

    Args:
        model: has the defaults.
        settings: of train.py, such as ``img_size`` and ``mean``.
    """
    settings = dict(settings or {})
    found = timm.data.resolve_data_config(settings, model=model)
    channels, *size = found['input_size']
    channels = settings.get('in_chans') or channels  # which timm heeds together with a size only
    adapted = {name: tuple(adapt_to_chs(found[name], channels)) for name in ('mean', 'std')}
    return {**found, 'input_size': (channels, *size), **adapted}


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
        crop = [keeping.resize_for_pad_crop(size), transforms.RandomCrop(size, padding=pad_crop)]
        dataset.transform = transforms.Compose([*crop, *steps[1:]])  # timm's first step is its crop
    return loader


def make_loaders(
    config: LoaderConfig, num_classes: int, device: torch.device, data_config: dict[str, Any], splits: Splits
) -> tuple[Any, Any]:
    """Loaders of the training and the validation split (None without one).

    Raises:
        UserError: the training split is smaller than a batch, or cannot be held in memory though ``--in-memory on``.
    """
    _check_channels(splits.train, data_config['input_size'][0])
    _check_sizes(config, min(data_config['input_size'][-2:]))
    place, loader = 'memory', _memory_loader(config, num_classes, device, data_config, splits)
    if loader is None:
        place, loader = 'disk', _disk_loader(config, num_classes, device, data_config, splits.train)
    if loader is None:
        place, loader = 'files', _file_loader(config, num_classes, device, data_config, splits.train)
    _check_has_batches(loader, config, len(splits.train))
    if splits.validation is None:
        return loader, None
    preprocessing = {name: data_config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    preprocessing |= {'crop_mode': data_config['crop_mode']}
    preprocessing |= {'batch_size': config.validation_batch_size or config.batch_size}
    return loader, evaluation_loader(splits.validation, preprocessing, device, config.workers, place)


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
    place: Literal['files', 'memory', 'disk'] = 'files',
) -> Any:
    """A loader of images in their order, preprocessed as timm does it; of an unreadable image the label is -1.

    Args:
        dataset: the split.
        preprocessing: ``batch_size`` and timm's ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``crop_mode``.
        device: where batches are wanted.
        workers: processes that read.
        place: where images are read from; in memory and on disk they are kept decoded, and all are read first.
    """
    distributed = world_size() > 1
    shared = {'num_workers': workers, 'device': device, 'distributed': distributed, 'persistent_workers': False}
    loader = create_loader(dataset, is_training=False, **preprocessing, **shared)
    if place == 'files':
        return loader
    if place == 'memory':
        images, labels = decode(dataset, dataset.transform, workers)
        images = images.to(device)
    else:
        cache = keeping.transformed_on_disk(dataset, dataset.transform, workers)
        if cache is None or not len(cache.readable):  # of no image that can be read, whoever reads the loader says so
            return loader
        images, labels = cache.stacked(), cache.labels[cache.readable]
    sampler = OrderedDistributedSampler(labels) if distributed else SequentialSampler(labels)
    shared = (preprocessing['batch_size'], preprocessing['mean'], preprocessing['std'], device)
    return InMemoryLoader(Augment(images, images.shape[-2:]), labels, sampler, *shared)


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
    elif isinstance(loader.sampler, DistributedSampler):
        loader.sampler.seed = config.seed  # timm's have the same one in each run
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
    return DistributedSampler(targets, seed=config.seed) if world_size() > 1 else RandomSampler(targets)


def _memory_loader(
    config: LoaderConfig, num_classes: int, device: torch.device, data_config: dict[str, Any], splits: Splits
) -> InMemoryLoader | None:
    """A loader over the training split in memory; None where that cannot or should not be.

    Raises:
        UserError: it cannot be, and the settings ask for it.
    """
    if config.in_memory not in ('auto', 'on'):
        return None
    size = tuple(data_config['input_size'][-2:])
    obstacle, decoded = keeping.obstacle_in_memory(config, splits, size), None
    if not obstacle:
        transform = keeping.transform_for_memory(config, size, data_config['interpolation'], splits.train)
        decoded = decode(splits.train, transform, config.workers)
        obstacle = None if decoded else 'its images are not of one size'
    if obstacle and config.in_memory == 'on':
        raise UserError(f'--in-memory on does not work here: {obstacle}; give --in-memory off.')
    if obstacle:
        log_info(f'training images are not kept in memory: {obstacle}')
        return None
    images, labels = decoded[0].to(device), decoded[1]
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
    return _over_decoded(augment, labels, (data_config['mean'], data_config['std']), config, num_classes, device)


def _disk_loader(
    config: LoaderConfig, num_classes: int, device: torch.device, data_config: dict[str, Any], dataset: Dataset
) -> Any | None:
    """A loader over photographs that are kept decoded on disk; None where that cannot or should not be.

    Raises:
        UserError: it cannot be, and the settings ask for it.
    """
    if config.in_memory not in ('auto', 'disk'):
        return None
    size = tuple(data_config['input_size'][-2:])
    transform = keeping.no_aug_transform(size, data_config['interpolation']) if config.no_aug else None
    obstacle, cache = keeping.obstacle_on_disk(config, dataset, size, transform), None
    if not on_all_processes(obstacle is None):
        obstacle = obstacle or 'another process found an obstacle'
    elif transform:
        cache = keeping.transformed_on_disk(dataset, transform, config.workers)
    else:
        cache = keeping.photos_on_disk(config, dataset, size)
    if cache is None and config.in_memory == 'disk':
        reason = obstacle or 'the cache cannot be written'
        raise UserError(f'--in-memory disk does not work here: {reason}; give --in-memory off.')
    if cache is None:
        reason = f'; decoded ones are not kept on disk: {obstacle}' if obstacle else ''
        log_info(f'images are read by {config.workers} workers{reason}')
        return None
    one_by_one = config.train_interpolation not in RandomPhotos.interpolations and not config.pad_crop
    if not config.no_aug and (one_by_one or keeping.single_image_steps(config)):
        return _file_loader(config, num_classes, device, data_config, DecodedImages(cache, targets_of(dataset)))
    labels, channels = cache.labels[cache.readable], (data_config['mean'], data_config['std'])
    if config.no_aug:
        return _over_decoded(Augment(cache.stacked(), size), labels, channels, config, num_classes, device)
    names = ('pad_crop', 'scale', 'ratio', 'hflip', 'vflip', 'workers')
    options = {name: getattr(config, name) for name in names}
    images = RandomPhotos(cache, size, *channels, interpolation=config.train_interpolation, **options)
    return _over_decoded(images, labels, (None, None), config, num_classes, device)


def _over_decoded(
    images: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    channels: tuple[Any, Any],
    config: LoaderConfig,
    num_classes: int,
    device: torch.device,
) -> InMemoryLoader:
    """A training loader over decoded images, with random erasing, Mixup and CutMix as the settings say."""
    erasing = None
    if config.reprob and not config.no_aug:
        erasing = RandomErasing(config.reprob, mode=config.remode, max_count=config.recount, device=device)
    options = {'drop_last': True, 'random_erasing': erasing, 'mixup': _mixing(config, num_classes, Mixup)}
    sampler = _sampler(config, labels.tolist())
    return InMemoryLoader(images, labels, sampler, config.batch_size, *channels, device, **options)


def _check_channels(dataset: Dataset, channels: int) -> None:
    if isinstance(dataset, IterableDataset):
        return
    found = len(keeping.first_image(dataset).getbands())
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
