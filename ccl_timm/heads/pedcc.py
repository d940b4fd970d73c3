"""The classifier of PEDCC-Loss and POD-Loss: a linear layer, then fixed class centroids."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ccl_timm.heads.base import Head, HeadOutputs, require_positive, transformers_initializes
from ccl_timm.heads.centroids import pedcc_centroids
from ccl_timm.heads.cosine import cosine_logits
from ccl_timm.ops import FullPrecisionBuffers

__all__ = ['PEDCCHead']

torch.fx.wrap('cosine_logits')


class PEDCCHead(FullPrecisionBuffers, Head):
    """``f = Linear(F)``; logits are the scaled cosines of f and K fixed, evenly distributed centroids.

    The class is that of the nearest centroid, as POD-Loss has it. The losses made for this head read the features, so
    that the scale changes only probabilities, the validation loss, and losses that read logits, such as cross-entropy.

    Args:
        in_features: width of the pooled features F.
        num_classes: K >= 2.
        feature_dim: width D of f. The default is 512, or the smallest power of two that is at least 2 K if that is
            more: what POD-Loss takes for 100, 200, 500 and 1000 classes (512, 512, 1024, 2048; for 10 it takes 256,
            with 512 close behind). It is more than K - 1, so that all pairs of classes are equally far apart.
        seed: of the centroids' rotation. They are saved with the weights, since another machine may round otherwise.
        scale: s > 0 of the logits [assumed: 30, as in the cosine head]. The softmax of bare cosines is almost uniform:
            its cross-entropy is at least ``log(1 + (K - 1) exp(-s K / (K - 1)))``, which is 4.28 for s = 1, K = 196.

    The centroids are a buffer ``weight`` (K, D), not a parameter, and stay float32 in a half-precision model, where
    their cosines would move by 7e-4. Outputs but the features are float32 likewise.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        feature_dim: int | None = None,
        seed: int = 0,
        scale: float = 30.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        require_positive(feature_dim=feature_dim, scale=scale)
        self.in_features = in_features
        self.seed = seed
        self.scale = scale
        feature_dim = feature_dim or max(512, 1 << (2 * num_classes - 1).bit_length())
        self.linear = nn.Linear(in_features, feature_dim, device=device, dtype=dtype)
        self.register_buffer('weight', pedcc_centroids(num_classes, feature_dim, seed).to(device, torch.float32))

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The width of the features."""
        return {'feature_dim': state['linear.weight'].shape[0]} if 'linear.weight' in state else {}

    def reset(self, num_classes: int) -> None:
        """Make new centroids of the same width, keep the linear layer."""
        self.weight = pedcc_centroids(num_classes, self.linear.out_features, self.seed).to(self.weight)

    def init_non_persistent_buffers(self) -> None:
        """Make the centroids, unless transformers has loaded them."""
        if transformers_initializes() and not getattr(self.weight, '_is_hf_initialized', False):
            num_classes, feature_dim = self.weight.shape
            self.weight.copy_(pedcc_centroids(num_classes, feature_dim, self.seed))

    def outputs(self, pooled: Tensor) -> HeadOutputs:
        """Pooled features (N, in_features) to logits (N, K), features (N, D), cosine (N, K), centroids (K, D)."""
        features = self.linear(pooled)
        cosine = cosine_logits(features, self.weight)[0]
        return HeadOutputs(self.scale * cosine, features, cosine=cosine, centroids=self.weight)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (N, in_features) to logits (N, K)."""
        return self.outputs(pooled).logits
