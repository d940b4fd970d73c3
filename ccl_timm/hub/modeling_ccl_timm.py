"""Lies beside published weights: ``trust_remote_code=True`` of transformers reads it, and saves ``import ccl_timm``."""

from transformers import TimmWrapperForImageClassification, TimmWrapperModel

from ccl_timm import models  # noqa: F401  timm knows them now

__all__ = ['TimmWrapperForImageClassification', 'TimmWrapperModel']
