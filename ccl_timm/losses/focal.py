"""Focal loss, arXiv 1708.02002, in its softmax form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ccl_timm.losses.base import Loss, Range, batch_mean, gather_target, require
from ccl_timm.ops import force_fp32

__all__ = ['FocalLoss', 'focal_loss']


@force_fp32
def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: Tensor | float | None = None) -> Tensor:
    """Cross-entropy that weighs well-classified samples down (Focal loss paper, eq. 4 and 5, with softmax).

    With p the softmax's probability of the target y::

        mean over the batch of  -alpha_y (1 - p)^gamma log p

    The paper's formula is for a sigmoid; the softmax form is the usual transfer (reference code). The gradient goes
    through the weight (1 - p)^gamma too, as in the paper; a popular implementation detaches it.

    Args:
        logits: (N, K), floating point; half precision is computed in float32.
        target: (N,) class indices, or (N, K) class probabilities: then the target-weighted mean of the loss at each
            class [assumption].
        gamma: >= 0; 0 is cross-entropy.
        alpha: weight of every class, or (K,) weights; None for 1.

    Returns:
        Scalar >= 0.
    """
    log_p = gather_target(logits.log_softmax(1), target)
    # the floor keeps the gradient finite where p is 1, for gamma < 1
    missing = -torch.expm1(log_p).clamp_max(-torch.finfo(log_p.dtype).tiny)
    loss = -(missing**gamma) * log_p
    if alpha is not None:
        weights = torch.as_tensor(alpha, dtype=loss.dtype, device=loss.device).expand(logits.shape[1])
        loss = loss * (weights if target.ndim == 2 else weights.index_select(0, target))
    return batch_mean(loss, target)


class FocalLoss(Loss):
    """Focal loss with softmax; see :func:`focal_loss`.

    Args:
        gamma: focusing parameter, >= 0. 2 in the paper; 0 is cross-entropy.
        alpha: class weight, a number or K of them. The paper's 0.25 balances a detector's foreground against its
            background; among balanced classes it only rescales the loss, hence none here [assumption].

    Shapes: logits (N, K); target (N,) indices or (N, K) probabilities.
    Terms: ``focal``.

    Raises:
        UserError: gamma < 0, or as many class weights as there are no classes.
    """

    requires = ('logits',)
    soft_targets = True
    paper = 'Focal loss, arXiv 1708.02002, eq. 5'
    assumptions = 'no class weights by default; soft targets'
    search_space = {'gamma': Range(0.5, 5.0)}

    def __init__(self, gamma: float = 2.0, alpha: float | Sequence[float] | None = None):
        super().__init__()
        require(gamma >= 0, f'gamma must be at least 0, not {gamma}.')
        self.gamma = gamma
        weight = None if alpha is None else torch.as_tensor(alpha).float()
        weight = weight.flatten() if weight is not None and weight.ndim else weight
        weights = [] if weight is None else weight.flatten().tolist()
        require(all(w >= 0 for w in weights), f'alpha must not be negative, as {min(weights, default=0)} is.')
        self.register_buffer('alpha', weight, persistent=False)

    def compute_terms(self, outputs, target):
        """Return ``focal``."""
        number, wanted = outputs.logits.shape[1], 1 if self.alpha is None else self.alpha.numel()
        require(wanted in (1, number), f'alpha has {wanted} class weights for {number} classes: give one for each.')
        return {'focal': focal_loss(outputs.logits, target, self.gamma, self.alpha)}
