"""The built-in training script: timm's parts and flags, any of our models and losses."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import get_pretrained_cfg, is_model, parse_model_name, safe_model_name
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
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
from timm.utils.summary import trim_summary

from ccl_timm import data, losses, models, options, runs
from ccl_timm.console import Progress, is_primary, say, warn
from ccl_timm.errors import UserError, did_you_mean
from ccl_timm.hub import build_model
from ccl_timm.task import LossTask, create_task
from ccl_timm.validate import evaluate, pick_device

__all__ = ['main', 'train']

_WARM_STEPS = 3  # the first steps are slow and say nothing about the finishing time
_TIMED_STEPS = 20


@dataclass
class _Run:
    """All that the epochs of a run share."""

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
    scheduler: Any = None
    saver: CheckpointSaver | None = None
    epochs: int = 0
    start_epoch: int = 0
    said_finish: bool = False
    said_no_pairs: bool = False
    best: tuple[float | None, int | None] = (None, None)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.loader) // self.args.grad_accum_steps)


def main(argv: list[str], prog: str = 'timm train.py') -> int:
    """Run the script with these words; returns 0, or raises UserError for what the user can mend."""
    args, sources = options.resolve(argv, prog)
    if args.config == 'digits' and sources['config'] != 'typed':
        say('No data named: training on the embedded handwritten digits, with recipe digits. Yours: --data-dir DIR')
    train(args, sources, argv)
    return 0


def train(args: argparse.Namespace, sources: dict[str, str], argv: list[str]) -> Path:
    """Train as the settings say, and return the run's folder.

    Args:
        args: settings, as :func:`ccl_timm.options.resolve` returns them.
        sources: where each is from.
        argv: the words typed, for the record.

    Raises:
        UserError: a setting, the data, the model, the loss or the folder does not allow it; nothing is overwritten.
    """
    for module in args.device_modules or []:
        importlib.import_module(module)
    check_settings(args)
    settings = dict(vars(args))  # as given: what is computed from them does not belong into a recipe
    args.device = pick_device(args.device)
    folder, checkpoint = runs.plan_folder(args, sources, safe_model_name(args.model))
    device = init_distributed_device(args)
    random_seed(args.seed, args.rank)
    splits = data.open_splits(args, _channels(args))
    _take_classes(args, splits, sources)
    run = _prepare(args, device, folder, splits, checkpoint)
    _say_choices(run, splits, sources)
    if is_primary():
        settings |= {'num_classes': args.num_classes, 'class_names': args.class_names}
        information = runs.environment(argv, args.device, splits.fingerprint)
        runs.write_run_files(folder, settings, information, splits.held_out)
        _start_saver(run, checkpoint)
    try:
        _fit(run)
    except KeyboardInterrupt:
        say('stopped by hand')
    except RuntimeError as error:
        _explain_memory(error, args)
        raise
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()
    _say_end(run)
    return folder


def check_settings(args: argparse.Namespace) -> None:
    """Find what cannot work before anything is built.

    Raises:
        UserError: with the setting and the way out.
    """
    models.ensure_registered(args.model)
    known = losses.loss_options(args.loss)
    for key in args.loss_kwargs:
        if key not in known:
            losses.create_loss(args.loss, **{key: args.loss_kwargs[key]})  # raises, with the options there are
    for name in ('batch_size', 'epochs', 'grad_accum_steps', 'val_interval', 'log_interval', 'checkpoint_hist'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} {getattr(args, name)} must be at least 1.')
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f'--val-fraction {args.val_fraction} must lie between 0 and 1, such as 0.2.')
    if not 0 <= args.smoothing < 1:
        raise UserError(f'--smoothing {args.smoothing} must be at least 0 and below 1.')
    if mixes(args) and not losses.takes_soft_targets(args.loss):
        raise UserError(
            f"Mixup and CutMix make soft targets, which the loss '{args.loss}' does not take: "
            'leave out --mixup and --cutmix, or choose another loss.'
        )
    if args.opt.lower() not in list_optimizers():
        raise UserError(f"Unknown optimizer '{args.opt}'{did_you_mean(args.opt, list_optimizers())}")
    if args.log_wandb and importlib.util.find_spec('wandb') is None:
        raise UserError('--log-wandb needs the package wandb: `pip install wandb`.')


def mixes(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _channels(args: argparse.Namespace) -> int:
    source, name = parse_model_name(args.model)
    cfg = get_pretrained_cfg(name) if source is None and is_model(name.split('.')[0]) else None
    return resolve_data_config(vars(args), pretrained_cfg=cfg.to_dict() if cfg else None)['input_size'][0]


def _take_classes(args: argparse.Namespace, splits: data.Splits, sources: dict[str, str]) -> None:
    """The number of classes and their names come from the training part."""
    args.class_names = splits.class_names
    if args.num_classes is None:
        sources['num_classes'] = 'the data'
        args.num_classes = len(splits.class_names or splits.counts or []) or None
        if args.num_classes is None:
            raise UserError(f"The data '{args.dataset}' does not tell its classes: give --num-classes N.")


def _prepare(args, device, folder, splits, checkpoint) -> _Run:
    """Build model, loss, loaders and optimizer, and take up a checkpoint."""
    model = build_model(vars(args), pretrained=args.pretrained, **_weights(args))
    data_config = resolve_data_config(vars(args), model=model)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''
        model = convert_sync_batchnorm(model)
    task = create_task(model, args.loss, device=device, **_loss_options(args))
    loader, loader_eval = _loaders(args, device, data_config, splits)
    _set_learning_rate(args)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    autocast, scaler = contextlib.nullcontext, None
    if args.amp:
        autocast = functools.partial(torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype))
        scaler = NativeScaler(device=device.type) if device.type == 'cuda' and args.amp_dtype == 'float16' else None
    run = _Run(args, device, folder, task, optimizer, loader, loader_eval, data_config, autocast, scaler)
    _resume(run, checkpoint)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(device_ids=[device])
    _schedule(run)
    return run


def _weights(args: argparse.Namespace) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    if args.pretrained_path:
        weights['pretrained_cfg_overlay'] = {'file': args.pretrained_path, 'num_classes': -1}
    if args.initial_checkpoint:
        weights['checkpoint_path'] = args.initial_checkpoint
    for path in (args.pretrained_path, args.initial_checkpoint):
        if path and not Path(path).is_file():
            raise UserError(f"There is no checkpoint '{path}'.")
    return weights


def _loss_options(args: argparse.Namespace) -> dict[str, Any]:
    """The loss's options, with label smoothing where the loss has it and Mixup has not applied it already."""
    known = losses.loss_options(args.loss)
    filled = {'smoothing': 0.0 if mixes(args) else args.smoothing, 'soft_targets': mixes(args)}
    return {**{key: value for key, value in filled.items() if key in known}, **args.loss_kwargs}


def _loaders(args, device, data_config, splits):
    shared = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        # workers that live on carry random state from epoch to epoch, which no checkpoint holds
        persistent_workers=False,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        device=device,
    )
    names = ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob')
    names += ('gaussian_blur_prob', 'no_aug', 'train_crop_mode', 'pad_crop')
    loader = data.create_loader(
        splits.train,
        batch_size=args.batch_size,
        is_training=True,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        auto_augment=args.aa,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        collate_fn=_mixup(args) if mixes(args) else None,
        **{name: getattr(args, name) for name in names},
        **shared,
    )
    if len(loader) == 0:
        raise UserError(
            f'The training part has {len(splits.train)} images, fewer than a batch of {args.batch_size} '
            f'(x {args.world_size} processes): give a smaller --batch-size.'
        )
    if splits.validation is None:
        return loader, None
    return loader, data.create_loader(
        splits.validation,
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **shared,
    )


def _mixup(args: argparse.Namespace) -> FastCollateMixup:
    return FastCollateMixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


def _set_learning_rate(args: argparse.Namespace) -> None:
    """timm's rule: from --lr-base and the global batch, unless --lr is given."""
    if args.lr is not None:
        return
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = _global_batch(args) / args.lr_base_size
    args.lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def _global_batch(args: argparse.Namespace) -> int:
    return args.batch_size * args.world_size * args.grad_accum_steps


def _resume(run: _Run, checkpoint: Path | None) -> None:
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


def _schedule(run: _Run) -> None:
    args = run.args
    run.scheduler, run.epochs = create_scheduler_v2(
        run.optimizer,
        **scheduler_kwargs(args, decreasing_metric=_decreasing(run)),
        updates_per_epoch=run.updates_per_epoch,
    )
    if run.start_epoch and run.scheduler is not None:
        if args.sched_on_updates:
            run.scheduler.step_update(run.start_epoch * run.updates_per_epoch)
        else:
            run.scheduler.step(run.start_epoch)


def _metric(run: _Run) -> str:
    return run.args.eval_metric if run.loader_eval is not None else 'loss'


def _decreasing(run: _Run) -> bool:
    return _metric(run) == 'loss'


def _start_saver(run: _Run, checkpoint: Path | None) -> None:
    run.saver = CheckpointSaver(
        model=run.task.get_trainable_module(),
        optimizer=run.optimizer,
        args=run.args,
        amp_scaler=run.scaler,
        checkpoint_dir=str(run.folder),
        recovery_dir=str(run.folder),
        decreasing=_decreasing(run),
        max_history=run.args.checkpoint_hist,
        task=run.task,
    )
    if checkpoint and checkpoint.parent.resolve() == run.folder.resolve():
        run.saver.load_state_dict_from_checkpoint(str(checkpoint))
        run.best = (run.saver.best_metric, run.saver.best_epoch)
        trim_summary(str(run.folder / 'summary.csv'), run.start_epoch)
    if run.args.log_wandb:
        import wandb

        wandb.init(
            project=run.args.wandb_project,
            name=run.folder.name,
            config=vars(run.args),
            tags=run.args.wandb_tags,
            resume='must' if run.args.wandb_resume_id else None,
            id=run.args.wandb_resume_id or None,
        )


def _fit(run: _Run) -> None:
    args = run.args
    for epoch in range(run.start_epoch, run.epochs):
        # each epoch's randomness depends on the seed and the epoch only: a resumed run repeats it
        random_seed(args.seed + 1000 * epoch, args.rank)
        if hasattr(run.loader.sampler, 'set_epoch'):
            run.loader.sampler.set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            run.loader.mixup_enabled = False
        started = time.perf_counter()
        train_metrics = _train_epoch(run, epoch)
        if args.distributed and args.dist_bn:
            distribute_bn(run.task.get_trainable_module(), args.world_size, args.dist_bn == 'reduce')
        eval_metrics = None
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == run.epochs:
            eval_metrics = _validate(run)
            _record(run, epoch, train_metrics, eval_metrics)
        _say_epoch(run, epoch, train_metrics, eval_metrics, time.perf_counter() - started)
        if run.scheduler is not None:
            metric = (eval_metrics or train_metrics).get(_metric(run)) if run.loader_eval is not None else None
            run.scheduler.step(epoch + 1, metric)


def _train_epoch(run: _Run, epoch: int) -> dict[str, float]:
    args, task = run.args, run.task
    task.get_trainable_module().train()
    run.optimizer.zero_grad()
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=run.device))
    zeros: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=run.device))
    batches = len(run.loader)
    progress = Progress(run.loader, f'epoch {epoch + 1}/{run.epochs}', args.log_interval)
    timer = time.perf_counter()
    for index, (images, target) in enumerate(progress):
        result = _step(run, epoch, index, images, target)
        for name, value in result.items():
            if name != 'output':
                sums[name] += value.detach()
                zeros[name] += value.detach() == 0
        if index == _WARM_STEPS:
            timer = time.perf_counter()
        if not run.said_finish and index >= min(_TIMED_STEPS, batches - 1) > _WARM_STEPS:
            _say_finish(run, (time.perf_counter() - timer) / (index - _WARM_STEPS), batches)
        if progress.wants_report:
            loss = (sums['loss'] / (index + 1)).item()
            _check_finite(run, epoch, loss)
            progress.report(f'loss {loss:.4g}  lr {_learning_rate(run):.3g}')
    means = {name: (total / batches).item() for name, total in sums.items()}
    if args.distributed:
        means = {n: reduce_tensor(torch.tensor(v, device=run.device), args.world_size).item() for n, v in means.items()}
    _check_finite(run, epoch, means['loss'])
    _warn_of_empty_terms(run, {name: (count / batches).item() for name, count in zeros.items()})
    return means


def _step(run: _Run, epoch: int, index: int, images: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """One batch: forward, backward, and the optimizer's step when enough batches have been gathered."""
    args, task = run.args, run.task
    batches, accumulate = len(run.loader), args.grad_accum_steps
    update = (index + 1) % accumulate == 0 or index + 1 == batches
    remainder = batches % accumulate
    gathered = remainder if remainder and index >= batches - remainder else accumulate
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
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


def _backward(run: _Run, loss: torch.Tensor, update: bool) -> None:
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


def _validate(run: _Run) -> dict[str, float] | None:
    if run.loader_eval is None:
        return None
    args = run.args
    shared = (run.loader_eval, run.device, run.autocast, args.channels_last)
    metrics = evaluate(run.task.get_eval_model(), *shared, log_interval=args.log_interval)
    if run.task.has_ema():
        if args.distributed and args.dist_bn:
            distribute_bn(run.task.get_trainable_module(ema=True), args.world_size, args.dist_bn == 'reduce')
        metrics = evaluate(run.task.get_eval_model(ema=True), *shared, 'validation (EMA)', args.log_interval)
    return metrics


def _record(run: _Run, epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float] | None) -> None:
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
        log_wandb=run.args.log_wandb,
    )
    run.best = run.saver.save_checkpoint(epoch, metric=(eval_metrics or train_metrics)[_metric(run)])


def _learning_rate(run: _Run) -> float:
    rates = [group['lr'] for group in run.optimizer.param_groups]
    return sum(rates) / len(rates)


def _check_finite(run: _Run, epoch: int, loss: float) -> None:
    if loss - loss != 0:  # true for infinity and not-a-number
        raise UserError(
            f'The loss became {loss} in epoch {epoch + 1}: lower the learning rate (now {_learning_rate(run):.3g}) '
            f'or clip gradients with --clip-grad 1. Checkpoints of earlier epochs are in {run.folder}.'
        )


def _explain_memory(error: RuntimeError, args: argparse.Namespace) -> None:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        raise UserError(
            f'Out of memory on {args.device} with batches of {args.batch_size}: give --batch-size '
            f'{max(1, args.batch_size // 2)} --grad-accum-steps {2 * args.grad_accum_steps}; --amp, '
            '--grad-checkpointing and a smaller --img-size help too.'
        ) from error


def _warn_of_empty_terms(run: _Run, share: dict[str, float]) -> None:
    """A term over pairs of one class says nothing where no two images of one class meet."""
    if run.said_no_pairs or not run.task.loss.batch_statistics or not getattr(run.task.loss, 'weight', 1.0):
        return
    for name, zero in share.items():
        if name != 'loss' and zero > 0.5:
            run.said_no_pairs = True
            warn(
                f"loss term '{name}' was zero in {zero:.0%} of this epoch's batches: no two images of one class met. "
                'A larger --batch-size lets it work.'
            )


def _say_choices(run: _Run, splits: data.Splits, sources: dict[str, str]) -> None:
    """One block with what was chosen, and whether it was typed, from the recipe or a default."""
    args, loss = run.args, run.task.loss
    model = run.task.get_eval_model()
    counts = splits.counts or [0]
    values = ', '.join(f'{k}={v}' for k, v in vars(loss).items() if isinstance(v, (int, float, str)) and k in
                       losses.loss_options(args.loss))  # fmt: skip
    start = 'pretrained' if args.pretrained or args.pretrained_path else 'from scratch'
    start = f'weights of {args.initial_checkpoint}' if args.initial_checkpoint else start
    batch = _global_batch(args)
    rows = [
        ('model', f'{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters', 'model'),
        ('head', type(model.get_classifier()).__name__, 'model'),
        ('start', start, 'initial_checkpoint' if args.initial_checkpoint else 'pretrained'),
        ('loss', f'{args.loss} ({values})' if values else args.loss, 'loss'),
        ('smoothing', str(_loss_options(args).get('smoothing', 'not taken by this loss')), 'smoothing'),
        ('data', args.dataset or str(args.data_dir), 'dataset' if args.dataset else 'data_dir'),
        ('images', f'{len(splits.train)} to train on, {len(splits.validation or [])} to validate on', 'val_split'),
        ('classes', f'{args.num_classes}, {min(counts)} to {max(counts)} images each', 'num_classes'),
        ('input', 'x'.join(map(str, run.data_config['input_size'])), 'input_size' if args.input_size else 'img_size'),
        ('device', args.device, 'device'),
        ('precision', f'mixed {args.amp_dtype}' if args.amp else 'float32', 'amp'),
        ('batch', f'{batch} = {args.batch_size} x {args.world_size} processes x {args.grad_accum_steps} accumulated',
         'batch_size'),
        ('lr', f'{args.lr:.4g}, {args.opt}, {args.sched}', 'lr' if sources.get('lr') != 'default' else 'lr_base'),
        ('epochs', f'{run.epochs}' + (f', going on after {run.start_epoch}' if run.start_epoch else ''), 'epochs'),
    ]  # fmt: skip
    for name, value, key in rows:
        source = sources.get(key, 'default')
        say(f'{name:>10}  {value}  [{source if source in ("typed", "default", "the data") else f"recipe {source}"}]')
    for note in splits.notes:
        warn(note)


def _say_finish(run: _Run, seconds_a_step: float, batches: int) -> None:
    run.said_finish = True
    left = seconds_a_step * batches * (run.epochs - run.start_epoch)
    say(
        f'expected to finish at {datetime.now() + timedelta(seconds=left):%H:%M} (in {_duration(left)}, plus validation)'
    )


def _duration(seconds: float) -> str:
    return (
        f'{seconds:.0f} s'
        if seconds < 100
        else f'{seconds / 60:.0f} min'
        if seconds < 6000
        else f'{seconds / 3600:.1f} h'
    )


def _say_epoch(run, epoch, train_metrics, eval_metrics, seconds) -> None:
    terms = ', '.join(f'{name} {value:.4g}' for name, value in train_metrics.items() if name != 'loss')
    validation = f'  top-1 {eval_metrics["top1"]:.2f}%  val loss {eval_metrics["loss"]:.4g}' if eval_metrics else ''
    say(f'epoch {epoch + 1}/{run.epochs}  loss {train_metrics["loss"]:.4g} ({terms}){validation}  {seconds:.1f} s')


def _say_end(run: _Run) -> None:
    """Results to stdout as timm prints them; then, for people, the best and what to do next."""
    if not is_primary():
        return
    metric = _metric(run)
    ordered = sorted(
        run.results, key=lambda r: r.get('validation', r['train']).get(metric, 0), reverse=_decreasing(run)
    )
    print(f'--result\n{json.dumps(ordered[-10:], indent=4)}', flush=True)
    value, epoch = run.best
    if value is not None:
        label = {'top1': f'best top-1 {value:.2f}%', 'top5': f'best top-5 {value:.2f}%'}.get(
            metric, f'best loss {value:.4g}'
        )
        say(f'{label} (epoch {epoch + 1}); the run is in {run.folder}')
    say(f'next: timm validate.py {run.folder}')
    say(f'      ccl-timm export {run.folder} DIR   ccl-timm predict {run.folder} IMAGES...')
