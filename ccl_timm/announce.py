"""What the training script tells people: its choices, its progress, its end."""

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from ccl_timm import losses
from ccl_timm.console import is_primary, say, warn
from ccl_timm.data import Splits
from ccl_timm.settings import global_batch, loss_settings

if TYPE_CHECKING:
    from ccl_timm.train import Run

__all__ = ['say_choices', 'say_end', 'say_epoch', 'say_finish', 'warn_of_empty_terms']


def say_choices(run: 'Run', splits: Splits, sources: dict[str, str]) -> None:
    """One block with what was chosen, and whether it was typed, from the recipe or a default."""
    args, loss = run.args, run.task.loss
    model = run.task.get_eval_model()
    counts = splits.counts or [0]
    values = ', '.join(f'{k}={v}' for k, v in vars(loss).items() if isinstance(v, (int, float, str)) and k in
                       losses.loss_options(args.loss))  # fmt: skip
    start = 'pretrained' if args.pretrained or args.pretrained_path else 'from scratch'
    start = f'weights of {args.initial_checkpoint}' if args.initial_checkpoint else start
    batch = global_batch(args)
    rows = [
        ('model', f'{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters', 'model'),
        ('head', type(model.get_classifier()).__name__, 'model'),
        ('start', start, 'initial_checkpoint' if args.initial_checkpoint else 'pretrained'),
        ('loss', f'{args.loss} ({values})' if values else args.loss, 'loss'),
        ('smoothing', str(loss_settings(args).get('smoothing', 'not taken by this loss')), 'smoothing'),
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


def say_finish(run: 'Run', seconds_a_step: float, batches: int) -> None:
    """When training will be done, from the time of the first steps; said once."""
    run.said_finish = True
    left = seconds_a_step * batches * (run.epochs - run.start_epoch)
    end = datetime.now() + timedelta(seconds=left)
    say(f'expected to finish at {end:%H:%M} (in {_duration(left)}, plus validation)')


def _duration(seconds: float) -> str:
    for size, unit in ((3600, 'h'), (60, 'min')):
        if seconds >= 1.6 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.0f} s'


def say_epoch(
    run: 'Run', epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float] | None, seconds: float
) -> None:
    """One line an epoch."""
    terms = [f'{name} {value:.4g}' for name, value in train_metrics.items() if name != 'loss']
    shown = f' ({", ".join(terms)})' if len(terms) > 1 else ''
    validation = f'  top-1 {eval_metrics["top1"]:.2f}%  val loss {eval_metrics["loss"]:.4g}' if eval_metrics else ''
    say(f'epoch {epoch + 1}/{run.epochs}  loss {train_metrics["loss"]:.4g}{shown}{validation}  {seconds:.1f} s')


def say_end(run: 'Run') -> None:
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
        say(f'best {shown} (epoch {epoch + 1}); the run is in {run.folder}')
    ema = ' --use-ema' if run.task.has_ema() else ''  # the best is that of the moving average
    say(f'next: timm validate.py {run.folder}{ema}')
    say(f'      ccl-timm export {run.folder} DIR{ema}   ccl-timm predict {run.folder} IMAGES...{ema}')


def warn_of_empty_terms(run: 'Run', share: dict[str, float]) -> None:
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
