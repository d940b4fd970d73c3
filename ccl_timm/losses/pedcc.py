"""PEDCC-Loss, arXiv 1904.06008."""

import torch
from torch import Tensor

from ccl_timm.losses.base import Loss, Range, batch_mean, require
from ccl_timm.losses.margin import additive_margin
from ccl_timm.ops import all_reduce_sum, force_fp32, l2_normalize

__all__ = ['PEDCCLoss', 'centroid_distances']


@force_fp32
def centroid_distances(features: Tensor, centroids: Tensor, target: Tensor) -> Tensor:
    """Squared distance of normalised features to centroids, ``|| f / ||f|| - a ||^2 = 2 - 2 cos``.

    Args:
        features: (N, D), not normalised; half precision is computed in float32.
        centroids: (K, D), unit rows.
        target: (N,) class indices, or (N, K) class probabilities.

    Returns:
        (N,) to the target's centroid, or (N, K) to every one for probabilities. In [0, 4]; 1 for a zero feature.
    """
    unit = l2_normalize(features)
    if target.ndim == 1:
        return (unit - centroids.index_select(0, target)).square().sum(1)
    # not by 2 - 2 cos: that subtracts nearly equal numbers
    return torch.cdist(unit, centroids, compute_mode='donot_use_mm_for_euclid_dist').square()


class PEDCCLoss(Loss):
    """PEDCC-Loss: AM-Softmax with fixed centroids, plus the distance to the own centroid (POD-Loss paper, eq. 2 to 4).

    ``L = AM(cos(f, a), y) + weight * (mean over the batch of || f / ||f|| - a_y ||^2)^(1 / root)``.

    Args:
        scale: s > 0; 7.5 in the official code for CIFAR-100, 15 otherwise. The head's logits keep the head's scale.
        margin: m; 0.35 in the official code for CIFAR-100, 0.5 otherwise.
        weight: lambda >= 0; the official code has none, that is 1.
        root: n > 0, constraint factor. The paper takes the n-th root; the official code the n-th power, which is
            ``root=1/n``. 1 in its configuration for CIFAR-100.
        reduction: of the distances, ``'mean'``, or ``'sum'`` over the global batch, as in the official code since 2023;
            in 2019 it took the mean over the D features too, which is ``weight=1/D``.

    Shapes: features (N, D), centroids (K, D); target (N,) indices or (N, K) probabilities.
    Terms: ``amsoftmax``, ``mse``.

    Cautions: the POD-Loss paper does not state the values of its comparison.

    Raises:
        UserError: an option out of range.
    """

    requires = ('features', 'centroids')
    head = 'pedcc'
    soft_targets = True
    paper = 'PEDCC-Loss, arXiv 1904.06008; POD-Loss, arXiv 2111.15449, eq. 2 to 4'
    assumptions = 'the mean of the distances over the batch; the symbols of eq. 4, read from its text; soft targets'
    search_space = {
        'scale': Range(4.0, 64.0, log=True), 'margin': Range(0.0, 0.5), 'weight': Range(0.1, 10.0, log=True)
    }  # fmt: skip

    def __init__(
        self,
        scale: float = 7.5,
        margin: float = 0.35,
        weight: float = 1.0,
        root: float = 1.0,
        reduction: str = 'mean',
    ):
        super().__init__()
        require(scale > 0 and root > 0, f'scale and root must be positive, not {scale} and {root}.')
        require(weight >= 0, f'weight must not be negative, as {weight} is.')
        require(reduction in ('mean', 'sum'), f"reduction is 'mean' or 'sum', not '{reduction}'.")
        self.scale = scale
        self.margin = margin
        self.weight = weight
        self.root = root
        self.reduction = reduction

    def compute_terms(self, outputs, target):
        """Return ``amsoftmax`` and ``mse``."""
        features, centroids = outputs.features, outputs.centroids.to(outputs.features.dtype)
        amsoftmax = additive_margin(l2_normalize(features) @ centroids.T, target, self.scale, self.margin)
        distance = batch_mean(centroid_distances(features, centroids, target), target)
        number = torch.ones_like(features[:, 0]).sum()
        # of the global batch, for the root
        total, number = all_reduce_sum(torch.stack([distance * number, number])).unbind()
        mse = total if self.reduction == 'sum' else total / number
        if self.root != 1:
            mse = mse.clamp_min(1e-12) ** (1 / self.root)  # a root's slope is infinite at 0
        return {'amsoftmax': amsoftmax, 'mse': self.weight * mse}
