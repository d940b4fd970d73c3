"""Classifier heads: pooled features in, logits out, and what else a loss may read."""

from ccl_timm.heads.base import Head, HeadOutputs
from ccl_timm.heads.cam import CamHead
from ccl_timm.heads.cosine import CosineHead
from ccl_timm.heads.linear import LinearHead
from ccl_timm.heads.mc import McHead
from ccl_timm.heads.mlp import MLPHead
from ccl_timm.heads.pedcc import PedccHead

__all__ = ['HEADS', 'CamHead', 'CosineHead', 'Head', 'HeadOutputs', 'LinearHead', 'MLPHead', 'McHead', 'PedccHead']

# the suffix of a model's name -> its head
HEADS: dict[str, type[Head]] = {
    'cam': CamHead,
    'cosine': CosineHead,
    'linear': LinearHead,
    'mc': McHead,
    'mlp': MLPHead,
    'pedcc': PedccHead,
}
