"""Start a plugin package: a folder with a model, a loss, their entry points, and tests that pass."""

import argparse
import importlib.resources
import keyword
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ccl_timm.console.arguments import Parser
from ccl_timm.errors import UserError

__all__ = ['HELP', 'add_arguments', 'run', 'scaffold_plugin']

HELP = 'Write a small plugin package to start from, with a loss, a head and a model.'

_MODULE, _DISTRIBUTION = 'example_plugin', 'example-plugin'
_TAKEN = {'ccl_timm', 'timm', 'torch', 'torchvision', *keyword.kwlist, *sys.stdlib_module_names}


def add_arguments(parser: Parser) -> None:
    parser.add_argument('folder', metavar='DIR', help='a new folder; the package takes its name')


def run(args: argparse.Namespace) -> int:
    for path in scaffold_plugin(args.folder):
        print(path)
    print(f'next: pip install -e {args.folder} && ccl-timm plugins --check')
    return 0


def scaffold_plugin(directory: str | Path) -> list[Path]:
    """Write a plugin package, named after its folder (``my-loss`` -> module ``my_loss``).

    Args:
        directory: a folder that does not exist yet, or an empty one. ``'.'`` is the current one.

    Returns:
        The files written, sorted.

    Raises:
        UserError: the folder holds something, is a file, or its name makes no module name.
    """
    directory = Path(directory).expanduser().resolve()
    module = _module_name(directory.name)
    if directory.exists() and not directory.is_dir():
        raise UserError(f'{directory} is a file; name a new folder.')
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f'{directory} is not empty, and nothing is overwritten; name a new folder.')
    written = []
    for relative, source in _template_files(importlib.resources.files('ccl_timm') / 'plugin_template'):
        path = directory / _renamed(relative, module)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_renamed(source.read_text(encoding='utf-8'), module), encoding='utf-8')
        written.append(path)
    return sorted(written)


def _module_name(folder: str) -> str:
    name = re.sub(r'[-. ]', '_', folder.lower())
    if not re.fullmatch(r'[a-z][a-z0-9]*(_[a-z0-9]+)*', name):
        raise UserError(
            f"'{folder}' makes no module name; name the folder with letters a-z and digits, joined by - or _, "
            "a letter first, such as 'my-plugin'."
        )
    if name in _TAKEN:
        raise UserError(f"'{name}' is taken by Python or a package that plugins need; choose another name.")
    return name


def _renamed(text: str, module: str) -> str:
    return text.replace(_MODULE, module).replace(_DISTRIBUTION, module.replace('_', '-'))


def _template_files(folder: Any, below: str = '') -> Iterator[tuple[str, Any]]:
    """Yield (path below the template, file) of a resource folder, without what Python compiled at installation."""
    for entry in folder.iterdir():
        if entry.is_file():
            yield below + entry.name, entry
        elif entry.name != '__pycache__':
            yield from _template_files(entry, f'{below}{entry.name}/')
