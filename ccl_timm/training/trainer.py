"""The built-in training script: timm's parts and flags, any of our models and losses."""

import argparse
import contextlib
import copy
import errno
import functools
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    CheckpointSaver,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    init_distributed_device,
    random_seed,
    reduce_tensor,
    update_summary,
)

from ccl_timm.console import Progress, is_primary, log_info
from ccl_timm.data import datasets
from ccl_timm.data.loaders import make_loaders, mixes
from ccl_timm.errors import UserError
from ccl_timm.task import LossTask, create_task
from ccl_timm.training import options, run_dir, settings
from ccl_timm.training.checkpoints import build_model
from ccl_timm.training.evaluation import evaluate, pick_device
from ccl_timm.training.folder_lock import FolderLock
from ccl_timm.training.interrupts import Stopped, WholeBatches, stopped_by_signals, uninterrupted
from ccl_timm.training.kernel_cropping import crop_kernels
from ccl_timm.training.logging import log_config, log_epoch, log_eta, log_result, warn_zero_terms
from ccl_timm.training.origin import origin
from ccl_timm.training.trackers import Tracker

__all__ = ['Run', 'main', 'build_run', 'train_step', 'train']

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WARM_STEPS = 3  # the first steps are slow and say nothing about the finishing time
_TIMED_STEPS = 20


@dataclass
class Run:
    """All that the epochs of a run share.

    Attributes:
        metric: what the best checkpoint is best in: ``top1``, ``macro_top1``, ``top5`` or ``loss``.
        memory_format: of the images, and of the model.
        cropped: convolutions that leave out what only meets padding where images are small enough.
        best: its value and epoch so far.
        results: what was measured after each epoch.
    """

    args: argparse.Namespace
    device: torch.device
    folder: Path
    task: LossTask
    optimizer: torch.optim.Optimizer
    loader: Any
    loader_eval: Any
    data_config: dict[str, Any]
    autocast: Any
    scaler: Any
    memory_format: torch.memory_format = torch.contiguous_format
    cropped: int = 0
    tracker: Tracker | None = None
    scheduler: Any = None
    saver: CheckpointSaver | None = None
    epochs: int = 0
    start_epoch: int = 0
    logged_eta: bool = False
    warned_zero_terms: bool = False
    best: tuple[float | None, int | None] = (None, None)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def metric(self) -> str:
        return self.args.eval_metric if self.loader_eval is not None else 'loss'

    def is_measured(self, epoch: int) -> bool:
        """Whether the model is validated and saved after an epoch."""
        return (epoch + 1) % self.args.val_interval == 0 or epoch + 1 == self.epochs

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.loader) // self.args.grad_accum_steps)


def main(argv: list[str], prog: str = 'timm train.py') -> int:
    """Run the script with these words; returns 0, or raises UserError for what the user can mend."""
    args, sources = options.resolve(argv, prog)
    if args.config == 'digits' and sources['config'] != 'typed':
        log_info('No data given: training on the embedded handwritten digits, recipe digits. Yours: --data-dir DIR')
    elif not (args.config or args.pretrained or args.pretrained_path or args.initial_checkpoint or args.resume):
        log_info("hint: this is training from scratch with timm's defaults, which a small folder seldom suffices for; "
            'recipe finetune starts from pretrained weights: --config finetune')  # fmt: skip
    train(args, sources, argv)
    return 0


def train(args: argparse.Namespace, sources: dict[str, str], argv: list[str]) -> Path:
    """Train as the settings say, and return the run's folder.

    Args:
        args: settings, as :func:`ccl_timm.training.options.resolve` returns them.
        sources: where each is from.
        argv: the words typed, for the record.

    Raises:
        UserError: a setting, the data, the model, the loss or the folder does not allow it; nothing is overwritten.
    """
    settings.check_settings(args)
    given = dict(vars(args))  # as given: what is computed from them does not belong into a recipe
    with stopped_by_signals(), FolderLock() as lock:
        folder, checkpoint = run_dir.resolve_run_dir(args, sources, safe_model_name(args.model), lock)
        continues = lock.folder is not None
        with _explained(args, folder):
            run, splits = build_run(args, sources, folder, checkpoint)
            log_config(run, splits, sources)
            if is_primary():
                if not continues:
                    folder = run_dir.create_folder(folder, lock, run_dir.is_named(args, sources))
                run.folder = folder
                given |= {'num_classes': args.num_classes, 'class_names': args.class_names, 'class_map': args.class_map}
                information = {**run_dir.environment(argv, args.device, splits.fingerprint), 'origin': origin(given)}
                run_dir.write_run_files(run.folder, given, information, splits.held_out, continues)
                _start_saver(run, checkpoint, continues)
            _fit(run)
            if run.tracker is not None:
                run.tracker.finish()
    if getattr(args, 'distributed', False):  # not after an error, which this process says before it lets go of others
        torch.distributed.destroy_process_group()
    log_result(run)
    return run.folder


def build_run(
    args: argparse.Namespace, sources: dict[str, str], folder: Path, checkpoint: Path | None = None
) -> tuple[Run, datasets.Splits]:
    """Open the data and build all that a run needs, without writing anything.

    Args:
        args: settings that have been checked; what is computed from them is filled in.
        sources: where each is from; likewise.
        folder: the run's. If it holds a run, its data must be the same.
        checkpoint: to go on from.

    Raises:
        UserError: the data, the model, the loss or the checkpoint does not allow it.
    """
    args.device = pick_device(args.device)
    device = init_distributed_device(args)
    random_seed(args.seed, args.rank)
    if args.deterministic:
        _repeat_exactly()
    else:
        torch.backends.cudnn.benchmark = True  # as timm's train.py; images are of one size
    splits = datasets.create_splits(args, settings.input_channels(args))
    _take_classes(args, splits, sources)
    args.class_weights = settings.class_weights(args, splits.counts, splits.class_names)
    if run_dir.is_run_dir(folder):
        held_out = args.val_fraction is not None
        splits.notes += run_dir.check_same_data(folder, splits.class_names, splits.fingerprint, held_out)
    return _prepare(args, device, folder, splits, checkpoint), splits


def _take_classes(args: argparse.Namespace, splits: datasets.Splits, sources: dict[str, str]) -> None:
    """The number of classes and their names come from the training part."""
    args.class_names = splits.class_names
    args.class_map = ''  # the names say the same, also where that file is not
    if args.num_classes is None:
        sources['num_classes'] = 'the data'
        args.num_classes = len(splits.class_names or splits.counts or []) or None
        if args.num_classes is None:
            raise UserError(f"The data '{args.dataset}' does not tell its classes: give --num-classes N.")


def _prepare(args, device, folder, splits, checkpoint) -> Run:
    """Build model, loss, loaders and optimizer, and take up a checkpoint."""
    model = build_model(vars(args), **settings.weight_settings(args))
    data_config = resolve_data_config(vars(args), model=model)
    memory_format = _memory_format(args, model)
    cropped = crop_kernels(model) if device.type == 'cpu' else 0
    model.to(device, memory_format=memory_format)
    if args.grad_checkpointing:
        with settings.explained(f"--grad-checkpointing does not work with '{args.model}'"):
            model.set_grad_checkpointing(True)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''
        model = convert_sync_batchnorm(model)
    task = create_task(model, args.loss, device=device, **settings.loss_settings(args, args.class_weights))
    size = 'x'.join(map(str, data_config['input_size']))
    with settings.explained(f"'{args.model}' with loss '{args.loss}' cannot take images of {size}"):
        task.dry_run_forward(data_config['input_size'], soft_classes=args.num_classes if mixes(args) else 0)
    if args.batch_size == 1:
        _check_batch_of_one(args, model, data_config['input_size'])
    with settings.explained('The settings of data and augmentation do not work'):
        loader, loader_eval = make_loaders(args, device, data_config, splits)
    args.lr = settings.learning_rate(args)
    with settings.explained(f"The settings of the optimizer '{args.opt}' do not work"):
        optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    autocast, scaler = contextlib.nullcontext, None
    if args.amp:
        autocast = functools.partial(torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype))
        scaler = NativeScaler(device=device.type) if device.type == 'cuda' and args.amp_dtype == 'float16' else None
    parts = (task, optimizer, loader, loader_eval, data_config, autocast, scaler)
    run = Run(args, device, folder, *parts, memory_format=memory_format, cropped=cropped)
    _resume(run, checkpoint)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(device_ids=[device])
    with settings.explained(f"The settings of the schedule '{args.sched}' do not work"):
        _schedule(run, checkpoint)
    task.set_num_updates(run.start_epoch * run.updates_per_epoch)
    return run


def _check_batch_of_one(args: argparse.Namespace, model: torch.nn.Module, size: tuple[int, int, int]) -> None:
    """Raise a UserError if the model cannot be trained on one image at a time, as some batch normalisation cannot."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []), torch.no_grad():
        with settings.explained(f"'{args.model}' cannot be trained with --batch-size 1, give 2 or more"):
            copy.deepcopy(model).train()(torch.randn(1, *size, device=device))


def _resume(run: Run, checkpoint: Path | None) -> None:
    args, task = run.args, run.task
    try:
        if checkpoint:
            optimizer, scaler = (None, None) if args.no_resume_opt else (run.optimizer, run.scaler)
            epoch = resume_task_checkpoint(task, str(checkpoint), optimizer, scaler, log_info=False)
            run.start_epoch = epoch or 0
        if args.model_ema:
            task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
            if checkpoint:
                load_task_ema_checkpoint(task, str(checkpoint))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"'{checkpoint}' does not fit this model, loss and optimizer: {reason}") from error


def _schedule(run: Run, checkpoint: Path | None) -> None:
    args = run.args
    run.scheduler, run.epochs = create_scheduler_v2(
        run.optimizer,
        **scheduler_kwargs(args, decreasing_metric=run.metric == 'loss'),
        updates_per_epoch=run.updates_per_epoch,
    )
    if not run.start_epoch or run.scheduler is None:
        return
    if isinstance(run.scheduler, PlateauLRScheduler):
        _repeat_plateau(run, checkpoint)
    elif args.sched_on_updates:
        run.scheduler.step_update(run.start_epoch * run.updates_per_epoch)
    else:
        run.scheduler.step(run.start_epoch)


def _repeat_plateau(run: Run, checkpoint: Path) -> None:
    """Show the schedule the metrics of all epochs again: its state is in no checkpoint."""
    name = f'{"train" if run.loader_eval is None else "eval"}_{run.metric}'
    rows = run_dir.complete_rows(run_dir.folder_of(checkpoint))
    metrics = {int(row['epoch']): row[name] for row in rows if name in row}
    for epoch in range(run.start_epoch):
        if run.is_measured(epoch) and epoch not in metrics:
            raise UserError(
                f"--sched plateau goes on by the summary.csv beside '{checkpoint}', which has no {name} of epoch "
                f'{epoch + 1}: restore a copy of it, or give another --sched.'
            )
        run.scheduler.step(epoch + 1, metrics.get(epoch) if run.is_measured(epoch) else None)


def _start_saver(run: Run, checkpoint: Path | None, continues: bool) -> None:
    run.saver = CheckpointSaver(
        model=run.task.get_trainable_module(),
        optimizer=run.optimizer,
        args=run.args,
        amp_scaler=run.scaler,
        checkpoint_dir=str(run.folder),
        recovery_dir=str(run.folder),
        decreasing=run.metric == 'loss',
        max_history=run.args.checkpoint_hist,
        task=run.task,
    )
    if continues:
        if checkpoint:
            run_dir.restore_saver(run.saver, checkpoint)
            run.best = (run.saver.best_metric, run.saver.best_epoch)
            run_dir.trim_summary(run.folder, run.start_epoch)
        else:
            (run.folder / 'summary.csv').unlink(missing_ok=True)
    run.tracker = Tracker('wandb' if run.args.log_wandb else run.args.tracker, run.folder, run.args)


def _fit(run: Run) -> None:
    args = run.args
    for epoch in range(run.start_epoch, run.epochs):
        # each epoch's randomness depends on the seed and the epoch only: a resumed run repeats it
        random_seed(args.seed + 1000 * epoch, args.rank)
        if hasattr(run.loader.sampler, 'set_epoch'):
            run.loader.sampler.set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            run.loader.mixup_enabled = False
        if _has_lost_patience(run, epoch):
            break
        started = time.perf_counter()
        train_metrics = _train_epoch(run, epoch)
        if args.distributed and args.dist_bn:
            distribute_bn(run.task.get_trainable_module(), args.world_size, args.dist_bn == 'reduce')
        eval_metrics = metric = None
        if run.is_measured(epoch):
            eval_metrics = _validate(run, epoch)
            metric = (eval_metrics or train_metrics)[run.metric]
            with uninterrupted():
                _record(run, epoch, train_metrics, eval_metrics)
        log_epoch(run, epoch, train_metrics, eval_metrics, time.perf_counter() - started)
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)


def _train_epoch(run: Run, epoch: int) -> dict[str, float]:
    args, task = run.args, run.task
    task.set_epoch(epoch)
    task.get_trainable_module().train()
    run.optimizer.zero_grad()
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=run.device))
    zeros: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=run.device))
    batches = len(run.loader)
    progress = Progress(WholeBatches(run.loader), f'epoch {epoch + 1}/{run.epochs}', args.log_interval)
    started = (time.perf_counter(), 0.0)
    for index, (images, target) in enumerate(progress):
        result = train_step(run, epoch, index, images, target)
        for name, value in result.items():
            if name != 'output':
                sums[name] += value.detach()
                zeros[name] += value.detach() == 0
        if index == _WARM_STEPS:
            started = (time.perf_counter(), progress.waited)
        if not run.logged_eta and index >= min(_TIMED_STEPS, batches - 1) > _WARM_STEPS:
            seconds, waited = time.perf_counter() - started[0], progress.waited - started[1]
            log_eta(run, seconds / (index - _WARM_STEPS), waited / seconds, batches)
        if progress.wants_report:
            loss = (sums['loss'] / (index + 1)).item()
            _check_finite(run, epoch, loss)
            progress.report(f'loss {loss:.4g}  lr {_learning_rate(run):.3g}')
    means = {name: (total / batches).item() for name, total in sums.items()}
    if args.distributed:
        means = {n: reduce_tensor(torch.tensor(v, device=run.device), args.world_size).item() for n, v in means.items()}
    _check_finite(run, epoch, means['loss'])
    warn_zero_terms(run, {name: (count / batches).item() for name, count in zeros.items()})
    return means


def train_step(run: Run, epoch: int, index: int, images: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """One batch: forward, backward, and the optimizer's step when enough batches have been gathered."""
    args, task = run.args, run.task
    batches, accumulate = len(run.loader), args.grad_accum_steps
    update = (index + 1) % accumulate == 0 or index + 1 == batches
    remainder = batches % accumulate
    gathered = remainder if remainder and index >= batches - remainder else accumulate
    images = images.contiguous(memory_format=run.memory_format)
    with contextlib.nullcontext() if update else task.no_sync():
        with run.autocast():
            result = task(images, target)
        _backward(run, result['loss'] / gathered, update)
    if update:
        run.optimizer.zero_grad()
        updates = epoch * run.updates_per_epoch + index // accumulate + 1
        task.update_ema(step=updates)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=updates)
    return result


def _backward(run: Run, loss: torch.Tensor, update: bool) -> None:
    args = run.args
    parameters = None
    if args.clip_grad is not None:
        parameters = run.task.get_clip_parameters(exclude_head=args.clip_mode == 'agc')
    if run.scaler is not None:
        clip = dict(clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters)
        run.scaler(loss, run.optimizer, need_update=update, **clip)
        return
    loss.backward()
    if update:
        if args.clip_grad is not None:
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        run.optimizer.step()


def _validate(run: Run, epoch: int) -> dict[str, float] | None:
    if run.loader_eval is None:
        return None
    args = run.args
    shared = (run.loader_eval, run.device, run.autocast, run.memory_format)
    metrics = evaluate(run.task.get_eval_model(), *shared, log_interval=args.log_interval).metrics
    if run.task.has_ema():
        if args.distributed and args.dist_bn:
            distribute_bn(run.task.get_trainable_module(ema=True), args.world_size, args.dist_bn == 'reduce')
        metrics = evaluate(run.task.get_eval_model(ema=True), *shared, 'validation (EMA)', args.log_interval).metrics
    _check_finite(run, epoch, metrics['loss'], 'validation loss')
    return metrics


def _record(run: Run, epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float] | None) -> None:
    run.results.append({'epoch': epoch, 'train': train_metrics})
    if eval_metrics:
        run.results[-1]['validation'] = eval_metrics
    if run.saver is None:
        return
    update_summary(
        epoch,
        train_metrics,
        eval_metrics,
        filename=str(run.folder / 'summary.csv'),
        lr=_learning_rate(run),
    )
    run.tracker.log(epoch, {'train': {**train_metrics, 'lr': _learning_rate(run)}, 'eval': eval_metrics})
    run.best = run.saver.save_checkpoint(epoch, metric=(eval_metrics or train_metrics)[run.metric])


def _learning_rate(run: Run) -> float:
    rates = [group['lr'] for group in run.optimizer.param_groups]
    return sum(rates) / len(rates)


def _check_finite(run: Run, epoch: int, loss: float, name: str = 'loss') -> None:
    if not math.isfinite(loss):
        raise UserError(
            f'The {name} became {loss} in epoch {epoch + 1}: lower the learning rate (now {_learning_rate(run):.3g}) '
            f'or clip gradients with --clip-grad 1. Checkpoints of earlier epochs are in {run.folder}.'
        )


def _memory_format(args: argparse.Namespace, model: torch.nn.Module) -> torch.memory_format:
    """Channels last where --channels-last says so, or where it is known to be faster: convolutions on a CPU."""
    if args.memory_format == 'auto':
        convolves = any(isinstance(m, torch.nn.Conv2d) and m.kernel_size != m.stride for m in model.modules())
        fast = convolves and args.device == 'cpu'
    else:
        fast = args.memory_format == 'channels_last'
    return torch.channels_last if fast or args.channels_last else torch.contiguous_format


def _repeat_exactly() -> None:
    """Let torch take no algorithm whose results differ from run to run."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # without it torch refuses cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _has_lost_patience(run: Run, epoch: int) -> bool:
    """Whether --patience epochs have passed without a better checkpoint; the same on every process."""
    if run.args.patience is None:
        return False
    over = run.best[1] is not None and epoch - run.best[1] > run.args.patience
    if run.args.distributed:  # only the first process saves, and knows the best
        flag = torch.tensor(float(over), device=run.device)
        torch.distributed.broadcast(flag, 0)
        over = bool(flag)
    if over:
        log_info(f'no better {run.metric} for {run.args.patience} epochs: stopping after epoch {epoch}')
    return over


@contextlib.contextmanager
def _explained(args: argparse.Namespace, folder: Path) -> Iterator[None]:
    """Say why a run ends, where neither the settings nor this package are to blame."""
    try:
        yield
    except KeyboardInterrupt as stop:
        log_info(f'stopped by {stop}' if isinstance(stop, Stopped) else 'stopped by hand')
        raise
    except (OSError, RuntimeError) as error:
        reason = _reason(error, args, folder)
        if reason is None:
            raise
        raise UserError(reason) from error


def _reason(error: OSError | RuntimeError, args: argparse.Namespace, folder: Path) -> str | None:
    text = str(error)
    go_on = f'--resume auto goes on with the checkpoints in {folder}' if args.experiment else f'checkpoints: {folder}'
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            f'Out of memory on {args.device} with batches of {args.batch_size}: give --batch-size '
            f'{max(1, args.batch_size // 2)} --grad-accum-steps {2 * args.grad_accum_steps}; --amp, '
            '--grad-checkpointing and a smaller --img-size help too.'
        )
    if getattr(error, 'errno', None) in _NO_SPACE or 'inline_container' in text or 'PytorchStreamWriter' in text:
        free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
        return f"'{folder}' cannot be written, with {free / 1e6:,.0f} MB free on its disk: make room. {go_on}."
    if 'DataLoader worker' in text:
        return f'A process that reads images was killed, perhaps for lack of memory: give fewer --workers. {go_on}.'
    if isinstance(error, torch.distributed.DistError) or 'gloo' in text:
        return f'Another process of this run has ended, or cannot be reached. {go_on}.'
    return None
