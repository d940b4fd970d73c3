"""`ccl-timm data`: data sets as folders of images that any script reads, made of links to the files people have."""

import functools
import os
import shutil
from collections import Counter
from pathlib import Path

import timm.data

from ccl_timm.console import first_few, warn
from ccl_timm.data import check, datasets
from ccl_timm.data.archives import SOURCES, Layout
from ccl_timm.errors import UserError, did_you_mean
from ccl_timm.flags import SHARE, Parser, integer

__all__ = ['main', 'split_folder', 'write_digits', 'write_links']


def write_digits(folder: str | os.PathLike) -> list[Path]:
    """Write the digits as a folder of images: ``<folder>/{train,validation}/<class>/<number>.png``.

    Raises:
        UserError: the folder exists and is not empty.
    """
    root = _new_folder(folder)
    written = []
    for split in ('train', 'validation'):
        digits = datasets.Digits(split, mode='L')
        for number, label in enumerate(digits.targets):
            path = root / split / str(label) / f'{number:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            digits[number][0].save(path)
            written.append(path)
    return written


def write_links(layout: Layout, folder: str | os.PathLike, source: str | os.PathLike) -> str:
    """Write a folder of links: symbolic ones, where that cannot be hard ones, where that cannot be copies.

    Args:
        layout: what to write.
        folder: a new or empty folder outside the source. If writing fails it is left empty.
        source: where the files lie; nothing is changed in it.

    Returns:
        What was written: ``'symbolic links'``, ``'hard links'``, ``'copies'``, or several.

    Raises:
        UserError: the folder does not allow it, or a file is missing.
    """
    root = _new_folder(folder)
    if root.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"'{folder}' lies in '{source}', which is not changed: name a folder outside of it.")
    missing = [path for path in layout.values() if not path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(layout)} images are missing in '{source}', such as '{missing[0]}'.")
    kinds = Counter()
    try:
        for target, path in layout.items():
            place = root / target
            place.parent.mkdir(parents=True, exist_ok=True)
            kinds[_link(path, place)] += 1
    except BaseException:  # half a data set must not pass for a whole one
        for child in root.iterdir():
            shutil.rmtree(child)
        raise
    return ' and '.join(kinds)


def _new_folder(folder: str | os.PathLike) -> Path:
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"'{root}' exists and is not empty: name a new folder.")
    return root


def _link(path: Path, place: Path) -> str:
    path = path.absolute()
    for kind, make in (('symbolic links', os.symlink), ('hard links', os.link)):
        try:
            make(path, place)
            return kind
        except FileExistsError:  # a file system that does not tell A from a; a copy would go through the link
            raise
        except (OSError, NotImplementedError):
            continue
    shutil.copy2(path, place)
    return 'copies'


def split_folder(source: str | os.PathLike, fraction: float, seed: int) -> tuple[Layout, list[str]]:
    """Divide a folder with a folder a class into training and validation, as ``--val-fraction`` does in training.

    Args:
        source: the folder.
        fraction: share of each class for validation, in (0, 1).
        seed: of the choice.

    Returns:
        The layout, and the classes with a single image, which is for training.

    Raises:
        UserError: it is no such folder, or no class has two images.
    """
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"There is no folder '{source}'.")
    parts = [name for name in datasets.PARTS if (root / name).is_dir()]
    if parts:
        raise UserError(
            f"'{source}' has parts ({', '.join(parts)}): name the one to split, such as '{root / parts[0]}'."
        )
    try:
        dataset = timm.data.create_dataset('', root=str(root), search_split=False)
    except RuntimeError as error:
        raise UserError(' '.join(str(error).split())) from error
    files, targets = datasets.file_names(dataset), datasets.targets_of(dataset)
    outside = [name for name in files if '/' not in name]
    if outside:
        raise UserError(f"{len(outside)} images in '{source}' lie outside of any class folder, such as '{outside[0]}'.")
    held = datasets.hold_out(files, targets, fraction, seed)
    if not held:
        raise UserError(f"No class in '{source}' has two images: there is nothing to validate on.")
    names = {label: name for name, label in dataset.reader.class_to_idx.items()}
    single = [names[label] for label, count in sorted(Counter(targets).items()) if count == 1]
    layout = {f'{"validation" if i in held else "train"}/{name}': root / name for i, name in enumerate(files)}
    return layout, single


def _digits(argv: list[str], prog: str) -> int:
    parser = Parser(prog=prog, description='Write the embedded handwritten digits as a folder of images.')
    parser.add_argument('folder', metavar='DIR', help='a new folder')
    args = parser.parse_strictly(argv)
    written = write_digits(args.folder)
    print(f'{len(written)} images in {args.folder}; train on them: timm train.py --data-dir {args.folder}')
    return 0


def _prepare(name: str, argv: list[str], prog: str) -> int:
    source = SOURCES[name]
    parser = Parser(prog=prog, description=source.get)
    parser.add_argument('source', nargs='?', metavar='SRC', help='the folder that you have; it is not changed')
    parser.add_argument('folder', nargs='?', metavar='DIR', help='a new folder, for links to the images')
    if source.add_options:
        source.add_options(parser)
    args = parser.parse_strictly(argv)
    if source.layout is None:
        raise UserError(source.get)
    if args.folder is None:
        raise UserError(f'{source.get} With that folder: `{prog} SRC DIR`.')
    if not Path(args.source).is_dir():
        raise UserError(f"There is no folder '{args.source}'. {source.get}")
    layout = source.layout(Path(args.source), args)
    images = _images_of_parts(layout)
    for part, number in source.official.items():
        if images[part] != number:
            warn(f"'{args.source}' has {images[part]} images for {part}, the official set {number}.")
    _write(layout, args.folder, args.source)
    return 0


def _split(argv: list[str], prog: str) -> int:
    parser = Parser(
        prog=prog,
        description='Divide a folder with a folder a class into OUT/train and OUT/validation, as links: the same share '
        'of each class, and the same images as --val-fraction holds out in training.',
    )
    add = parser.add_argument
    add('source', metavar='DIR', help='a folder with a folder a class; it is not changed')
    add('folder', metavar='OUT', help='a new folder')
    add('--val-fraction', type=SHARE, default=0.2, metavar='F', help='share for validation (default 0.2)')
    add('--seed', type=integer(0), default=42, metavar='N', help='another seed, another choice (default 42)')
    args = parser.parse_strictly(argv)
    layout, single = split_folder(args.source, args.val_fraction, args.seed)
    if single:
        warn(f'{len(single)} classes have one image, which is for training: {first_few(single)}')
    _write(layout, args.folder, args.source)
    return 0


def _images_of_parts(layout: Layout) -> Counter:
    return Counter(target.split('/')[0] for target in layout)


def _write(layout: Layout, folder: str, source: str) -> None:
    kinds = write_links(layout, folder, source)
    classes = Counter(part for part, _ in {(target.split('/')[0], target.split('/')[-2]) for target in layout})
    found = [
        f'{number} images of {classes[part]} classes in {part}' for part, number in _images_of_parts(layout).items()
    ]
    print(f'{", ".join(found)}, as {kinds}; train on them: timm train.py --data-dir {folder}')


_COMMANDS = {
    'digits': (_digits, 'DIR', 'write the embedded handwritten digits'),
    **{
        name: (functools.partial(_prepare, name), 'SRC DIR' if source.layout else '', source.text)
        for name, source in SOURCES.items()
    },
    'check': (check.main, 'DIR', 'tell what is wrong with a folder of images'),
    'split': (_split, 'DIR OUT', 'divide a folder with a folder a class into train/ and validation/'),
}


def main(argv: list[str], prog: str) -> int:
    """`ccl-timm data`: one of its commands."""
    if not argv or argv[0] in ('-h', '--help'):
        words = [f'{name} {rest}' for name, (_, rest, _) in _COMMANDS.items()]
        width = max(map(len, words))
        print(f'usage: {prog} COMMAND ...   (each has --help)\n')
        print(
            '\n'.join(f'  {word.ljust(width)}  {row[2]}' for word, row in zip(words, _COMMANDS.values(), strict=True))
        )
        print('\nMNIST and CIFAR need none: timm train.py --dataset torch/mnist --data-dir DIR --dataset-download')
        return 0
    name, *words = argv
    if name not in _COMMANDS:
        raise UserError(f"Unknown data set or command '{name}'{did_you_mean(name, _COMMANDS)} See `{prog} --help`.")
    return _COMMANDS[name][0](words, f'{prog} {name}')
