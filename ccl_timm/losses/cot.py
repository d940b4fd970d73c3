"""Complement objective training (ICLR 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ccl_timm.losses.base import Loss, Range, class_weight_buffer, cross_entropy, mask_class, require, require_smoothing
from ccl_timm.ops import force_fp32

__all__ = ['COTLoss', 'complement_entropy']


@force_fp32
def complement_entropy(logits: Tensor, target: Tensor, divisor: str = 'paper') -> Tensor:
    """Negative entropy of the softmax over the classes other than the target, balanced by their number.

    With q the softmax without the target's logit::

        mean over the batch of  (1 / (K - 1)) sum_(j != y) q_j log q_j

    Equal to the official form p_j / (1 - p_y), whose eps switches it off where p_y is nearly 1.

    Args:
        logits: (N, K), floating point; half precision is computed in float32.
        target: (N,) class indices.
        divisor: ``'paper'`` for K - 1, ``'code'`` for K, as in the official code.

    Returns:
        Scalar in [-log(K - 1) / (K - 1), 0], to be minimised. 0 for K < 3. The gradient on the target's logit is
        exactly 0.
    """
    number = logits.shape[1] if divisor == 'code' else max(1, logits.shape[1] - 1)
    log_q = mask_class(logits, target).log_softmax(1).clamp_min(torch.finfo(logits.dtype).min)  # 0 * -inf is NaN
    return (log_q.exp() * log_q).sum(1).mean() / number


class COTLoss(Loss):
    """COT: cross-entropy, and an even distribution over the wrong classes; see :func:`complement_entropy`.

    The paper takes two optimizer steps a batch: one on cross-entropy, then, after another forward pass, one on the
    complement objective, with an optimizer (and so momentum and weight decay) of its own for each. Here a batch is one
    step [assumption]:

    - ``mode='alternate'``: the even steps minimise cross-entropy, the odd ones the complement objective, of another
      batch and with one optimizer: half the paper's updates in the same epochs.
    - ``mode='sum'``: every step minimises the sum of both: one forward pass, one momentum.

    Args:
        mode: ``'alternate'`` or ``'sum'``.
        divisor: ``'paper'`` for K - 1, ``'code'`` for K.
        smoothing: label smoothing of the cross-entropy term, in [0, 1); the paper uses none.
        class_weight: K weights of the classes in the cross-entropy term; the paper has none.

    Shapes: logits (N, K); target (N,) indices.
    Terms: ``ce``, ``complement``; with ``'alternate'`` the one whose turn it is not is 0.
    State: ``step``, optimizer steps taken, as :meth:`set_step` sets them.

    Raises:
        UserError: an unknown mode or divisor.
    """

    requires = ('logits',)
    paper = 'Complement objective training, ICLR 2019'
    assumptions = 'one optimizer step a batch instead of two: half the updates in the same epochs; class weights'
    search_space = {'smoothing': Range(0.0, 0.3)}

    def __init__(
        self,
        mode: str = 'alternate',
        divisor: str = 'paper',
        smoothing: float = 0.0,
        class_weight: Sequence[float] | None = None,
    ):
        super().__init__()
        require(mode in ('alternate', 'sum'), f"mode is 'alternate' or 'sum', not '{mode}'.")
        require(divisor in ('paper', 'code'), f"divisor is 'paper' or 'code', not '{divisor}'.")
        self.mode = mode
        self.divisor = divisor
        require_smoothing(smoothing)
        self.smoothing = smoothing
        self.register_buffer('class_weight', class_weight_buffer(class_weight), persistent=False)
        self.register_buffer('step', torch.tensor(0))

    def set_step(self, step):
        """Take over the number of optimizer steps."""
        self.step = torch.zeros_like(self.step) + step  # not in place: a compiled backward pass may read the old one

    def compute_terms(self, outputs, target):
        """Return ``ce`` and ``complement``."""
        ce = cross_entropy(outputs.logits, target, self.smoothing, self.class_weight)
        complement = complement_entropy(outputs.logits, target, self.divisor)
        if self.mode == 'alternate':
            odd = self.step % 2
            ce, complement = ce * (1 - odd), complement * odd
        return {'ce': ce, 'complement': complement}
