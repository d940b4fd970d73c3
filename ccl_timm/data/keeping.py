"""Whether decoded images are kept in memory or on disk, at what size, and what stands in the way."""

import statistics
from collections.abc import Callable

import PIL
import timm.data
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from torchvision import transforms

from ccl_timm.console import log_info
from ccl_timm.data.config import LoaderConfig
from ccl_timm.data.datasets import ImageFiles, Replacing, Splits, base_of, content_hash
from ccl_timm.data.files import UnreadableImage, unreadable_if_it_fails
from ccl_timm.data.image_cache import ImageCache, cached_images, free_space, is_cached
from ccl_timm.data.photos import shrunk_size

__all__ = [
    'first_image',
    'no_aug_transform',
    'obstacle_in_memory',
    'obstacle_on_disk',
    'photos_on_disk',
    'resize_for_pad_crop',
    'single_image_steps',
    'transform_for_memory',
    'transformed_on_disk',
]

_SMALL = 2**30  # bytes: data sets of up to this size go to memory by themselves
_MARGIN = 1.15  # in memory, large photos are kept at this multiple of the input size, which leaves room for crops
_LARGEST = 32 * 2**30  # bytes: image files of up to this size, decoded, go to disk by themselves
_DETAIL = 2  # on disk, shorter sides are this multiple of the input size, so that most random crops shrink


def single_image_steps(config: LoaderConfig) -> str | None:
    """The settings that change one image at a time, with timm's transforms; None for none of them."""
    if config.no_aug:
        return None
    flags = ('aa', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')
    found = [f'--{name.replace("_", "-")}' for name in flags if getattr(config, name)]
    if config.train_crop_mode not in (None, 'rrc') and not config.pad_crop:
        found.append('--train-crop-mode')
    return ', '.join(found) or None


def obstacle_in_memory(config: LoaderConfig, splits: Splits, size: tuple[int, int]) -> str | None:
    """Why the images cannot be kept in memory; with ``--in-memory auto`` also why they had better not.

    Args:
        config: the settings.
        splits: the data.
        size: height and width of the model's input.
    """
    if isinstance(splits.train, IterableDataset):
        return 'the data set is a stream'
    steps = single_image_steps(config)
    if steps:
        return f'{steps} work on one image at a time'
    return _unfit(config, splits, size) if config.in_memory == 'auto' else None


def _unfit(config: LoaderConfig, splits: Splits, size: tuple[int, int]) -> str | None:
    """Why results would suffer, or that it is large."""
    image = first_image(splits.train)
    width, height = image.size
    if not (config.no_aug or config.pad_crop):
        if config.train_interpolation != 'bilinear':
            return f'--train-interpolation {config.train_interpolation} is not bilinear'
        if height > size[0] or width > size[1]:
            return f'its images ({width} x {height}) are larger than the input'
    pixels = (size[0] + 2 * config.pad_crop) * (size[1] + 2 * config.pad_crop)
    count = len(splits.train) * (2 if config.hflip and not config.no_aug else 1) + len(splits.validation or [])
    needed = count * pixels * len(image.getbands())
    return f'it would take {needed / 2**30:.1f} GiB' if needed > _SMALL else None


def transform_for_memory(config: LoaderConfig, size: tuple[int, int], interpolation: str, dataset: Dataset) -> Callable:
    """How images are made ready for memory: what comes before the random steps of timm's transform."""
    if config.no_aug:
        return no_aug_transform(size, interpolation)
    if config.pad_crop:
        return transforms.Compose([resize_for_pad_crop(size), transforms.PILToTensor()])
    width, height = first_image(dataset).size
    if height <= size[0] and width <= size[1]:
        return transforms.PILToTensor()
    large = tuple(round(_MARGIN * length) for length in size)
    log_info(f'images are kept at {large[1]} x {large[0]}, resized and centre cropped: random crops see less')
    return transforms.Compose([transforms.Resize(max(large)), transforms.CenterCrop(large), transforms.PILToTensor()])


def no_aug_transform(size: tuple[int, int], interpolation: str) -> Callable:
    """timm's transform of ``--no-aug``, to uint8 tensors."""
    options = {'is_training': True, 'no_aug': True, 'use_prefetcher': True, 'interpolation': interpolation}
    return transforms.Compose(timm.data.create_transform(size, **options).transforms)


def resize_for_pad_crop(size: tuple[int, int]) -> transforms.Resize:
    """What comes before pad-crop: as at evaluation, a square keeps the shape, and the longer side hangs over."""
    return transforms.Resize(size[0] if size[0] == size[1] else size)


def first_image(dataset: Dataset) -> Image.Image:
    """The first image that can be read."""
    dataset.transform = None
    return Replacing(dataset)[0][0]


def obstacle_on_disk(
    config: LoaderConfig, dataset: Dataset, size: tuple[int, int], transform: Callable | None = None
) -> str | None:
    """Why decoded images cannot be kept on disk; with ``--in-memory auto`` also why they need not.

    Args:
        config: the settings.
        dataset: the training split.
        size: height and width of the model's input.
        transform: of each image before it is kept; None for photographs as :func:`photos_on_disk` keeps them.
    """
    if not isinstance(base_of(dataset)[0], ImageFiles):
        return 'the images are not files'
    sizes = _some_sizes(dataset)
    if not sizes:
        return 'no image can be read'
    automatic = config.in_memory == 'auto'
    kept = _kept_size(config, size)
    pixels = statistics.mean(height * width for height, width in map(kept, sizes))
    needed = len(dataset) * pixels * len(base_of(dataset)[0].mode)
    if automatic and needed > _LARGEST:
        return f'it would take {needed / 2**30:.1f} GiB'
    steps = str(transform) if transform else _photo_steps(config, size)
    if needed > free_space() / (2 if automatic else 1) and not is_cached(len(dataset), _facts(dataset, steps)):
        return f'it would take {needed / 2**30:.1f} GiB, and {free_space() / 2**30:.1f} are free'
    return None


def _some_sizes(dataset: Dataset) -> list[tuple[int, int]]:
    """Height and width of up to 32 images."""
    base, indices = base_of(dataset)
    sizes = []
    for place in range(0, len(dataset), -(-len(dataset) // 32)):
        try:
            with unreadable_if_it_fails():
                file = base.reader[place if indices is None else indices[place]][0]
                with file, Image.open(file) as image:
                    sizes.append((image.height, image.width))
        except UnreadableImage:
            continue
    return sizes


def _kept_size(config: LoaderConfig, size: tuple[int, int]) -> Callable[[tuple[int, int]], tuple[int, int]]:
    """Height and width of a decoded image, as a function of those of its file."""
    if not (config.pad_crop or config.no_aug):
        return lambda found: shrunk_size(found, _DETAIL * max(size))
    if size[0] != size[1]:
        return lambda found: size
    return lambda found: tuple(size[0] if n == min(found) else int(size[0] * n / min(found)) for n in found)


def photos_on_disk(config: LoaderConfig, dataset: Dataset, size: tuple[int, int]) -> ImageCache | None:
    """Images of a folder, as they are before random crops; None if they cannot be written.

    Args:
        config: the settings.
        dataset: of image files, or a share of one.
        size: height and width of the model's input.
    """
    base, indices = base_of(dataset)
    kept = _kept_size(config, size)

    def read(place: int) -> tuple[torch.Tensor, int]:
        return base.resized(place if indices is None else indices[place], kept)

    return cached_images(read, len(dataset), _facts(dataset, _photo_steps(config, size)), config.workers)


def transformed_on_disk(dataset: Dataset, transform: Callable, workers: int) -> ImageCache | None:
    """Images of a folder after a transform into uint8 tensors (C, H, W); None if they cannot be written."""
    dataset.transform = transform
    return cached_images(dataset.__getitem__, len(dataset), _facts(dataset, str(transform)), workers)


def _photo_steps(config: LoaderConfig, size: tuple[int, int]) -> str:
    return f'pad-crop {size}' if config.pad_crop else f'crop {max(size)}'


def _facts(dataset: Dataset, steps: str) -> dict[str, object]:
    versions = [PIL.__version__, torch.__version__, torchvision.__version__]
    return {'data': content_hash(dataset), 'mode': base_of(dataset)[0].mode, 'steps': steps, 'versions': versions}
