"""Classifier heads: pooled features in, logits and what else losses require out. Their names end those of models."""

import inspect
from typing import Any

import torch

from ccl_timm import registry
from ccl_timm.errors import UnknownNameError, did_you_mean
from ccl_timm.heads.base import Head, HeadOutputs
from ccl_timm.heads.cam import CAMHead
from ccl_timm.heads.cosine import CosineHead
from ccl_timm.heads.linear import LinearHead
from ccl_timm.heads.mc import MCHead
from ccl_timm.heads.mlp import MLPHead
from ccl_timm.heads.pedcc import PEDCCHead

__all__ = [
    'CAMHead', 'CosineHead', 'Head', 'HeadOutputs', 'LinearHead', 'MCHead', 'MLPHead', 'PEDCCHead', 'head_class',
    'head_name', 'head_options', 'list_heads', 'output_names',
]  # fmt: skip


def list_heads() -> list[str]:
    """Names of heads, ours and those of available plug-ins; imports nothing."""
    return registry.names('head')


def head_class(name: str) -> type[Head]:
    """The class of a head.

    Raises:
        UnknownNameError: there is none of that name, with the closest one.
    """
    found = registry.load('head', name, verify=_verify_head)
    if found is None:
        known = list_heads()
        raise UnknownNameError(f"There is no head '{name}'{did_you_mean(name, known)} Heads: {', '.join(known)}.")
    return found


def head_options(cls: type[Head]) -> list[str]:
    """Names of the options of a head, which a model takes as arguments."""
    names = list(inspect.signature(cls).parameters)[2:]  # after in_features and num_classes
    return [name for name in names if name not in ('device', 'dtype')]


def head_name(head: Any) -> str | None:
    """The name of a head or of its class; None for a classifier that is no head of ours or of a loaded plug-in."""
    cls = head if isinstance(head, type) else type(head)
    plugins = [own['name'] for own in registry.used_plugins() if own['kind'] == 'head']
    return next((name for name in (*registry.our_names('head'), *plugins) if head_class(name) is cls), None)


def output_names(head: Any) -> list[str]:
    """Names of the tensors that a head computes; of a classifier that is none of ours those of a linear layer."""
    if not isinstance(head, Head):
        return ['logits', 'features', 'weight']
    tensor = next(head.parameters())
    stage: Any = head.feature_stage()
    width = stage.out_channels if stage else head.in_features
    with torch.no_grad():
        outputs = head.outputs(tensor.new_zeros(2, width))  # batch norm takes no single row
    return [name for name, value in outputs._asdict().items() if value is not None]


def _verify_head(name: str, cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Head)):
        raise TypeError('the object must be a class that derives from ccl_timm.Head')
    if cls.outputs is Head.outputs or cls.reset is Head.reset:
        raise TypeError('the class must have the methods outputs(pooled) and reset(num_classes)')
    known = list(inspect.signature(cls).parameters)
    if known[:2] != ['in_features', 'num_classes'] or not {'device', 'dtype'} <= set(known):
        raise TypeError('its arguments must be in_features, num_classes, options, device and dtype')
