"""The CAM classifier of CC-Loss: a hidden layer gated by squeeze-and-excitation."""

from torch import Tensor, nn

from ccl_timm.heads.base import HeadOutputs
from ccl_timm.heads.linear import HeadWithLinear

__all__ = ['CamHead', 'SqueezeExcite']


class SqueezeExcite(nn.Module):
    """Channel attention of pooled features: Linear, ReLU, Linear, sigmoid (SENet's gate without its pooling).

    Args:
        in_features: width of the pooled features.
        out_features: width of the attention vector.
        reduction: the inner width is ``in_features // reduction``, at least 1.
    """

    def __init__(self, in_features: int, out_features: int, reduction: int = 16, device=None, dtype=None):
        super().__init__()
        inner = max(1, in_features // reduction)
        self.reduce = nn.Linear(in_features, inner, device=device, dtype=dtype)
        self.expand = nn.Linear(inner, out_features, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.reduce.weight, nonlinearity='relu')
        nn.init.zeros_(self.reduce.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (N, in_features) to attention (N, out_features) in (0, 1)."""
        return self.expand(self.reduce(pooled).relu()).sigmoid()


class CamHead(HeadWithLinear):
    """``P = f2(ReLU(f1(F) * f_se(F)))``: the classifier of CC-Loss (section 2, P2), from pooled features F.

    The attention f_se(F) is what CC-Loss compares between samples; it stays on at inference.

    Args:
        in_features: width of F.
        num_classes: K.
        hidden_features: width D of f1 and of the attention. The paper does not state it; the default is the width of
            F (512 for VGG16 and ResNet18), so that the layer is square and adds as little as it can [inferred].
            2 gives the papers' pictures of features in the plane.
        reduction: of the squeeze-and-excitation gate; 16 is SENet's, CC-Loss states none [inferred].

    He initialisation of the layers before a ReLU, as the paper names it.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_features: int | None = None,
        reduction: int = 16,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        hidden_features = hidden_features or in_features
        self.hidden = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.attention = SqueezeExcite(in_features, hidden_features, reduction, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_features, num_classes, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity='relu')
        nn.init.zeros_(self.hidden.bias)

    def outputs(self, pooled: Tensor) -> HeadOutputs:
        """Pooled features (N, in_features) to logits (N, K), features (N, D), attention (N, D), weight (K, D)."""
        attention = self.attention(pooled)
        features = (self.hidden(pooled) * attention).relu()
        return HeadOutputs(self.out(features), features, attention=attention, weight=self.out.weight)
