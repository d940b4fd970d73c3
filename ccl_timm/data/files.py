"""Image files as people have them: folders listed once and without loops, images read through one reader."""

import contextlib
import functools
import os
import re
import stat
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

from ccl_timm.console import first_few, log_warning
from ccl_timm.console.escape import utf8_text
from ccl_timm.errors import UserError

__all__ = [
    'DataError',
    'FolderReader',
    'Tree',
    'UnreadableImage',
    'color_mode',
    'decode_image',
    'list_images',
    'open_regular',
    'read_image',
    'read_lines',
    'scan',
    'unreadable_if_it_fails',
]


class UnreadableImage(Exception):
    """An image cannot be read, for whatever reason: the message says which."""


class DataError(UserError):
    """A UserError about data that may be raised in a worker process of a loader."""

    def __init__(self, message: str):
        # torch raises it anew with the worker's traceback as the message, which ends with this sentence
        super().__init__(message.rstrip().rpartition(f'{type(self).__name__}: ')[2])


def color_mode(channels: int) -> str:
    """Pillow's mode of images with that many channels: ``'L'`` for 1, else ``'RGB'``."""
    return 'L' if channels == 1 else 'RGB'


@contextlib.contextmanager
def unreadable_if_it_fails() -> Iterator[None]:
    """Turn every exception into :class:`UnreadableImage`: a damaged file makes decoders raise nearly anything."""
    try:
        yield
    except Exception as error:  # MemoryError, SyntaxError and NotImplementedError included
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__
        raise UnreadableImage('not an image' if 'cannot identify' in reason else reason) from error


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading; refuse pipes, sockets and devices, which may never end.

    Raises:
        OSError: there is no such file, it cannot be opened, or it is not a regular one.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError('not a regular file')
    return open(path, 'rb')


def decode_image(file: BinaryIO, mode: str) -> Image.Image:
    """Decode an open file into an image of that mode, and close it."""
    with file, Image.open(file) as image:
        return image.convert(mode)


def read_image(path: str | os.PathLike, mode: str) -> Image.Image:
    """Read an image file.

    Args:
        path: of the file.
        mode: Pillow's colour mode that the image is converted to, such as ``'RGB'``.

    Raises:
        UnreadableImage: for whatever reason.
    """
    with unreadable_if_it_fails():
        return decode_image(open_regular(path), mode)


class Tree(NamedTuple):
    """What lies below a folder. All paths begin with the folder's own.

    Attributes:
        folders: each folder with the names of its subfolders and of its files, in order.
        repeated: folders and links that lead to a folder which is listed already: they are not entered.
        closed: folders that cannot be listed.
        hidden: files and folders whose names begin with a dot: they are left out.
    """

    folders: list[tuple[str, list[str], list[str]]]
    repeated: list[str]
    closed: list[str]
    hidden: list[str]


def scan(root: str | os.PathLike) -> Tree:
    """List a folder and all below it, through symbolic links too, but each folder once: a loop of links ends.

    Where several ways lead to a folder, the way without links counts.
    """
    tree, seen = Tree([], [], [], []), set()
    folders, links = deque([os.fspath(root)]), deque()
    while folders or links:
        folder = (folders or links).popleft()
        try:
            identity = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            tree.closed.append(folder)
            continue
        if (identity.st_dev, identity.st_ino) in seen:
            tree.repeated.append(folder)
            continue
        seen.add((identity.st_dev, identity.st_ino))
        subfolders, files = [], []
        for entry in entries:
            if entry.name.startswith('.'):
                tree.hidden.append(entry.path)
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                subfolders.append(entry.name)
                (links if entry.is_symlink() else folders).append(entry.path)
            else:
                files.append(entry.name)
        tree.folders.append((folder, subfolders, files))
    return tree


def list_images(root: str | os.PathLike, suffixes: set[str] | None = None) -> list[str]:
    """Paths of all images below a folder, as :func:`scan` finds them, in order; warns of folders left out.

    Args:
        root: the folder.
        suffixes: of images, in lower case; None for those that timm reads. What such a file holds is not looked at.
    """
    suffixes = suffixes or get_img_extensions(as_set=True)
    tree = scan(root)
    if tree.repeated:
        names = first_few(tree.repeated)
        log_warning(f'{len(tree.repeated)} folders are left out, since they lead to folders already read: {names}')
    if tree.closed:
        names = first_few(tree.closed)
        log_warning(f'{len(tree.closed)} folders are left out, since they cannot be listed: {names}')
    return sorted(
        os.path.join(folder, name)
        for folder, _, files in tree.folders
        for name in files
        if os.path.splitext(name)[1].lower() in suffixes
    )


def _natural_key(name: str) -> list[int | str]:
    """timm's sorting key, by which 'img10' follows 'img9'; timm's own fails at digits such as those of '10²'."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())]


def _warn_of_merged_classes(pairs: list[tuple[str, str]]) -> None:
    folders = defaultdict(set)
    for path, label in pairs:
        folders[label].add(os.path.dirname(path))
    merged = sorted(label for label, own in folders.items() if len(own) > 1)
    if merged:
        _warn_once(
            f'{len(merged)} classes are spread over several folders, such as {first_few(sorted(folders[merged[0]]))}: '
            'the class of an image is the name of the folder that it lies in.'
        )


@functools.cache
def _warn_once(sentence: str) -> None:
    """A folder is listed for each of its splits."""
    log_warning(sentence)


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder, with the same classes, numbers and order, over what :func:`list_images` finds.

    Args:
        root: the folder.
        suffixes: of images, in lower case; None for those that timm reads.
        by_top_folder: an image's class is the uppermost folder below the root, and classes are in the order of their
            characters, as in torchvision's ImageFolder; else it is the folder that the image lies in.

    Raises:
        RuntimeError: there is no image.
    """

    def __init__(self, root: str, suffixes: set[str] | None = None, by_top_folder: bool = False):
        self.root = os.fspath(root)
        pairs = [(path, self._label(path, by_top_folder)) for path in list_images(root, suffixes)]
        if by_top_folder:
            pairs = [(path, label) for path, label in pairs if label]
        else:
            _warn_of_merged_classes(pairs)
        if not pairs:
            known = ', '.join(sorted(suffixes) if suffixes else get_img_extensions())
            raise RuntimeError(f'Found 0 images in subfolders of {root}. Supported image extensions are {known}')
        names = sorted({label for _, label in pairs})
        names.sort(key=None if by_top_folder else _natural_key)
        self.class_to_idx = {name: number for number, name in enumerate(names)}
        self.samples = sorted(
            ((path, self.class_to_idx[label]) for path, label in pairs), key=lambda sample: _natural_key(sample[0])
        )

    def _label(self, path: str, by_top_folder: bool) -> str:
        *folders, _ = os.path.relpath(path, self.root).split(os.sep)
        return utf8_text(folders[0 if by_top_folder else -1]) if folders else ''

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return open_regular(path), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return utf8_text(super()._filename(index, basename, absolute))


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file, without those that are empty.

    Raises:
        UserError: the file cannot be read, or is no UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not a text file in UTF-8: {error.reason} at byte {error.start}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    return [line for line in text.splitlines() if line.strip()]
