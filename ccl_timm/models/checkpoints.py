"""Our checkpoints: each is a folder of hub_cards/, a repository on the Hub, and a pretrained tag, all of one name."""

import dataclasses
import functools
import json
import os
from typing import Any

from timm.models import PretrainedCfg

from ccl_timm.registry import resource_dir

__all__ = ['ORGANISATION', 'checkpoint_name', 'checkpoint_options', 'checkpoints', 'tagged_cfgs']

# owner of the repositories on the Hub
ORGANISATION = os.environ.get('CCL_TIMM_ORGANISATION', 'ccl-timm')

_FACTS = ('num_classes', 'input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')


@functools.cache
def checkpoints() -> dict[str, dict[str, Any]]:
    """What the config.json of each checkpoint says, by ``'architecture.tag'``.

    A checkpoint is one whether or not its repository exists yet: what is published needs no second list.
    """
    files = sorted(resource_dir('hub_cards').glob('*.*/config.json'))
    return {file.parent.name: json.loads(file.read_text(encoding='utf-8')) for file in files}


def checkpoint_name(location: str) -> str | None:
    """The checkpoint that a repository ``owner/name[@revision]`` is for; None if it is none of ours."""
    owner, _, name = location.partition('@')[0].partition('/')
    return name if owner == ORGANISATION and name in checkpoints() else None


def tagged_cfgs(architecture: str, base: PretrainedCfg) -> dict[str, dict[str, Any] | PretrainedCfg]:
    """The cfgs of an architecture for timm's ``generate_default_cfgs``: one for each checkpoint, then the plain one.

    The first tag does not become the architecture's default, which stays the backbone's ImageNet weights.

    Args:
        architecture: such as ``'resnet18_cam'``.
        base: its cfg without weights.
    """
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for name, config in checkpoints().items():
        if config['architecture'] == architecture:
            facts = {key: config['pretrained_cfg'][key] for key in _FACTS}
            cfgs[name] = dataclasses.replace(base, hf_hub_id=f'{ORGANISATION}/{name}', **facts)
    return {**cfgs, f'{architecture}.*': base}  # last and starred: the default, before every tag with weights


def checkpoint_options(architecture: str, pretrained_cfg: Any) -> dict[str, Any]:
    """The options that the model of a checkpoint was built with; empty without a tag.

    Args:
        architecture: such as ``'resnet18_cam'``.
        pretrained_cfg: as timm hands it to an entry point: a tag, a cfg, a dict, or None.
    """
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = pretrained_cfg.tag
    elif isinstance(pretrained_cfg, dict):
        pretrained_cfg = pretrained_cfg.get('tag')
    options = checkpoints().get(f'{architecture}.{pretrained_cfg}', {}).get('model_args', {})
    return {key: value for key, value in options.items() if key != 'num_classes'}  # the cfg has it
