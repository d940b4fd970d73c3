"""CC-Loss (channel correlation), arXiv 2010.05469."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ccl_timm.distributed import all_sum
from ccl_timm.losses.base import Loss, class_weight_buffer, cross_entropy, require, require_smoothing
from ccl_timm.precision import in_full_precision

__all__ = ['CCLoss', 'channel_correlation']


@in_full_precision
def channel_correlation(attention: Tensor, target: Tensor, num_classes: int | None = None, eps: float = 1e-8) -> Tensor:
    """Intra-class over inter-class squared distance of attention vectors (CC-Loss paper, eq. 8, second term).

    With d_ij = ||c_i - c_j||^2 over all pairs i < j of the batch::

        sum of d_ij over pairs of one class  /  (sum of d_ij over pairs of two classes + eps)

    Exact in O(N D), where the paper's matrix form takes O(N^2 D): sums over pairs are moments about class means. The
    attention is centred on the batch mean first, and every term is a sum of non-negative numbers: nothing cancels,
    and the ratio cannot turn negative [inferred; equal to the N x N form in value and gradient]. For soft targets,
    "same class" becomes <y_i, y_j> [inferred]. Under DDP the pairs are those of the global batch.

    Args:
        attention: (N, D), floating point; half precision is computed in float32.
        target: (N,) class indices, or (N, K) class probabilities whose rows sum to 1.
        num_classes: K, for class indices; found from the largest index if None (which waits for the device).
        eps: added to the denominator; the paper names none [inferred].

    Returns:
        Scalar >= 0. Exactly 0, with zero gradient, if there is no pair of one class or only one class at all.
    """
    if target.ndim == 2:
        intra, inter, classes = _soft_pair_sums(attention, target)
    else:
        intra, inter, classes = _pair_sums(attention, target, num_classes or int(target.max()) + 1)
    several = classes > 1
    # with a single class the paper's ratio is intra / eps, about 1e9: there is nothing to push apart, so no term
    return torch.where(several, intra, 0.0) / torch.where(several, inter + eps, 1.0)


def _pair_sums(c: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    n, c = _count_and_centre(c)
    counts = all_sum(c.new_zeros(num_classes).index_add(0, target, c.new_ones(len(target))))  # (K,)
    sums = all_sum(c.new_zeros(num_classes, c.shape[1]).index_add(0, target, c))  # (K, D)
    means = sums / counts.clamp_min(1)[:, None]
    # index_select, since the gradient of means[target] is summed in any order on several threads
    scatter = (c - means.index_select(0, target)).square().sum(1)  # (N,) squared distance to the own class's mean
    own = counts.index_select(0, target)  # (N,) size of the own class
    intra = all_sum((own * scatter).sum())
    inter = all_sum(((n - own) * scatter).sum()) + n * (counts * means.square().sum(1)).sum()
    return intra, inter, (counts > 0).sum()


def _soft_pair_sums(c: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, c = _count_and_centre(c)
    counts = all_sum(y.sum(0))  # (K,)
    # a class without weight has a zero sum: any positive divisor will do
    means = all_sum(y.T @ c) / torch.where(counts > 0, counts, 1.0)[:, None]  # (K, D)
    # not by ||c||^2 + ||m||^2 - 2 c.m: that subtracts nearly equal numbers
    distance = torch.cdist(c, means, compute_mode='donot_use_mm_for_euclid_dist').square()  # (N, K)
    scatter = all_sum((y * distance).sum(0))  # (K,)
    intra = (counts * scatter).sum()
    inter = ((n - counts).clamp_min(0) * scatter).sum() + n * (counts * means.square().sum(1)).sum()
    return intra, inter, (counts > 0).sum()


def _count_and_centre(c: Tensor) -> tuple[Tensor, Tensor]:
    """Global number of rows, and the rows minus their global mean: distances stay, rounding errors do not."""
    n = all_sum(c.new_tensor(float(len(c))))
    return n, c - all_sum(c.sum(0)) / n


class CCLoss(Loss):
    """CC-Loss: cross-entropy plus the channel correlation of the attention vectors (eq. 8).

    ``L = CE(P2, y) + weight * L_intra / (L_inter + eps)``: attention vectors of one class are drawn together, those
    of different classes are pushed apart. P2 are the logits of the CAM classifier, which stays on at inference.

    Args:
        weight: lambda, >= 0; the paper tunes 0, 0.5, 1, 1.5, 2 and takes 1.
        eps: keeps the ratio finite; "a small positive constant" in the paper, which gives no value [inferred].
        smoothing: label smoothing of the cross-entropy part, in [0, 1); the paper uses none.
        class_weight: K weights of the classes in the cross-entropy part; the paper has none.

    Shapes: logits (N, K), attention (N, D); target (N,) indices or (N, K) probabilities.
    Terms: ``ce``, ``cc``.

    Cautions: a batch without two samples of one class has a zero cc term (53% of random batches of 16 on Cars-196);
    without structure the ratio is about 1 / (K - 1), so that at weight 1 the term starts small for many classes.
    """

    reads = ('logits', 'attention')
    head = 'cam'
    soft_targets = True
    batch_statistics = True
    paper = 'CC-Loss, arXiv 2010.05469, eq. 8'
    inferred = 'the value of eps; soft targets; the global batch under DDP'

    def __init__(
        self,
        weight: float = 1.0,
        eps: float = 1e-8,
        smoothing: float = 0.0,
        class_weight: Sequence[float] | None = None,
    ):
        super().__init__()
        require(weight >= 0 and eps > 0, f'weight must not be negative and eps positive, not {weight} and {eps}.')
        require_smoothing(smoothing)
        self.weight = weight
        self.eps = eps
        self.smoothing = smoothing
        self.register_buffer('class_weight', class_weight_buffer(class_weight), persistent=False)

    def terms(self, outputs, target):
        """Return ``ce`` and ``cc``."""
        cc = channel_correlation(outputs.attention, target, outputs.logits.shape[1], self.eps)
        ce = cross_entropy(outputs.logits, target, self.smoothing, self.class_weight)
        return {'ce': ce, 'cc': self.weight * cc}
