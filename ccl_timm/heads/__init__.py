"""Classifier heads: pooled features in, logits out, and what else a loss may read."""

from ccl_timm.heads.base import Head, HeadOutputs
from ccl_timm.heads.cam import CamHead

__all__ = ['HEADS', 'CamHead', 'Head', 'HeadOutputs']

# the suffix of a model's name -> its head
HEADS: dict[str, type[Head]] = {'cam': CamHead}
