"""Margins on the target's cosine: A-Softmax, AM-Softmax, ArcFace and their combination."""

import bisect
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ccl_timm.losses.base import (
    Loss,
    Range,
    batch_mean,
    cross_entropy,
    gather_target,
    mask_class,
    require,
    row_norms,
    unnormalized_cosine_logits,
)
from ccl_timm.ops import force_fp32

__all__ = [
    'AMSoftmaxLoss',
    'ASoftmaxLoss',
    'ArcFaceLoss',
    'CombinedMarginLoss',
    'additive_margin',
    'angular_margin',
    'combined_margin',
    'margin_cross_entropy',
]

_COSINE_LIMIT = 1 - 1e-7  # the slope of arccos is infinite at 1


def margin_cross_entropy(logits: Tensor, target_logits: Tensor, target: Tensor) -> Tensor:
    """Mean softmax cross-entropy in which the target's logit, and no other, is replaced.

    Args:
        logits: (N, K), without margin.
        target_logits: with margin: (N,) those of the targets if these are indices, (N, K) of every class otherwise.
        target: (N,) class indices, or (N, K) class probabilities: then the target-weighted mean of the losses that
            each class as the target would have, in O(N K).

    Returns:
        Scalar >= 0.
    """
    if target.ndim == 1:
        return cross_entropy(logits.scatter(1, target[:, None], target_logits[:, None]), target)
    return batch_mean(-F.logsigmoid(target_logits - _others(logits)), target)


def _others(logits: Tensor) -> Tensor:
    """Logarithm of the sum of exp over all classes but one, for each: (N, K).

    ``log(1 - p_k)`` added to the logarithm of the whole sum: safe while p_k <= 1/2, and so for all classes but the
    first in rank, whose sum is made without it.
    """
    first = logits.detach().argmax(1)
    rest = mask_class(logits, first).logsumexp(1)  # (N,)
    whole = torch.logaddexp(rest, gather_target(logits, first))[:, None]
    p = (logits - whole).exp().scatter(1, first[:, None], 0.0)
    return (whole + torch.log1p(-p)).scatter(1, first[:, None], rest[:, None])


@force_fp32
def additive_margin(cosine: Tensor, target: Tensor, scale: float, margin: float) -> Tensor:
    """AM-Softmax: cross-entropy of ``scale * (cos - margin)`` for the target, ``scale * cos`` for the other classes.

    Args:
        cosine: (N, K), cosines of features and class vectors; half precision is computed in float32.
        target: (N,) class indices, or (N, K) class probabilities for the target-weighted mean [assumption].
        scale: s > 0.
        margin: m; 0 is plain cross-entropy of the scaled cosines.

    Returns:
        Scalar >= 0.
    """
    return margin_cross_entropy(scale * cosine, scale * (gather_target(cosine, target) - margin), target)


@force_fp32
def combined_margin(
    cosine: Tensor,
    target: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    threshold: bool = True,
) -> Tensor:
    """Cross-entropy of ``scale * (cos(m1 * theta + m2) - m3)`` for the target, ``scale * cos(theta)`` for the others.

    m1 is SphereFace's margin, m2 ArcFace's, m3 that of AM-Softmax. ``cos(m1 theta + m2)`` falls up to the angle
    ``limit = (pi - m2) / m1`` and would rise again beyond. With ``threshold`` the target's logit goes on there as
    ``scale * (cos(theta) - max(b sin(b), 1 - cos(b)) - m3)`` with ``b = pi - limit``. For m1 = 1, where b is m2, and
    m2 up to 2.33, that is ArcFace's own ``m2 sin(m2)``; beyond, the value would rise at the limit, which
    ``1 - cos(b)`` prevents [assumption, as is any m1 but 1].

    Args:
        cosine: (N, K), cosines of features and class vectors, clamped to +-(1 - 1e-7); half precision is computed in
            float32.
        target: (N,) class indices, or (N, K) class probabilities for the target-weighted mean [assumption].
        scale: s > 0.
        m1: multiplicative angular margin > 0.
        m2: additive angular margin, in radians, 0 <= m2 < pi.
        m3: additive cosine margin.
        threshold: False for ``cos(m1 theta + m2)`` at every angle, as later official code has it.

    Returns:
        Scalar >= 0. The gradient is the true one; the latest official code passes that of the plain cosine instead.
    """
    c = gather_target(cosine, target).clamp(-_COSINE_LIMIT, _COSINE_LIMIT)
    with_margin = torch.cos(m1 * torch.acos(c) + m2)
    beyond = math.pi - (math.pi - m2) / m1  # pi - limit; not positive if the limit is never reached
    if threshold and beyond > 0:
        step = max(beyond * math.sin(beyond), 1 - math.cos(beyond))  # at least what keeps the value falling there
        with_margin = torch.where(c > -math.cos(beyond), with_margin, c - step)
    return margin_cross_entropy(scale * cosine, scale * (with_margin - m3), target)


@force_fp32
def angular_margin(features: Tensor, cosine: Tensor, target: Tensor, margin: int, annealing: Tensor | float) -> Tensor:
    """A-Softmax (SphereFace): cross-entropy of ``||f|| cos(theta_j)`` with a multiplied angle for the target.

    The target's logit is ``||f|| (annealing * cos(theta) + psi(theta)) / (1 + annealing)`` with
    ``psi(theta) = (-1)^k cos(margin * theta) - 2 k`` where ``k pi <= margin * theta <= (k + 1) pi``: falling from 1 at
    angle 0 to 1 - 2 margin at pi. ``cos(margin * theta)`` is a polynomial in cos(theta): there is no arccos in the
    gradient.

    Args:
        features: (N, D), not normalised; half precision is computed in float32.
        cosine: (N, K), cosines of features and class vectors.
        target: (N,) class indices, or (N, K) class probabilities for the target-weighted mean [assumption].
        margin: whole number >= 1; 1 is plain cross-entropy of ``||f|| cos``.
        annealing: lambda >= 0, how much of the plain cosine is mixed in.

    Returns:
        Scalar >= 0.
    """
    logits = unnormalized_cosine_logits(features, cosine)
    c = gather_target(cosine, target).clamp(-1, 1)
    psi = _psi(c, margin)
    # (annealing * c + psi) / (1 + annealing), without a ratio of large numbers
    norm = row_norms(features)
    norm = norm[:, 0] if target.ndim == 1 else norm
    return margin_cross_entropy(logits, norm * (c + (psi - c) / (1 + annealing)), target)


def _psi(c: Tensor, margin: int) -> Tensor:
    previous, chebyshev = torch.ones_like(c), c
    for _ in range(margin - 1):
        previous, chebyshev = chebyshev, 2 * c * chebyshev - previous
    k = sum((c < math.cos(j * math.pi / margin)).to(c.dtype) for j in range(1, margin))
    return (1 - 2 * (k % 2)) * chebyshev - 2 * k


class _ScaledMarginLoss(Loss):
    """A margin loss whose default scale and margin were tuned for more than 10,000 faces.

    ``suggested`` has the options for few classes (up to 20), some (up to 999) and many (up to 9999) [assumption].
    """

    requires = ('cosine',)
    head = 'cosine'
    soft_targets = True
    suggested: ClassVar[tuple[dict[str, float], ...]]

    @classmethod
    def options_for(cls, num_classes):
        """Options that suit this number of classes better than the defaults [assumption]; none from 10,000 on."""
        return (*cls.suggested, {})[bisect.bisect_left((20, 999, 9999), num_classes)]

    def caution(self, num_classes):
        """That the scale is more than twice the suggested one, and what to try."""
        options = self.options_for(num_classes)
        if not options or self.scale <= 2 * options['scale']:
            return None
        better = ' '.join(f'{name}={value}' for name, value in options.items())
        return f'scale={self.scale:g} was tuned for more than 10,000 classes; for {num_classes} classes try {better}.'


class AMSoftmaxLoss(_ScaledMarginLoss):
    """AM-Softmax (CosFace): a margin subtracted from the target's cosine; see :func:`additive_margin`.

    Args:
        scale: s > 0; 30 in the official code.
        margin: m; 0.35 in the official code. The POD-Loss paper does not state the values of its comparison.

    Shapes: cosine (N, K); target (N,) indices or (N, K) probabilities.
    Terms: ``amsoftmax``.

    Raises:
        UserError: scale <= 0.
    """

    suggested = ({'scale': 16, 'margin': 0.2}, {'scale': 24, 'margin': 0.2}, {'scale': 32, 'margin': 0.35})
    paper = 'AM-Softmax, arXiv 1801.05599'
    assumptions = 'soft targets'
    search_space = {'scale': Range(4.0, 64.0, log=True), 'margin': Range(0.0, 0.6)}

    def __init__(self, scale: float = 30.0, margin: float = 0.35):
        super().__init__()
        require(scale > 0, f'scale must be positive, not {scale}.')
        self.scale = scale
        self.margin = margin

    def compute_terms(self, outputs, target):
        """Return ``amsoftmax``."""
        return {'amsoftmax': additive_margin(outputs.cosine, target, self.scale, self.margin)}


class ArcFaceLoss(_ScaledMarginLoss):
    """ArcFace: a margin added to the target's angle; see :func:`combined_margin` with m1 = 1, m3 = 0.

    Args:
        scale: s > 0; 64 in the official code.
        margin: m in radians, 0 <= m < pi; 0.5 in the official code.
        threshold: continue as ``cos(theta) - m sin(m)`` beyond ``theta = pi - m``, as the first official code does
            (for m up to 2.33, see there); False for ``cos(theta + m)`` everywhere, as the later ones do.

    Shapes: cosine (N, K); target (N,) indices or (N, K) probabilities.
    Terms: ``arcface``.

    Cautions: scale 64 was tuned for more than 10,000 faces; ``options_for`` has smaller values for fewer classes
    [assumption]. The POD-Loss paper does not state the values of its comparison. The margin costs least at an angle of
    0 to the class vector, so that at a high learning rate all class vectors may come to one direction, which can
    lower the loss without telling classes apart; a margin subtracted from the cosine, as AM-Softmax has it, costs the
    same at every angle. ``CosineHead.caution`` says when it has happened.

    Raises:
        UserError: an option out of range.
    """

    suggested = ({'scale': 16, 'margin': 0.3}, {'scale': 24, 'margin': 0.3}, {'scale': 32, 'margin': 0.5})
    paper = 'ArcFace, arXiv 1801.07698'
    assumptions = 'soft targets'
    search_space = {'scale': Range(4.0, 64.0, log=True), 'margin': Range(0.0, 0.6)}

    def __init__(self, scale: float = 64.0, margin: float = 0.5, threshold: bool = True):
        super().__init__()
        _check_margins(scale, 1.0, margin)
        self.scale = scale
        self.margin = margin
        self.threshold = threshold

    def compute_terms(self, outputs, target):
        """Return ``arcface``."""
        loss = combined_margin(outputs.cosine, target, self.scale, 1.0, self.margin, 0.0, self.threshold)
        return {'arcface': loss}


class CombinedMarginLoss(_ScaledMarginLoss):
    """CM: multiplicative angular, additive angular and additive cosine margin; see :func:`combined_margin`.

    Args:
        scale: s > 0; 64 in the official code.
        m1: multiplicative angular margin > 0.
        m2: additive angular margin in radians, 0 <= m2 < pi.
        m3: additive cosine margin.

    The default margins are those of the official "combined" sample. With m1 = 1 it has no multiplicative margin, though
    the POD-Loss paper, which gives no values, speaks of one: it may have taken others, such as (0.9, 0.4, 0.15).

    Shapes: cosine (N, K); target (N,) indices or (N, K) probabilities.
    Terms: ``cm``.

    Cautions: as for ArcFace, a smaller scale is more plausible for few classes; see ``options_for``.

    Raises:
        UserError: an option out of range.
    """

    suggested = (
        {'scale': 16, 'm2': 0.2, 'm3': 0.1},
        {'scale': 24, 'm2': 0.2, 'm3': 0.1},
        {'scale': 32, 'm2': 0.3, 'm3': 0.2},
    )
    paper = 'ArcFace, arXiv 1801.07698, combined margin'
    assumptions = 'the continuation beyond the angle up to which the margin falls, for m1 other than 1; soft targets'
    search_space = {
        'scale': Range(4.0, 64.0, log=True), 'm2': Range(0.0, 0.5), 'm3': Range(0.0, 0.4)
    }  # fmt: skip

    def __init__(self, scale: float = 64.0, m1: float = 1.0, m2: float = 0.3, m3: float = 0.2):
        super().__init__()
        _check_margins(scale, m1, m2)
        self.scale = scale
        self.m1 = m1
        self.m2 = m2
        self.m3 = m3

    def compute_terms(self, outputs, target):
        """Return ``cm``."""
        return {'cm': combined_margin(outputs.cosine, target, self.scale, self.m1, self.m2, self.m3)}


def _check_margins(scale: float, m1: float, m2: float) -> None:
    require(scale > 0, f'scale must be positive, not {scale}.')
    require(m1 > 0, f'The multiplicative margin must be positive, not {m1}.')
    require(0 <= m2 < math.pi, f'The angular margin must be in [0, pi), not {m2}.')


class ASoftmaxLoss(Loss):
    """A-Softmax (SphereFace): the target's angle is multiplied, the more the longer training lasts.

    See :func:`angular_margin`. At the optimizer step number t = 1, 2, ... the plain cosine has the weight
    ``lambda = max(lambda_min, lambda_base * (1 + lambda_gamma * t)^-lambda_power)`` and the margin weight 1.

    Args:
        margin: m, a whole number >= 1.
        lambda_base: with the other three: the official code's schedule, which reaches lambda_min at t = 1659. A
            well-known reimplementation has 1500 and 0.1.
        lambda_gamma: >= 0.
        lambda_power: >= 0.
        lambda_min: >= 0. It never gets to 0 in the official code: in the end the margin counts one sixth.

    Shapes: cosine (N, K), features (N, D); target (N,) indices or (N, K) probabilities.
    Terms: ``asoftmax``.
    State: ``iteration``, optimizer steps taken, as :meth:`set_step` sets them.

    Cautions: a smaller lambda_min may diverge. The official code rescales the target's gradient on purpose; this is the
    true one. The model trains ``||f|| cos``: build it with ``normalize_features=False`` for the same logits at
    evaluation (the classes are the same either way).

    Raises:
        UserError: an option out of range.
    """

    requires = ('cosine', 'features')
    head = 'cosine'
    soft_targets = True
    paper = 'SphereFace, arXiv 1704.08063; annealing from its official code'
    assumptions = 'annealing by optimizer steps; soft targets'
    search_space = {'lambda_min': Range(1.0, 100.0, log=True)}

    def __init__(
        self,
        margin: int = 4,
        lambda_base: float = 1000.0,
        lambda_gamma: float = 0.12,
        lambda_power: float = 1.0,
        lambda_min: float = 5.0,
    ):
        super().__init__()
        require(margin == int(margin) and margin >= 1, f'margin must be a whole number of at least 1, not {margin}.')
        schedule = (lambda_base, lambda_gamma, lambda_power, lambda_min)
        require(min(schedule) >= 0, f'The options that begin with lambda_ must not be negative, as in {schedule}.')
        self.margin = int(margin)
        self.lambda_base = lambda_base
        self.lambda_gamma = lambda_gamma
        self.lambda_power = lambda_power
        self.lambda_min = lambda_min
        self.register_buffer('iteration', torch.tensor(0))

    def set_step(self, step):
        """Take over the number of optimizer steps."""
        # not in place: a compiled backward pass may read the old one
        self.iteration = torch.zeros_like(self.iteration) + step

    def compute_terms(self, outputs, target):
        """Return ``asoftmax``."""
        now = (self.iteration + 1).to(outputs.cosine.dtype)
        annealing = self.lambda_base * (1 + self.lambda_gamma * now) ** -self.lambda_power
        annealing = annealing.clamp_min(self.lambda_min)
        return {'asoftmax': angular_margin(outputs.features, outputs.cosine, target, self.margin, annealing)}
