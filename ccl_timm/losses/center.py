"""Center loss (ECCV 2016)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ccl_timm.losses.base import Loss, Range, class_weight_buffer, cross_entropy, finite_or, require, require_smoothing
from ccl_timm.ops import all_reduce_sum, force_fp32

__all__ = ['CenterLoss', 'center_distances', 'move_centers']


@force_fp32
def center_distances(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
    """Squared distance (N,) of features (N, D) to the centre, a row of (K, D), of their class (N,)."""
    # by gather and subtraction: ||f||^2 + ||c||^2 - 2 f.c cancels
    return (features - centers.index_select(0, target)).square().sum(1)


@force_fp32
def move_centers(features: Tensor, target: Tensor, centers: Tensor, alpha: float) -> Tensor:
    """Return the centres (K, D) after one update (Center loss paper, eq. 4).

    ``c_j - alpha * sum over the n_j samples of class j of (c_j - f) / (1 + n_j)``, over the global batch; a class
    without samples stays.

    Args:
        features: (N, D).
        target: (N,) class indices.
        centers: (K, D).
        alpha: in [0, 1].
    """
    features = features.detach()
    samples = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    sums = all_reduce_sum(samples.new_zeros(len(centers), samples.shape[1]).index_add(0, target, samples))
    sums, counts = sums[:, :-1], sums[:, -1:]
    return centers - alpha * (counts * centers - sums) / (1 + counts)


class CenterLoss(Loss):
    """Center loss: cross-entropy plus the squared distance of features to their class's centre (eq. 5).

    ``L = CE(z, y) + (weight / 2) * mean over the batch of ||f - c_y||^2``. Each training step then moves the centres by
    the paper's rule, not by the optimizer: see :func:`move_centers`. They start as in the official code (Xavier).

    Args:
        num_classes: K; filled in by ``create_task``.
        num_features: D; filled in by ``create_task``.
        weight: lambda >= 0; 0.008 for faces, 0.01 for MNIST in the official code, which takes the mean.
        alpha: how far centres move, in [0, 1]; 0.5 in the paper.
        reduction: ``'mean'`` over the batch, as in the official code, or ``'sum'``, as in the paper (weight 0.003),
            over the global batch.
        smoothing: label smoothing of the cross-entropy term, in [0, 1); the paper uses none.
        class_weight: K weights of the classes in the cross-entropy term; the paper has none.

    Shapes: logits (N, K), features (N, D); target (N,) indices.
    Terms: ``ce``, ``center``.
    State: ``centers`` (K, D), advanced in training.

    Cautions: weights are not portable between the paper (sum, 1/2), the official code (mean, 1/2) and a popular
    reimplementation (mean, no 1/2). The POD-Loss paper does not state the values of its comparison.

    Raises:
        UserError: an option out of range.
    """

    requires = ('logits', 'features')
    paper = 'Center loss, ECCV 2016, eq. 4 and 5'
    assumptions = "the mean with the paper's own centre update; centres of the global batch under DDP"
    search_space = {'weight': Range(1e-4, 0.1, log=True), 'alpha': Range(0.1, 1.0), 'smoothing': Range(0.0, 0.3)}

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        weight: float = 0.008,
        alpha: float = 0.5,
        reduction: str = 'mean',
        smoothing: float = 0.0,
        class_weight: Sequence[float] | None = None,
    ):
        super().__init__()
        require(weight >= 0, f'weight must not be negative, as {weight} is.')
        require(0 <= alpha <= 1, f'alpha must be in [0, 1], not {alpha}.')
        require(reduction in ('mean', 'sum'), f"reduction is 'mean' or 'sum', not '{reduction}'.")
        self.num_classes = num_classes
        self.num_features = num_features
        self.weight = weight
        self.alpha = alpha
        self.reduction = reduction
        require_smoothing(smoothing)
        self.smoothing = smoothing
        self.register_buffer('class_weight', class_weight_buffer(class_weight), persistent=False)
        bound = (3 / num_features) ** 0.5
        self.register_buffer('centers', nn.init.uniform_(torch.empty(num_classes, num_features), -bound, bound))

    def compute_terms(self, outputs, target):
        """Return ``ce`` and ``center``."""
        classes = outputs.logits.shape[1]
        require(
            classes == self.num_classes,
            f'Center loss has {self.num_classes} centres for {classes} classes: make the loss anew.',
        )
        distances = center_distances(outputs.features, target, self.centers)
        distance = distances.mean() if self.reduction == 'mean' else all_reduce_sum(distances.sum())
        if self.training and torch.is_grad_enabled():
            # new tensor, not in place: a compiled backward pass may read the old centres again
            moved = move_centers(outputs.features, target, self.centers, self.alpha).to(self.centers.dtype)
            self.centers = finite_or(moved, self.centers)
        ce = cross_entropy(outputs.logits, target, self.smoothing, self.class_weight)
        return {'ce': ce, 'center': self.weight / 2 * distance}
