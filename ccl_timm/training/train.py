"""The built-in training script: a run from its settings to its folder, with one sentence where it cannot go on."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.models import safe_model_name

from ccl_timm.console import is_primary, log_info
from ccl_timm.errors import UserError
from ccl_timm.training.checks import check_config
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.interrupts import Stopped, stopped_by_signals
from ccl_timm.training.provenance import environment, origin
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.trainer import Trainer

__all__ = ['train']

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(config: TrainConfig, argv: list[str]) -> Path:
    """Train as the configuration says, and return the run's folder.

    Args:
        config: see :meth:`TrainConfig.resolve`.
        argv: the command line, for the record.

    Raises:
        UserError: a setting, the data, the model, the loss or the folder does not allow it; nothing is overwritten.
    """
    check_config(config)
    with stopped_by_signals(), RunDir.choose(config, safe_model_name(config.model)) as run:
        with _run_errors(config, run):
            trainer = Trainer(config, run)
            trainer.logger.on_start(trainer)
            if is_primary():
                _start_writing(trainer, argv)
            trainer.fit()
            trainer.logger.finish()
    if torch.distributed.is_initialized():  # not after an error, whose message comes before the others are let go
        torch.distributed.destroy_process_group()
    trainer.logger.on_end(trainer)
    return run.path


def _start_writing(trainer: Trainer, argv: list[str]) -> None:
    """Create or continue the run's folder, write what the run is made of, and start the saver."""
    settings, splits = trainer.setup.recorded(trainer.config), trainer.splits
    made_with = {**environment(argv, str(trainer.device), splits.fingerprint), 'origin': origin(settings)}
    made_with['precision'] = trainer.setup.dtype
    trainer.run.begin(settings, made_with, splits.held_out, trainer.start_epoch)
    trainer.start_saver()
    trainer.logger.start_tracker(trainer.run.path, settings)


@contextlib.contextmanager
def _run_errors(config: TrainConfig, run: RunDir) -> Iterator[None]:
    """Give the reason for a run's end in one sentence where neither the settings nor this package are to blame."""
    try:
        yield
    except KeyboardInterrupt as stop:
        log_info(f'stopped by {stop}' if isinstance(stop, Stopped) else 'stopped by hand')
        raise
    except (OSError, RuntimeError) as error:
        reason = _reason(error, config, run.path)
        if reason is None:
            raise
        raise UserError(reason) from error


def _reason(error: OSError | RuntimeError, config: TrainConfig, folder: Path) -> str | None:
    text = str(error)
    remedy = f'--resume auto resumes from those in {folder}' if config.experiment else f'checkpoints: {folder}'
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            f'Out of memory on {config.device} with batches of {config.batch_size}: give --batch-size '
            f'{max(1, config.batch_size // 2)} --grad-accum-steps {2 * config.grad_accum_steps}; --amp, '
            '--grad-checkpointing and a smaller --img-size help too.'
        )
    if getattr(error, 'errno', None) in _NO_SPACE or 'inline_container' in text or 'PytorchStreamWriter' in text:
        free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
        return f"'{folder}' cannot be written, with {free / 1e6:,.0f} MB free on its disk: make room. {remedy}."
    if 'DataLoader worker' in text:
        return f'A process that reads images was killed, perhaps for lack of memory: give fewer --workers. {remedy}.'
    if isinstance(error, torch.distributed.DistError) or 'gloo' in text:
        return f'Another process of this run has ended, or cannot be reached. {remedy}.'
    return None
