"""Channel-attention classifiers and discriminative losses for timm. Importing this registers the models with timm."""

import sys
from importlib import reload
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccl_timm import registry

# `ccl-timm --help` need not wait seconds for torch: there the rest comes with the first name that is asked for.
_is_command = Path(*sys.argv[:1]).stem in ('ccl-timm', 'timm') and '__all__' not in globals()
if TYPE_CHECKING or not _is_command:
    import timm
    import timm.loss

    if not hasattr(timm.loss, 'LOSS_TYPES'):  # as where a script lies in a clone of an older timm
        raise ImportError(f'ccl_timm needs timm 1.0.31 or later, and {timm.__path__[0]} is timm {timm.__version__}')

    from ccl_timm.errors import PluginLoadError, UnknownNameError, UserError
    from ccl_timm.heads import Head, HeadOutputs
    from ccl_timm.heads.centroids import max_cosine, pedcc_centroids
    from ccl_timm.losses import Loss, create_loss, list_losses
    from ccl_timm.models import create_model, list_models, register_variant
    from ccl_timm.models.torchvision import register_torchvision
    from ccl_timm.task import LossTask, create_task

__version__ = registry.version()

__all__ = [
    'Head', 'HeadOutputs', 'Loss', 'LossTask', 'PluginLoadError', 'Run', 'UnknownNameError', 'UserError', 'create_loss',
    'create_model', 'create_task', 'list_losses', 'list_models', 'load', 'max_cosine', 'pedcc_centroids',
    'register_torchvision', 'register_variant', 'train',
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # runs need data, training and the Hub, which those who only want a model or a loss do not load
    if name in ('Run', 'load', 'train'):
        from ccl_timm.hub import run

        return getattr(run, name)
    if name in __all__ and _is_command:
        return getattr(reload(sys.modules[__name__]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
