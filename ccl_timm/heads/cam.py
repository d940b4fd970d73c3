"""The CAM classifier of CC-Loss: a hidden layer gated by squeeze-and-excitation."""

import torch
from torch import Tensor, nn

from ccl_timm.heads.base import HeadOutputs, require_positive
from ccl_timm.heads.linear import HeadWithLinear
from ccl_timm.ops import full_precision, outside_autocast

__all__ = ['CAMHead', 'SqueezeExcite']

torch.fx.wrap('full_precision')  # it asks for the dtype, which a traced tensor does not have


class SqueezeExcite(nn.Module):
    """Channel attention of pooled features: Linear, ReLU, Linear, sigmoid (SENet's gate without its pooling).

    Outside autocast: CC-Loss compares attention between samples, which half precision rounds by up to 2e-3. The output
    is float32 (float64 in a float64 model) even in a half-precision model. A graph traced by torch.fx does not leave
    autocast.

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
        if torch.jit.is_scripting():
            return self._gate(pooled)
        else:
            with outside_autocast(pooled.device):
                dtype = getattr(self.reduce.weight, 'dtype', torch.float32)  # a quantised layer's weight is a method
                return self._gate(pooled.to(dtype))

    def _gate(self, pooled: Tensor) -> Tensor:
        return full_precision(self.expand(self.reduce(pooled).relu())).sigmoid()


class CAMHead(HeadWithLinear):
    """``P = f2(ReLU(f1(F) * f_se(F)))``: the classifier of CC-Loss (section 2, P2), from pooled features F.

    The attention f_se(F) is what CC-Loss compares between samples. It stays on at inference: our assumption, since the
    paper speaks of attention "in the training stage".

    Args:
        in_features: width of F.
        num_classes: K.
        hidden_features: width D of f1 and of the attention. The paper does not state it; the default is the width of
            F (512 for VGG16 and ResNet18), so that the layer is square and adds as little as it can [assumption].
            2 gives features in the plane. They are those after gate and ReLU, so they lie in one quadrant; the paper
            draws the outputs of f1.
        reduction: of the squeeze-and-excitation gate; 16 is SENet's, CC-Loss states none [assumption].

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
        require_positive(hidden_features=hidden_features, reduction=reduction)
        self.in_features = in_features
        hidden_features = hidden_features or in_features
        self.hidden = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.attention = SqueezeExcite(in_features, hidden_features, reduction, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_features, num_classes, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity='relu')
        nn.init.zeros_(self.hidden.bias)

    def outputs(self, pooled: Tensor) -> HeadOutputs:
        """Pooled features (N, in_features) to logits (N, K), features (N, D), attention (N, D), weight (K, D)."""
        weight = self.out.weight  # before the logits: the last node that torch.fx traces is the model's output
        attention = self.attention(pooled)
        hidden = self.hidden(pooled)
        features = (hidden * attention.to(hidden.dtype)).relu()
        return HeadOutputs(self.out(features), features, attention=attention, weight=weight)
