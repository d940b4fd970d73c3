"""What a run will cost: a few of its real steps, timed."""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ccl_timm.training.evaluation import evaluate
from ccl_timm.training.settings import check_settings
from ccl_timm.training.trainer import Run, build_run, train_step

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


def time_run(args: argparse.Namespace, sources: dict[str, str], folder: Path) -> Cost:
    """Time the first steps of a run, in training and in validation, with its real data; nothing is written.

    Args:
        args: settings, as :func:`ccl_timm.training.options.resolve` returns them.
        sources: where each is from.
        folder: of the run.

    Raises:
        UserError: the run could not begin.
    """
    started = time.perf_counter()
    check_settings(args)
    run, _ = build_run(args, sources, folder)
    start = time.perf_counter() - started
    run.task.get_trainable_module().train()
    training = _whole(_train_steps(run), len(run.loader))
    validation = _whole(_validation_steps(run), len(run.loader_eval)) if run.loader_eval is not None else 0.0
    return Cost(start, training, validation, run.epochs, math.ceil(run.epochs / args.val_interval))


def _whole(ends: Iterator[float], steps: int) -> float:
    """Seconds for all steps, from the moments at which the first of them end: the slow ones once, then the mean."""
    moments = [time.perf_counter(), *ends]
    warm = min(_WARM, len(moments) - 2)
    a_step = (moments[-1] - moments[warm]) / (len(moments) - 1 - warm)
    return moments[warm] - moments[0] + (steps - warm) * a_step


def _train_steps(run: Run) -> Iterator[float]:
    for index, (images, target) in enumerate(islice(run.loader, _WARM + _STEPS)):
        train_step(run, 0, index, images, target)
        yield _now(run.device)


def _validation_steps(run: Run) -> Iterator[float]:
    model = run.task.get_eval_model()
    for batch in islice(run.loader_eval, _WARM + _STEPS):
        evaluate(model, [batch], run.device, run.autocast, run.memory_format)
        yield _now(run.device)


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
