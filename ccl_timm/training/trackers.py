"""Metrics shown elsewhere too: TensorBoard, Trackio, Weights & Biases. A tracker that fails never stops a run."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ccl_timm.console import log_warning

__all__ = ['Tracker']


class Tracker:
    """Sends each epoch's numbers to a tracker, of the first process only; after a failure it warns, and is still.

    Args:
        name: ``'tensorboard'``, ``'trackio'``, ``'wandb'``; empty for none.
        folder: the run's.
        args: settings of the run, which the tracker is told; ``wandb_*`` are for wandb alone.
    """

    def __init__(self, name: str, folder: Path, args: argparse.Namespace):
        self.name = name
        self._log: Callable[[dict[str, float], int], Any] | None = None
        self._finish: Callable[[], Any] = lambda: None
        start = {'tensorboard': self._tensorboard, 'trackio': self._trackio, 'wandb': self._wandb}.get(name)
        if start is not None:
            self._guarded(lambda: start(folder, args))

    def log(self, epoch: int, parts: dict[str, dict[str, float] | None]) -> None:
        """Send numbers after an epoch (0-based): of each part (``train``, ``eval``) its numbers by name."""
        if self._log is not None:
            known = {part: values for part, values in parts.items() if values}
            numbers = {f'{part}/{name}': value for part, values in known.items() for name, value in values.items()}
            self._guarded(lambda: self._log(numbers, epoch))

    def finish(self) -> None:
        """Send what is left."""
        if self._log is not None:
            self._guarded(self._finish)

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a library of others, a network: nothing in it is worth a run
            self._log = None
            log_warning(f'tracker {self.name} failed, and gets no further numbers: {type(error).__name__}: {error}')

    def _tensorboard(self, folder: Path, args: argparse.Namespace) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / 'tensorboard'))
        writer.add_text('settings', '\n'.join(f'    {name}: {value}' for name, value in _plain(args).items()))
        self._log = lambda numbers, epoch: [writer.add_scalar(name, v, epoch) for name, v in numbers.items()]
        self._finish = writer.close

    def _trackio(self, folder: Path, args: argparse.Namespace) -> None:
        import trackio

        trackio.init(project=args.wandb_project or 'ccl-timm', name=folder.name, config=_plain(args), resume='allow')
        self._log = lambda numbers, epoch: trackio.log(numbers, step=epoch)
        self._finish = trackio.finish

    def _wandb(self, folder: Path, args: argparse.Namespace) -> None:
        import wandb

        goes_on = {'id': args.wandb_resume_id, 'resume': 'must'} if args.wandb_resume_id else {}
        wandb.init(project=args.wandb_project, name=folder.name, config=_plain(args), tags=args.wandb_tags, **goes_on)
        self._log = lambda numbers, epoch: wandb.log(numbers, step=epoch)
        self._finish = wandb.finish


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that are plain values; those of a dict by their own names, such as ``loss_kwargs.scale``."""
    flat = {}
    for key, value in vars(args).items():
        flat |= {f'{key}.{name}': own for name, own in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if isinstance(value, (bool, int, float, str, list, tuple))}
