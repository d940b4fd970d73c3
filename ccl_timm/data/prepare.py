"""`ccl-timm data`: data sets as folders of images that any script reads, made of links to the files people have."""

import contextlib
import functools
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ccl_timm.console import first_few, log_warning
from ccl_timm.console.arguments import SHARE, Parser, integer
from ccl_timm.console.escape import shell_text, terminal_text
from ccl_timm.data import check, datasets
from ccl_timm.data.archives import SOURCES, Layout
from ccl_timm.data.files import FolderReader
from ccl_timm.errors import UserError, did_you_mean

__all__ = ['main', 'new_folder', 'split_folder', 'write_digits', 'write_links']

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
    parts = [name for name in datasets.SPLITS if (root / name).is_dir()]
    if parts:
        raise UserError(
            f"'{source}' has parts ({', '.join(parts)}): name the one to split, such as '{root / parts[0]}'."
        )
    try:
        reader = FolderReader(source)
    except RuntimeError as error:
        raise UserError(' '.join(str(error).split())) from error
    paths, targets = zip(*reader.samples, strict=True)
    files = [Path(name).as_posix() for name in reader.filenames()]
    outside = [name for name in files if '/' not in name]
    if outside:
        raise UserError(f"{len(outside)} images in '{source}' lie outside of any class folder, such as '{outside[0]}'.")
    held = datasets.stratified_holdout(files, targets, fraction, seed)
    if not held:
        raise UserError(f"No class in '{source}' has two images: there is nothing to validate on.")
    names = {label: name for name, label in reader.class_to_idx.items()}
    single = [names[label] for label, count in sorted(Counter(targets).items()) if count == 1]
    layout = {
        f'{"validation" if i in held else "train"}/{Path(path).relative_to(root).as_posix()}': Path(path)
        for i, path in enumerate(paths)
    }
    return layout, single


def _digits(argv: list[str], prog: str) -> int:
    parser = Parser(prog=prog, description='Write the embedded handwritten digits as a folder of images.')
    parser.add_argument('folder', metavar='DIR', help='a new folder')
    args = parser.parse_strictly(argv)
    written = write_digits(args.folder)
    folder = shell_text([args.folder])
    print(f'{len(written)} images in {folder}; train on them: timm train.py --data-dir {folder}')
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
            log_warning(f"'{args.source}' has {images[part]} images for {part}, the official set {number}.")
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
        log_warning(f'{len(single)} classes have one image, which is for training: {first_few(single)}')
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
    print(f'{", ".join(found)}, as {kinds}; train on them: timm train.py --data-dir {shell_text([folder])}')


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
