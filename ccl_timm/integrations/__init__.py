"""Callbacks that pass epochs and optimizer steps to a task, for trainers whose epochs it cannot detect.

Hugging Face's Trainer calls ``model.train()`` at every step, Lightning never. For the losses with a schedule (``nac``,
``pod``, ``cot``, ``asoftmax``), and for resuming with any loss::

    from ccl_timm.integrations import LightningCallback, TransformersCallback

    transformers.Trainer(model=task, callbacks=[TransformersCallback()], ...)
    lightning.Trainer(callbacks=[LightningCallback()], ...)

The task is the model, or anywhere within it. Each class is made when it is imported from here, which imports its
package; neither is needed otherwise.
"""

import importlib
from typing import Any

from torch import nn

from ccl_timm.errors import UserError
from ccl_timm.task import LossTask

__all__ = ['LightningCallback', 'TransformersCallback']


def _task_in(model: nn.Module) -> LossTask:
    for module in model.modules():
        if isinstance(module, LossTask):
            return module
    raise UserError(f'There is no LossTask in {type(model).__name__}: train what ccl_timm.create_task returns.')


class _Transformers:
    """Passes epochs and optimizer steps of ``transformers.Trainer`` to the task."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Find the task; resumed training begins where ``state`` says."""
        self.task = _task_in(model)
        self.epoch = int((state.epoch or 0) + 1e-6)  # a fraction of epochs if resumed within one
        self.task.set_num_updates(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Begin the next epoch."""
        self.task.set_epoch(self.epoch)
        self.epoch += 1

    def on_step_end(self, args, state, control, **kwargs):
        """Count optimizer steps, however many batches each takes."""
        self.task.set_num_updates(state.global_step)


class _Lightning:
    """Passes epochs and optimizer steps of ``lightning.Trainer`` to the task in the LightningModule."""

    def on_train_start(self, trainer, pl_module):
        """Find the task; resumed training begins where ``trainer`` says."""
        self.task = _task_in(pl_module)
        self.task.set_num_updates(trainer.global_step)

    def on_train_epoch_start(self, trainer, pl_module):
        """Begin the epoch."""
        self.task.set_epoch(trainer.current_epoch)

    def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
        """Count optimizer steps, however many batches each takes."""
        self.task.set_num_updates(trainer.global_step)


# name -> our events, the packages that may have the base class (the first installed one counts), and its name
_CALLBACKS = {
    'TransformersCallback': (_Transformers, ('transformers',), 'TrainerCallback'),
    'LightningCallback': (_Lightning, ('lightning.pytorch', 'pytorch_lightning'), 'Callback'),
}


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    events, packages, base = _CALLBACKS[name]
    for package in packages:
        try:
            parent = getattr(importlib.import_module(package), base)
        except ModuleNotFoundError as error:
            if (error.name or '').partition('.')[0] != package.partition('.')[0]:
                raise
            continue
        made = type(name, (events, parent), {'__module__': __name__, '__doc__': events.__doc__})
        return globals().setdefault(name, made)  # one class, so that it pickles
    raise UserError(f'{name} needs the package {" or ".join(p.partition(".")[0] for p in packages)}: pip install it.')
