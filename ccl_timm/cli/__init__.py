"""The words typed: `timm SCRIPT ...` and `ccl-timm COMMAND ...`. Users' mistakes end in one sentence and code 2."""

import json
import os
import shlex
import sys
import traceback
from argparse import REMAINDER
from collections.abc import Callable

from ccl_timm.console import log_error, log_info, was_error_logged
from ccl_timm.errors import UserError, did_you_mean

__all__ = ['main', 'timm']

_BUILT_IN = {'train.py': 'train', 'validate.py': 'validate'}


def timm(argv: list[str] | None = None) -> int:
    """Entry point of `timm`: runs SCRIPT if it is a file, else the built-in script of that name."""
    return _guarded(_timm, argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `ccl-timm`."""
    return _guarded(_ccl_timm, argv)


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
    """The module that exits with code 0, as a plug-in might; None if that is a parser's help or a script's own end."""
    *_, (frame, _) = traceback.walk_tb(stop.__traceback__)
    module = frame.f_globals.get('__name__', '')
    return module if not stop.code and module not in ('argparse', '__main__', 'train') else None


def _sentence(error: Exception) -> str | None:
    """What a user can do something about, in one sentence; None for an error of the program."""
    text = ' '.join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{os.fsdecode(error.filename)}': {error.strerror or text}."
    if isinstance(error, OSError):
        return text or f'{type(error).__name__}, without a reason; CCL_TIMM_DEBUG=1 shows where it comes from.'
    if isinstance(error, ValueError) and text.startswith('embedded null'):
        return 'A name or path has a NUL character in it, which no file can have.'
    if isinstance(error, MemoryError) or 'out of memory' in text.lower() or "can't allocate memory" in text:
        return f'Out of memory: give smaller sizes. {text}'.rstrip()
    return None


def _timm(argv: list[str]) -> int:
    if not argv or argv[0] in ('-h', '--help'):
        print(_TIMM_USAGE)
        return 0
    script, *words = argv
    if script.split('=')[0] == '--nproc':
        return _on_processes(argv)
    if os.path.isfile(script):
        return _run(argv)
    if script in _BUILT_IN:
        from importlib.metadata import version

        log_info(f'no file {script} here: the built-in script, with timm {version("timm")}')
        return _COMMANDS[_BUILT_IN[script]][0](words, f'timm {script}')
    if script.endswith('.py'):
        raise UserError(
            f"There is no file '{script}', and it is not built in ({', '.join(_BUILT_IN)} are): "
            "timm's scripts do not come with its package, give the path of one."
        )
    raise UserError(f"Unknown script '{script}'{did_you_mean(script, _BUILT_IN)} See `timm --help`.")


def _on_processes(argv: list[str]) -> int:
    from ccl_timm.console.arguments import integer

    parser = _parser('timm', 'Run a script on several processes of this machine, one for each device.')
    parser.add_argument('--nproc', type=integer(1, 256), required=True, metavar='N', help='processes')
    parser.add_argument('words', nargs=REMAINDER, metavar='SCRIPT ...', help='as without --nproc')
    args = parser.parse_args(argv)
    if not args.words:
        raise UserError(f'`timm --nproc N SCRIPT ...` takes a script, not {shlex.join(argv)}.')
    from ccl_timm.cli.launch import run_on_processes

    return run_on_processes(args.nproc, args.words)


def _ccl_timm(argv: list[str]) -> int:
    if not argv or argv[0] in ('-h', '--help'):
        width = max(map(len, _COMMANDS))
        print('usage: ccl-timm COMMAND ...   (each has --help)\n')
        print('\n'.join(f'  {name.ljust(width)}  {text}' for name, (_, text) in _COMMANDS.items()))
        return 0
    command, *words = argv
    if command == '--version':
        import ccl_timm

        print(ccl_timm.__version__)
        return 0
    if command not in _COMMANDS:
        raise UserError(f"Unknown command '{command}'{did_you_mean(command, _COMMANDS)} See `ccl-timm --help`.")
    return _COMMANDS[command][0](words, f'ccl-timm {command}')


def _parser(prog: str, description: str):
    from ccl_timm.console.arguments import Parser

    return Parser(prog=prog, description=description)


def _run(argv: list[str], prog: str = 'ccl-timm run') -> int:
    if not argv or argv[0] in ('-h', '--help'):
        print(f'usage: {prog} SCRIPT ...   runs a timm script by path, with our models and losses in place')
        return 0
    if not os.path.isfile(argv[0]):
        raise UserError(f"There is no script '{argv[0]}'.")
    from ccl_timm.cli.launch import run_script

    return run_script(argv[0], argv[1:])


def _train(argv: list[str], prog: str) -> int:
    from ccl_timm.training import train

    return train.main(argv, prog)


def _validate(argv: list[str], prog: str) -> int:
    from ccl_timm.training import evaluation

    return evaluation.main(argv, prog)


def _predict(argv: list[str], prog: str) -> int:
    from ccl_timm.training import prediction

    return prediction.main(argv, prog)


def _bench(argv: list[str], prog: str) -> int:
    from ccl_timm.experiments import bench

    return bench.main(argv, prog)


def _export(argv: list[str], prog: str) -> int:
    parser = _parser(prog, 'Write a trained model for use elsewhere.')
    parser.add_argument('source', metavar='RUN', help='folder of a run, or a checkpoint file')
    parser.add_argument('folder', metavar='DIR', help='where to write')
    parser.add_argument('--use-ema', action='store_true', help='the moving average of the weights')
    parser.add_argument(
        '--format', default='timm', choices=('timm', 'onnx'), help='safetensors and config.json, or ONNX'
    )
    args = parser.parse_strictly(argv)
    from ccl_timm.hub.publish import export

    for path in export(args.source, args.folder, args.use_ema, args.format):
        print(path)
    if args.format == 'timm':
        print(f'load it: import ccl_timm; ccl_timm.create_model({f"local-dir:{args.folder}"!r}, pretrained=True)')
    return 0


def _push(argv: list[str], prog: str) -> int:
    parser = _parser(prog, 'Put a trained model on the Hugging Face Hub: weights, config, card, settings, results.')
    _add_card_words(parser, required=True)
    parser.add_argument('--private', action='store_true', help='only you see the repository, if it is new')
    parser.add_argument('--revision', default=None, metavar='BRANCH', help='default: main; made if there is none')
    parser.add_argument('--replace-card', action='store_true', help='write over a card that was edited by hand, too')
    parser.add_argument('--dry-run', action='store_true', help='say what would go up, and send nothing')
    args = parser.parse_strictly(argv)
    from ccl_timm.hub.publish import push

    address = push(**vars(args))
    if address:
        print(address)
        print(f"load it: import ccl_timm; ccl_timm.create_model('hf-hub:{args.repo_id}', pretrained=True)")
    return 0


def _card(argv: list[str], prog: str) -> int:
    parser = _parser(prog, 'Print the model card that `ccl-timm push` would send with a run.')
    _add_card_words(parser, required=False)
    parser.add_argument('-o', '--output', default='', metavar='DIR', help='write it here, with what it is written from')
    args = parser.parse_strictly(argv)
    from ccl_timm.hub import publish

    print(publish.write_card(**vars(args)), end='')
    return 0


def _add_card_words(parser, required: bool) -> None:
    parser.add_argument('source', metavar='RUN', help='folder of a run, or a checkpoint file in one')
    parser.add_argument('--repo-id', required=required, default=None, metavar='OWNER/NAME', help='the repository')
    parser.add_argument('--use-ema', action='store_true', help='the moving average of the weights')
    parser.add_argument('--baseline', default=None, metavar='RUN', help='the same recipe with --loss ce, for the card')
    parser.add_argument('--license', default='apache-2.0', metavar='NAME', help='of the weights')


def _data(argv: list[str], prog: str) -> int:
    from ccl_timm.data import prepare

    return prepare.main(argv, prog)


def _losses(argv: list[str], prog: str) -> int:
    parser = _parser(prog, 'List the losses, or explain one.')
    parser.add_argument('name', nargs='?', default=None, metavar='NAME', help='explain this one')
    args = parser.parse_strictly(argv)
    from ccl_timm import losses
    from ccl_timm.console import table

    print(losses.explain(args.name) if args.name else table(*losses.overview()))
    return 0


def _models(argv: list[str], prog: str) -> int:
    parser = _parser(prog, 'List our models: timm backbones with another classifier.')
    parser.add_argument('pattern', nargs='?', default='*', metavar='PATTERN', help="such as '*_cam'; also of plugins")
    args = parser.parse_strictly(argv)
    from ccl_timm import losses, models
    from ccl_timm.console import table

    rows = [
        (name, f'{size / 1e6:.1f} M', ', '.join(losses.losses_for(head, outputs)))
        for name, size, head, outputs in models.overview(args.pattern)
    ]
    if not rows:
        raise UserError(f"No model of ours matches '{args.pattern}'; any <timm architecture>_<head> works by its name.")
    print(table(rows, ('name', 'parameters', 'losses')))
    print('\nAny other timm architecture by its name too, such as convnext_tiny_cam.')
    return 0


def _recipes(argv: list[str], prog: str) -> int:
    parser = _parser(prog, 'List the packaged recipes, or print one.')
    parser.add_argument('name', nargs='?', default=None, metavar='NAME', help='print this one')
    args = parser.parse_strictly(argv)
    from ccl_timm.console import table
    from ccl_timm.experiments import tables
    from ccl_timm.training import recipes

    if args.name:
        print(recipes.find_recipe(args.name).read_text(encoding='utf-8'))
        return 0
    rows = []
    for name in recipes.list_recipes():
        title, data = recipes.describe(name)
        served = [f'{own.name} ({len(own.rows)})' for own in tables.tables_of(name)]
        rows.append((name, title, data, ', '.join(served) or '-'))
    print(table(rows, ('name', 'what', 'data', 'tables (rows)')))
    return 0


def _reproduce(argv: list[str], prog: str) -> int:
    from ccl_timm.experiments import reproduce

    return reproduce.main(argv, prog)


def _compare(argv: list[str], prog: str) -> int:
    from ccl_timm.experiments import compare

    return compare.main(argv, prog)


def _report(argv: list[str], prog: str) -> int:
    from ccl_timm.experiments import report

    return report.main(argv, prog)


def _features(argv: list[str], prog: str) -> int:
    from ccl_timm.experiments import features

    return features.main(argv, prog)


def _plugins(argv: list[str], prog: str) -> int:
    parser = _parser(prog, 'List the losses, heads and models of other packages.')
    parser.add_argument('--check', action='store_true', help='load each and check it; exit code 1 if one fails')
    parser.add_argument('--json', action='store_true', help='as JSON')
    args = parser.parse_strictly(argv)
    from ccl_timm import losses, models, registry
    from ccl_timm.console import table
    from ccl_timm.testing import try_loss, try_model

    def check(kind: str, name: str) -> None:
        try_loss(name) if kind == 'loss' else try_model(name if kind == 'model' else f'test_resnet_{name}')

    def taken(kind: str, name: str) -> str | None:
        return {'model': models.name_owner, 'loss': losses.name_owner}.get(kind, lambda name: None)(name)

    rows = registry.describe(check=check if args.check else None, owner=taken)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print('no plugins installed; `ccl-timm new-plugin DIR` writes one to start from')
    else:
        header = ('kind', 'name', 'distribution', 'version', 'value', 'state')
        print(table([tuple(str(row[key] or '') for key in header) for row in rows], header))
        print(''.join(f'\n{row["kind"]} {row["name"]}: {row["error"]}' for row in rows if row['error']), end='')
    return int(args.check and any(row['state'] in ('broken', 'clash') for row in rows))


def _new_plugin(argv: list[str], prog: str) -> int:
    parser = _parser(prog, 'Write a small plug-in package, with a loss, a head and a model, to start from.')
    parser.add_argument('folder', metavar='DIR', help='a new folder; the package takes its name')
    args = parser.parse_strictly(argv)
    from ccl_timm.cli.new_plugin import scaffold_plugin

    for path in scaffold_plugin(args.folder):
        print(path)
    print(f'next: pip install -e {args.folder} && ccl-timm plugins --check')
    return 0


_COMMANDS: dict[str, tuple[Callable[[list[str], str], int], str]] = {
    'train': (_train, 'train; the same as `timm train.py` without such a file'),
    'validate': (_validate, 'evaluate a run'),
    'predict': (_predict, 'classify images'),
    'bench': (_bench, 'time losses, training steps and loaders, as ratios'),
    'export': (_export, 'write a trained model as safetensors and config.json, or as ONNX'),
    'push': (_push, 'put a trained model on the Hugging Face Hub'),
    'card': (_card, "print a run's model card"),
    'run': (_run, "run a timm script, such as timm's own train.py, with our models and losses"),
    'data': (_data, 'prepare, check or split a folder of images'),
    'losses': (_losses, 'list the losses, or explain one'),
    'models': (_models, 'list our models, with parameters and the losses made for them'),
    'recipes': (_recipes, 'list the packaged recipes, or print one'),
    'reproduce': (_reproduce, "run rows of the papers' tables and ours, or tell what that takes"),
    'compare': (_compare, 'compare losses with cross-entropy on your own images'),
    'report': (_report, "put runs into the papers' tables and ours, with tests and pictures, or tell two runs apart"),
    'features': (_features, "draw a model's features, attention and confusion"),
    'plugins': (_plugins, 'list models and losses of other packages'),
    'new-plugin': (_new_plugin, 'write a plugin package to start from'),
}

_TIMM_USAGE = """\
usage: timm SCRIPT ...

  timm path/to/train.py ...   runs that script of timm's, unmodified, with our models and losses in place
  timm train.py ...           without such a file: the built-in script; `timm train.py --help` lists its flags
  timm validate.py RUN        likewise
  timm --nproc N SCRIPT ...   the same on N processes of this machine, one for each device

`ccl-timm --help` lists the other commands."""
