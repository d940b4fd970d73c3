"""Data sets that people download themselves: where, and how an unpacked archive becomes one folder per class."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ccl_timm.console import log_info, log_warning
from ccl_timm.console.arguments import COUNT
from ccl_timm.data.files import list_images, read_lines
from ccl_timm.errors import UserError, user_errors

__all__ = ['SOURCES', 'Layout', 'Source']

# what is to be written: path in the new folder, such as train/<class>/<file>, and the file that it becomes a copy of
Layout = dict[str, Path]

_PAPER_SIZES = '30, 100, 200, 500, 1000'  # POD-Loss, table 2


@dataclass(frozen=True)
class Source:
    """A data set that people bring themselves.

    Attributes:
        text: what the command does with it.
        get: where people get it.
        layout: from the folder that they have, and the options, to what is to be written; None where there is nothing
            to prepare.
        options: by name, what argparse needs for each.
        official: number of images of each split.
    """

    text: str
    get: str
    layout: Callable[..., Layout] | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    official: dict[str, int] = field(default_factory=dict)

    def prepare(self, source: str | os.PathLike, **options: Any) -> Layout:
        """What is to be written of a folder; warns if it does not have the official number of images.

        Raises:
            UserError: there is no such folder, or it is not the unpacked data set.
        """
        if self.layout is None:
            raise UserError(self.get)
        if not os.path.isdir(source):
            raise UserError(f"There is no folder '{source}'. {self.get}")
        layout = self.layout(Path(source), **options)
        images = Counter(target.split('/')[0] for target in layout)
        for split, number in self.official.items():
            if images[split] != number:
                log_warning(f"'{source}' has {images[split]} images for {split}, the official set {number}.")
        return layout


def _with_train(source: Path) -> Path:
    """The folder that holds train/: the source, or one in it, as archives unpack."""
    for root in (source, *sorted(path for path in source.iterdir() if path.is_dir())):
        if (root / 'train').is_dir():
            return root
    raise UserError(f"'{source}' holds no train/: is it the unpacked archive?")


def _class_folders(folder: Path, split: str, names: Iterable[str] | None = None) -> Layout:
    """Layout of one folder per class, which may have folders in them; of these classes only, if given."""
    names = _folders_in(folder) if names is None else names
    layout = {}
    for name in names:
        for path in list_images(folder / name):
            target = f'{split}/{name}/{os.path.basename(path)}'
            if target in layout:
                raise UserError(f"'{folder / name}' holds two files of the name '{os.path.basename(path)}'.")
            layout[target] = Path(path)
    return layout


def _folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))


def _tiny_imagenet(source: Path) -> Layout:
    root = _with_train(source)
    layout = _class_folders(root / 'train', 'train')
    annotations = root / 'val' / 'val_annotations.txt'
    if not annotations.is_file():
        raise UserError(f"'{root}' has no val/val_annotations.txt, which has the class of each validation image.")
    for line in read_lines(annotations):
        file, _, rest = line.partition('\t')
        name = rest.split('\t')[0]
        if not name:
            raise UserError(f"'{annotations}' has a line without file and class: {line[:80]!r}.")
        layout[f'validation/{name}/{file}'] = root / 'val' / 'images' / file
    return layout


def _imagenet_subset(source: Path, num_classes: int | None = None, classes: str | None = None) -> Layout:
    root = _with_train(source)
    if (num_classes is None) == (classes is None):
        raise UserError(f"Which classes? --num-classes N ({_PAPER_SIZES} in POD-Loss's paper), or --classes FILE.")
    validation = next((root / name for name in ('val', 'validation') if (root / name).is_dir()), None)
    if validation is None:
        raise UserError(f"'{root}' has no val/ beside train/.")
    if classes:
        names = list(dict.fromkeys(line.strip() for line in read_lines(classes)))
    else:
        known = _folders_in(root / 'train')
        log_info("No source names the paper's classes: these are the first by name; --classes FILE takes others.")
        names = known[:num_classes]
        if len(names) < num_classes:
            raise UserError(f"'{root}' has {len(known)} classes, fewer than --num-classes {num_classes}.")
    for folder in (root / 'train', validation):
        absent = sorted(set(names).difference(_folders_in(folder)))
        if absent:
            raise UserError(
                f"'{folder}' has no folder of {len(absent)} of the {len(names)} classes, such as '{absent[0]}'"
                + (': it needs one folder per class too.' if folder == validation else '.')
            )
    return _class_folders(root / 'train', 'train', names) | _class_folders(validation, 'validation', names)


def _cars196(source: Path) -> Layout:
    found = {path.name: path for path in source.rglob('cars_*.mat')}
    if not found:  # one folder per class
        root = _with_train(source)
        if not (root / 'test').is_dir():
            raise UserError(f"'{root}' has train/ but no test/, nor the annotations of the official archive.")
        return _class_folders(root / 'train', 'train') | _class_folders(root / 'test', 'validation')
    files = ('cars_meta.mat', 'cars_train_annos.mat', 'cars_test_annos_withlabels.mat')
    missing = [name for name in files if name not in found]
    if missing:
        raise UserError(f"'{source}' lacks {', '.join(missing)}, annotations of the official archive.")
    meta, *annotations = (found[name] for name in files)
    names = [str(name).replace('/', '-') for name in _matlab(meta, 'class_names')]
    layout = {}
    for split, images, path in zip(('train', 'validation'), ('cars_train', 'cars_test'), annotations, strict=True):
        rows = _annotations(path, len(names))
        folder = next((own.parent for own in source.rglob(f'{images}/*') if own.name == rows[0][1]), source / images)
        for label, file in rows:
            layout[f'{split}/{names[label - 1]}/{file}'] = folder / file
    return layout


def _annotations(path: Path, classes: int) -> list[tuple[int, str]]:
    """Class, counted from 1, and file of each image."""
    with user_errors(f"'{path}' does not hold the class and fname of each image"):
        rows = [(int(row['class']), str(row['fname'])) for row in _matlab(path, 'annotations')]
    wrong = [label for label, _ in rows if not 1 <= label <= classes]
    if wrong or not rows:
        raise UserError(f"'{path}' names no image, or one of class {wrong[:1]} of {classes}.")
    return rows


def _matlab(path: Path, key: str) -> Any:
    from scipy.io import loadmat

    # scipy raises nearly anything on a damaged file
    with user_errors(f"'{path}' is not the MATLAB file of the official archive", (Exception,)):
        return np.atleast_1d(loadmat(path, squeeze_me=True)[key])


SOURCES: dict[str, Source] = {
    'tiny-imagenet': Source(
        text='sort its flat val/ by class, take the images/ out of its train/ (test/ has no labels)',
        get="Tiny ImageNet is the archive tiny-imagenet-200.zip of Stanford's course CS231n. Without this command: "
        "`pip install 'ccl-timm[datasets]'` and --dataset hfds/zh-plus/tiny-imagenet --val-split valid.",
        layout=_tiny_imagenet,
        official={'train': 100_000, 'validation': 10_000},
    ),
    'imagenet-subset': Source(
        text='take some classes of ImageNet-1k',
        get='ImageNet-1k is for people who register and agree to its terms, at image-net.org or for ILSVRC/imagenet-1k '
        'on the Hugging Face Hub. This command takes train/ and val/ with one folder per class.',
        layout=_imagenet_subset,
        options={
            'num_classes': {'type': COUNT, 'metavar': 'N', 'help': f'the first N by name; POD-Loss: {_PAPER_SIZES}'},
            'classes': {'metavar': 'FILE', 'help': 'these classes, one per line'},
        },
    ),
    'cars196': Source(
        text='take Stanford Cars, the official archive or class folders; test images become validation/',
        get='The page of Stanford Cars is gone. People take cyizhuo/stanford-cars-by-classes-folder from Kaggle (one '
        "folder per class), or without this command `pip install 'ccl-timm[datasets]'` and "
        '--dataset hfds/tanganke/stanford_cars --val-split test (6 GB).',
        layout=_cars196,
        official={'train': 8_144, 'validation': 8_041},
    ),
    'facescrub': Source(
        text='print where to get it',
        get='FaceScrub is a list of addresses, many of them dead, and no copy on the Hugging Face Hub is known. '
        'With a copy of your own, one folder per person: `ccl-timm data split DIR OUT`.',
    ),
}
