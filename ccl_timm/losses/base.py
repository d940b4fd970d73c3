"""What every loss shares: declared facts, named terms, full precision, targets of either kind, cross-entropy."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ccl_timm.errors import UserError
from ccl_timm.ops import FullPrecisionBuffers, full_precision, outside_autocast

__all__ = [
    'Loss',
    'Range',
    'gather_target',
    'batch_mean',
    'class_weight_buffer',
    'cross_entropy',
    'finite_or',
    'unnormalized_cosine_logits',
    'require',
    'require_smoothing',
    'row_norms',
    'sum_terms',
    'mask_class',
]


# which dimensions of what a loss reads are samples and classes
_DIMENSIONS: dict[str, tuple[int | None, ...]] = {
    'logits': (0, 1), 'cosine': (0, 1), 'features': (0,), 'feature_map': (0,), 'attention': (0,),
    'centroids': (None, 0), 'weight': (None, 0),
}  # fmt: skip
_CLASSES = {'logits': 1, 'cosine': 1, 'centroids': 0, 'weight': 0}  # which of their dimensions is K


def require(condition: bool, message: str) -> None:
    """Raise a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_smoothing(smoothing: float) -> None:
    """Raise a UserError unless label smoothing is in [0, 1)."""
    require(0 <= smoothing < 1, f'smoothing must be at least 0 and below 1, not {smoothing}.')


def gather_target(x: Tensor, target: Tensor) -> Tensor:
    """What of (N, K) concerns the target: the entries (N,) at class indices (N,), or all for probabilities (N, K)."""
    return x if target.ndim == 2 else x.gather(1, target[:, None])[:, 0]


def batch_mean(values: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of values (N,) for class indices, or (N, K) weighted by the target's probabilities (N, K)."""
    return values.mean() if target.ndim == 1 else (target * values).sum(1).mean()


def mask_class(logits: Tensor, index: Tensor) -> Tensor:
    """Take the class ``index`` (N,) out of a softmax over logits (N, K): no share of the sum, no gradient.

    Its logit becomes the lowest finite number: with -inf, 0 * -inf would be NaN.
    """
    return logits.scatter(1, index[:, None], torch.finfo(logits.dtype).min)


def row_norms(x: Tensor) -> Tensor:
    """Euclidean norm (N, 1) of the rows of (N, D); finite wherever it can be, though its square may overflow."""
    largest = x.detach().abs().amax(1, keepdim=True)
    scale = torch.where(largest > 1e15, largest, 1.0)  # 1: ordinary rows keep every bit
    return torch.linalg.vector_norm(x / scale, dim=1, keepdim=True) * scale


def unnormalized_cosine_logits(features: Tensor, cosine: Tensor) -> Tensor:
    """Logits of a classifier with unit class vectors, no bias and features as they are: ``||f|| * cos`` (N, K)."""
    return row_norms(features) * cosine


def finite_or(new: Tensor, old: Tensor) -> Tensor:
    """The new state of a loss, or the old one if any entry of the new one is infinite or NaN.

    A batch that overflows (a GradScaler skips its step) must not spoil the state of all later ones.
    """
    return torch.where(new.isfinite().all(), new, old)


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0, class_weight: Tensor | None = None) -> Tensor:
    """Mean softmax cross-entropy.

    Args:
        logits: (N, K).
        target: class indices (N,), or class probabilities (N, K), which are taken as they are: whoever made them
            (Mixup, CutMix) has smoothed them already.
        smoothing: label smoothing in [0, 1) for class indices.
        class_weight: (K,) weights of the classes, >= 0. The mean is the weighted one, as torch takes it for class
            indices: the sum is divided by the weights of the batch, ``sum_i w_(y_i)``. For probabilities it is divided
            by ``sum_ik y_ik w_k``, so that one-hot rows give the value of indices; torch divides by N there. Under DDP
            the weights are those of each process's own batch. 0 if they sum to 0.
    """
    smoothing = smoothing if target.ndim == 1 else 0.0
    if class_weight is None:
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    number, classes = len(class_weight), logits.shape[1]
    require(number == classes, f'class_weight has {number} weights for {classes} classes: give one for each.')
    weight = class_weight.to(logits)
    summed = F.cross_entropy(logits, target, weight, reduction='sum', label_smoothing=smoothing)
    total = weight.index_select(0, target).sum() if target.ndim == 1 else (target @ weight).sum()
    return summed / torch.where(total > 0, total, torch.inf)


def class_weight_buffer(weights: Sequence[float] | None) -> Tensor | None:
    """Weights of the classes, >= 0, as a tensor (K,), for a buffer."""
    if weights is None:
        return None
    require(all(w >= 0 for w in weights), f'class_weight must not be negative, as {min(weights)} is.')
    return torch.tensor(weights, dtype=torch.float32)


def sum_terms(terms: dict[str, Tensor]) -> Tensor:
    """The loss: the sum of its terms."""
    return torch.stack(list(terms.values())).sum()


def _carrier(outputs: Any, tensors: dict[str, Tensor]) -> Any:
    """The outputs with these tensors in the place of their own."""
    return outputs._replace(**tensors) if hasattr(outputs, '_replace') else SimpleNamespace(**tensors)


class Range(NamedTuple):
    """Values in which an option of a loss is worth searching: from low to high, evenly, or by their logarithm."""

    low: float
    high: float
    log: bool = False

    def clip(self, value: float) -> float:
        """The nearest value within the range."""
        return min(max(value, self.low), self.high)


class Loss(FullPrecisionBuffers):
    """Base of all losses. A subclass declares facts and computes named terms.

    Class attributes (tests read them):
        requires: tensors it takes from the model: ``logits`` (N, K), ``cosine`` (N, K), ``features`` (N, D),
            ``feature_map`` (what forward_features returns), ``attention`` (N, D), ``centroids`` (K, D),
            ``weight`` (K, D), or any further output of a plug-in's head.
        head: the head it is made for (``'cam'``, ``'cosine'``, ``'mc'``, ``'pedcc'``), or None if every head will do.
        soft_targets: True if targets may be class probabilities (N, K), as Mixup and CutMix make them.
        uses_batch_statistics: True if a sample's loss depends on the other samples of the batch.
        paper: where the formula is from.
        assumptions: what in it no source states, and where it differs from its source; empty if nothing.
        search_space: options that are worth tuning, each with its range, which is our choice.
    """

    requires: tuple[str, ...] = ('logits',)
    head: str | None = None
    soft_targets: bool = False
    uses_batch_statistics: bool = False
    paper: str = ''
    assumptions: str = ''
    search_space: Mapping[str, Range] = MappingProxyType({})

    def __init__(self):
        super().__init__()  # without options: torch's own takes any

    def compute_terms(self, outputs: Any, target: Tensor) -> dict[str, Tensor]:
        """Compute the loss's named terms, scalars that are already weighted: their sum is the loss.

        Args:
            outputs: has the tensors of ``requires`` as attributes, float32 or float64.
            target: int64 class indices (N,) in [0, K), or float class probabilities (N, K) if ``soft_targets``.
        """
        raise NotImplementedError(f'{type(self).__name__} lacks the method compute_terms(outputs, target)')

    def loss_dict(self, outputs: Any, target: Tensor) -> dict[str, Tensor]:
        """Check the target, leave autocast, and return :meth:`compute_terms` of the outputs in full precision.

        Raises:
            UserError: the target's shape does not fit the outputs, it is soft and the loss takes class indices only, it
                has an index beyond the classes (looked for on a CPU only), or a term is not a scalar.
        """
        if missing := [name for name in self.requires if getattr(outputs, name, None) is None]:
            head = f": take those of the head '{self.head}'" if self.head else ''
            raise UserError(f"{type(self).__name__} requires '{missing[0]}', which these outputs do not have{head}.")
        required = {name: full_precision(getattr(outputs, name)) for name in self.requires}
        first = next(iter(required.values()))
        target = self._checked(target, required)
        with outside_autocast(first.device):
            terms = self.compute_terms(_carrier(outputs, required), target)
        for name, term in terms.items():
            shape = tuple(term.shape)
            require(not shape, f"{type(self).__name__}'s term '{name}' has the shape {shape}: take its mean, a scalar.")
        return terms

    def forward(self, outputs: Any, target: Tensor) -> Tensor:
        """Return the scalar to minimise: the sum of the named terms.

        Args:
            outputs: anything with the attributes named in ``requires``: the outputs of a head, or your own.
            target: (N,) integer class indices, or (N, K) probabilities if ``soft_targets``.
        """
        return sum_terms(self.loss_dict(outputs, target))

    def set_epoch(self, epoch: int | Tensor) -> None:
        """A training epoch (0-based) begins. For losses with a schedule; what they keep of it is a buffer.

        A loss that overrides this needs an epoch's beginning, which not every trainer announces: see ``LossTask``.
        """

    def set_step(self, step: int | Tensor) -> None:
        """``step`` optimizer steps have been taken (a number, or an int64 scalar on the device).

        For losses with a schedule; what they keep of it is a buffer.
        """

    @property
    def needs_epochs(self) -> bool:
        """Whether the loss depends on the epoch: whether it overrides :meth:`set_epoch`."""
        return type(self).set_epoch is not Loss.set_epoch

    @classmethod
    def options_for(cls, num_classes: int) -> dict[str, float]:
        """Options that suit this number of classes better than the defaults [assumption]; empty if there are none."""
        return {}

    def caution(self, num_classes: int) -> str | None:
        """What speaks against these options for this number of classes, as a sentence; None if nothing does."""

    def _checked(self, target: Tensor, read: dict[str, Tensor]) -> Tensor:
        """The target as int64 indices, or as probabilities in the type of the outputs."""
        name, found = type(self).__name__, f'a target of shape {tuple(target.shape)}'
        indices = target.ndim == 1 and not target.is_floating_point()
        if not indices and (target.ndim != 2 or not target.is_floating_point()):
            raise UserError(
                f'{name} got {found} and type {target.dtype}; it takes integer class indices of shape (N,)'
                + (' or float probabilities of shape (N, K).' if self.soft_targets else '.')
            )
        if not indices and not self.soft_targets:
            raise UserError(
                f'{name} got soft targets of shape {tuple(target.shape)} but takes class indices only: '
                'turn Mixup and CutMix off, or choose a loss with soft targets.'
            )
        for key, output in read.items():
            pairs = zip(target.shape, _DIMENSIONS.get(key, ()), strict=False)
            if any(dim is not None and size != output.shape[dim] for size, dim in pairs):
                raise UserError(f"{name} got {found} for '{key}' of shape {tuple(output.shape)}: they must agree.")
        if indices:
            self._check_indices(target, read)
        dtype = next(iter(read.values())).dtype
        return target.long() if indices else target.to(torch.promote_types(dtype, torch.float32))

    def _check_indices(self, target: Tensor, read: dict[str, Tensor]) -> None:
        """Raise a UserError for an index that is no class, where looking at it does not make a device wait."""
        sizes = [output.shape[_CLASSES[key]] for key, output in read.items() if key in _CLASSES]
        if not sizes or not len(target) or target.device.type != 'cpu' or torch.compiler.is_compiling():
            return
        low, high = int(target.min()), int(target.max())
        require(
            0 <= low and high < sizes[0],
            f'{type(self).__name__} got the class index {low if low < 0 else high}, and there are {sizes[0]} classes: '
            'number them from 0.',
        )
