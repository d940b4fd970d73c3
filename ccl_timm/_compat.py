"""timm's private names, as read in timm 1.0.31: nothing else here imports them, and pyproject.toml caps timm below 1.1.

Two more are attributes, named where they are set: ``_model_args`` of a model that timm built (``models.builder``), and
``_parse_args`` of timm's train.py (``cli.launch``).
"""

import os
from pathlib import Path
from typing import Any, TypeAlias

from timm.data.dataset_factory import _search_split as search_split
from timm.models import _registry as model_registry
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from timm.models._hub import _parse_model_cfg as parse_model_cfg
from timm.models._hub import save_config_for_hf
from timm.utils import CheckpointSaver

__all__ = [
    'FeatureGetterNet', 'TimmModel', 'keep_best', 'keep_epoch', 'model_registry', 'parse_model_cfg',
    'pretrained_cfg_for_features', 'save_config_for_hf', 'search_split',
]  # fmt: skip

# a torch.nn.Module with timm's methods and attributes, for which timm has no type
TimmModel: TypeAlias = Any


def keep_epoch(saver: CheckpointSaver, checkpoint: Path, epoch: int, metric: float) -> None:
    """Make and rank the numbered copy of a checkpoint if it is missing and good enough, as ``save_checkpoint`` does."""
    copy = saver._checkpoint_path(epoch)
    full = len(saver.checkpoint_files) >= saver.max_history
    if os.path.exists(copy) or (full and not saver.cmp(metric, saver.checkpoint_files[-1][1])):
        return
    if full:
        saver._cleanup_checkpoints(1)
    saver._duplicate(str(checkpoint), copy)
    saver._track_checkpoint(copy, epoch, metric, update_best_file=False)


def keep_best(saver: CheckpointSaver, best: Path) -> None:
    """Copy the numbered checkpoint of the best epoch to ``best``, if it is there."""
    copy = saver._checkpoint_path(saver.best_epoch)
    if os.path.exists(copy):
        saver._duplicate(copy, str(best))
