"""Classifier heads: pooled features in, logits out, and what else a loss may read."""

from ccl_timm.heads.base import Head, HeadOutputs
from ccl_timm.heads.cam import CAMHead
from ccl_timm.heads.cosine import CosineHead
from ccl_timm.heads.linear import LinearHead
from ccl_timm.heads.mc import MCHead
from ccl_timm.heads.mlp import MLPHead
from ccl_timm.heads.pedcc import PEDCCHead

__all__ = ['HEADS', 'CAMHead', 'CosineHead', 'Head', 'HeadOutputs', 'LinearHead', 'MLPHead', 'MCHead', 'PEDCCHead']

# the suffix of a model's name -> its head
HEADS: dict[str, type[Head]] = {
    'cam': CAMHead,
    'cosine': CosineHead,
    'linear': LinearHead,
    'mc': MCHead,
    'mlp': MLPHead,
    'pedcc': PEDCCHead,
}
