"""What is wrong with a folder of images, found before training."""

import hashlib
import io
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from ccl_timm.console import Progress, table
from ccl_timm.console.escape import terminal_text, utf8_text
from ccl_timm.data.datasets import SPLITS
from ccl_timm.data.files import UnreadableImage, open_regular, scan, unreadable_if_it_fails
from ccl_timm.data.photos import is_turned
from ccl_timm.errors import UserError

__all__ = ['PROBLEMS', 'Facts', 'Report', 'check_folder', 'inspect']


class Problem(NamedTuple):
    """A kind of problem: what people read, and whether scripts stop or skip images because of it."""

    text: str
    breaks: bool


PROBLEMS = {
    'unreadable': Problem('cannot be decoded; scripts take another image instead', True),
    'closed': Problem('folders that cannot be listed, and are left out', True),
    'no_class': Problem('outside of any class folder', True),
    'empty_split': Problem('splits without an image', True),
    'unknown_class': Problem('classes that the training split lacks', True),
    'missing_class': Problem('classes of the training split that another split lacks', False),
    'deep_class': Problem('class folders that lie deeper; the names of the folders around them do not count', False),
    'empty_class': Problem('class folders without an image', False),
    'several_splits': Problem('same file in several splits, which makes accuracies too good', False),
    'several_classes': Problem('same file in several classes', False),
    'twice': Problem('same file more than once in a class', False),
    'sixteen_bit': Problem('more than 8 bits per pixel, clipped to white at 255 on conversion', False),
    'cmyk': Problem('CMYK; colours shift on conversion', False),
    'alpha': Problem('transparency, which is dropped', False),
    'turned': Problem('turned or mirrored by their EXIF data, which scripts do not heed: turn the pixels', False),
    'palette': Problem('palette of colours, expanded on conversion', False),
    'not_utf8': Problem('names that are not UTF-8, shown with escapes', False),
    'other_file': Problem('files whose ending scripts do not read', False),
    'hidden': Problem('hidden files and folders, which are left out', False),
    'repeated': Problem('folders that lead to one that was read already, and are left out', False),
}
_HEADER = ('split', 'images', 'classes', 'images per class', 'width min / median / max', 'height min / median / max')
_LITTER = {'.DS_Store', 'Thumbs.db', 'desktop.ini'}
_UNSEEN = 'unseen'  # what `data split --held-out-classes` keeps out of the splits: classes of its own
_CHUNK = 16  # files that a thread takes at a time


class Facts(NamedTuple):
    """What one file is.

    Attributes:
        traits: names of :data:`PROBLEMS` that it has by itself.
        size: width and height in pixels; None if it cannot be decoded.
        digest: hash of its bytes; None if it cannot be read.
        error: why it cannot be decoded, else ''.
    """

    traits: tuple[str, ...]
    size: tuple[int, int] | None
    digest: bytes | None
    error: str = ''


@dataclass
class Report:
    """What :func:`check_folder` found.

    Attributes:
        splits: for each split its images, classes, images per class, widths and heights.
        problems: for each of :data:`PROBLEMS` that was met, the names of what has it, relative to the folder.
    """

    folder: str
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether a script would stop, or take other images than it was given."""
        return any(PROBLEMS[kind].breaks for kind in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain types."""
        problems = {
            kind: {'text': PROBLEMS[kind].text, 'breaks': PROBLEMS[kind].breaks, 'names': names}
            for kind, names in self.problems.items()
        }
        return {'folder': self.folder, 'broken': self.broken, 'splits': self.splits, 'problems': problems}

    def as_text(self, show: int = 5) -> str:
        """A table of the splits, and each problem with the first ``show`` names."""
        lines = [table([_row(split, found) for split, found in self.splits.items()], _HEADER), '']
        for kind, names in self.problems.items():
            level = 'broken' if PROBLEMS[kind].breaks else 'note'
            lines.append(f'{level}: {len(names)} {PROBLEMS[kind].text}')
            lines += [f'    {terminal_text(name)}' for name in names[:show]]
            if len(names) > show:
                lines.append(f'    ... and {len(names) - show} more')
        return '\n'.join(lines if self.problems else [*lines, 'no problem found'])


def _row(split: str, found: dict[str, Any]) -> tuple[str, ...]:
    counts = f'{found["fewest"]["images"]} to {found["most"]["images"]} (1 : {found["ratio"]:.1f})'
    sizes = (' / '.join(map(str, found[side] or '-')) for side in ('width', 'height'))
    return split or 'all', str(found['images']), str(found['classes']), counts, *sizes


@dataclass
class _Listing:
    """Files of a folder as scripts see them: an image's class is the folder it lies in."""

    images: list[tuple[str, str, Path]] = field(default_factory=list)  # split, class, file
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def check_folder(folder: str | os.PathLike) -> Report:
    """Read every image of a folder, with one folder per split or per class; nothing is changed.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"There is no folder '{folder}'.")
    splits = {name: root / name for name in SPLITS if (root / name).is_dir()}
    if splits and (root / _UNSEEN).is_dir():
        splits[_UNSEEN] = root / _UNSEEN
    splits = splits or {'': root}
    listing = _Listing()
    for split, place in splits.items():
        _list(root, split, place, listing)
    if not listing.images:
        raise UserError(f"No image in '{folder}': scripts read files ending in {', '.join(get_img_extensions())}.")
    files = [path for _, _, path in listing.images]
    with warnings.catch_warnings(), ThreadPool(os.cpu_count()) as pool:  # decoding and hashing release the GIL
        warnings.simplefilter('ignore')
        bar = Progress(files, 'check', len(files))
        facts = [found for _, found in zip(bar, pool.imap(inspect, files, _CHUNK), strict=True)]
    return _report(root, list(splits), listing, facts)


def inspect(path: Path) -> Facts:
    """Read and decode one file."""
    digest = None
    try:
        with unreadable_if_it_fails():
            with open_regular(path) as file:
                content = file.read()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            with Image.open(io.BytesIO(content)) as image:
                image.convert('RGB')  # decodes it, and does what scripts do
                return Facts(tuple(_traits(image)), image.size, digest)
    except UnreadableImage as error:
        return Facts(('unreadable',), None, digest, str(error))


def _traits(image: Image.Image) -> Iterable[str]:
    if image.mode.startswith(('I', 'F')):
        yield 'sixteen_bit'
    if image.mode == 'CMYK':
        yield 'cmyk'
    if image.has_transparency_data:
        yield 'alpha'
    if is_turned(image):
        yield 'turned'
    if image.mode in ('P', 'PA'):
        yield 'palette'


def _list(root: Path, split: str, place: Path, listing: _Listing) -> None:
    endings = get_img_extensions(as_set=True)
    before = len(listing.images)
    tree = scan(place)
    for folder, subfolders, files in sorted(tree.folders):
        here = Path(folder)
        label = '' if here == place else utf8_text(here.name)
        images = [here / name for name in files if Path(name).suffix.lower() in endings]
        others = sorted({here / name for name in files if name not in _LITTER}.difference(images))
        listing.images += [(split, label, path) for path in images]
        listing.problems['other_file'] += [_name(path, root) for path in others]
        listing.problems['not_utf8'] += [
            _name(here / own, root) for own in (*subfolders, *files) if utf8_text(own) != own
        ]
        if not label:
            listing.problems['no_class'] += [_name(path, root) for path in images]
        elif images and here.parent != place:
            listing.problems['deep_class'].append(_name(here, root))
        elif not images and not subfolders:
            listing.problems['empty_class'].append(_name(here, root))
    for kind in ('hidden', 'repeated', 'closed'):
        listing.problems[kind] += [_name(path, root) for path in getattr(tree, kind) if Path(path).name not in _LITTER]
    if len(listing.images) == before:
        listing.problems['empty_split'].append(split)


def _name(path: str | Path, root: Path) -> str:
    """Name of a file relative to the folder, as text that can be printed."""
    return utf8_text(Path(path).relative_to(root).as_posix())


def _report(root: Path, splits: list[str], listing: _Listing, facts: list[Facts]) -> Report:
    problems = listing.problems
    names = [_name(path, root) for _, _, path in listing.images]
    for name, found in zip(names, facts, strict=True):
        for trait in found.traits:
            problems[trait].append(f'{name} ({found.error})' if found.error else name)
    _compare_classes(splits, listing)
    _find_duplicates(names, listing, facts)
    report = Report(str(root), problems={kind: problems[kind] for kind in PROBLEMS if problems[kind]})
    for split in splits:
        own = [i for i, (where, _, _) in enumerate(listing.images) if where == split]
        if own:
            report.splits[split] = _statistics([listing.images[i][1] for i in own], [facts[i].size for i in own])
    return report


def _statistics(labels: list[str], sizes: list[tuple[int, int] | None]) -> dict[str, Any]:
    counts = Counter(labels)
    fewest, most = min(counts, key=counts.get), max(counts, key=counts.get)
    statistics = {
        'images': len(labels),
        'classes': len(counts),
        'fewest': {'class': fewest, 'images': counts[fewest]},
        'most': {'class': most, 'images': counts[most]},
        'ratio': counts[most] / counts[fewest],
    }
    read = np.array([size for size in sizes if size])
    for axis, side in enumerate(('width', 'height')):
        statistics[side] = [int(f(read[:, axis])) for f in (np.min, np.median, np.max)] if len(read) else None
    return statistics


def _compare_classes(splits: list[str], listing: _Listing) -> None:
    """Compare the classes of the other splits with those of training."""
    classes = {split: {label for where, label, _ in listing.images if where == split and label} for split in splits}
    training = next((split for split in splits if split.startswith('train')), None)
    if training is None:
        return
    for split in (split for split in splits if split != _UNSEEN):
        listing.problems['unknown_class'] += [f'{split}/{name}' for name in sorted(classes[split] - classes[training])]
        if classes[split]:
            missing = sorted(classes[training] - classes[split])
            listing.problems['missing_class'] += [f'{split}/{name}' for name in missing]


def _find_duplicates(names: list[str], listing: _Listing, facts: list[Facts]) -> None:
    same = defaultdict(list)
    for index, found in enumerate(facts):
        if found.digest is not None:
            same[found.digest].append(index)
    for group in same.values():
        if len(group) < 2:
            continue
        labels = [listing.images[index][:2] for index in group]
        line = ' = '.join(names[index] for index in group)
        if len({split for split, _ in labels}) > 1:
            listing.problems['several_splits'].append(line)
        if len({label for _, label in labels}) > 1:
            listing.problems['several_classes'].append(line)
        if len(set(labels)) < len(labels):
            listing.problems['twice'].append(line)
