"""The plain classifier: one linear layer, behind any stem that our variants can have."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ccl_timm.heads.base import Head, HeadOutputs, require_positive

__all__ = ['HeadWithLinear', 'LinearHead']


class HeadWithLinear(Head):
    """A head that ends in a linear layer, ``out``, the only one that is shaped by the classes."""

    classifier_layers = ('out',)

    @property
    def weight(self) -> Tensor:
        """Class vectors (K, D) of the last layer, where timm's scripts look for a classifier's weight."""
        return self.out.weight

    @property
    def bias(self) -> Tensor:
        """Bias (K,) of the last layer."""
        return self.out.bias

    def reset(self, num_classes: int) -> None:
        """Replace the last layer, keep what stands before it."""
        out = self.out
        self.out: nn.Linear = nn.Linear(out.in_features, num_classes, device=out.weight.device, dtype=out.weight.dtype)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (N, in_features) to logits (N, K)."""
        return self.outputs(pooled).logits


class LinearHead(HeadWithLinear):
    """A linear layer: timm's own classifier, and POD-Loss's softmax baseline. CC-Loss's baseline is ``MLPHead``.

    The model is timm's own but for what the other heads' models have too: ``small_input``, and a VGG without its two
    4096-wide layers. So it is the baseline that differs from them in the classifier alone.

    Args:
        in_features: width of the pooled features.
        num_classes: K.
        feature_dim: width of one more linear layer before the last, such as 2 for features in the plane; None for
            none. No ReLU follows it.
    """

    def __init__(self, in_features: int, num_classes: int, feature_dim: int | None = None, device=None, dtype=None):
        super().__init__()
        require_positive(feature_dim=feature_dim)
        self.in_features = in_features
        self.hidden = nn.Linear(in_features, feature_dim, device=device, dtype=dtype) if feature_dim else nn.Identity()
        self.out = nn.Linear(feature_dim or in_features, num_classes, device=device, dtype=dtype)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The width of the layer before the last, if there is one."""
        return {'feature_dim': len(state['hidden.weight'])} if 'hidden.weight' in state else {}

    def outputs(self, pooled: Tensor) -> HeadOutputs:
        """Pooled features (N, in_features) to logits (N, K), features (N, D), weight (K, D)."""
        weight = self.out.weight  # before the logits, see CAMHead
        features = self.hidden(pooled)
        return HeadOutputs(self.out(features), features, weight=weight)
