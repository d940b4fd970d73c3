"""Photographs: decoded fast, and cropped at random a batch at a time from a cache of decoded ones."""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional as F

from ccl_timm.data.image_cache import ImageCache
from ccl_timm.data.in_memory import random_boxes
from ccl_timm.data.threads import image_threads

__all__ = ['RandomPhotos', 'decode_resized', 'is_turned', 'resized', 'shrunk_size']


def shrunk_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes ``side``, unless that would save little."""
    shorter = min(size)
    if shorter <= 1.25 * side:
        return size
    return tuple(side if length == shorter else int(side * length / shorter) for length in size)


def resized(image: Tensor, size: tuple[int, int], bicubic: bool = False) -> Tensor:
    """Resize an image with antialiasing, as Pillow does it: values differ from Pillow's by one level at most.

    Of bicubic enlarging a few in a million differ by two.

    Args:
        image: (C, H, W) uint8.
        size: height and width.
        bicubic: in the place of bilinear.
    """
    if image.shape[-2:] == size:
        return image
    # in this layout torch takes a quarter of the time
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size, mode='bicubic' if bicubic else 'bilinear', antialias=True)[0]


def decode_resized(file: BinaryIO, mode: str, size_of: Callable[[tuple[int, int]], tuple[int, int]]) -> Tensor:
    """Decode an open image file, resize the image, and close the file.

    A JPEG of twice the size or more is decoded at a half, a quarter or an eighth, which its format makes cheap.

    Args:
        file: an image in any format that Pillow reads.
        mode: ``'RGB'`` or ``'L'``.
        size_of: takes the image's height and width, returns those to resize it to.

    Returns:
        (C, H, W) uint8.
    """
    with file, Image.open(file) as image:
        height, width = size_of((image.height, image.width))
        reduced = image.height >= 2 * height and image.width >= 2 * width
        if reduced:
            image.draft(None, (width, height))
        plain_jpeg = (image.format, image.mode) == ('JPEG', mode) and not reduced and not is_turned(image)
        pixels = _decode_jpeg(file) if plain_jpeg else None
        if pixels is None:
            rows = np.array(image if image.mode == mode else image.convert(mode))
            pixels = torch.from_numpy(rows).view(*rows.shape[:2], -1).permute(2, 0, 1)
    return resized(pixels, (height, width))


def is_turned(image: Image.Image) -> bool:
    """Whether its EXIF data ask to turn or mirror it when it is shown, as those of phones do.

    Pillow, timm and so all of our scripts leave the pixels as they are; torchcodec would turn them.
    """
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _decode_jpeg(file: BinaryIO) -> Tensor | None:
    """Pillow's pixels (C, H, W) in less time; None if torchcodec cannot decode them: then Pillow says why."""
    decode = _torchcodec()
    if decode is None:
        return None
    file.seek(0)
    with contextlib.suppress(RuntimeError):
        return decode(file.read(), mode='UNCHANGED')
    return None


@functools.cache
def _torchcodec() -> Callable[..., Tensor] | None:
    """Its decoder of JPEGs; None without the package, or with one that does not fit this torch."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):
        return None
    return decode_jpeg


class RandomPhotos:
    """Random crops and flips of the readable images of a cache, as timm's transforms of one image draw them.

    Args:
        cache: images of at least ``size`` for pad_crop, else of any size.
        size: height and width of what comes out.
        mean: of each channel, of values 0..1, for normalisation.
        std: likewise.
        pad_crop: zero-pad by this many pixels, and crop at random; 0 for a random resized crop.
        scale: range of the share of an image's area that a random resized crop takes.
        ratio: range of that crop's ratio of width to height.
        interpolation: ``'bilinear'``, ``'bicubic'`` or ``'random'``.
        hflip: chance of a mirror image.
        vflip: chance of an image upside down.
        workers: threads; at most one per core is of use.
    """

    interpolations = ('bilinear', 'bicubic', 'random')

    def __init__(
        self,
        cache: ImageCache,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pad_crop: int = 0,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = 'random',
        hflip: float = 0.5,
        vflip: float = 0.0,
        workers: int = 0,
    ):
        self.cache, self.size, self.pad_crop, self.scale, self.ratio = cache, size, pad_crop, scale, ratio
        self.bicubic = {'bilinear': 0.0, 'bicubic': 1.0, 'random': 0.5}[interpolation]
        self.hflip, self.vflip = hflip, vflip
        # as long as a row of pixels: torch is ten times slower where it has to repeat three values for each pixel
        self.mean, self.std = (torch.tensor([v * 255 for v in s]).repeat(size[1]) for s in (mean, std))
        self.threads = max(1, min(workers, os.cpu_count() or 1))
        self._pool = image_threads(self.threads)

    def __call__(self, indices: Tensor) -> Tensor:
        """Images (B, C, *size) float32 of these numbers (B,) of readable images, newly drawn and normalised."""
        numbers = self.cache.readable[indices]
        prepare = self._draw_padded if self.pad_crop else self._draw_resized
        # in one of our threads, too: those of torch, which other threads' operations use, spin for a while afterwards
        draw = self._pool.submit(prepare, numbers).result()
        count = len(numbers)
        mirrored, turned = (torch.rand(count) < chance for chance in (self.hflip, self.vflip))
        axes = [[2] * m + [1] * t for m, t in zip(mirrored.tolist(), turned.tolist(), strict=True)]
        height, width = self.size
        rows = torch.empty(count, height, len(self.mean))

        places = iter(range(count))  # each thread takes the next: some begin later than others

        def fill(_: int) -> None:
            for place in places:
                image = draw(place)
                image = image.flip(axes[place]) if axes[place] else image
                pixels = image.permute(1, 2, 0).reshape(height, -1)
                rows[place].copy_(pixels).sub_(self.mean).div_(self.std)

        list(self._pool.map(fill, range(self.threads)))
        return rows.view(count, height, width, -1).permute(0, 3, 1, 2)

    def _draw_resized(self, numbers: Tensor) -> Callable[[int], Tensor]:
        height, width = self.cache.shapes[numbers, :2].unsqueeze(-1).unbind(1)
        boxes = random_boxes(height, width, self.scale, self.ratio).to(torch.int64).tolist()
        bicubic = (torch.rand(len(numbers)) < self.bicubic).tolist()
        chosen = numbers.tolist()

        def draw(place: int) -> Tensor:
            top, left, height, width = boxes[place]
            image = self.cache[chosen[place]][:, top : top + height, left : left + width]
            return resized(image, self.size, bicubic[place])

        return draw

    def _draw_padded(self, numbers: Tensor) -> Callable[[int], Tensor]:
        room = self.cache.shapes[numbers, :2] + 2 * self.pad_crop - torch.tensor(self.size) + 1
        corners = ((torch.rand(room.shape) * room).floor().to(torch.int64) - self.pad_crop).tolist()
        chosen = numbers.tolist()

        def draw(place: int) -> Tensor:
            image = self.cache[chosen[place]]
            window = image.new_zeros(len(image), *self.size)
            top, left = corners[place]
            inside = image[:, max(top, 0) : top + self.size[0], max(left, 0) : left + self.size[1]]
            top, left = max(-top, 0), max(-left, 0)
            window[:, top : top + inside.shape[1], left : left + inside.shape[2]] = inside
            return window

        return draw
