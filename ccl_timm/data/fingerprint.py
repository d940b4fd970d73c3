"""A fingerprint of the data that a run trains and validates on, by which a resumed run notices other data."""

import hashlib
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, Literal, NamedTuple

import numpy as np

from ccl_timm.data.files import open_regular

__all__ = ['Content', 'change', 'fingerprint']

_WHOLE = 2**30  # bytes: files of up to this size in total are read whole
_BLOCK = 2**12  # bytes: of more, so much of each file at its start, middle and end
_THREADS = 8


class Content(NamedTuple):
    """What a split of the data consists of.

    Attributes:
        files: name, path and label of each image of a folder; None for other data.
        targets: label of each image of the split; None if unknown.
        arrays: images that are in memory.
        indices: of the images of the split, among files or arrays; None for all.
    """

    files: list[tuple[str, Any, int]] | None
    targets: list[int] | None
    arrays: list[Any]
    indices: Sequence[int] | None


def fingerprint(train: Content, validation: Content | None) -> str:
    """Hash of the data: ``<names>-<contents>``, 16 hexadecimal digits each.

    The first is of the training split's names, sizes and labels, as runs recorded it alone before there was a second.
    The second is of the validation split and of all files: whole up to 1 GiB in total, else 4 KiB at the start, in the
    middle and at the end of each. Of images in memory both cover every pixel; of a data set of the Hub the labels only.
    """
    splits = [split for split in (train, validation) if split is not None]
    digest = hashlib.sha256(_hash_contents(splits))
    for split in splits[1:]:
        digest.update(_hash_names(split))
    return f'{_hash_names(train).hex()[:16]}-{digest.hexdigest()[:16]}'


def change(before: str, now: str) -> Literal['none', 'unknown', 'contents', 'files']:
    """What changed between two fingerprints: nothing; the first part of the hash (``'files'``) or the second.

    ``'unknown'``: the first part is the same, and one of the runs recorded no second.
    """
    if before == now:
        return 'none'
    if before.split('-')[0] != now.split('-')[0]:
        return 'files'
    return 'contents' if '-' in before and '-' in now else 'unknown'


def _hash_names(split: Content) -> bytes:
    digest = hashlib.sha256()
    if split.files is not None:
        lines = [f'{name} {_size(path)} {target}' for name, path, target in split.files]
        digest.update('\n'.join(sorted(lines)).encode())
    else:
        digest.update(np.asarray(split.targets or [], dtype=np.int64).tobytes())
        for array in split.arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
    if split.indices is not None:
        digest.update(np.asarray(split.indices, dtype=np.int64).tobytes())
    return digest.digest()


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _hash_contents(splits: list[Content]) -> bytes:
    files = [file for split in splits for file in sorted(_chosen(split))]
    whole = sum(_size(path) for _, path, _ in files) <= _WHOLE
    digest = hashlib.sha256()
    with ThreadPool(_THREADS) as pool:  # waiting for files and hashing release the GIL
        contents = pool.imap(lambda file: _hash_file(file[1], whole), files, 16)
        for (name, _, _), content in zip(files, contents, strict=True):
            digest.update(f'{name} '.encode() + content)
    return digest.digest()


def _chosen(split: Content) -> list[tuple[str, str, int]]:
    files = split.files or []
    return [files[index] for index in split.indices] if files and split.indices is not None else files


def _hash_file(path: str, whole: bool) -> bytes:
    """Hash of a file's bytes, all or three blocks; of one that cannot be read, 16 zeros."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if whole or size <= 3 * _BLOCK:
                digest.update(file.read())
                return digest.digest()
            for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
                file.seek(start)
                digest.update(file.read(_BLOCK))
            return digest.digest()
    except OSError:
        return bytes(16)
