"""Runs a timm script, unmodified, with our models and losses in place."""

import argparse
import contextlib
import importlib.util
import logging
import os
import runpy
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import timm.data
import timm.task
import timm.task.classification
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ccl_timm import losses, models
from ccl_timm.console import ERROR_MARK, log_error, log_info, log_warning
from ccl_timm.console.arguments import KeyValues, Parser, integer
from ccl_timm.data import loaders
from ccl_timm.errors import UserError
from ccl_timm.task import LossTask
from ccl_timm.training import recipes
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.yaml_files import dump_yaml

__all__ = ['run_on_processes', 'run_script']

# settings of ours that a foreign script can have, those that only describe a recipe, and those that are refused
_OWN = TrainConfig.names(own=True)
_HONOURED = ('loss', 'loss_kwargs', 'pad_crop')
_IGNORED = (*recipes.DESCRIPTIVE, 'class_names')
_REFUSED = tuple(key for key in _OWN if key not in (*_HONOURED, *_IGNORED))
_NEEDED = ('ClassificationTask', '_parse_args', 'main', 'parser')


def run_script(script: str, argv: list[str]) -> int:
    """Run a timm script by path, as ``python SCRIPT ...`` would, with plugins' models registered.

    If a loss of ours is named, by ``--loss`` or in the recipe, timm's ClassificationTask is replaced by
    :class:`LossTask` while the script runs. timm's own losses pass through untouched.

    Raises:
        UserError: the script cannot take the loss, or a combination with it makes no sense.
    """
    path = Path(script).resolve()
    log_info(f'running {script} with timm {timm.__version__}')
    _warn_of_other_timm(path)
    with tempfile.TemporaryDirectory() as scratch:
        own, rest = _split_args(argv, Path(scratch))
        _register_models(rest, own)
        passed = _script_args(path, own)
        if passed is not None:
            with _as_argv(path, [*rest, *passed]), _pad_crop(own.pad_crop):
                runpy.run_path(str(path), run_name='__main__')
        else:
            losses.loss_options(own.loss)  # an unknown loss is reported before anything runs
            with _as_argv(path, rest), _pad_crop(own.pad_crop):
                _run_with_loss(path, own)
    return 0


def run_on_processes(count: int, argv: list[str]) -> int:
    """Run a command on several processes, as ``torchrun --nproc-per-node COUNT -m ccl_timm ARGV`` does.

    Args:
        count: processes, on this machine.
        argv: what follows `ccl-timm`.

    Returns:
        0, or the exit code of the first process that failed, which logged why; after a signal 128 plus its number.
    """
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)  # the process has logged it
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, torch.get_num_threads() // count)))
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend='c10d',
            rdzv_endpoint='localhost:0',
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)('-m', 'ccl_timm', *argv)
        except SignalException as stop:
            return 128 + stop.sigval
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            if code < 0 and not any(Path(logs).rglob(ERROR_MARK)):  # killed, so that it could not log why
                log_error(f'A process was killed by {signal.Signals(-code).name}; the others were stopped.')
            return code if code > 0 else 128 - code
    return 0


def _script_args(path: Path, own: argparse.Namespace) -> list[str] | None:
    """How the script itself gets its loss, if it is one of timm's that it knows; None for a loss that we put in."""
    if own.loss is None:
        return []
    if own.loss not in timm.loss.LOSS_TYPES:
        return None
    if own.loss_kwargs:
        raise UserError(f"--loss-kwargs belong to our losses: for timm's '{own.loss}' give the script's own flags.")
    if "'--loss'" in path.read_text(encoding='utf-8'):
        return ['--loss', own.loss]
    return [] if own.loss == 'ce' else None  # an older script trains cross-entropy and knows no names


def _split_args(argv: list[str], scratch: Path) -> tuple[argparse.Namespace, list[str]]:
    """Take our own settings out of argv and out of the recipe; the script gets a copy of it without them."""
    parser = Parser(prog='ccl-timm run', add_help=False)
    parser.add_argument('--loss', default=None)
    parser.add_argument('--loss-kwargs', nargs='*', default=None, action=KeyValues)
    parser.add_argument('--pad-crop', type=integer(0), default=None)
    # a stock script takes abbreviations of --config, which must not get past us
    parser.add_argument('-c', '--config', *(f'--{"config"[:n]}' for n in range(1, 6)), dest='config', default=None)
    own, rest = parser.parse_known_args(argv)
    recipe: dict[str, Any] = {}
    own.model = None
    if own.config:
        recipe = recipes.read_recipe(recipes.find_recipe(own.config))
        own.model = _typed_model(rest) or recipe.get('model')
        classes = _typed(rest, '--num-classes', type=int)
        recipe = recipes.split_options(recipe, own.loss, own.model, classes)
        _refuse_builtin_only(recipe, own.config)
        recipes.check_modules(recipe, _typed(rest, '--device-modules', nargs='*'), own.config)
        copy = scratch / 'recipe.yaml'
        kept = {key: value for key, value in recipe.items() if key not in (*_OWN, *_IGNORED)}
        if kept.get('device') == 'auto':  # the built-in script's
            del kept['device']
        copy.write_text(dump_yaml(kept), encoding='utf-8')
        rest = ['--config', str(copy), *rest]
    for key in _HONOURED:
        if getattr(own, key) is None:
            setattr(own, key, recipe.get(key))
    return own, rest


def _refuse_builtin_only(recipe: dict[str, Any], name: str) -> None:
    for key in _REFUSED:
        if recipe.get(key) not in (None, TrainConfig.defaults()[key]):
            raise UserError(f"Recipe {name}: '{key}' works in the built-in script only, `ccl-timm train`.")
    if recipe.get('dataset') == 'digits':
        raise UserError(
            f'Recipe {name}: the embedded digits work in the built-in script only. For this one, write them as a '
            'folder: `ccl-timm data digits DIR`, and give --dataset "" --data-dir DIR.'
        )


def _register_models(rest: list[str], own: argparse.Namespace) -> None:
    """Load the plugin that has the model, and only that."""
    name = _typed_model(rest) or own.model
    if name and not name.endswith(('.txt', '.csv')) and not set(name) & set('*?'):  # lists and patterns of benchmark.py
        models.ensure_registered(name)


def _typed_model(argv: list[str]) -> str | None:
    return _typed(argv, '--model', '-m')


def _typed(argv: list[str], *flags: str, **kwargs: Any) -> Any:
    """The value of one flag of a script's; None without it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*flags, dest='value', default=None, **kwargs)
    return parser.parse_known_args(argv)[0].value


@contextlib.contextmanager
def _as_argv(path: Path, argv: list[str]) -> Iterator[None]:
    before, before_path = sys.argv, list(sys.path)
    sys.argv = [str(path), *argv]
    sys.path.insert(0, str(path.parent))
    try:
        yield
    finally:
        sys.argv = before
        sys.path[:] = before_path


@contextlib.contextmanager
def _pad_crop(pixels: int | None) -> Iterator[None]:
    """While it lasts, timm's create_loader pads and crops in training."""
    if not pixels:
        yield
        return
    before = timm.data.create_loader

    def create_loader(*args: Any, **kwargs: Any):
        return loaders.create_loader(*args, pad_crop=pixels, make=before, **kwargs)

    timm.data.create_loader = create_loader
    try:
        yield
    finally:
        timm.data.create_loader = before


def _run_with_loss(path: Path, own: argparse.Namespace) -> None:
    spec: dict[str, Any] = {}
    built = []

    class ScriptTask(LossTask):
        """What the script builds in the belief that it is timm's ClassificationTask."""

        def __init__(self, model, criterion=None, criterion_kwargs=None, device=None, dtype=None, verbose=True):
            super().__init__(model, own.loss, device=device, dtype=dtype, verbose=verbose, **spec)
            self.follow_timm_script()
            built.append(self)
            if verbose:
                log_info(f"loss '{own.loss}' {spec or ''} on {type(model.get_classifier()).__name__}")

    before = timm.task.ClassificationTask
    timm.task.ClassificationTask = timm.task.classification.ClassificationTask = ScriptTask
    try:
        script = _load(path, ScriptTask)
        script._parse_args = _wrapped_parse_args(script, own, spec)
        if not torch.accelerator.is_available():
            script.parser.set_defaults(device='cpu')
        script.main()
    finally:
        timm.task.ClassificationTask = timm.task.classification.ClassificationTask = before
        sys.modules.pop('train', None)
    if not built:
        raise UserError(f"{path} never built its training task: the loss '{own.loss}' was not used.")


def _load(path: Path, task: type) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location('train', path)
    script = importlib.util.module_from_spec(module_spec)
    sys.modules['train'] = script  # worker processes and pickles look it up by this name
    module_spec.loader.exec_module(script)
    missing = [name for name in _NEEDED if not hasattr(script, name)]
    if missing or script.ClassificationTask is not task:
        what = f'has no {", ".join(missing)}' if missing else 'brings its own ClassificationTask'
        raise UserError(
            f'{path} cannot take a loss of ours: it {what}. It must be a train.py of timm 1.0.31 or later; '
            '`ccl-timm train` runs the built-in script.'
        )
    return script


def _wrapped_parse_args(script: ModuleType, own: argparse.Namespace, spec: dict[str, Any]):
    """The script's own parsing, then refusal of what cannot be combined, and our settings for its args.yaml."""
    original = script._parse_args

    def parse_args():
        args, _ = original()
        _refuse_combinations(args, own.loss)
        mixes = any(getattr(args, name, None) for name in ('mixup', 'cutmix', 'cutmix_minmax'))
        if mixes and not losses.takes_soft_targets(own.loss):
            raise UserError(
                f"Mixup and CutMix make soft targets, which the loss '{own.loss}' does not take: leave them out."
            )
        if 'smoothing' in losses.loss_options(own.loss):
            spec['smoothing'] = 0.0 if mixes else getattr(args, 'smoothing', 0.0)
        spec.update(own.loss_kwargs or {})
        settings = {'loss': own.loss, 'loss_kwargs': dict(own.loss_kwargs or {})}
        modules = {'device_modules': recipes.with_autoload(getattr(args, 'device_modules', None))}
        if own.pad_crop:
            settings['pad_crop'] = own.pad_crop
        text = dump_yaml({**vars(args), **settings, **modules})
        args.plugin_loss = settings  # the checkpoint keeps it; plain types, since resume unpickles nothing else
        return args, text

    return parse_args


def _refuse_combinations(args: argparse.Namespace, loss: str) -> None:
    refused = {
        'jsd_loss': '--jsd-loss',
        'bce_loss': '--bce-loss',
        'kd_model_name': '--kd-model-name (distillation)',
        'naflex_loader': '--naflex-loader',
        'multi_label': '--multi-label',
        'multilabel': '--multilabel',
        'aug_splits': '--aug-splits',
        'head_init_scale': '--head-init-scale',
        'head_init_bias': '--head-init-bias',
    }
    for name, flag in refused.items():
        if getattr(args, name, None):
            raise UserError(f'{flag} cannot be combined with --loss {loss}: leave one of them out.')
    if getattr(args, 'loss', None) not in (None, 'ce'):
        raise UserError(f"Two losses are named, '{args.loss}' and '{loss}': leave one of them out.")


def _warn_of_other_timm(path: Path) -> None:
    version = path.parent / 'timm' / 'version.py'
    if version.is_file():
        beside = runpy.run_path(str(version)).get('__version__')
        if beside != timm.__version__:
            log_warning(f'beside the script lies timm {beside}; the installed timm {timm.__version__} is used')
