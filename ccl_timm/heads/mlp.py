"""The classifier that CC-Loss's paper trains with cross-entropy: a hidden layer with ReLU, then a linear layer."""

from torch import Tensor, nn

from ccl_timm.heads.base import HeadOutputs, require_positive
from ccl_timm.heads.linear import HeadWithLinear

__all__ = ['MLPHead']


class MLPHead(HeadWithLinear):
    """``P = f2(ReLU(f1(F)))``: CC-Loss's classifier without attention (section 2.1, P1), from pooled features F.

    It is the ``cam`` head without its gate, so a model with it is the control for what the gate does.

    Args:
        in_features: width of F.
        num_classes: K.
        hidden_features: width D of f1. The paper does not state it; the default is the width of F, as for ``cam``
            [assumption].

    He initialisation of f1, as the paper names it.
    """

    def __init__(self, in_features: int, num_classes: int, hidden_features: int | None = None, device=None, dtype=None):
        super().__init__()
        self.in_features = in_features
        require_positive(hidden_features=hidden_features)
        hidden_features = hidden_features or in_features
        f1 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.hidden = nn.Sequential(f1, nn.ReLU())
        self.out = nn.Linear(hidden_features, num_classes, device=device, dtype=dtype)
        nn.init.kaiming_normal_(f1.weight, nonlinearity='relu')
        nn.init.zeros_(f1.bias)

    def outputs(self, pooled: Tensor) -> HeadOutputs:
        """Pooled features (N, in_features) to logits (N, K), features (N, D) not negative, weight (K, D)."""
        weight = self.out.weight  # before the logits, see CAMHead
        features = self.hidden(pooled)
        return HeadOutputs(self.out(features), features, weight=weight)
