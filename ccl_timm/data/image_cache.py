"""Photographs decoded once and kept in a file that is mapped into memory: the system holds what fits, the disk all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ccl_timm.console import log_info
from ccl_timm.data.cache import cache_dir
from ccl_timm.data.threads import image_threads
from ccl_timm.ops import on_all_processes

__all__ = ['DecodedImages', 'ImageCache', 'cached_images', 'free_space', 'is_cached']

_FORMAT = 2  # of the files: another number makes them unknown
_SIGN_OF_LIFE = 60  # seconds after which processes that wait hear that another is at work: they give up after minutes


class ImageCache:
    """Decoded images of any size, one after another in one file.

    Args:
        pixels: (T,) uint8, all pixels, of each image in the order height, width, channels.
        shapes: (N, 3) int64, height, width and channels of each image.
        labels: (N,) int64; -1 for an image that could not be read.
        stem: what the names of its files begin with; None for a cache that is in memory only.
    """

    def __init__(self, pixels: np.ndarray, shapes: np.ndarray, labels: np.ndarray, stem: Path | None = None):
        self.stem = stem
        self.pixels, self.shapes, self.labels = pixels, torch.from_numpy(shapes), torch.from_numpy(labels)
        self._ends = np.cumsum(shapes.prod(axis=1))
        self.readable = torch.nonzero(self.labels >= 0).squeeze(1)  # numbers of the images that could be read

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a process that is not forked opens the files itself, in the place of receiving all that they hold
        return (_opened, (self.stem,)) if self.stem else super().__reduce_ex__(protocol)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        """Image of that number: (C, H, W) uint8, with channels last in memory. It is not a copy."""
        height, width, channels = self.shapes[index].tolist()
        end = self._ends[index]
        pixels = self.pixels[end - height * width * channels : end].reshape(height, width, channels)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def stacked(self) -> Tensor:
        """The readable images as one tensor (N, C, H, W), which is no copy if all could be read.

        Raises:
            ValueError: they are not of one size.
        """
        shapes = self.shapes[self.readable].unique(dim=0)
        if len(shapes) != 1:
            raise ValueError('The images are not of one size.')
        if len(self.readable) < len(self):
            return torch.stack([self[index] for index in self.readable.tolist()])
        return torch.from_numpy(self.pixels.reshape(len(self), *shapes[0].tolist())).permute(0, 3, 1, 2)


class DecodedImages(Dataset):
    """The images of a cache as a data set for timm's loader, which changes one at a time.

    Args:
        cache: the images.
        targets: label of each, which for an image that cannot be read the cache does not have.
    """

    def __init__(self, cache: ImageCache, targets: list[int]):
        self.cache, self.targets, self.transform = cache, targets, None

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.cache[index].permute(1, 2, 0).squeeze(-1).numpy())
        return (self.transform(image) if self.transform else image), int(self.cache.labels[index])


def free_space() -> int:
    """Bytes that are free where the cache is."""
    folder = cache_dir('images')
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cached_images(
    read: Callable[[int], tuple[Tensor, int]], count: int, facts: dict[str, Any], workers: int
) -> ImageCache | None:
    """Images from the cache, into which they are written first if need be; by the first process on each machine.

    Those that could not be read the last time are tried again, since a file server may have been away: if one can be
    read now, all are written anew.

    Args:
        read: takes a number below ``count``, returns an image (C, H, W) uint8 and its label; called by several threads.
        count: of images.
        facts: all that the images depend on.
        workers: threads that read.

    Returns:
        The cache; None, on all processes, if one of them cannot have it, which is logged.
    """
    stem = _stem(count, facts)
    found = _opened(stem)
    if int(os.environ.get('LOCAL_RANK', 0)) == 0 and (found is None or _more_can_be_read(found, read)):
        try:
            _build(stem, read, count, max(workers, 1))
        except OSError as error:
            log_info(f'decoded images cannot be kept in {stem.parent}: {error.strerror or error}')
    while not on_all_processes(True):  # some are still at work, and say so
        pass
    cache = _opened(stem)
    return cache if on_all_processes(cache is not None) else None


def _more_can_be_read(cache: ImageCache, read: Callable[[int], tuple[Tensor, int]]) -> bool:
    return any(read(number)[1] >= 0 for number in torch.nonzero(cache.labels < 0).flatten().tolist())


def is_cached(count: int, facts: dict[str, Any]) -> bool:
    """Whether these images are in the cache; arguments as of :func:`cached_images`."""
    return _opened(_stem(count, facts)) is not None


def _stem(count: int, facts: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps([_FORMAT, count, facts], sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir('images') / key


def _files(stem: Path) -> tuple[Path, Path]:
    return stem.with_suffix('.pixels'), stem.with_suffix('.index.npz')


def _opened(stem: Path) -> ImageCache | None:
    """What was written; None if there is nothing, or not all of it."""
    pixels, index = _files(stem)
    try:
        with np.load(index, allow_pickle=False) as arrays:
            shapes, labels = arrays['shapes'], arrays['labels']
        # copy on write: torch refuses memory that it may not write to, and nobody writes
        mapped = np.memmap(pixels, np.uint8, 'c')
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):  # none, or a damaged one
        return None
    return ImageCache(mapped, shapes, labels, stem) if len(mapped) == shapes.prod(axis=1).sum() else None


def _build(stem: Path, read: Callable[[int], tuple[Tensor, int]], count: int, threads: int) -> None:
    started = waiting = time.monotonic()
    stem.parent.mkdir(parents=True, exist_ok=True)
    shapes, labels = np.zeros((count, 3), np.int64), np.zeros(count, np.int64)
    pixels, index = _files(stem)

    def read_rows(number: int) -> tuple[np.ndarray, int]:
        image, label = read(number)
        return image.permute(1, 2, 0).contiguous().numpy(), label

    with _replacing(pixels) as file:
        for number, (rows, label) in enumerate(_in_order(read_rows, count, threads)):
            shapes[number], labels[number] = rows.shape, label
            file.write(rows)
            if time.monotonic() > waiting + _SIGN_OF_LIFE:
                on_all_processes(False)
                waiting = time.monotonic()
        size = file.tell()
    with _replacing(index) as file:  # last: it says that the pixels are whole
        np.savez(file, shapes=shapes, labels=labels)
    seconds, unreadable = time.monotonic() - started, int((labels < 0).sum())
    later = 'later runs use it' + (f', and try the {unreadable} again that could not be read' if unreadable else '')
    log_info(f'{count} images decoded into {pixels} ({size / 2**20:.0f} MiB, {seconds:.0f} s); {later}')


def _in_order(read: Callable[[int], Any], count: int, threads: int) -> Iterator[Any]:
    """Results of ``read`` for 0, 1, ..., computed a few ahead: a disk slower than the decoder does not fill memory."""
    block = 32 * threads
    with image_threads(threads) as pool:
        ahead = pool.map(read, range(min(block, count)))
        for start in range(0, count, block):
            now, ahead = ahead, pool.map(read, range(min(start + block, count), min(start + 2 * block, count)))
            yield from now


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A file to write that takes its place at the end, and vanishes on failure."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix='.tmp', delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
