"""CC-Loss (channel correlation), arXiv 2010.05469."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ccl_timm.losses.base import Loss, Range, class_weight_buffer, cross_entropy, require, require_smoothing
from ccl_timm.ops import all_reduce_sum, all_reduce_sum_no_grad, force_fp32

__all__ = ['CCLoss', 'channel_correlation']


@force_fp32
def channel_correlation(attention: Tensor, target: Tensor, num_classes: int | None = None, eps: float = 1e-8) -> Tensor:
    """Intra-class over inter-class squared distance of attention vectors (CC-Loss paper, eq. 8, second term).

    With d_ij = ||c_i - c_j||^2 over all pairs i < j of the batch::

        sum of d_ij over pairs of one class  /  (sum of d_ij over pairs of two classes + eps)

    Exact in O(N D), where the paper's matrix form takes O(N^2 D): sums over pairs are moments about class means. The
    attention is centred on the batch mean first, and every term is a sum of non-negative numbers: nothing cancels,
    and the ratio cannot turn negative [assumption; equal to the N x N form in value and gradient]. For soft targets,
    "same class" becomes <y_i, y_j> [assumption]. Under DDP the pairs are those of the global batch.

    Args:
        attention: (N, D), floating point; half precision is computed in float32.
        target: (N,) class indices, or (N, K) class probabilities whose rows sum to 1.
        num_classes: K, for class indices; found from the largest index if None (which waits for the device).
        eps: added to the denominator; the paper names none [assumption].

    Returns:
        Scalar >= 0. Exactly 0, with zero gradient, if there is no pair of one class or only one class at all.
    """
    if target.ndim == 2:
        intra, inter, classes = _soft_pair_sums(attention, target)
    else:
        # evaluation is each process's own
        number = num_classes or (int(target.max()) + 1 if len(target) else 1)
        intra, inter, counts = _PairSums.apply(attention, target, number, torch.is_grad_enabled())
        classes = (counts > 0).sum()
    several = classes > 1
    # with a single class the paper's ratio is intra / eps, about 1e9: there is nothing to push apart, so no term
    return torch.where(several, intra, 0.0) / torch.where(several, inter + eps, 1.0)


class _PairSums(torch.autograd.Function):
    """Sums of squared distances over pairs of one class and of two, and the size of each class (K,).

    The gradient is written out: with r the difference to the own class's mean m, it is 2 n_k r for the first sum and
    2 (n - n_k) r + 2 n m for the second. It needs r alone, where autograd keeps and fills four such matrices; to write
    them is nearly all the time that this loss takes.
    """

    @staticmethod
    def forward(ctx, c: Tensor, target: Tensor, num_classes: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.sum, ctx.num_classes = _sum_over_processes if shared else lambda x: x, num_classes
        n, counts, means, residual = _about_means(c, target, num_classes, ctx.sum)
        scatter = torch.linalg.vector_norm(residual, dim=1).square()  # (N,) squared distance to the own class's mean
        own = counts.index_select(0, target)  # (N,) size of the own class
        intra = ctx.sum((own * scatter).sum())
        inter = ctx.sum(((n - own) * scatter).sum()) + n * (counts * means.square().sum(1)).sum()
        ctx.save_for_backward(c, target, n, own, means, residual)
        ctx.mark_non_differentiable(counts)
        return intra, inter, counts

    @staticmethod
    def backward(ctx, grad_intra: Tensor, grad_inter: Tensor, _) -> tuple[Tensor, None, None, None]:
        c, target, n, own, means, residual = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives: means and residuals again, with their graph
            means, residual = _about_means(c, target, ctx.num_classes, ctx.sum)[2:]
        grad_intra, grad_inter = ctx.sum(torch.stack([grad_intra, grad_inter]))  # each process's loss has all pairs
        factor = 2 * (grad_intra * own + grad_inter * (n - own))
        grad = (2 * n * grad_inter * means).index_select(0, target)
        return grad.addcmul_(residual, factor[:, None]), None, None, None


def _sum_over_processes(x: Tensor) -> Tensor:
    return all_reduce_sum(x) if torch.is_grad_enabled() else all_reduce_sum_no_grad(x)


def _about_means(
    c: Tensor, target: Tensor, num_classes: int, total: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples in all, samples of each class (K,), class means about the batch mean (K, D), differences to them (N, D).

    ``total`` sums over processes.
    """
    n = total(c.new_tensor(float(len(c))))
    c = c - total(c.sum(0)) / n  # distances stay, rounding errors do not
    counts = total(c.new_zeros(num_classes).index_add_(0, target, c.new_ones(len(target))))
    sums = total(c.new_zeros(num_classes, c.shape[1]).index_add_(0, target, c))
    means = sums / counts.clamp_min(1)[:, None]
    subtract = torch.sub if torch.is_grad_enabled() else torch.Tensor.sub_  # in place, unless autograd has kept c
    residual = subtract(c, means.index_select(0, target))
    # what rounding left of the centre would be in every row of the gradient
    return n, counts, means - sums.sum(0) / n, residual


def _soft_pair_sums(c: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = all_reduce_sum(c.new_tensor(float(len(c))))
    c = c - all_reduce_sum(c.sum(0)) / n  # distances stay, rounding errors do not
    counts = all_reduce_sum(y.sum(0))  # (K,)
    # a class without weight has a zero sum: any positive divisor will do
    means = all_reduce_sum(y.T @ c) / torch.where(counts > 0, counts, 1.0)[:, None]  # (K, D)
    # not by ||c||^2 + ||m||^2 - 2 c.m: that subtracts nearly equal numbers
    distance = torch.cdist(c, means, compute_mode='donot_use_mm_for_euclid_dist').square()  # (N, K)
    scatter = all_reduce_sum((y * distance).sum(0))  # (K,)
    intra = (counts * scatter).sum()
    inter = ((n - counts).clamp_min(0) * scatter).sum() + n * (counts * means.square().sum(1)).sum()
    return intra, inter, (counts > 0).sum()


class CCLoss(Loss):
    """CC-Loss: cross-entropy plus the channel correlation of the attention vectors (eq. 8).

    ``L = CE(P2, y) + weight * L_intra / (L_inter + eps)``: attention vectors of one class are drawn together, those
    of different classes are pushed apart. P2 are the logits of the CAM classifier, which stays on at inference.

    Args:
        weight: lambda, >= 0; the paper tunes 0, 0.5, 1, 1.5, 2 and takes 1.
        eps: keeps the ratio finite; "a small positive constant" in the paper, which gives no value [assumption].
        smoothing: label smoothing of the cross-entropy term, in [0, 1); the paper uses none.
        class_weight: K weights of the classes in the cross-entropy term; the paper has none.

    Shapes: logits (N, K), attention (N, D); target (N,) indices or (N, K) probabilities.
    Terms: ``ce``, ``cc``.

    Cautions: a batch without two samples of one class has a zero cc term (53% of random batches of 16 on Cars-196);
    without structure the ratio is about 1 / (K - 1), so that at weight 1 the term starts small for many classes.
    """

    requires = ('logits', 'attention')
    head = 'cam'
    soft_targets = True
    uses_batch_statistics = True
    paper = 'CC-Loss, arXiv 2010.05469, eq. 8'
    assumptions = (
        'the value of eps; no cc term in a batch of a single class, where the ratio would be intra / eps; '
        'attention also at inference; soft targets; class weights; the global batch under DDP'
    )
    search_space = {'weight': Range(0.03, 10.0, log=True), 'smoothing': Range(0.0, 0.3)}

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

    def compute_terms(self, outputs, target):
        """Return ``ce`` and ``cc``."""
        cc = channel_correlation(outputs.attention, target, outputs.logits.shape[1], self.eps)
        ce = cross_entropy(outputs.logits, target, self.smoothing, self.class_weight)
        return {'ce': ce, 'cc': self.weight * cc}
