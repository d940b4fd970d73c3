"""Small data sets decoded once, kept on the training device, and augmented a batch at a time."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from ccl_timm.errors import UserError

__all__ = ['Augment', 'InMemoryLoader', 'decode', 'random_boxes', 'random_crops', 'resized_crops']


def decode(dataset: Dataset, transform: Callable, workers: int = 0) -> tuple[Tensor, Tensor] | None:
    """Read a whole data set.

    Args:
        dataset: its samples are an image and a label; an image that cannot be read has the label -1, and is left out.
        transform: of PIL images into uint8 tensors (C, H, W).
        workers: processes that read.

    Returns:
        Images (N, C, H, W) uint8 and labels (N,) int64; None if the images are not of one size.

    Raises:
        UserError: no image can be read.
    """
    dataset.transform = transform
    loader = DataLoader(dataset, batch_size=256, num_workers=workers, collate_fn=_stack_readable)
    images, labels = [], []
    for batch, targets in loader:
        if not len(targets):
            continue
        if batch is None or (images and batch.shape[1:] != images[0].shape[1:]):
            return None
        images.append(batch)
        labels.append(targets)
    if not images:
        raise UserError('Not one image can be read.')
    return torch.cat(images), torch.cat(labels)


def _stack_readable(samples: list[tuple[Tensor, int]]) -> tuple[Tensor | None, Tensor]:
    """Images (n, C, H, W) and labels (n,) of those that can be read; None for images that are not of one size.

    One tensor, since each one that a process sends takes a file descriptor.
    """
    readable = [(image, int(label)) for image, label in samples if label >= 0]
    same = len({image.shape for image, _ in readable}) == 1
    images = torch.stack([image for image, _ in readable]) if same else None
    return images, torch.tensor([label for _, label in readable], dtype=torch.int64)


class Augment:
    """Random crops and flips of many images at once.

    Args:
        images: (N, C, H, W) uint8.
        size: height and width of what comes out.
        pad_crop: zero-pad by this many pixels, and crop at random.
        scale: without pad_crop: range of the share of the image's area that a random resized crop takes; None for
            the images as they are.
        ratio: range of that crop's ratio of width to height.
        hflip: chance of a mirror image.
        vflip: chance of an image upside down.
    """

    def __init__(
        self,
        images: Tensor,
        size: tuple[int, int],
        pad_crop: int = 0,
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] = (1.0, 1.0),
        hflip: float = 0.0,
        vflip: float = 0.0,
    ):
        self.size, self.pad_crop, self.scale, self.ratio = size, pad_crop, scale, ratio
        self.hflip, self.vflip = hflip, vflip
        self.images = F.pad(images, (pad_crop,) * 4) if pad_crop else images
        if self.mirrors:
            # to mirror pixels in each batch costs more than all the rest; the random crops of mirror images are
            # the mirror images of random crops
            self.images = torch.cat([self.images, self.images.flip(-1)])

    @property
    def mirrors(self) -> bool:
        """Whether mirror images are kept beside the images."""
        return self.hflip > 0

    def __call__(self, indices: Tensor) -> Tensor:
        """Images (B, C, *size) with these numbers (B,), newly drawn: uint8, or float32 0..255 after resizing."""
        count = len(indices)
        if self.mirrors:
            indices = indices + (torch.rand(count) < self.hflip) * (len(self.images) // 2)
        if self.pad_crop:
            x = random_crops(self.images, indices, self.size)
        else:
            x = _take(self.images, indices)
            if self.scale is not None:
                height, width = (torch.full((count, 1), length) for length in x.shape[-2:])
                boxes = random_boxes(height, width, self.scale, self.ratio)
                x = resized_crops(x.float(), _copy_async(boxes, x.device), self.size)
        if self.vflip > 0:
            x = torch.where(_copy_async(torch.rand(count) < self.vflip, x.device).view(-1, 1, 1, 1), x.flip(-2), x)
        return x


def _take(images: Tensor, indices: Tensor) -> Tensor:
    return images[_copy_async(indices, images.device)]


def _copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without waiting for the work queued there."""
    return tensor.to(device, non_blocking=True)


def random_crops(images: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop images at random places.

    Args:
        images: (N, C, H, W).
        indices: numbers (B,) of those to crop.
        size: height and width of the crops.

    Returns:
        (B, C, *size), of the same type.
    """
    room = [length - crop + 1 for length, crop in zip(images.shape[-2:], size, strict=True)]
    top, left = (torch.randint(n, (len(indices),)) for n in room)
    if images.device.type == 'cpu':  # numpy copies whole rows, and takes a quarter of torch's time
        windows = np.lib.stride_tricks.sliding_window_view(images.numpy(), size, axis=(2, 3))
        return torch.from_numpy(windows[indices.numpy(), :, top.numpy(), left.numpy()])
    windows = images.unfold(2, size[0], 1).unfold(3, size[1], 1).permute(0, 2, 3, 1, 4, 5)
    return windows[tuple(_copy_async(numbers, images.device) for numbers in (indices, top, left))]


def random_boxes(height: Tensor, width: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Boxes drawn as timm's random resized crop draws them.

    Args:
        height: of each image (B, 1), in pixels.
        width: likewise.
        scale: range of the share of an image's area.
        ratio: range of a box's ratio of width to height.

    Returns:
        (B, 4) top, left, height, width in whole pixels, as floating point numbers.
    """
    count, tries = len(height), 10
    area = height * width * torch.empty(count, tries).uniform_(*scale)
    aspect = torch.empty(count, tries).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # the first try that fits
    # without one, the largest central box of an allowed ratio
    w = torch.where(fits.any(1, keepdim=True), w.gather(1, first), torch.minimum(width, (height * ratio[1]).round()))
    h = torch.where(fits.any(1, keepdim=True), h.gather(1, first), torch.minimum(height, (width / ratio[0]).round()))
    rooms = (height - h, width - w)
    top, left = (
        torch.where(fits.any(1, keepdim=True), (torch.rand(count, 1) * (room + 1)).floor(), room // 2) for room in rooms
    )
    return torch.cat([top, left, h, w], dim=1)


def resized_crops(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a box out of each image and resize it bilinearly, as if each were cut out first: no pixel outside counts.

    Args:
        images: (B, C, H, W) floating point.
        boxes: (B, 4) top, left, height, width in pixels; not empty.
        size: height and width to resize to; without antialiasing, so meant for enlarging.

    Returns:
        (B, C, *size).
    """
    places = []
    for axis, (out, length) in enumerate(zip(size, images.shape[-2:], strict=True)):
        start, extent = boxes[:, axis, None], boxes[:, axis + 2, None]
        at = (torch.arange(out, device=images.device) + 0.5) / out * extent - 0.5
        at = start + torch.minimum(at.clamp(min=0), extent - 1)  # (B, out), in pixels
        places.append((at + 0.5) * (2 / length) - 1)
    y, x = places
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=-1)
    return F.grid_sample(images, grid, mode='bilinear', padding_mode='border', align_corners=False)


class InMemoryLoader:
    """What timm's loader is to a script, over images in memory.

    Args:
        images: of all numbers that the sampler gives: takes numbers (B,), returns (B, C, H, W) with values 0..255, or
            without ``mean`` what is ready for the model.
        labels: (N,) int64.
        sampler: the order; ``set_epoch`` is called on it if it has that.
        batch_size: images a batch.
        mean: of each channel, of values 0..1; None for no normalisation.
        std: likewise.
        device: where batches are wanted.
        drop_last: leave out a last batch that is not full.
        random_erasing: changes a normalised batch.
        mixup: makes a mixed batch and soft targets.
    """

    def __init__(
        self,
        images: Callable[[Tensor], Tensor],
        labels: Tensor,
        sampler: Sampler,
        batch_size: int,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        device: torch.device,
        drop_last: bool = False,
        random_erasing: Callable | None = None,
        mixup: timm.data.Mixup | None = None,
    ):
        self.images, self.labels, self.sampler, self.batch_size = images, labels.to(device), sampler, batch_size
        self.drop_last, self.random_erasing, self.mixup, self.mixup_enabled = drop_last, random_erasing, mixup, True
        self.device = device
        # in the order and precision of timm's prefetching loader, so that its values come out bit for bit
        self.mean, self.std = (
            None if s is None else torch.tensor([v * 255 for v in s], device=device).view(-1, 1, 1) for s in (mean, std)
        )

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        order = torch.tensor(list(self.sampler), dtype=torch.int64)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            indices = order[start : start + self.batch_size]
            x = self.images(indices).to(self.device)
            if self.mean is not None:
                x = x.contiguous().to(torch.float32).sub_(self.mean).div_(self.std)
            target = self.labels[_copy_async(indices, self.device)]
            if self.random_erasing is not None:
                x = self.random_erasing(x)
            if self.mixup is not None:
                self.mixup.mixup_enabled = self.mixup_enabled
                x, target = self.mixup(x, target)
            yield x, target
