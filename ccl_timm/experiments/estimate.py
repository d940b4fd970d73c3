"""What a run will cost: a few of its real steps, timed."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ccl_timm.training.checks import check_config
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.evaluation import evaluate
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.trainer import Trainer

__all__ = ['Cost', 'time_run']

_STEPS = 10
_WARM = 2  # the first steps are slow and say nothing about the others


@dataclass(frozen=True)
class Cost:
    """Seconds that a run takes.

    Attributes:
        start: until the first epoch begins.
        training: an epoch's training.
        validation: one validation.
        epochs: number of epochs.
        validations: number of validations.
    """

    start: float
    training: float
    validation: float
    epochs: int
    validations: int

    @property
    def hours(self) -> float:
        """Of the whole run, in hours."""
        return (self.start + self.epochs * self.training + self.validations * self.validation) / 3600


def time_run(config: TrainConfig, folder: Path) -> Cost:
    """Time the first steps of a run, in training and in validation, with its real data; nothing is written.

    Args:
        config: the run's.
        folder: of the run.

    Raises:
        UserError: the run could not begin.
    """
    started = time.perf_counter()
    check_config(config)
    trainer = Trainer(config, RunDir(folder))
    start = time.perf_counter() - started
    trainer.task.get_trainable_module().train()
    training = _whole(_train_steps(trainer), len(trainer.loader))
    validation = (
        _whole(_validation_steps(trainer), len(trainer.loader_eval)) if trainer.loader_eval is not None else 0.0
    )
    return Cost(start, training, validation, trainer.epochs, math.ceil(trainer.epochs / config.val_interval))


def _whole(ends: Iterator[float], steps: int) -> float:
    """Seconds for all steps, from the moments at which the first of them end: the slow ones once, then the mean."""
    moments = [time.perf_counter(), *ends]
    warm = min(_WARM, len(moments) - 2)
    a_step = (moments[-1] - moments[warm]) / (len(moments) - 1 - warm)
    return moments[warm] - moments[0] + (steps - warm) * a_step


def _train_steps(trainer: Trainer) -> Iterator[float]:
    for index, (images, target) in enumerate(islice(trainer.loader, _WARM + _STEPS)):
        trainer.train_step(0, index, images, target)
        yield _now(trainer.device)


def _validation_steps(trainer: Trainer) -> Iterator[float]:
    model = trainer.eval_model()
    for batch in islice(trainer.loader_eval, _WARM + _STEPS):
        evaluate(model, [batch], trainer.device, trainer.autocast, trainer.setup.memory_format)
        yield _now(trainer.device)


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
