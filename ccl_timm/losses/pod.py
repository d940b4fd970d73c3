"""POD-Loss, arXiv 2111.15449: cosine and norm-adaptive cosine loss, and the self-correlation constraint."""

import torch
from torch import Tensor

from ccl_timm.losses.base import Loss, Range, batch_mean, require, row_norms
from ccl_timm.ops import all_reduce_sum, force_fp32, l2_normalize, world_size

__all__ = ['CosineLoss', 'NaCLoss', 'PODLoss', 'cosine_loss', 'norm_adaptive_cosine', 'self_correlation']


@force_fp32
def norm_adaptive_cosine(
    features: Tensor, centroids: Tensor, target: Tensor, delta: Tensor | float, denominator: str = 'root'
) -> Tensor:
    """Norm-adaptive cosine loss (POD-Loss paper, eq. 17).

    ``mean over the batch of (1 - <f, a_y> / sqrt(||f||^2 + delta^2))^2``. A delta > 0 rewards long features, where the
    cosine is positive.

    Args:
        features: (N, D), not normalised; half precision is computed in float32.
        centroids: (K, D), unit rows.
        target: (N,) class indices, or (N, K) class probabilities for the target-weighted mean [assumption].
        delta: >= 0; 0 is the cosine loss.
        denominator: ``'root'`` as above (official code), or ``'sum'`` for ``||f|| + delta``, the paper's wording in
            another reading [assumption].

    Returns:
        Scalar in [0, 4].
    """
    if target.ndim == 1:
        products = (features * centroids.index_select(0, target)).sum(1)
    else:
        products = features @ centroids.T
    if denominator == 'root':
        squared = features.square().sum(1) + delta**2
        length = torch.where(squared > 1e-24, squared, 1.0).sqrt()
    else:
        length = torch.linalg.vector_norm(features, dim=1) + delta
        length = torch.where(length > 1e-12, length, 1.0)
    cosine = products / (length if target.ndim == 1 else length[:, None])
    return batch_mean((1 - cosine).square(), target)


def cosine_loss(features: Tensor, centroids: Tensor, target: Tensor) -> Tensor:
    """Cosine loss (POD-Loss paper, eq. 9), ``mean over the batch of (1 - cos(f, a_y))^2``.

    Args:
        features: (N, D), floating point, not normalised; a zero feature has cosine 0.
        centroids: (K, D), unit rows.
        target: (N,) class indices, or (N, K) class probabilities for the target-weighted mean [assumption].

    Returns:
        Scalar in [0, 4].
    """
    return norm_adaptive_cosine(features, centroids, target, 0.0)


@force_fp32
def self_correlation(features: Tensor, centroids: Tensor, target: Tensor) -> Tensor:
    """Self-correlation constraint (POD-Loss paper, eq. 18 and 19): features' errors should not go together.

    With the errors ``x_n = f_n / ||f_n|| - a_(y_n)``, not centred, as the rows of X, and ``R = X^T X / (N - 1)``::

        (1 / (D - 1)) * sum over i != j of R_ij^2

    From the D x D matrix if D <= N, and else from the N x N matrix ``X X^T``, whose squares have the same sum: work
    min(D^2, N^2) * max(N, D). Under DDP N is the global batch and the D x D matrices are summed [assumption].

    Args:
        features: (N, D), not normalised; half precision is computed in float32.
        centroids: (K, D), unit rows.
        target: (N,) class indices.

    Returns:
        Scalar >= 0. 0 for a single sample, where the official code divides by zero, and for D = 1.
    """
    errors = l2_normalize(features) - centroids.index_select(0, target)
    number, dim = errors.shape
    if dim <= number or world_size() > 1:
        total = all_reduce_sum(torch.ones_like(errors[:, 0]).sum())
        gram = all_reduce_sum(errors.T @ errors)
        squares = (gram - torch.diag(gram.diagonal())).square().sum()
    else:
        total = torch.ones_like(errors[:, 0]).sum()
        # the diagonal of X^T X from the columns of X; rounding must not make the difference negative
        squares = (errors @ errors.T).square().sum() - errors.square().sum(0).square().sum()
        squares = squares.clamp_min(0)
    several = (total > 1).to(squares.dtype)
    return several * squares / ((total - 1).clamp_min(1) ** 2 * max(1, dim - 1))


class CosineLoss(Loss):
    """Cosine loss to fixed centroids; see :func:`cosine_loss`.

    Shapes: features (N, D), centroids (K, D); target (N,) indices or (N, K) probabilities.
    Terms: ``cosine``.

    Cautions: the length of the features has no gradient; the gradient by the angle vanishes at 0 and at 180 degrees and
    is largest at 120.
    """

    requires = ('features', 'centroids')
    head = 'pedcc'
    soft_targets = True
    paper = 'POD-Loss, arXiv 2111.15449, eq. 9'
    assumptions = 'soft targets'

    def compute_terms(self, outputs, target):
        """Return ``cosine``."""
        return {'cosine': cosine_loss(outputs.features, outputs.centroids, target)}


class NaCLoss(Loss):
    """NaC loss: the cosine loss with a delta in the norm that grows with the epochs; see :func:`norm_adaptive_cosine`.

    In epoch e = 0, 1, 2, ... ``delta_e = alpha * e * (mean norm of the training features in epoch e - 1)``, and
    ``delta`` in epoch 0. The norms are those of the features as they come in training, without a pass of their own.

    Args:
        alpha: >= 0; 0.01, in the paper for 100 epochs. For E epochs 1 / E goes equally far [assumption].
        delta: of the first epoch, >= 0.
        denominator: ``'root'`` or ``'sum'``, see :func:`norm_adaptive_cosine`.
        norm: ``'features'``, as in the paper, or ``'logits'``: of the vector of the K products with the centroids, as
            in the official code, which is the shorter the less the features lie in the centroids' span.

    Epochs count from 0 as in the official code. The paper counts from 1, which makes delta twice as large in the second
    epoch, and 1% larger in the hundredth.

    Shapes: features (N, D), centroids (K, D); target (N,) indices or (N, K) probabilities.
    Terms: ``nac``.
    State: ``delta``; ``mean_norm`` and ``count`` of the samples of this epoch so far, advanced in training.

    Cautions: with delta at the mean norm the cosine is at most 0.71 and the loss at least 0.086: values of different
    epochs do not compare.

    Raises:
        UserError: an option out of range.
    """

    requires = ('features', 'centroids')
    head = 'pedcc'
    soft_targets = True
    paper = 'POD-Loss, arXiv 2111.15449, eq. 12 to 17, official code'
    assumptions = 'soft targets; the mean norm of the global batch under DDP'
    search_space = {'alpha': Range(1e-3, 1.0, log=True), 'delta': Range(0.01, 0.5, log=True)}

    delta: Tensor
    mean_norm: Tensor
    count: Tensor

    def __init__(self, alpha: float = 0.01, delta: float = 0.05, denominator: str = 'root', norm: str = 'features'):
        super().__init__()
        require(alpha >= 0 and delta >= 0, f'alpha and delta must not be negative, as in {alpha} and {delta}.')
        require(denominator in ('root', 'sum'), f"denominator is 'root' or 'sum', not '{denominator}'.")
        require(norm in ('features', 'logits'), f"norm is 'features' or 'logits', not '{norm}'.")
        self.alpha = alpha
        self.first_delta = delta
        self.denominator = denominator
        self.norm = norm
        self.register_buffer('delta', torch.tensor(float(delta)))
        self.register_buffer('mean_norm', torch.tensor(0.0))
        self.register_buffer('count', torch.tensor(0.0))

    def set_epoch(self, epoch):
        """Take delta from the mean norm of the epoch that has ended, if there was one, and start a new mean."""
        if epoch == 0:
            self.delta.fill_(self.first_delta)
        else:
            self.delta.copy_(torch.where(self.count > 0, self.alpha * epoch * self.mean_norm, self.delta))
        self.mean_norm.zero_()
        self.count.zero_()

    def compute_terms(self, outputs, target):
        """Return ``nac``."""
        features, centroids = outputs.features, outputs.centroids
        if self.training and torch.is_grad_enabled():
            self._average_norm(features.detach(), centroids.to(features.dtype))
        return {'nac': norm_adaptive_cosine(features, centroids, target, self.delta, self.denominator)}

    def _average_norm(self, features: Tensor, centroids: Tensor) -> None:
        vectors = features @ centroids.T if self.norm == 'logits' else features
        norms = row_norms(vectors)
        total, number = all_reduce_sum(torch.stack([norms.sum(), torch.ones_like(norms).sum()])).unbind()
        number = torch.where(total.isfinite(), number, 0.0)  # a batch that overflows must not spoil the mean
        total = torch.where(total.isfinite(), total, 0.0)
        count = self.count + number
        mean = self.mean_norm + (total - number * self.mean_norm) / count.clamp_min(1)
        self.count, self.mean_norm = count.to(self.count.dtype), mean.to(self.mean_norm.dtype)


class PODLoss(NaCLoss):
    """POD-Loss: NaC loss plus the self-correlation constraint (eq. 20); see :class:`NaCLoss`, :func:`self_correlation`.

    Args:
        weight: lambda of the self-correlation term, >= 0; 1 in the paper.
        alpha: as for NaC loss, like the following.
        delta: of the first epoch.
        denominator: ``'root'`` or ``'sum'``.
        norm: ``'features'`` or ``'logits'``.

    Shapes: features (N, D), centroids (K, D); target (N,) indices.
    Terms: ``nac``, ``sc``.
    State: that of NaC loss.

    Cautions: the sc term is small (about 1e-4, with nac about 1) until the features agree.

    Raises:
        UserError: an option out of range.
    """

    soft_targets = False
    uses_batch_statistics = True
    paper = 'POD-Loss, arXiv 2111.15449, eq. 12 to 20, official code'
    assumptions = 'the global batch under DDP; 0 for a batch of one'
    search_space = {**NaCLoss.search_space, 'weight': Range(0.1, 10.0, log=True)}

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float = 0.01,
        delta: float = 0.05,
        denominator: str = 'root',
        norm: str = 'features',
    ):
        super().__init__(alpha, delta, denominator, norm)
        require(weight >= 0, f'weight must not be negative, as {weight} is.')
        self.weight = weight

    def compute_terms(self, outputs, target):
        """Return ``nac`` and ``sc``."""
        sc = self_correlation(outputs.features, outputs.centroids, target)
        return {**super().compute_terms(outputs, target), 'sc': self.weight * sc}
