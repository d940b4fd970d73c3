"""`ccl-timm data`."""

import argparse
import json
from pathlib import Path

from ccl_timm.console import first_few, log_warning
from ccl_timm.console.arguments import SHARE, Parser, integer
from ccl_timm.console.escape import shell_text
from ccl_timm.data.archives import SOURCES
from ccl_timm.data.check import check_folder
from ccl_timm.data.prepare import describe, split_folder, write_digits, write_links
from ccl_timm.errors import UserError

__all__ = ['HELP', 'add_arguments', 'run']

HELP = (
    'Prepare, check or split a folder of images. MNIST and CIFAR need none of this: '
    'timm train.py --dataset torch/mnist --data-dir DIR --dataset-download'
)


def add_arguments(parser: Parser) -> None:
    parser.set_defaults(function=lambda args: print(parser.format_help(), end='') or 0)
    commands = parser.add_subparsers(metavar='COMMAND', help='each has --help')
    add = _command(commands, 'digits', _digits, 'write the embedded handwritten digits')
    add('folder', metavar='DIR', help='a new folder')
    for name, source in SOURCES.items():
        add = _command(commands, name, _prepare, source.text, source.get)
        add('source', nargs='?', metavar='SRC', help='the folder that you have; it is not changed')
        add('folder', nargs='?', metavar='DIR', help='a new folder, for links to the images')
        for option, keywords in source.options.items():
            add(f'--{option.replace("_", "-")}', **keywords)
    text = 'show what is wrong with a folder of images'
    more = 'Nothing is changed. The exit code is 1 if scripts would stop or skip images, else 0.'
    add = _command(commands, 'check', _check, text, f'Read every image of a folder, and {text}. {more}')
    add('folder', metavar='DIR', help='a folder with splits such as train/, or with one folder per class')
    add('--show', type=integer(0), default=5, metavar='N', help='names to show of each problem, default 5')
    add('--json', action='store_true', help='print everything, with all names, as JSON')
    text = 'divide a folder with one folder per class into train/ and validation/, as links'
    more = 'the same share of each class, and the same images as --val-fraction holds out in training.'
    add = _command(commands, 'split', _split, text, f'{text}: {more}')
    add('source', metavar='DIR', help='a folder with one folder per class; it is not changed')
    add('folder', metavar='OUT', help='a new folder')
    add('--val-fraction', type=SHARE, default=0.2, metavar='F', help='share for validation, default 0.2')
    add('--seed', type=integer(0), default=42, metavar='N', help='of the choice of images, default 42')
    text = 'keep this share of the classes, the last by name, out of both, in unseen/: 0.5 as for Cars-196'
    add('--held-out-classes', type=SHARE, default=0.0, metavar='F', help=text)


def run(args: argparse.Namespace) -> int:
    return args.function(args)


def _command(commands, name: str, function, text: str, description: str = ''):
    parser = commands.add_parser(name, help=text, description=description or text)
    parser.set_defaults(function=function, parser=parser, name=name)
    return parser.add_argument


def _digits(args: argparse.Namespace) -> int:
    written, folder = write_digits(args.folder), shell_text([args.folder])
    print(f'{len(written)} images in {folder}; train on them: timm train.py --data-dir {folder}')
    return 0


def _prepare(args: argparse.Namespace) -> int:
    source = SOURCES[args.name]
    if args.folder is None:
        then = f' With that folder: `{args.prog} {args.name} SRC DIR`.' if source.layout else ''
        raise UserError(f'{source.get}{then}')
    options = {name: getattr(args, name) for name in source.options}
    return _write(source.prepare(args.source, **options), args)


def _check(args: argparse.Namespace) -> int:
    report = check_folder(args.folder)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report.as_text(args.show))
    return int(report.broken)


def _split(args: argparse.Namespace) -> int:
    layout, single = split_folder(args.source, args.val_fraction, args.seed, args.held_out_classes)
    if single:
        log_warning(f'{len(single)} classes have one image, which is for training: {first_few(single)}')
    return _write(layout, args)


def _write(layout: dict[str, Path], args: argparse.Namespace) -> int:
    kinds = write_links(layout, args.folder, args.source)
    print(f'{describe(layout)}, as {kinds}; train on them: timm train.py --data-dir {shell_text([args.folder])}')
    return 0
