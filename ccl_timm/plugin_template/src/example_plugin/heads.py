"""A head: `<any timm architecture>_example_plugin_head` is a model name once this package is installed."""

import torch.nn.functional as F
from torch import Tensor, nn

from ccl_timm.heads import Head, HeadOutputs

__all__ = ['NormalisedHead']


class NormalisedHead(Head):
    """A linear classifier on features of length ``scale``: ``logits = W (scale * F / ||F||) + b``.

    Args:
        in_features: width of the pooled features F.
        num_classes: K.
        scale: length of the features, > 0.
    """

    classifier_layers = ('out',)  # a change of classes replaces this layer and keeps the others

    def __init__(self, in_features: int, num_classes: int, scale: float = 16.0, device=None, dtype=None):
        super().__init__()
        self.in_features = in_features
        self.scale = scale
        self.out = nn.Linear(in_features, num_classes, device=device, dtype=dtype)

    def outputs(self, pooled: Tensor) -> HeadOutputs:
        """Pooled features (N, in_features) to logits (N, K), features (N, in_features), weight (K, in_features)."""
        weight = self.out.weight
        features = self.scale * F.normalize(pooled, dim=1)
        return HeadOutputs(self.out(features), features, weight=weight)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (N, in_features) to logits (N, K)."""
        return self.outputs(pooled).logits

    def reset(self, num_classes: int) -> None:
        """Replace the last layer."""
        weight = self.out.weight
        self.out = nn.Linear(self.in_features, num_classes, device=weight.device, dtype=weight.dtype)
