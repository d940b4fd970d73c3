"""Metrics sent to TensorBoard, Trackio or Weights & Biases. A tracker that fails never stops a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ccl_timm.console import log_warning

__all__ = ['Tracker']


class Tracker:
    """Sends each epoch's metrics to a tracker; after a failure it warns once and sends nothing more.

    Args:
        name: ``'tensorboard'``, ``'trackio'``, ``'wandb'``; empty for none.
        folder: the run's.
        settings: of the run, logged by the tracker; ``wandb_*`` are for wandb alone.
    """

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]):
        self.name = name
        self._log: Callable[[dict[str, float], int], Any] | None = None
        self._finish: Callable[[], Any] = lambda: None
        start = {'tensorboard': self._tensorboard, 'trackio': self._trackio, 'wandb': self._wandb}.get(name)
        if start is not None:
            self._guarded(lambda: start(folder, settings))

    def log(self, epoch: int, metrics: dict[str, dict[str, float] | None]) -> None:
        """Send metrics after an epoch (0-based), by split (``train``, ``eval``) and name."""
        if self._log is not None:
            known = {split: values for split, values in metrics.items() if values}
            numbers = {f'{split}/{name}': value for split, values in known.items() for name, value in values.items()}
            self._guarded(lambda: self._log(numbers, epoch))

    def finish(self) -> None:
        """Send what is left."""
        if self._log is not None:
            self._guarded(self._finish)

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a library of others, a network: none of its failures may end a run
            self._log = None
            log_warning(f'tracker {self.name} failed and gets no further metrics: {type(error).__name__}: {error}')

    def _tensorboard(self, folder: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / 'tensorboard'))
        writer.add_text('settings', '\n'.join(f'    {name}: {value}' for name, value in _plain(settings).items()))
        self._log = lambda numbers, epoch: [writer.add_scalar(name, v, epoch) for name, v in numbers.items()]
        self._finish = writer.close

    def _trackio(self, folder: Path, settings: dict[str, Any]) -> None:
        import trackio

        project = settings['wandb_project'] or 'ccl-timm'
        trackio.init(project=project, name=folder.name, config=_plain(settings), resume='allow')
        self._log = lambda numbers, epoch: trackio.log(numbers, step=epoch)
        self._finish = trackio.finish

    def _wandb(self, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        resumed, tags = settings['wandb_resume_id'], settings['wandb_tags']
        identity = {'id': resumed, 'resume': 'must'} if resumed else {}
        project = settings['wandb_project']
        wandb.init(project=project, name=folder.name, config=_plain(settings), tags=tags, **identity)
        self._log = lambda numbers, epoch: wandb.log(numbers, step=epoch)
        self._finish = wandb.finish


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are plain values; those of a dict by their own names, such as ``loss_kwargs.scale``."""
    flat = {}
    for key, value in settings.items():
        flat |= {f'{key}.{name}': own for name, own in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if isinstance(value, (bool, int, float, str, list, tuple))}
