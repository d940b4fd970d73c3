"""Channel-attention classifiers and discriminative losses for timm. Importing this registers the models with timm."""

import timm
import timm.loss

if not hasattr(timm.loss, 'LOSS_TYPES'):  # as where a script lies in a clone of an older timm
    raise ImportError(f'ccl_timm needs timm 1.0.31 or later, and {timm.__path__[0]} is timm {timm.__version__}')

from ccl_timm import registry
from ccl_timm.errors import PluginLoadError, UnknownNameError, UserError
from ccl_timm.heads.centroids import max_cosine, pedcc_centroids
from ccl_timm.losses import (
    Loss,
    channel_correlation,
    cosine_loss,
    create_loss,
    focal_loss,
    list_losses,
    norm_adaptive_cosine,
    self_correlation,
)
from ccl_timm.models import build_variant, create_model, register_variant
from ccl_timm.models.torchvision import register_torchvision
from ccl_timm.task import LossTask, create_task

__version__ = registry.version()

__all__ = [
    'Loss',
    'LossTask',
    'PluginLoadError',
    'UnknownNameError',
    'UserError',
    'build_variant',
    'channel_correlation',
    'cosine_loss',
    'create_loss',
    'create_model',
    'create_task',
    'focal_loss',
    'max_cosine',
    'list_losses',
    'norm_adaptive_cosine',
    'pedcc_centroids',
    'register_torchvision',
    'register_variant',
    'self_correlation',
]
