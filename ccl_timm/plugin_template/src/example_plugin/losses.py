"""Confidence penalty (Pereyra et al. 2017, arXiv 1701.06548)."""

from torch import Tensor

from ccl_timm.losses import Loss, cross_entropy

__all__ = ['ConfidencePenalty', 'entropy']


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions in nats: logits (N, K) to a scalar between 0 and log K."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


class ConfidencePenalty(Loss):
    """Cross-entropy minus the entropy of the prediction: certainty costs. ``L = CE(logits, y) - weight * H(p)``.

    Args:
        weight: beta, >= 0; the paper takes 0.1 for images.
        smoothing: label smoothing of the cross-entropy term, in [0, 1).

    Shapes: logits (N, K); target (N,) class indices or (N, K) probabilities.
    Terms: ``ce``, ``confidence`` (<= 0).
    """

    requires = ('logits',)
    soft_targets = True
    paper = 'Confidence penalty, arXiv 1701.06548, section 3.1'

    def __init__(self, weight: float = 0.1, smoothing: float = 0.0):
        super().__init__()
        if weight < 0:
            raise ValueError(f'weight is {weight}, it must be >= 0')
        self.weight = weight
        self.smoothing = smoothing

    def compute_terms(self, outputs, target):
        """Return ``ce`` and ``confidence``."""
        return {
            'ce': cross_entropy(outputs.logits, target, self.smoothing),
            'confidence': -self.weight * entropy(outputs.logits),
        }
