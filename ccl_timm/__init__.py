"""Channel-attention classifiers and discriminative losses for timm. Importing this registers the models with timm."""

from ccl_timm.errors import PluginLoadError, UnknownNameError, UserError
from ccl_timm.losses import Loss, channel_correlation, create_loss, list_losses
from ccl_timm.models import build_variant, create_model, register_variant
from ccl_timm.task import LossTask, create_task

__version__ = '0.1.0'

__all__ = [
    'Loss',
    'LossTask',
    'PluginLoadError',
    'UnknownNameError',
    'UserError',
    'build_variant',
    'channel_correlation',
    'create_loss',
    'create_model',
    'create_task',
    'list_losses',
    'register_variant',
]
