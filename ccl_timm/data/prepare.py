"""Data sets as folders of images that any script reads, made of links to the files that people have."""

import contextlib
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ccl_timm.console.escape import terminal_text
from ccl_timm.data import datasets
from ccl_timm.data.archives import Layout
from ccl_timm.data.files import FolderReader
from ccl_timm.errors import UserError, user_errors

__all__ = ['describe', 'new_folder', 'open_classes', 'split_folder', 'write_digits', 'write_links']

_LONGEST_NAME = 255  # bytes, of the usual file systems


def write_digits(folder: str | os.PathLike) -> list[Path]:
    """Write the digits as a folder of images: ``<folder>/{train,validation}/<class>/<number>.png``.

    Args:
        folder: a new or empty folder. If writing fails it stays as it was.

    Raises:
        UserError: the folder exists and is not empty.
    """
    written = []
    with new_folder(folder) as root:
        for split in ('train', 'validation'):
            digits = datasets.Digits(split, mode='L')
            for number, label in enumerate(digits.targets):
                path = root / split / str(label) / f'{number:04d}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                digits[number][0].save(path)
                written.append(path.relative_to(root))
    return [Path(folder) / path for path in written]


def write_links(layout: Layout, folder: str | os.PathLike, source: str | os.PathLike) -> str:
    """Write a folder of links: symbolic ones, where that cannot be hard ones, where that cannot be copies.

    Args:
        layout: what to write. It may come from annotations that others wrote, so that each name is checked.
        folder: a new or empty folder outside the source. If writing fails it stays as it was.
        source: where the files lie; nothing is changed in it.

    Returns:
        What was written: ``'symbolic links'``, ``'hard links'``, ``'copies'``, or several.

    Raises:
        UserError: the folder does not allow it, a file is missing, or a name leads out of the folder or the source.
    """
    if Path(folder).resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"'{folder}' lies in '{source}', which is not changed: name a folder outside of it.")
    if not layout:
        raise UserError(f"There is no image to link to in '{source}'.")
    _check_names(layout, source)
    missing = [path for path in layout.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(layout)} images are missing in '{source}', such as '{_shown(missing[0])}'."
        )
    kinds = Counter()
    with new_folder(folder) as root:
        for target, path in layout.items():
            place = root / target
            place.parent.mkdir(parents=True, exist_ok=True)
            kinds[_link(path, place)] += 1
    return ' and '.join(kinds)


def _check_names(layout: Layout, source: str | os.PathLike) -> None:
    """Raise a UserError unless everything is written below the new folder, and links to what lies in the source."""
    inside = os.path.join(os.path.abspath(source), '')
    for target, path in layout.items():
        wrong = [name for name in target.split('/') if not _is_file_name(name)]
        if wrong:
            raise UserError(f"'{_shown(target)}' cannot be written: '{_shown(wrong[0])}' is not the name of a file.")
        if not os.path.abspath(path).startswith(inside):  # lexically: links in the source are the user's own
            raise UserError(f"'{_shown(path)}' lies outside of '{source}': it is not linked to.")


def _is_file_name(name: str) -> bool:
    separators = {os.sep, os.altsep, '\0'} - {None}
    return name not in ('', '.', '..') and not separators & set(name) and len(os.fsencode(name)) <= _LONGEST_NAME


def _shown(name: str | os.PathLike) -> str:
    """A name as a sentence can show it: short, and in one line."""
    text = terminal_text(os.fspath(name))
    return text if len(text) <= 200 else f'{text[:100]}...{text[-97:]}'


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Write a whole folder or none: what is written into the folder that this gives gets its name at the end.

    Args:
        folder: a new or empty folder. If writing fails, or is interrupted, it stays as it was.

    Raises:
        UserError: the folder exists and is not empty.
    """
    root = Path(folder)
    exists = root.exists()
    if exists and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"'{root}' exists and is not empty: name a new folder.")
    # beside a new folder, within one that exists: what lies around that may not be ours to write
    unfinished = (root if exists else root.absolute().parent) / f'.unfinished-{uuid.uuid4().hex[:8]}'
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if exists:
            for child in sorted(unfinished.iterdir(), reverse=True):  # train/ last: without it nothing trains
                child.rename(root / child.name)
            unfinished.rmdir()
        else:
            unfinished.rename(root)
    except BaseException:  # half a data set must not pass for a whole one
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _link(path: Path, place: Path) -> str:
    path = path.absolute()
    for kind, make in (('symbolic links', os.symlink), ('hard links', os.link)):
        try:
            make(path, place)
            return kind
        except FileExistsError:  # a file system to which A and a are the same; a copy would go through the link
            raise
        except (OSError, NotImplementedError):
            continue
    shutil.copy2(path, place)
    return 'copies'


def split_folder(
    source: str | os.PathLike, fraction: float, seed: int, unseen: float = 0.0
) -> tuple[Layout, list[str]]:
    """Divide a folder with one folder per class into training and validation, as ``--val-fraction`` does in training.

    Args:
        source: the folder.
        fraction: share of each class for validation, in (0, 1).
        seed: of the choice.
        unseen: share of the classes that are in neither, but in a folder ``unseen``: the last ones by name, as the
            second half of Cars-196 is in metric learning.

    Returns:
        The layout, and the classes with a single image, which is for training.

    Raises:
        UserError: it is no such folder, no class has two images, or a share of the classes is none or all of them.
    """
    root, reader = Path(source), open_classes(source)
    paths, targets = zip(*reader.samples, strict=True)
    files = [Path(name).as_posix() for name in reader.filenames()]
    names = {label: name for name, label in reader.class_to_idx.items()}
    first_unseen = len(names) - math.ceil(unseen * len(names) - 0.5)  # half a class is trained on
    if unseen and not 0 < first_unseen < len(names):
        raise UserError(f'--held-out-classes {unseen:g} of {len(names)} classes is none or all of them.')
    held = datasets.stratified_holdout(files, targets, fraction, seed)
    held = {index for index in held if targets[index] < first_unseen}
    if not held:
        raise UserError(f"No class in '{source}' has two images: there is nothing to validate on.")
    counts = sorted(Counter(targets).items())
    single = [names[label] for label, count in counts if count == 1 and label < first_unseen]
    layout = {}
    for i, (path, label) in enumerate(zip(paths, targets, strict=True)):
        split = 'unseen' if label >= first_unseen else 'validation' if i in held else 'train'
        layout[f'{split}/{Path(path).relative_to(root).as_posix()}'] = Path(path)
    return layout, single


def open_classes(folder: str | os.PathLike) -> FolderReader:
    """A reader of a folder with one folder per class.

    Raises:
        UserError: it is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"There is no folder '{folder}'.")
    splits = [name for name in datasets.SPLITS if (root / name).is_dir()]
    if splits:
        raise UserError(f"'{folder}' has splits ({', '.join(splits)}): name one of them, such as '{root / splits[0]}'.")
    with user_errors(f"'{folder}' cannot be used", (RuntimeError,)):
        reader = FolderReader(folder)
    outside = [name for name in reader.filenames() if os.sep not in name]
    if outside:
        raise UserError(f"{len(outside)} images in '{folder}' lie outside of any class folder, such as '{outside[0]}'.")
    return reader


def describe(layout: Layout) -> str:
    """How many images and classes a layout has in each split."""
    images = Counter(target.split('/')[0] for target in layout)
    classes = Counter(split for split, _ in {(target.split('/')[0], target.split('/')[-2]) for target in layout})
    return ', '.join(f'{number} images of {classes[split]} classes in {split}' for split, number in images.items())
