"""The training loop: timm's optimizers, schedulers and savers around any of our models and losses."""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    CheckpointSaver,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    random_seed,
    reduce_tensor,
)
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor

from ccl_timm.console import Progress, log_info, log_warning
from ccl_timm.data.datasets import create_splits
from ccl_timm.data.loaders import make_loaders, resolve_preprocessing
from ccl_timm.errors import UserError, user_errors
from ccl_timm.ops import rank, world_size
from ccl_timm.task import create_task
from ccl_timm.training.checkpoint_files import restore_saver
from ccl_timm.training.checkpoints import build_model
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.evaluation import evaluate, pick_device
from ccl_timm.training.frozen import Classifier, check_freezable, feature_loaders, freeze_backbone
from ccl_timm.training.interrupts import WholeBatches, uninterrupted
from ccl_timm.training.kernel_cropping import crop_kernels
from ccl_timm.training.logging import RunLogger
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.setup import (
    Setup,
    class_weights,
    count_classes,
    input_channels,
    learning_rate,
    loss_options,
    mixup_smoothing,
    weight_options,
)
from ccl_timm.training.step_timing import LAYOUTS, Choice, fastest_choice, likely_layout, list_dtypes

__all__ = ['Trainer']

_FUSED = ('adam', 'adamw')  # torch updates their weights in one pass if asked: several times as fast


class Trainer:
    """Everything that the epochs of a run share. Building one opens the data and writes nothing.

    Args:
        config: has been checked.
        run: the run's folder, with the checkpoint to resume from. If it holds a run, its data must be the same.

    Attributes:
        splits: the data.
        setup: what follows from configuration and data.
        task: model and loss.
        epochs: in all.
        start_epoch: the first one to train.
        best: value and epoch of the best checkpoint so far.
        results: what was measured after each epoch.

    Raises:
        UserError: the data, the model, the loss or the checkpoint does not allow it.
    """

    def __init__(self, config: TrainConfig, run: RunDir):
        self.config, self.run = config, run
        self.device = _start_processes(config)
        self.splits = create_splits(config, input_channels(config))
        if run.exists():
            held_out = config.val_fraction is not None
            self.splits.notes += run.check_data(self.splits.class_names, self.splits.fingerprint, held_out)
        self.logger = RunLogger(config)
        self.saver: CheckpointSaver | None = None
        self.best: tuple[float | None, int | None] = (None, None)
        self.results: list[dict[str, Any]] = []
        self._build_task()
        self._build_optimizer()
        self._resume(run.checkpoint)
        if config.torchcompile:
            self.task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
        if world_size() > 1:
            self.task.prepare_distributed(device_ids=[self.device])
        with user_errors(f"The settings of the schedule '{config.sched}' do not work"):
            self._build_schedule(run.checkpoint)
        self.task.set_num_updates(self.start_epoch * self.updates_per_epoch)

    @property
    def metric(self) -> str:
        """What the best checkpoint is best in: ``top1``, ``macro_top1``, ``top5`` or ``loss``."""
        return self.config.eval_metric if self.loader_eval is not None else 'loss'

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return -(-len(self.loader) // self.config.grad_accum_steps)

    @property
    def lr(self) -> float:
        """The current learning rate, the mean over the optimizer's groups."""
        rates = [group['lr'] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def is_measured(self, epoch: int) -> bool:
        """Whether the model is validated and saved after an epoch."""
        return (epoch + 1) % self.config.val_interval == 0 or epoch + 1 == self.epochs

    def fit(self) -> None:
        """Train, validate and save, epoch after epoch."""
        for epoch in range(self.start_epoch, self.epochs):
            self._begin_epoch(epoch)
            if self._has_lost_patience(epoch):
                break
            started = time.perf_counter()
            train_metrics = self.train_epoch(epoch)
            eval_metrics = metric = None
            if self.is_measured(epoch):
                eval_metrics = self.evaluate(epoch)
                metric = (eval_metrics or train_metrics)[self.metric]
                with uninterrupted():
                    self._record(epoch, train_metrics, eval_metrics)
            self.logger.on_epoch(self, epoch, train_metrics, eval_metrics, time.perf_counter() - started)
            if self.scheduler is not None:
                self.scheduler.step(epoch + 1, metric)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch; returns the means of the loss and its components over all batches and processes."""
        self.task.set_epoch(epoch)
        self.task.get_trainable_module().train()
        self.optimizer.zero_grad()
        meter = _Meter(self.device)
        progress = Progress(WholeBatches(self.loader), f'epoch {epoch + 1}/{self.epochs}', self.config.log_interval)
        for index, (images, target) in enumerate(progress):
            meter.update(self.train_step(epoch, index, images, target))
            self.logger.on_step(self, index, progress)
            if progress.wants_report:
                self._check_finite(epoch, meter.loss)
                progress.report(f'loss {meter.loss:.4g}  lr {self.lr:.3g}')
        self._average_batch_norm()
        means = meter.means()
        self._check_finite(epoch, means['loss'])
        self.logger.warn_zero_terms(self, meter.zero_shares())
        return means

    def train_step(self, epoch: int, index: int, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One batch: forward, backward, and the optimizer's step when enough batches have been accumulated."""
        batches, accumulate = len(self.loader), self.config.grad_accum_steps
        update = (index + 1) % accumulate == 0 or index + 1 == batches
        remainder = batches % accumulate
        accumulated = remainder if remainder and index >= batches - remainder else accumulate
        images = images.contiguous(memory_format=self.setup.memory_format)
        with contextlib.nullcontext() if update else self.task.no_sync():
            with self.autocast():
                result = self.task(images, target)
            self._backward(result['loss'] / accumulated, update)
        if update:
            self.optimizer.zero_grad()
            updates = epoch * self.updates_per_epoch + index // accumulate + 1
            self.task.update_ema(step=updates)
            if self.scheduler is not None:
                self.scheduler.step_update(num_updates=updates)
        return result

    def evaluate(self, epoch: int) -> dict[str, float] | None:
        """Validate the model, and its moving average, whose values count, if there is one; None without a split."""
        if self.loader_eval is None:
            return None
        shared = (self.loader_eval, self.device, self.autocast, self.setup.memory_format)
        interval = self.config.log_interval
        metrics = evaluate(self.eval_model(), *shared, log_interval=interval).metrics
        if self.task.has_ema():
            self._average_batch_norm(ema=True)
            metrics = evaluate(self.eval_model(ema=True), *shared, 'validation (EMA)', interval).metrics
        self._check_finite(epoch, metrics['loss'], 'validation loss')
        return metrics

    def eval_model(self, ema: bool = False) -> torch.nn.Module:
        """What returns logits of a batch of the loaders."""
        model = self.task.get_eval_model(ema=ema)
        return Classifier(model) if self.config.freeze_backbone else model

    def start_saver(self) -> None:
        """Save checkpoints from now on, ranked with the earlier ones if the run in the folder continues."""
        self.saver = CheckpointSaver(
            model=self.task.get_trainable_module(),
            optimizer=self.optimizer,
            args=self.config.view(**{**self.setup.recorded(self.config), 'lr': self.setup.lr}),
            amp_scaler=self.scaler,
            checkpoint_dir=str(self.run.path),
            recovery_dir=str(self.run.path),
            decreasing=self.metric == 'loss',
            max_history=self.config.checkpoint_hist,
            task=self.task,
        )
        if self.run.resumes and self.run.checkpoint:
            restore_saver(self.saver, self.run.checkpoint)
            self.best = (self.saver.best_metric, self.saver.best_epoch)

    def _build_task(self) -> None:
        """Model, loss, loaders, and the values that follow from them."""
        config = self.config
        num_classes, weights = count_classes(config, self.splits), class_weights(config, self.splits)
        model = build_model({**config.settings(), 'num_classes': num_classes}, **weight_options(config))
        data_config = resolve_preprocessing(model, config.settings())
        memory_format = _memory_format(config, self.device, model)
        cropped = crop_kernels(model) if self.device.type == 'cpu' else 0
        model.to(self.device, memory_format=memory_format)
        if config.grad_checkpointing:
            with user_errors(f"--grad-checkpointing does not work with '{config.model}'"):
                model.set_grad_checkpointing(True)
        if world_size() > 1 and config.sync_bn:
            if self.device.type == 'cpu':
                raise UserError('--sync-bn works on accelerators only: leave it out.')
            model = convert_sync_batchnorm(model)
        self.task = create_task(model, config.loss, device=self.device, **loss_options(config, weights))
        size = data_config['input_size']
        with user_errors(
            f"'{config.model}' with loss '{config.loss}' cannot take images of {'x'.join(map(str, size))}"
        ):
            self.task.dry_run_forward(size, soft_classes=num_classes if config.mixes else 0)
        if config.batch_size == 1:
            _check_batch_of_one(config, model, size)
        memory_format, dtype = self._fastest(memory_format, size)
        model.to(memory_format=memory_format)
        if config.freeze_backbone:
            check_freezable(model, self.task.loss.requires, config.model, config.loss)
            freeze_backbone(model)
        with user_errors('The settings of data and augmentation do not work'):
            if config.freeze_backbone:
                loaders = feature_loaders(config, model, self.device, data_config, self.splits)
                memory_format = torch.contiguous_format  # of features; the backbone keeps its own
                self.task.train_on_features(config.drop)
            else:
                own = dataclasses.replace(config, smoothing=mixup_smoothing(config))
                loaders = make_loaders(own, num_classes, self.device, data_config, self.splits)
        self.loader, self.loader_eval = loaders
        names = self.splits.class_names
        rate = learning_rate(config)
        self.setup = Setup(num_classes, names, data_config, rate, memory_format, dtype, cropped)

    def _fastest(
        self, memory_format: torch.memory_format, size: tuple[int, int, int]
    ) -> tuple[torch.memory_format, str]:
        """Memory layout and precision: the given ones, and of those left open the fastest, if steps can be timed."""
        config, names = self.config, {layout: name for name, layout in LAYOUTS.items()}
        open_dtypes = list_dtypes(self.device) if config.amp and config.amp_dtype == 'auto' else []
        dtype = config.amp_dtype if config.amp and not open_dtypes else 'float32'
        fixed = config.memory_format != 'auto' or config.channels_last or config.deterministic
        # steps of one process among several wait for the others
        can_time = not config.freeze_backbone and world_size() == 1 and hasattr(self.splits.train, '__len__')
        if open_dtypes and (config.deterministic or not can_time):
            raise UserError(
                '--amp auto times steps of one process that trains on images, without --deterministic: give '
                '--amp-dtype float16 or bfloat16.'
            )
        if not can_time or (fixed and not open_dtypes):
            return memory_format, dtype
        facts = {name: getattr(config, name) for name in ('model', 'model_kwargs', 'loss', 'loss_kwargs', 'batch_size')}
        facts |= {'checkpointing': config.grad_checkpointing, 'soft_targets': config.mixes}
        images, before = config.epochs * len(self.splits.train), Choice(names[memory_format], dtype)
        layouts = [before.layout] if fixed else [*LAYOUTS]
        chosen = fastest_choice(self.task, facts, size, images, before, layouts, open_dtypes)
        return LAYOUTS[chosen.layout], chosen.dtype

    def _build_optimizer(self) -> None:
        """Optimizer and precision."""
        config = self.config
        with user_errors(f"The settings of the optimizer '{config.opt}' do not work"):
            options = {**optimizer_kwargs(cfg=config.view(lr=self.setup.lr)), **config.opt_kwargs}
            if config.opt in _FUSED and self.device.type in ('cpu', 'cuda') and not options.get('foreach'):
                options = {'fused': True, **options}
            self.optimizer = create_optimizer_v2(self.task.get_trainable_module(), **options)
        self.autocast, self.scaler = contextlib.nullcontext, None
        if self.setup.dtype != 'float32':
            dtype = getattr(torch, self.setup.dtype)
            self.autocast = functools.partial(torch.autocast, self.device.type, dtype=dtype)
            if self.device.type == 'cuda' and dtype == torch.float16:
                self.scaler = NativeScaler(device=self.device.type)

    def _resume(self, checkpoint: Path | None) -> None:
        config, self.start_epoch = self.config, 0
        with user_errors(f"'{checkpoint}' does not fit this model, loss and optimizer"):
            if checkpoint:
                optimizer, scaler = (None, None) if config.no_resume_opt else (self.optimizer, self.scaler)
                planned = [dict(group) for group in self.optimizer.param_groups]
                epoch = resume_task_checkpoint(self.task, str(checkpoint), optimizer, scaler, log_info=False)
                self.start_epoch = epoch or 0
                self._warn_of_rate(checkpoint)
                self._warn_of_options(checkpoint, planned)
            if config.model_ema:
                self.task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
                if checkpoint:
                    load_task_ema_checkpoint(self.task, str(checkpoint))

    def _warn_of_rate(self, checkpoint: Path) -> None:
        """The learning rate comes with the optimizer's state, which schedules start from."""
        rates = {group.get('initial_lr') for group in self.optimizer.param_groups}
        if len(rates) == 1 and None not in rates and not math.isclose(rate := rates.pop(), self.setup.lr):
            log_warning(
                f"The learning rate is {rate:g}, that of the optimizer in '{checkpoint}', not {self.setup.lr:g}: "
                '--no-resume-opt starts a new one.'
            )

    def _warn_of_options(self, checkpoint: Path, planned: list[dict[str, Any]]) -> None:
        """Weight decay, momentum and the like come with the optimizer's state, too, whatever the settings say."""
        for name in ('weight_decay', 'momentum', 'betas', 'eps'):
            wanted, found = ([group.get(name) for group in groups] for groups in (planned, self.optimizer.param_groups))
            if found != wanted:
                log_warning(
                    f"The optimizer's {name} is {_shown(found)}, that in '{checkpoint}', not {_shown(wanted)}: "
                    '--no-resume-opt starts a new one.'
                )

    def _build_schedule(self, checkpoint: Path | None) -> None:
        options = scheduler_kwargs(self.config.view(lr=self.setup.lr), decreasing_metric=self.metric == 'loss')
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, **options, updates_per_epoch=self.updates_per_epoch
        )
        if self.start_epoch >= self.epochs > 0 and not self.run.resumes:
            raise UserError(
                f"'{checkpoint}' has {self.start_epoch} epochs already, which count among the {self.epochs} of the new "
                'run: give more --epochs.'
            )
        if not self.start_epoch or self.scheduler is None:
            return
        if isinstance(self.scheduler, PlateauLRScheduler):
            self._repeat_plateau(checkpoint)
        elif self.config.sched_on_updates:
            self.scheduler.step_update(self.start_epoch * self.updates_per_epoch)
        else:
            self.scheduler.step(self.start_epoch)

    def _repeat_plateau(self, checkpoint: Path) -> None:
        """Show the schedule the metrics of all epochs again: its state is in no checkpoint."""
        name = f'{"train" if self.loader_eval is None else "eval"}_{self.metric}'
        rows = RunDir.of(checkpoint).rows()
        metrics = {int(row['epoch']): row[name] for row in rows if name in row}
        for epoch in range(self.start_epoch):
            if self.is_measured(epoch) and epoch not in metrics:
                raise UserError(
                    f"--sched plateau resumes with the summary.csv beside '{checkpoint}', which has no {name} of epoch "
                    f'{epoch + 1}: restore a copy of it, or give another --sched.'
                )
            self.scheduler.step(epoch + 1, metrics.get(epoch) if self.is_measured(epoch) else None)

    def _begin_epoch(self, epoch: int) -> None:
        # an epoch's randomness depends on the seed and the epoch alone: a resumed run repeats it
        random_seed(self.config.seed + 1000 * epoch, rank())
        own = getattr(self.optimizer, 'generator', None)  # of adahessian, the same on all processes
        if isinstance(own, torch.Generator):
            own.manual_seed(self.config.seed + 1000 * epoch)
        if hasattr(self.loader.sampler, 'set_epoch'):
            self.loader.sampler.set_epoch(epoch)
        if self.config.mixup_off_epoch and epoch >= self.config.mixup_off_epoch:
            self.loader.mixup_enabled = False

    def _backward(self, loss: Tensor, update: bool) -> None:
        config, parameters = self.config, None
        second_order = getattr(self.optimizer, 'is_second_order', False)  # it differentiates the gradient
        if config.clip_grad is not None:
            parameters = self.task.get_clip_parameters(exclude_head=config.clip_mode == 'agc')
        if self.scaler is not None:
            clip = dict(clip_grad=config.clip_grad, clip_mode=config.clip_mode, parameters=parameters)
            self.scaler(loss, self.optimizer, create_graph=second_order, need_update=update, **clip)
            return
        loss.backward(create_graph=second_order)
        if update:
            if config.clip_grad is not None:
                dispatch_clip_grad(parameters, value=config.clip_grad, mode=config.clip_mode)
            self.optimizer.step()

    def _average_batch_norm(self, ema: bool = False) -> None:
        """Make batch norm statistics the same on all processes."""
        if world_size() > 1 and self.config.dist_bn and not self.config.sync_bn:
            distribute_bn(self.task.get_trainable_module(ema=ema), world_size(), self.config.dist_bn == 'reduce')

    def _record(self, epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float] | None) -> None:
        self.results.append({'epoch': epoch, 'train': train_metrics})
        if eval_metrics:
            self.results[-1]['validation'] = eval_metrics
        if self.saver is None:
            return
        self.run.add_row(epoch, train_metrics, eval_metrics, self.lr)
        self.logger.track(epoch, {'train': {**train_metrics, 'lr': self.lr}, 'eval': eval_metrics})
        self.best = self.saver.save_checkpoint(epoch, metric=(eval_metrics or train_metrics)[self.metric])

    def _check_finite(self, epoch: int, loss: float, name: str = 'loss') -> None:
        if not math.isfinite(loss):
            raise UserError(
                f'The {name} became {loss} in epoch {epoch + 1}: lower the learning rate (now {self.lr:.3g}) '
                f'or clip gradients with --clip-grad 1. Checkpoints of earlier epochs are in {self.run.path}.'
            )

    def _has_lost_patience(self, epoch: int) -> bool:
        """Whether a measured epoch is --patience after the best one; the same on every process."""
        patience, best = self.config.patience, self.best[1]
        if patience is None or not self.is_measured(epoch - 1):
            return False
        over = best is not None and epoch - best > patience
        if world_size() > 1:  # only the first process saves, and knows the best
            flag = torch.tensor(float(over), device=self.device)
            torch.distributed.broadcast(flag, 0)
            over = bool(flag)
        if over:
            log_info(f'no better {self.metric} for {patience} epochs: stopping after epoch {epoch}')
        return over


def _shown(values: list[Any]) -> str:
    """The different ones of the values of an optimizer's groups."""
    return ' and '.join(dict.fromkeys(f'{value:g}' if isinstance(value, float) else str(value) for value in values))


class _Meter:
    """Means of the loss and its components over an epoch."""

    def __init__(self, device: torch.device):
        self._device = device
        self._batches = 0
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        self._zeros: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))

    def update(self, result: dict[str, Tensor]) -> None:
        """Add what the task returned for a batch."""
        self._batches += 1
        for name, value in result.items():
            if name != 'output':
                self._sums[name] += value.detach()
                self._zeros[name] += value.detach() == 0

    @property
    def loss(self) -> float:
        """Mean loss so far, on this process."""
        return (self._sums['loss'] / self._batches).item()

    def means(self) -> dict[str, float]:
        """Mean of each value, over all processes."""
        means = {name: (total / self._batches).item() for name, total in self._sums.items()}
        if world_size() == 1:
            return means
        return {n: reduce_tensor(torch.tensor(v, device=self._device), world_size()).item() for n, v in means.items()}

    def zero_shares(self) -> dict[str, float]:
        """Share of the batches, on this process, in which each value was zero."""
        return {name: (count / self._batches).item() for name, count in self._zeros.items()}


def _start_processes(config: TrainConfig) -> torch.device:
    """Join the other processes if there are some, seed, and return this process's device."""
    name = pick_device(config.device)
    devices = torch.accelerator.device_count()
    if name != 'cpu' and int(os.environ.get('LOCAL_RANK', 0)) >= devices:
        raise UserError(
            f'Each process needs a device of its own, and this machine has {devices}: start no more processes than '
            'that, or give --device cpu.'
        )
    device = torch.device(init_distributed_device_so(name)['device'])
    random_seed(config.seed, rank())
    if config.deterministic:  # torch takes no algorithm whose results differ from run to run
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # without it torch refuses cuBLAS
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True  # as timm's train.py; images are of one size
    return device


def _check_batch_of_one(config: TrainConfig, model: torch.nn.Module, size: tuple[int, int, int]) -> None:
    """Raise a UserError if the model cannot be trained on one image at a time, as some batch normalisation cannot."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []), torch.no_grad():
        with user_errors(f"'{config.model}' cannot be trained with --batch-size 1, give 2 or more"):
            copy.deepcopy(model).train()(torch.randn(1, *size, device=device))


def _memory_format(config: TrainConfig, device: torch.device, model: torch.nn.Module) -> torch.memory_format:
    """The layout that the flags ask for, or else the one that is usually faster."""
    if config.channels_last:
        return torch.channels_last
    return likely_layout(model, device) if config.memory_format == 'auto' else LAYOUTS[config.memory_format]
