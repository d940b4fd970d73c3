"""Data sets for the scripts: embedded digits, one numbering of classes for all splits, a held-out share."""

import contextlib
import functools
import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import timm.data
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ccl_timm._compat import search_split
from ccl_timm.console import first_few, log_warning
from ccl_timm.data.config import DataConfig
from ccl_timm.data.files import (
    DataError,
    FolderReader,
    UnreadableImage,
    color_mode,
    decode_image,
    read_lines,
    unreadable_if_it_fails,
)
from ccl_timm.data.fingerprint import Content, fingerprint
from ccl_timm.data.photos import decode_resized
from ccl_timm.errors import UserError, did_you_mean, user_errors

__all__ = [
    'SPLITS',
    'Digits',
    'ImageFiles',
    'Replacing',
    'Splits',
    'content_hash',
    'base_of',
    'file_names',
    'stratified_holdout',
    'is_folder',
    'create_split',
    'create_splits',
    'targets_of',
]

# folders that are splits of a data set rather than classes
SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')
_SCHEMES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')  # of timm, in front of the slash


class Digits(Dataset):
    """Handwritten digits: 1,797 grey images of 8x8 px, 10 classes (UCI, as embedded in scikit-learn).

    The split is fixed: in each class every fifth image, in scikit-learn's order, is for validation (1,442 + 355).

    Args:
        split: ``'train'`` or ``'validation'``.
        mode: colour mode that images are converted to, ``'L'`` or ``'RGB'``.
    """

    def __init__(self, split: str, mode: str = 'RGB'):
        from sklearn.datasets import load_digits  # takes a second: only when digits are asked for

        data = load_digits()
        position = np.zeros(len(data.target), int)  # of an image within its class
        for label in range(10):
            position[data.target == label] = np.arange((data.target == label).sum())
        if split not in ('train', 'validation'):
            raise UserError(f"The digits have the splits 'train' and 'validation', not '{split}'.")
        chosen = (position % 5 == 4) == (split == 'validation')
        self.images = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8), 0..255
        self.targets = data.target[chosen].tolist()
        self.classes = [str(label) for label in range(10)]
        self.mode = mode
        self.transform = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return (self.transform(image) if self.transform else image), self.targets[index]


class ImageFiles(Dataset):
    """Images of a timm reader. One that cannot be read is named once, by whichever process meets it first.

    Its label is -1 and it is blank: :class:`Replacing` takes another one in its place, a measurement leaves it out.

    Args:
        reader: timm's, of files and labels.
        mode: colour mode that images are converted to.
    """

    def __init__(self, reader: Any, mode: str):
        self.reader = reader
        self.mode = mode
        self.transform = None
        self.named = torch.zeros(len(reader), dtype=torch.bool).share_memory_()  # shared with loaders' workers

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int):
        image, target = self._decoded(index, decode_image)
        image = Image.new(self.mode, (1, 1)) if image is None else image
        return (self.transform(image) if self.transform else image), target

    def resized(self, index: int, size_of: Callable[[tuple[int, int]], tuple[int, int]]) -> tuple[torch.Tensor, int]:
        """An image (C, H, W) uint8 and its label; see :func:`ccl_timm.data.photos.decode_resized`."""
        image, target = self._decoded(index, functools.partial(decode_resized, size_of=size_of))
        return torch.zeros(len(self.mode), 1, 1, dtype=torch.uint8) if image is None else image, target

    def _decoded(self, index: int, decode: Callable[[BinaryIO, str], Any]) -> tuple[Any, int]:
        try:
            with unreadable_if_it_fails():
                file, target = self.reader[index][:2]
                return decode(file, self.mode), target
        except UnreadableImage as error:
            if not self.named[index]:
                self.named[index] = True
                name = self.reader.filename(index)
                log_warning(f"'{name}' cannot be read, and is left out: {error}", by_any_process=True)
            return None, -1


class _Subset(Dataset):
    """Some samples of a data set. ``transform`` is the data set's own, so that timm's create_loader can set it."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = indices

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, value):
        self.dataset.transform = value

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.dataset[self.indices[index]]


class Replacing(_Subset):
    """A data set to train on: in the place of an image that cannot be read comes the next one, with its own label.

    Args:
        dataset: with the label -1 for an image that cannot be read, as :class:`ImageFiles` has it.
    """

    _tries = 1000  # whole classes may be damaged

    def __init__(self, dataset: Dataset):
        super().__init__(dataset, range(len(dataset)))

    def __getitem__(self, index: int):
        for place in range(index, index + min(self._tries, len(self))):
            image, target = self.dataset[place % len(self)]
            if target != -1:
                return image, target
        raise DataError(
            f'{min(self._tries, len(self))} images in a row cannot be read: is the folder of the training images gone?'
        )


@dataclass
class Splits:
    """What a run trains and validates on.

    Attributes:
        train: training split.
        validation: validation split; None for none.
        class_names: names in the order of their numbers; None if the data set does not have them.
        counts: training images of each class; None if the data set does not have them.
        held_out: with a held-out share, for each image of the training folder its name and split.
        notes: sentences that the user should read.
    """

    train: Dataset
    validation: Dataset | None
    class_names: list[str] | None
    counts: list[int] | None
    held_out: list[tuple[str, str]] | None
    notes: list[str]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies this data: see :func:`ccl_timm.data.fingerprint.fingerprint`."""
        return fingerprint(_content(self.train), None if self.validation is None else _content(self.validation))


def create_splits(config: DataConfig, channels: int) -> Splits:
    """Open the training and the validation split, with the numbering of classes of the training split.

    Raises:
        UserError: there is no such data, no image in it, no validation split, or a class that training lacks.
    """
    names = _class_names_from(config)
    train = create_split(config, config.train_split, channels, names)
    train_names = names or _names(train)
    targets = targets_of(train)
    notes, held_out, validation = _missing_classes(config.train_split, train, train_names), None, None
    if config.val_fraction is not None:
        train, validation, held_out = _hold_out(config, train, targets, channels, train_names)
        targets = targets_of(train)
    elif config.val_split:
        validation = create_split(config, config.val_split, channels, train_names, must_exist=True)
        notes += _missing_classes(config.val_split, validation, train_names)
    if config.train_fraction is not None:
        train, left = _subsample(config, train, targets)
        targets = targets_of(train)
        held_out = [(name, 'unused' if name in left else split) for name, split in held_out] if held_out else None
    _check_labels(config, targets, train_names)
    counts = None
    if targets is not None:
        found = Counter(targets)
        counts = [found.get(label, 0) for label in range(len(train_names) if train_names else max(found) + 1)]
    return Splits(train, validation, train_names, counts, held_out, notes)


def create_split(
    config: DataConfig, split: str, channels: int, names: list[str] | None, must_exist: bool = False
) -> Dataset:
    """Open one split of the data.

    Args:
        config: which data.
        split: name of the split.
        channels: of the images.
        names: class names in the order of their numbers, which the split gets, too; None for its own.
        must_exist: a folder must have a folder of that name; else one without any splits is taken as a whole.

    Raises:
        UserError: it cannot be had, holds no image, or has a class that is not among the names.
    """
    mode = config.input_img_mode or color_mode(channels)
    if config.dataset == 'digits':
        digits = Digits(split, mode)
        if names and names != digits.classes:
            raise UserError(
                f'The embedded digits have the classes 0 to 9, in this order, and not those of the model or of your '
                f'settings: {first_few(names)}.'
            )
        return digits
    _check_name(config.dataset)
    if is_folder(config.dataset):
        _check_is_folder(config.data_dir)
    elif config.dataset.startswith('torch/') and not config.data_dir:
        raise UserError(f"'{config.dataset}' needs its folder: give --data-dir DIR.")
    _check_has_split(config, split, must_exist)
    _check_has_package(config)
    with user_errors(f"Split '{split}' of '{config.dataset or config.data_dir}' cannot be opened"):
        dataset = _create(config, split, mode)
    if hasattr(getattr(dataset, 'reader', None), 'iter_targets'):  # the Hub's; each call of it reads the whole column
        dataset.targets = _column_of_labels(dataset.reader, f"Split '{split}' of '{config.dataset}'")
    own = _names(dataset) or []
    if '' in own and isinstance(getattr(dataset, 'reader', None), FolderReader):
        labels = targets_of(dataset) or []
        stray = next(name for name, label in zip(file_names(dataset), labels, strict=True) if not own[label])
        raise UserError(
            f"Split '{split}' has images outside the classes' folders, such as '{stray}': move each into the folder of "
            'its class, or out of the split.'
        )
    if names:
        _renumber(dataset, split, names, config.train_split)
    return dataset


def _create(config: DataConfig, split: str, mode: str) -> Dataset:
    """A split of the data, whose files are all read by :class:`ImageFiles`."""
    of_torchvision = (config.dataset or '').lower() in ('torch/folder', 'torch/image_folder')
    if of_torchvision or is_folder(config.dataset):
        root = search_split(config.data_dir, split)
        suffixes = set(config.input_key.lower().split(';')) if config.input_key else None
        return ImageFiles(FolderReader(root, suffixes, by_top_folder=of_torchvision), mode)
    with _download_lock(config):
        dataset = timm.data.create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split,
            is_training=split == config.train_split,
            download=config.dataset_download,
            batch_size=config.batch_size,
            seed=config.seed,
            input_img_mode=mode,
            input_key=config.input_key,
            target_key=config.target_key,
        )
    return ImageFiles(dataset.reader, mode) if type(dataset) is timm.data.ImageDataset else dataset


def _download_lock(config: DataConfig) -> contextlib.AbstractContextManager:
    """For one process at a time: torchvision's would write over each other's files."""
    if not config.dataset_download or not config.data_dir:
        return contextlib.nullcontext()
    os.makedirs(config.data_dir, exist_ok=True)
    return FileLock(os.path.join(config.data_dir, '.download.lock'))


def _check_name(dataset: str | None) -> None:
    """timm takes a folder where it does not know the scheme in front of the slash."""
    scheme, slash, _ = (dataset or '').partition('/')
    if is_folder(dataset) or (slash and scheme.lower() in _SCHEMES):
        return
    known = _SCHEMES if slash else ['digits', 'folder']
    raise UserError(
        f"Unknown data set '{dataset}'{did_you_mean(scheme.lower(), known)} "
        f"Give 'digits', one of {', '.join(_SCHEMES)} with a name, such as torch/cifar10 or hfds/owner/name, or a "
        'folder with --data-dir alone.'
    )


def _check_is_folder(folder: str | None) -> None:
    if not folder:
        raise UserError('There is no data folder: give one with --data-dir.')
    if not os.path.exists(folder):
        raise UserError(f"There is no data folder '{folder}': give an existing one with --data-dir.")
    if not os.path.isdir(folder):
        raise UserError(f"--data-dir '{folder}' is not a folder: unpack it into one, with a folder for each class.")


def _check_has_package(config: DataConfig) -> None:
    on_hub = config.dataset.lower().startswith(('hfds/', 'hfids/'))
    if on_hub and importlib.util.find_spec('datasets') is None:
        raise UserError(f"'{config.dataset}' needs the package datasets: `pip install 'ccl-timm[datasets]'`.")


def is_folder(dataset: str | None) -> bool:
    """Whether the setting ``dataset`` means images in a folder, which then has their name."""
    return dataset in ('', 'folder', None)


def _class_names_from(config: DataConfig) -> list[str] | None:
    if config.class_names and config.class_map:
        raise UserError('--class-names and --class-map mean the same: give one of them.')
    if not config.class_map:
        return _different(config.class_names, '--class-names') if config.class_names else None
    path = Path(config.class_map)
    if not path.is_file() and config.data_dir:
        path = Path(config.data_dir) / config.class_map
    if not path.is_file() or path.suffix == '.pkl':
        raise UserError(f"The class map '{config.class_map}' is not a text file with one class name a line.")
    return _different([line.strip() for line in read_lines(path)], f"The class map '{config.class_map}'")


def _different(names: Sequence[str], where: str) -> list[str]:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{where} names the class '{repeated[0]}' twice.")
    return list(names)


def _names(dataset: Dataset) -> list[str] | None:
    reader = getattr(dataset, 'reader', dataset)
    mapping = getattr(reader, 'class_to_idx', None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    names = getattr(dataset, 'classes', None)
    return [str(name) for name in names] if names else None


def targets_of(dataset: Dataset) -> list[int] | None:
    """Label of each image, without reading images; None if the data set does not have them."""
    if isinstance(dataset, _Subset):
        inner = targets_of(dataset.dataset)
        return [inner[index] for index in dataset.indices]
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    if samples is not None:
        return [int(target) for _, target in samples]
    targets = getattr(dataset, 'targets', None)
    return None if targets is None else [int(target) for target in targets]


def content_hash(dataset: Dataset) -> str:
    """A hash by which a split is recognised: see :func:`ccl_timm.data.fingerprint.fingerprint`.

    Of a data set of the Hub it has that of the package datasets, too, which is another for other images.
    """
    reader = getattr(base_of(dataset)[0], 'reader', None)
    on_hub = getattr(getattr(reader, 'dataset', None), '_fingerprint', None)
    found = fingerprint(_content(dataset), None)
    return f'{found}-{on_hub}-{reader.image_key}' if on_hub else found


def file_names(dataset: Dataset) -> list[str]:
    """A name for each image: its path within the folder, whatever the order of files, else its number."""
    reader = getattr(dataset, 'reader', None)
    if hasattr(reader, 'samples'):
        return [Path(reader.filename(index)).as_posix() for index in range(len(dataset))]
    return [f'{index:09d}' for index in range(len(dataset))]


def real_paths(dataset: Dataset) -> set[str]:
    """The files of a data set's images, without links; empty if the images are not single files."""
    base, indices = base_of(dataset)
    samples = getattr(getattr(base, 'reader', None), 'samples', None) or []
    chosen = samples if indices is None else [samples[index] for index in indices] if samples else []
    return {os.path.realpath(path) for path, *_ in chosen if isinstance(path, (str, os.PathLike))}


def _column_of_labels(reader: Any, where: str) -> list[int]:
    """Labels of a split of a data set of the Hub, in its order, once columns and values are what training can use."""
    columns = [name for name in reader.dataset.column_names if name != reader.image_key]
    try:
        labels = list(reader.iter_targets())
    except KeyError as error:
        raise UserError(
            f"{where} has no column '{reader.label_key}' of labels: name one with --target-key ({', '.join(columns)})."
        ) from error
    if not labels:
        raise UserError(f'{where} holds no image.')
    if reader.dataset[0][reader.image_key] is None:  # timm's reader makes up a column that is not there
        raise UserError(
            f"{where} has no column '{reader.image_key}' of images: name one with --input-key ({', '.join(columns)})."
        )
    wrong = [label for label in labels if not isinstance(label, int) or label < 0]
    if wrong:
        raise UserError(
            f"{where} has the label {wrong[0]!r} in its column '{reader.label_key}', which is not the number of a "
            'class: name a labelled split, or another column with --target-key.'
        )
    return labels


def has_split(config: DataConfig, split: str) -> bool:
    """Whether a folder has one of its own for a split."""
    return os.path.realpath(search_split(config.data_dir, split)) != os.path.realpath(config.data_dir)


def _check_has_split(config: DataConfig, split: str, must_exist: bool) -> None:
    """timm takes the whole folder where it finds no split of that name, the other splits included."""
    root = config.data_dir
    if not (is_folder(config.dataset) and os.path.isdir(root)) or has_split(config, split):
        return
    others = [name for name in SPLITS if os.path.isdir(os.path.join(root, name))]
    if must_exist or others:
        has = f' (it has {", ".join(others)})' if others else ''
        raise UserError(
            f"'{root}' has no split '{split}'{has}: add such a folder, or name another with --train-split, --val-split "
            'or --split; in training, hold out a share of the images with --val-fraction 0.2, or train without '
            "validation with --val-split ''."
        )


def _renumber(dataset: Dataset, split: str, names: list[str], train_split: str) -> None:
    """Give a split's classes the numbers that they have in ``names``, in place."""
    own = _names(dataset)
    if own is None or own == names:
        return
    unknown = [name for name in own if name not in names]
    if unknown:
        of_map = '--class-map, --class-names or the recipe' if split == train_split else 'training'
        remedy = (
            "name it there (a run's args.yaml has the classes of its own data as class_names)"
            if split == train_split
            else 'remove them from it, or add training images'
        )
        raise UserError(
            f"Split '{split}' has {len(unknown)} classes that are not among the {len(names)} of {of_map}, such as "
            f"'{unknown[0]}': {remedy}."
        )
    number = {label: names.index(name) for label, name in enumerate(own)}
    holder = getattr(dataset, 'reader', dataset)
    if not hasattr(holder, 'samples'):
        raise UserError(f"Split '{split}' numbers its classes differently from training, which cannot be fixed here.")
    holder.samples = [(image, number[target]) for image, target in holder.samples]
    holder.class_to_idx = {name: label for label, name in enumerate(names)}


def _missing_classes(split: str, dataset: Dataset, names: list[str] | None) -> list[str]:
    targets = targets_of(dataset)
    if not names or targets is None:
        return []
    found = set(targets)
    missing = [name for label, name in enumerate(names) if label not in found]
    if not missing:
        return []
    return [f"Split '{split}' has no image of {len(missing)} of {len(names)} classes: {first_few(missing)}."]


def _check_labels(config: DataConfig, targets: list[int] | None, names: list[str] | None) -> None:
    if targets is None:
        return
    highest = max(targets)
    if names and highest >= len(names):
        raise UserError(f'The data has labels up to {highest}, and {len(names)} classes have names: name all classes.')
    if config.num_classes is not None and (highest >= config.num_classes or min(targets) < 0):
        raise UserError(
            f'--num-classes {config.num_classes} is too small: the data has labels up to {highest}'
            + (f" ('{names[highest]}')" if names else '')
            + f'; give --num-classes {highest + 1}, or leave it out.'
        )
    if names and config.num_classes is not None and len(names) > config.num_classes:
        raise UserError(
            f'--num-classes {config.num_classes} is too small for {len(names)} class names: give --num-classes '
            f'{len(names)}, or leave it out.'
        )


def stratified_holdout(files: list[str], targets: list[int], fraction: float, seed: int) -> set[int]:
    """Choose a share of each class: stratified, seeded, and independent of the order of files.

    Args:
        files: name of each image.
        targets: label of each image.
        fraction: share of a class, in (0, 1); rounded, at least one image, and never a class's only one.
        seed: what the choice depends on, beside the names.

    Returns:
        Indices of the images that are held out.
    """
    by_class = defaultdict(list)
    for index, label in enumerate(targets):
        by_class[label].append(index)
    held = set()
    for label, own in by_class.items():
        own.sort(key=files.__getitem__)
        order = np.random.default_rng([seed, label]).permutation(len(own))
        held |= {own[i] for i in order[: min(len(own) - 1, max(1, round(len(own) * fraction)))]}
    return held


def _hold_out(config, dataset, targets, channels, names):
    """Open the training split a second time and divide the two by a held-out share."""
    if not _can_be_listed(dataset, targets):
        raise UserError(
            f"--val-fraction cannot split '{config.dataset}', whose images cannot be listed: use --val-split."
        )
    files = file_names(dataset)
    held = stratified_holdout(files, targets, config.val_fraction, config.seed)
    if not held:
        raise UserError(
            f"No class in '{config.data_dir or config.dataset}' has two images: there is nothing to hold out."
        )
    again = create_split(
        config, config.train_split, channels, names
    )  # a second one, since each split has its own transform
    train = _Subset(dataset, [index for index in range(len(files)) if index not in held])
    validation = _Subset(again, sorted(held))
    record = sorted((name, 'validation' if index in held else 'train') for index, name in enumerate(files))
    return train, validation, record


def _subsample(config, dataset, targets):
    """A share of each class of the training split, in its order, and the names of those left out; seeded."""
    if not _can_be_listed(dataset, targets):
        raise UserError(
            f"--train-fraction cannot take a share of '{config.dataset}', whose images cannot be listed: leave it out."
        )
    base, indices = (
        (dataset.dataset, dataset.indices) if isinstance(dataset, _Subset) else (dataset, range(len(dataset)))
    )
    files = file_names(base)
    left = stratified_holdout([files[index] for index in indices], targets, 1 - config.train_fraction, config.seed)
    kept = _Subset(base, [index for place, index in enumerate(indices) if place not in left])
    return kept, {files[indices[place]] for place in left}


def _can_be_listed(dataset, targets):
    return not isinstance(dataset, IterableDataset) and targets is not None


def base_of(dataset: Dataset) -> tuple[Dataset, Sequence[int] | None]:
    """The data set that a share is taken of, and the numbers of the share's images; None for all of them."""
    return (dataset.dataset, dataset.indices) if isinstance(dataset, _Subset) else (dataset, None)


def _content(dataset: Dataset) -> Content:
    """What a fingerprint is made of."""
    base, indices = base_of(dataset)
    arrays = [getattr(base, name, None) for name in ('images', 'data')]
    reader = getattr(base, 'reader', None)
    samples = getattr(reader, 'samples', None)
    files = None if samples is None else [(reader.filename(i), *sample) for i, sample in enumerate(samples)]
    return Content(
        files, targets_of(dataset), [a for a in arrays if isinstance(a, (np.ndarray, torch.Tensor))], indices
    )
