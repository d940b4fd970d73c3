"""Inter-class angular losses: ICAL (AAAI 2019) and focal ICAL (VCIP 2019)."""

import torch
from torch import Tensor

from ccl_timm.losses.base import Loss, Range, cross_entropy, finite_or, require, unnormalized_cosine_logits
from ccl_timm.ops import all_reduce_sum, force_fp32, l2_normalize

__all__ = ['FICALLoss', 'ICALLoss', 'confusion_rates', 'confusion_weighted_cosine', 'mean_class_cosine']


@force_fp32
def mean_class_cosine(weight: Tensor) -> Tensor:
    """Mean cosine between all pairs of class vectors, a vector with itself included (ICAL, official code).

    ``(1 / K^2) sum_ij cos(w_i, w_j) = || mean_k w_k / ||w_k|| ||^2``, in O(K D).

    Args:
        weight: (K, D) class vectors of any length, floating point.

    Returns:
        Scalar in [0, 1]. 0 for any class vectors whose directions sum to zero, the regular simplex among them.
    """
    return l2_normalize(weight).mean(0).square().sum()


@force_fp32
def confusion_rates(logits: Tensor, target: Tensor, hard: bool = False) -> tuple[Tensor, Tensor]:
    """Which class the samples of each class are taken for, in the global batch [assumption].

    Args:
        logits: (N, K).
        target: (N,) class indices.
        hard: count the class of the largest logit instead of the softmax's probabilities.

    Returns:
        Rates (K, K), detached: row i is the mean over the samples of class i, zero if there are none; and the number
        of samples of each class (K,).
    """
    number = logits.shape[1]
    with torch.no_grad():
        chosen = torch.nn.functional.one_hot(logits.argmax(1), number).to(logits.dtype) if hard else logits.softmax(1)
        sums = logits.new_zeros(number, number + 1)
        sums = sums.index_add(0, target, torch.cat([chosen, torch.ones_like(chosen[:, :1])], 1))
    sums = all_reduce_sum(sums)
    counts = sums[:, -1]
    return sums[:, :-1] / counts.clamp_min(1)[:, None], counts


@force_fp32
def confusion_weighted_cosine(weight: Tensor, rates: Tensor, exponent: float, eps: float, normalize: str) -> Tensor:
    """Cosine between class vectors, averaged over pairs of classes by how often they are confused [assumption].

    With ``s_ij = ((r_ij + r_ji) / 2)^exponent``, detached, for i != j::

        sum of s_ij cos(w_i, w_j)  /  max(sum of s_ij, eps)      or      / K^2

    Args:
        weight: (K, D) class vectors of any length.
        rates: (K, K), see :func:`confusion_rates`.
        exponent: > 0; more than 1 looks at the worst confusions.
        eps: > 0, least divisor.
        normalize: divide by ``'weights'``, the sum of s_ij, or by ``'classes'``, K^2.

    Returns:
        Scalar in [-1, 1].
    """
    vectors, rates = l2_normalize(weight), rates.detach()
    shares = ((rates + rates.T) / 2) ** exponent
    shares = shares - torch.diag(shares.diagonal())
    divisor = shares.sum().clamp_min(eps) if normalize == 'weights' else weight.shape[0] ** 2
    return (shares * (vectors @ vectors.T)).sum() / divisor


class ICALLoss(Loss):
    """ICAL: cross-entropy plus the mean cosine between class vectors; see :func:`mean_class_cosine`.

    ``L = CE(||f|| cos, y) + weight * (1 / K^2) sum_ij cos(w_i, w_j)``, for a classifier with unit class vectors,
    no bias, and features as they are.

    Args:
        weight: lambda >= 0. 5 in the official README for CIFAR-10 with augmentation, 10 without.

    Shapes: cosine (N, K), features (N, D), weight (K, D); target (N,) indices or (N, K) probabilities.
    Terms: ``ce``, ``ical``.

    Cautions: this is the official code's formula; if the paper weighs the pairs, its code does not. The official code
    does not differentiate through the normalisation of the class vectors, this does. Build the model with
    ``normalize_features=False`` for the trained logits at evaluation (the classes are the same either way).

    Raises:
        UserError: weight < 0.
    """

    requires = ('cosine', 'features', 'weight')
    head = 'cosine'
    soft_targets = True
    paper = 'ICAL, AAAI 2019, official code'
    assumptions = 'the gradient passes through the normalisation of the class vectors; soft targets'
    search_space = {'weight': Range(0.5, 50.0, log=True)}

    def __init__(self, weight: float = 5.0):
        super().__init__()
        require(weight >= 0, f'weight must not be negative, as {weight} is.')
        self.weight = weight

    def compute_terms(self, outputs, target):
        """Return ``ce`` and ``ical``."""
        ce = cross_entropy(unnormalized_cosine_logits(outputs.features, outputs.cosine), target)
        return {'ce': ce, 'ical': self.weight * mean_class_cosine(outputs.weight)}


class FICALLoss(Loss):
    """Focal ICAL, reconstructed from its abstract: neither formula nor code could be found.

    The abstract has a "confusion rate-weighted cosine distance" between categories, "dynamically evaluated during each
    iteration". Here [all assumptions]: cross-entropy as in ICAL, plus :func:`confusion_weighted_cosine` of the class
    vectors by the :func:`confusion_rates` of the batch.

    Args:
        weight: lambda >= 0; ICAL's 5.
        exponent: > 0, of the confusion rates.
        eps: > 0, least divisor.
        confusion: ``'soft'``, by the softmax's probabilities, or ``'hard'``, by the class chosen.
        momentum: in [0, 1). 0 takes the rates of the batch alone; else their average over iterations: a class in the
            batch keeps this share of its former rates, others keep all.
        normalize: ``'weights'`` or ``'classes'``, see :func:`confusion_weighted_cosine`.
        num_classes: K, needed for momentum > 0; filled in by ``create_task``.

    Shapes: cosine (N, K), features (N, D), weight (K, D); target (N,) indices.
    Terms: ``ce``, ``fical``.
    State: ``rates`` (K, K), with momentum > 0; advanced in training.

    Cautions: call results obtained with it a reimplementation from the abstract. ``normalize_features`` as for ICAL.

    Raises:
        UserError: an option out of range, or momentum without num_classes.
    """

    requires = ('cosine', 'features', 'weight')
    head = 'cosine'
    uses_batch_statistics = True
    paper = 'FICAL, VCIP 2019, doi 10.1109/VCIP47243.2019.8965889, abstract only'
    assumptions = 'the whole formula and its constants'
    search_space = {'weight': Range(0.5, 50.0, log=True), 'exponent': Range(0.25, 4.0, log=True)}

    rates: Tensor

    def __init__(
        self,
        weight: float = 5.0,
        exponent: float = 1.0,
        eps: float = 1e-8,
        confusion: str = 'soft',
        momentum: float = 0.0,
        normalize: str = 'weights',
        num_classes: int | None = None,
    ):
        super().__init__()
        require(weight >= 0, f'weight must not be negative, as {weight} is.')
        require(exponent > 0 and eps > 0, f'exponent and eps must be positive, not {exponent} and {eps}.')
        require(confusion in ('soft', 'hard'), f"confusion is 'soft' or 'hard', not '{confusion}'.")
        require(normalize in ('weights', 'classes'), f"normalize is 'weights' or 'classes', not '{normalize}'.")
        require(0 <= momentum < 1, f'momentum must be in [0, 1), not {momentum}.')
        require(momentum == 0 or num_classes is not None, 'momentum needs num_classes.')
        self.weight = weight
        self.exponent = exponent
        self.eps = eps
        self.confusion = confusion
        self.momentum = momentum
        self.normalize = normalize
        if momentum > 0 and num_classes:
            self.register_buffer('rates', torch.zeros(num_classes, num_classes))

    def compute_terms(self, outputs, target):
        """Return ``ce`` and ``fical``."""
        logits = unnormalized_cosine_logits(outputs.features, outputs.cosine)
        rates = self._rates(logits, target)
        fical = confusion_weighted_cosine(outputs.weight, rates, self.exponent, self.eps, self.normalize)
        return {'ce': cross_entropy(logits, target), 'fical': self.weight * fical}

    def _rates(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.momentum > 0:
            known, classes = len(self.rates), logits.shape[1]
            require(
                known == classes, f'FICAL has rates of {known} classes, and there are {classes}: make the loss anew.'
            )
        if self.momentum > 0 and not (self.training and torch.is_grad_enabled()):
            return self.rates
        rates, counts = confusion_rates(logits, target, self.confusion == 'hard')
        if self.momentum > 0:
            kept = torch.where(counts > 0, self.momentum, 1.0)[:, None]
            # new tensor, not in place: a compiled backward pass may read the old rates again
            averaged = (kept * self.rates + (1 - kept) * rates).to(self.rates.dtype)
            self.rates = rates = finite_or(averaged, self.rates)
        return rates
