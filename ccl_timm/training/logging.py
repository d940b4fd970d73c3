"""What a run shows: its configuration, its progress, its result, and metrics on a tracker."""

import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ccl_timm import losses
from ccl_timm.console import Progress, is_primary, log_info, log_warning, show_duration, show_share
from ccl_timm.console.escape import shell_text
from ccl_timm.data.in_memory import InMemoryLoader
from ccl_timm.heads import Head
from ccl_timm.ops import world_size
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.setup import global_batch, loss_options, mixup_smoothing
from ccl_timm.training.trackers import Tracker

if TYPE_CHECKING:
    from ccl_timm.training.trainer import Trainer

__all__ = ['RunLogger']

_LONG_WAIT = 0.3  # of a step
_IMBALANCE = 10  # largest class to smallest
_WARM_STEPS = 3  # the first steps are slow and do not predict the others
_TIMED_STEPS = 20
_HALF = 0.5  # of the batches of an epoch


class RunLogger:
    """Logs a run: messages to stderr, the result to stdout, metrics to the tracker that the configuration names.

    Args:
        config: the run's.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self._tracker: Tracker | None = None
        self._has_eta = False
        self._warned_zero_terms = self._warned_of_head = False
        self._warm: tuple[float, float] = (0.0, 0.0)  # time and seconds waited for images after the warm-up

    def on_start(self, trainer: 'Trainer') -> None:
        """Log the chosen configuration with the source of each setting, and warn of what may be unintended."""
        for name, value, key in _rows(trainer):
            source = trainer.config.source(key)
            if key == 'num_classes' and trainer.config.num_classes is None:
                source = 'the data'
            shown = {'cli': 'command line', 'default': 'default', 'the data': source}.get(source, f'recipe {source}')
            log_info(f'{name:>10}  {value}  [{shown}]')
        for note in (*trainer.splits.notes, *_cautions(trainer)):
            log_warning(note)

    def start_tracker(self, folder: Path, settings: dict[str, Any]) -> None:
        """Start the tracker, on the first process only."""
        self._tracker = Tracker('wandb' if self.config.log_wandb else self.config.tracker, folder, settings)

    def on_step(self, trainer: 'Trainer', index: int, progress: Progress) -> None:
        """After a step: time the first ones, and log once when training will be done."""
        if self._has_eta:
            return
        if index == _WARM_STEPS:
            self._warm = (time.perf_counter(), progress.waited)
        elif index >= min(_TIMED_STEPS, progress.steps - 1) > _WARM_STEPS:
            self._has_eta = True
            seconds, waited = time.perf_counter() - self._warm[0], progress.waited - self._warm[1]
            self._log_eta(trainer, seconds / (index - _WARM_STEPS), waited / seconds)

    def on_epoch(
        self,
        trainer: 'Trainer',
        epoch: int,
        train_metrics: dict[str, float],
        eval_metrics: dict[str, float] | None,
        seconds: float,
    ) -> None:
        """One line per epoch."""
        terms = [f'{name} {value:.4g}' for name, value in train_metrics.items() if name != 'loss']
        shown = f' ({", ".join(terms)})' if len(terms) > 1 else ''
        validation = f'  top-1 {eval_metrics["top1"]:.2f}%  val loss {eval_metrics["loss"]:.4g}' if eval_metrics else ''
        loss = f'loss {train_metrics["loss"]:.4g}{shown}'
        log_info(f'epoch {epoch + 1}/{trainer.epochs}  {loss}{validation}  {seconds:.1f} s')
        self._warn_of_head(trainer)

    def track(self, epoch: int, metrics: dict[str, dict[str, float] | None]) -> None:
        """Send the metrics of an epoch to the tracker."""
        if self._tracker is not None:
            self._tracker.log(epoch, metrics)

    def finish(self) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._tracker.finish()

    def on_end(self, trainer: 'Trainer') -> None:
        """Results to stdout as timm prints them; to stderr the best one and what to do next."""
        if not is_primary():
            return
        metric = trainer.metric
        ordered = sorted(
            trainer.results, key=lambda r: r.get('validation', r['train']).get(metric, 0), reverse=metric == 'loss'
        )
        print(f'--result\n{json.dumps(ordered[-10:], indent=4)}', flush=True)
        value, epoch = trainer.best
        if value is not None:
            shown = f'loss {value:.4g}' if metric == 'loss' else f'{metric.replace("top", "top-")} {value:.2f}%'
            log_info(f'best {shown} (epoch {epoch + 1}); the run is in {trainer.run.path}')
        ema = ' --use-ema' if trainer.task.has_ema() else ''  # the best is that of the moving average
        folder = shell_text([str(trainer.run.path)])
        split = '' if trainer.loader_eval else ' --split NAME'
        log_info(f'next: timm validate.py {folder}{ema}{split}')
        log_info(f'      ccl-timm export {folder} DIR{ema}   ccl-timm predict {folder} IMAGES...{ema}')

    def warn_zero_terms(self, trainer: 'Trainer', shares: dict[str, float]) -> None:
        """Warn, once, of a loss component that was zero in most batches of an epoch.

        Args:
            trainer: the run.
            shares: of the batches in which a component was zero, by name, 0..1.
        """
        loss = trainer.task.loss
        if self._warned_zero_terms or not loss.uses_batch_statistics or not getattr(loss, 'weight', 1.0):
            return
        for name, zero in shares.items():
            if name != 'loss' and zero > _HALF:
                self._warned_zero_terms = True
                reason = ' and had no effect there.'
                if name == 'cc' and isinstance(loss, losses.CCLoss) and trainer.setup.num_classes > 1:  # it needs pairs
                    reason = ': no two images of one class met. A larger --batch-size or --samples-per-class 2 helps.'
                log_warning(f"loss term '{name}' was zero in {zero:.0%} of this epoch's batches{reason}")

    def _warn_of_head(self, trainer: 'Trainer') -> None:
        """Pass on, once, what the head has to say against the weights that it has got."""
        head = trainer.task.get_eval_model().get_classifier()
        if not self._warned_of_head and isinstance(head, Head) and (caution := head.caution()):
            self._warned_of_head = True
            log_warning(caution)

    def _log_eta(self, trainer: 'Trainer', seconds_per_step: float, waiting: float) -> None:
        """When training will be done; and a warning if a large share of each step is spent waiting for images."""
        if waiting > _LONG_WAIT and not isinstance(trainer.loader, InMemoryLoader):
            log_warning(
                f'{waiting:.0%} of each step is spent on waiting for images: more --workers than '
                f'{self.config.workers}, smaller images on disk, or --in-memory on may help.'
            )
        left = seconds_per_step * len(trainer.loader) * (trainer.epochs - trainer.start_epoch)
        end = datetime.now() + timedelta(seconds=left)
        log_info(f'expected to finish at {end:%H:%M} (in {show_duration(left)}, plus validation)')


def _rows(trainer: 'Trainer') -> list[tuple[str, str, str]]:
    """Name, value, and the setting whose source is shown."""
    config, setup = trainer.config, trainer.setup
    size = 'input_size' if config.input_size else 'img_size'
    layout = 'channels last' if setup.memory_format == torch.channels_last else 'contiguous'
    layout += ', kernels cropped to small images' if setup.cropped else ''
    batch = f'{config.batch_size} x {world_size()} processes x {config.grad_accum_steps} accumulated'
    epochs = f'{trainer.epochs}' + (f', resuming after {trainer.start_epoch}' if trainer.start_epoch else '')
    return [
        *_model_rows(trainer),
        *_data_rows(trainer),
        ('input', 'x'.join(map(str, setup.data_config['input_size'])), size),
        ('device', str(trainer.device), 'device'),
        ('precision', 'float32' if setup.dtype == 'float32' else f'mixed {setup.dtype}', 'amp'),
        ('layout', layout, 'memory_format'),
        ('batch', f'{global_batch(config)} = {batch}', 'batch_size'),
        ('lr', f'{setup.lr:.4g}, {config.opt}, {config.sched}', 'lr' if config.lr is not None else 'lr_base'),
        ('epochs', epochs, 'epochs'),
    ]


def _model_rows(trainer: 'Trainer') -> list[tuple[str, str, str]]:
    config, loss = trainer.config, trainer.task.loss
    model = trainer.task.get_eval_model()
    known = losses.loss_options(config.loss)
    options = {k: v for k, v in vars(loss).items() if isinstance(v, (int, float, str)) and k in known}
    values = [f'{k}={v}' for k, v in {**options, **config.loss_kwargs}.items()]
    start = 'pretrained' if config.pretrained or config.pretrained_path else 'from scratch'
    start = f'weights of {config.initial_checkpoint}' if config.initial_checkpoint else start
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return [
        ('model', f'{config.model}, {size:.1f} M parameters', 'model'),
        ('head', type(model.get_classifier()).__name__, 'model'),
        ('start', start, 'initial_checkpoint' if config.initial_checkpoint else 'pretrained'),
        ('loss', f'{config.loss} ({", ".join(values)})' if values else config.loss, 'loss'),
        ('smoothing', _shown_smoothing(config), 'smoothing'),
    ]


def _shown_smoothing(config: TrainConfig) -> str:
    options = loss_options(config)
    if 'smoothing' not in options:
        return 'not an option of this loss'
    return f"{mixup_smoothing(config)} in Mixup's targets" if config.mixes else str(options['smoothing'])


def _data_rows(trainer: 'Trainer') -> list[tuple[str, str, str]]:
    config, splits = trainer.config, trainer.splits
    counts = splits.counts or [0]
    share = f' ({show_share(config.train_fraction)} of the split)' if config.train_fraction else ''
    memory = 'in memory' if isinstance(trainer.loader, InMemoryLoader) else f'read by {config.workers} workers'
    images = f'{len(splits.train)} to train on{share}, {len(splits.validation or [])} to validate on'
    classes = f'{trainer.setup.num_classes}, {min(counts)} to {max(counts)} images each'
    return [
        ('data', f'{config.dataset or config.data_dir}, {memory}', 'dataset' if config.dataset else 'data_dir'),
        ('images', images, 'val_split'),
        ('classes', classes, 'num_classes'),
    ]


def _cautions(trainer: 'Trainer') -> Iterator[str]:
    config, counts, lr = trainer.config, trainer.splits.counts or [0], trainer.setup.lr
    batch = global_batch(config)
    if min(counts) and max(counts) > _IMBALANCE * min(counts):
        yield (
            f'classes have {min(counts)} to {max(counts)} images: --class-weight balanced or --samples-per-class, and '
            '--eval-metric macro_top1, count all classes alike.'
        )
    if trainer.task.loss.uses_batch_statistics and config.grad_accum_steps > 1:
        yield (
            f"loss '{config.loss}' compares the images of a batch, and sees {config.batch_size * world_size()} at a "
            f'time, not the {batch} of {config.grad_accum_steps} accumulated batches.'
        )
    reached = trainer.epochs if config.sched_on_updates else trainer.epochs - 1  # of warm-up, by the last step
    if trainer.scheduler is not None and config.warmup_epochs > reached and config.warmup_lr < lr:
        highest = config.warmup_lr + (lr - config.warmup_lr) * reached / config.warmup_epochs
        yield (
            f'--warmup-epochs is {config.warmup_epochs}, the run has {trainer.epochs}: the learning rate ends near '
            f'{highest:.2g} and does not reach {lr:g}; give a shorter warm-up.'
        )
    if config.lr_batch and config.lr_batch != batch and not config.scale_lr:
        yield (
            f'the learning rate {lr:g} is for batches of {config.lr_batch}; for {batch} it would be '
            f'{lr * batch / config.lr_batch:g}: --scale-lr scales it.'
        )
