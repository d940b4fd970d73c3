"""Our checkpoints on the Hub, as pretrained tags of the models."""

import dataclasses
import os
from typing import Any

from timm.models import PretrainedCfg

__all__ = ['ORGANISATION', 'PUBLISHED', 'checkpoint_options', 'tagged_cfgs']

# owner of the repositories on the Hub, which are named as the tags are
ORGANISATION = os.environ.get('CCL_TIMM_ORGANISATION', 'ccl-timm')

# 'architecture.tag' -> what its config.json says: num_classes, input_size, mean, std, crop_pct, interpolation, and
# model_args (small_input, hidden_features ...). A row comes in when its repository is public, never before: a tag is
# what `pretrained=True` finds. The first tag of an architecture does not become its default, which stays the
# backbone's ImageNet weights.
PUBLISHED: dict[str, dict[str, Any]] = {}


def tagged_cfgs(architecture: str, base: PretrainedCfg) -> dict[str, dict[str, Any] | PretrainedCfg]:
    """The cfgs of an architecture for timm's ``generate_default_cfgs``: one for each published tag, then the plain one.

    Args:
        architecture: such as ``'resnet18_cam'``.
        base: its cfg without weights.
    """
    cfgs = {}
    for name, facts in PUBLISHED.items():
        if name.partition('.')[0] == architecture:
            facts = {key: value for key, value in facts.items() if key != 'model_args'}
            cfgs[name] = dataclasses.replace(base, hf_hub_id=f'{ORGANISATION}/{name}', **facts)
    return {**cfgs, f'{architecture}.*': base}  # last and starred: the default, before every tag with weights


def checkpoint_options(architecture: str, pretrained_cfg: Any) -> dict[str, Any]:
    """The options that the model of a published tag was built with; empty without a tag.

    Args:
        architecture: such as ``'resnet18_cam'``.
        pretrained_cfg: as timm hands it to an entry point: a tag, a cfg, a dict, or None.
    """
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = pretrained_cfg.tag
    elif isinstance(pretrained_cfg, dict):
        pretrained_cfg = pretrained_cfg.get('tag')
    return PUBLISHED.get(f'{architecture}.{pretrained_cfg}', {}).get('model_args', {})
