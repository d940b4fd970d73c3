"""`timm SCRIPT ...` and `ccl-timm COMMAND ...`. Users' mistakes end in one sentence and exit code 2.

Each command is a module of this package: ``HELP``, a literal, whose first sentence is in the list of commands,
``add_arguments(parser)``, and ``run(args)``, which returns the exit code. ``args.prog`` and ``args.argv`` hold what was
called. Nothing here imports torch, so that the list of commands appears at once.
"""

import ast
import os
import shlex
import sys
import traceback
from argparse import REMAINDER
from collections.abc import Callable
from importlib import import_module, resources
from importlib.metadata import version
from types import ModuleType

from ccl_timm import registry
from ccl_timm.console import log_error, log_info, was_error_logged
from ccl_timm.console.arguments import Parser, integer
from ccl_timm.console.memory import keep_freed_memory
from ccl_timm.errors import UserError, did_you_mean

__all__ = ['COMMANDS', 'main', 'timm']

COMMANDS = (
    'train', 'validate', 'predict', 'index', 'embed', 'bench', 'export', 'push', 'card', 'release', 'run', 'data',
    'losses', 'models', 'recipes', 'reproduce', 'compare', 'report', 'features', 'plugins', 'new-plugin',
)  # fmt: skip
_BUILT_IN = {'train.py': 'train', 'validate.py': 'validate'}
_TIMM_USAGE = """\
usage: timm SCRIPT ...

  timm path/to/train.py ...   runs that script of timm's, unmodified, with our models and losses in place
  timm train.py ...           without such a file: the built-in script; `timm train.py --help` lists its flags
  timm validate.py RUN        likewise
  timm --nproc N SCRIPT ...   the same on N processes of this machine, one for each device

`ccl-timm --help` lists the other commands."""


def timm(argv: list[str] | None = None) -> int:
    """Entry point of `timm`: runs SCRIPT if it is a file, else the built-in script of that name."""
    return _guarded(_timm, argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `ccl-timm` and of `python -m ccl_timm`."""
    return _guarded(_ccl_timm, argv)


def _timm(argv: list[str]) -> int:
    if not argv or argv[0] in ('-h', '--help'):
        print(_TIMM_USAGE)
        return 0
    if argv[0].split('=')[0] == '--nproc':
        return _on_processes(argv)
    command, *rest = _command_of(argv)
    return _run_command(command, rest, 'ccl-timm run' if command == 'run' else f'timm {argv[0]}')


def _command_of(argv: list[str]) -> list[str]:
    """What `ccl-timm` is to run for `timm SCRIPT ...`."""
    script, *rest = argv
    if os.path.isfile(script):
        return ['run', script, *rest]
    if script in _BUILT_IN:
        log_info(f'no file {script} here: the built-in script, with timm {version("timm")}')
        return [_BUILT_IN[script], *rest]
    if script.endswith('.py'):
        raise UserError(
            f"There is no file '{script}', and it is not built in ({', '.join(_BUILT_IN)} are): "
            "timm's scripts do not come with its package, give the path of one."
        )
    raise UserError(f"Unknown script '{script}'{did_you_mean(script, _BUILT_IN)} See `timm --help`.")


def _on_processes(argv: list[str]) -> int:
    parser = Parser(prog='timm', description='Run a script on several processes of this machine, one for each device.')
    parser.add_argument('--nproc', type=integer(1, 256), required=True, metavar='N', help='processes')
    parser.add_argument('script', nargs=REMAINDER, metavar='SCRIPT ...', help='as without --nproc')
    args = parser.parse_args(argv)
    if not args.script:
        raise UserError(f'`timm --nproc N SCRIPT ...` takes a script, not {shlex.join(argv)}.')
    return _load('launch').run_on_processes(args.nproc, _command_of(args.script))


def _ccl_timm(argv: list[str]) -> int:
    if not argv or argv[0] in ('-h', '--help'):
        width = max(map(len, COMMANDS))
        print('usage: ccl-timm COMMAND ...   (each has --help)\n')
        for name in COMMANDS:
            print(f'  {name.ljust(width)}  {_summary(name)}')
        return 0
    command, *rest = argv
    if command == '--version':
        print(registry.version())
        return 0
    if command not in COMMANDS:
        raise UserError(f"Unknown command '{command}'{did_you_mean(command, COMMANDS)} See `ccl-timm --help`.")
    return _run_command(command, rest, f'ccl-timm {command}')


def _summary(name: str) -> str:
    """The first sentence of a command's help, read without importing the command."""
    source = resources.files(__package__).joinpath(f'{_module(name)}.py').read_text(encoding='utf-8')
    assignments = (node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    text = next(node.value for node in assignments if ast.unparse(node.targets[0]) == 'HELP')
    return ast.literal_eval(text).partition('. ')[0].rstrip('.')


def _module(command: str) -> str:
    return command.replace('-', '_')


def _load(module: str) -> ModuleType:
    """A module of this package, after the models have been registered with timm."""
    import_module('ccl_timm.models')
    return import_module(f'{__package__}.{module}')


def _run_command(name: str, argv: list[str], prog: str) -> int:
    command = _load(_module(name))
    parser = Parser(prog=prog, description=command.HELP)
    command.add_arguments(parser)
    args = parser.parse_strictly(argv)
    args.prog, args.argv = prog, argv
    keep_freed_memory()
    return command.run(args)


def _guarded(run: Callable[[list[str]], int], argv: list[str] | None) -> int:
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as stop:
        return getattr(stop, 'exit_code', 130)
    except SystemExit as stop:
        if not (module := _exited_early(stop)):
            raise
        log_error(f"The module '{module}' ended the program (SystemExit) before its work was done.")
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, RuntimeError) and was_error_logged():  # what a process meets when another has left
            return 1
        sentence = _sentence(error)
        if sentence is None or os.environ.get('CCL_TIMM_DEBUG') == '1':
            raise
        log_error(sentence)
        return 2


def _exited_early(stop: SystemExit) -> str | None:
    """The module that exits with code 0, as a plugin might; None if that is a parser's help or a script's own end."""
    *_, (frame, _) = traceback.walk_tb(stop.__traceback__)
    module = frame.f_globals.get('__name__', '')
    return module if not stop.code and module not in ('argparse', '__main__', 'train') else None


def _sentence(error: Exception) -> str | None:
    """What a user can fix, in one sentence; None for an error of the program."""
    text = ' '.join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{os.fsdecode(error.filename)}': {error.strerror or text}."
    if isinstance(error, OSError):
        return text or f'{type(error).__name__}, without a reason; CCL_TIMM_DEBUG=1 shows where it comes from.'
    if isinstance(error, ValueError) and text.startswith('embedded null'):
        return 'A name or path contains a NUL character, which no file name can.'
    if isinstance(error, MemoryError) or 'out of memory' in text.lower() or "can't allocate memory" in text:
        return f'Out of memory: give smaller sizes. {text}'.rstrip()
    return None
