"""What the training script tells people: its choices, its progress, its end."""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import torch

from ccl_timm import losses
from ccl_timm.console import is_primary, log_info, log_warning, show_share
from ccl_timm.console.escape import shell_text
from ccl_timm.data.datasets import Splits
from ccl_timm.data.in_memory import InMemoryLoader
from ccl_timm.training.settings import global_batch, loss_settings

if TYPE_CHECKING:
    from ccl_timm.training.trainer import Run

_MUCH_WAITING = 0.3  # of a step
_IMBALANCE = 10  # largest class to smallest

__all__ = ['log_config', 'log_result', 'log_epoch', 'log_eta', 'warn_zero_terms']


def log_config(run: 'Run', splits: Splits, sources: dict[str, str]) -> None:
    """One block with what was chosen, and whether it was typed, from the recipe or a default."""
    args, loss = run.args, run.task.loss
    model = run.task.get_eval_model()
    counts = splits.counts or [0]
    values = ', '.join(f'{k}={v}' for k, v in vars(loss).items() if isinstance(v, (int, float, str)) and k in
                       losses.loss_options(args.loss))  # fmt: skip
    start = 'pretrained' if args.pretrained or args.pretrained_path else 'from scratch'
    start = f'weights of {args.initial_checkpoint}' if args.initial_checkpoint else start
    batch = global_batch(args)
    layout = 'channels last' if run.memory_format == torch.channels_last else 'contiguous'
    layout += ', kernels cropped to small images' if run.cropped else ''
    share = f' ({show_share(args.train_fraction)} of its part)' if args.train_fraction else ''
    memory = 'in memory' if isinstance(run.loader, InMemoryLoader) else f'read by {args.workers} workers'
    rows = [
        ('model', f'{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters', 'model'),
        ('head', type(model.get_classifier()).__name__, 'model'),
        ('start', start, 'initial_checkpoint' if args.initial_checkpoint else 'pretrained'),
        ('loss', f'{args.loss} ({values})' if values else args.loss, 'loss'),
        ('smoothing', str(loss_settings(args).get('smoothing', 'not taken by this loss')), 'smoothing'),
        ('data', f'{args.dataset or args.data_dir}, {memory}', 'dataset' if args.dataset else 'data_dir'),
        ('images', f'{len(splits.train)} to train on{share}, {len(splits.validation or [])} to validate on',
         'val_split'),
        ('classes', f'{args.num_classes}, {min(counts)} to {max(counts)} images each', 'num_classes'),
        ('input', 'x'.join(map(str, run.data_config['input_size'])), 'input_size' if args.input_size else 'img_size'),
        ('device', args.device, 'device'),
        ('precision', f'mixed {args.amp_dtype}' if args.amp else 'float32', 'amp'),
        ('layout', layout, 'memory_format'),
        ('batch', f'{batch} = {args.batch_size} x {args.world_size} processes x {args.grad_accum_steps} accumulated',
         'batch_size'),
        ('lr', f'{args.lr:.4g}, {args.opt}, {args.sched}', 'lr' if sources.get('lr') != 'default' else 'lr_base'),
        ('epochs', f'{run.epochs}' + (f', going on after {run.start_epoch}' if run.start_epoch else ''), 'epochs'),
    ]  # fmt: skip
    for name, value, key in rows:
        source = sources.get(key, 'default')
        source = source if source in ('typed', 'default', 'the data') else f'recipe {source}'
        log_info(f'{name:>10}  {value}  [{source}]')
    for note in (*splits.notes, *_cautions(run, counts)):
        log_warning(note)


def _cautions(run: 'Run', counts: list[int]) -> Iterator[str]:
    args = run.args
    if min(counts) and max(counts) > _IMBALANCE * min(counts):
        yield (
            f'classes have {min(counts)} to {max(counts)} images: --class-weight balanced or --samples-per-class, and '
            '--eval-metric macro_top1, count all classes alike.'
        )
    if run.task.loss.uses_batch_statistics and args.grad_accum_steps > 1:
        yield (
            f"loss '{args.loss}' compares the images of a batch, and sees {args.batch_size * args.world_size} at a "
            f'time, not the {global_batch(args)} of {args.grad_accum_steps} accumulated batches.'
        )
    if run.scheduler is not None and args.warmup_epochs >= run.epochs and args.warmup_lr < args.lr:
        highest = args.warmup_lr + (args.lr - args.warmup_lr) * (run.epochs - 1) / args.warmup_epochs
        yield (
            f'the warm-up takes {args.warmup_epochs} epochs, the run {run.epochs}: the learning rate ends near '
            f'{highest:.2g} and does not reach {args.lr:g}; give a shorter --warmup-epochs.'
        )
    batch = global_batch(args)
    if args.lr_batch and args.lr_batch != batch and not args.scale_lr:
        yield (
            f'the learning rate {args.lr:g} is for batches of {args.lr_batch}; for {batch} it would be '
            f'{args.lr * batch / args.lr_batch:g}: --scale-lr takes that.'
        )


def log_eta(run: 'Run', seconds_a_step: float, waiting: float, batches: int) -> None:
    """When training will be done, from the time of the first steps; said once. So is a loader that is too slow.

    Args:
        run: the run.
        seconds_a_step: of a whole step.
        waiting: share of it that is spent on waiting for images, 0..1.
        batches: of an epoch.
    """
    run.logged_eta = True
    if waiting > _MUCH_WAITING and not isinstance(run.loader, InMemoryLoader):
        log_warning(
            f'{waiting:.0%} of each step is spent on waiting for images: more --workers than {run.args.workers}, '
            'smaller images on disk, or --in-memory on may help.'
        )
    left = seconds_a_step * batches * (run.epochs - run.start_epoch)
    end = datetime.now() + timedelta(seconds=left)
    log_info(f'expected to finish at {end:%H:%M} (in {_duration(left)}, plus validation)')


def _duration(seconds: float) -> str:
    for size, unit in ((3600, 'h'), (60, 'min')):
        if seconds >= 1.6 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.0f} s'


def log_epoch(
    run: 'Run', epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float] | None, seconds: float
) -> None:
    """One line an epoch."""
    terms = [f'{name} {value:.4g}' for name, value in train_metrics.items() if name != 'loss']
    shown = f' ({", ".join(terms)})' if len(terms) > 1 else ''
    validation = f'  top-1 {eval_metrics["top1"]:.2f}%  val loss {eval_metrics["loss"]:.4g}' if eval_metrics else ''
    log_info(f'epoch {epoch + 1}/{run.epochs}  loss {train_metrics["loss"]:.4g}{shown}{validation}  {seconds:.1f} s')


def log_result(run: 'Run') -> None:
    """Results to stdout as timm prints them; then, for people, the best and what to do next."""
    if not is_primary():
        return
    metric = run.metric
    ordered = sorted(
        run.results, key=lambda r: r.get('validation', r['train']).get(metric, 0), reverse=run.metric == 'loss'
    )
    print(f'--result\n{json.dumps(ordered[-10:], indent=4)}', flush=True)
    value, epoch = run.best
    if value is not None:
        shown = f'loss {value:.4g}' if metric == 'loss' else f'{metric.replace("top", "top-")} {value:.2f}%'
        log_info(f'best {shown} (epoch {epoch + 1}); the run is in {run.folder}')
    ema = ' --use-ema' if run.task.has_ema() else ''  # the best is that of the moving average
    folder = shell_text([str(run.folder)])
    log_info(f'next: timm validate.py {folder}{ema}')
    log_info(f'      ccl-timm export {folder} DIR{ema}   ccl-timm predict {folder} IMAGES...{ema}')


def warn_zero_terms(run: 'Run', share: dict[str, float]) -> None:
    """Warn, once, of a loss term that was zero in most batches of an epoch.

    Args:
        run: the run.
        share: of the batches in which a term was zero, by name, 0..1.
    """
    loss = run.task.loss
    if run.warned_zero_terms or not loss.uses_batch_statistics or not getattr(loss, 'weight', 1.0):
        return
    for name, zero in share.items():
        if name != 'loss' and zero > 0.5:
            run.warned_zero_terms = True
            reason = ' and had no effect there.'
            if isinstance(loss, losses.CCLoss):  # the one whose term needs pairs
                reason = ': no two images of one class met. A larger --batch-size or --samples-per-class 2 helps.'
            log_warning(f"loss term '{name}' was zero in {zero:.0%} of this epoch's batches{reason}")
