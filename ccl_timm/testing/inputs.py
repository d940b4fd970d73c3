"""Inputs for the checks of losses: targets, and tensors as a model would give them."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ccl_timm.losses import declared

__all__ = ['BY_CLASS', 'derive', 'make_outputs', 'make_target']

# what make_outputs can draw by itself
_KNOWN = ('logits', 'cosine', 'features', 'feature_map', 'attention', 'centroids', 'weight')


# class vectors: their first dimension is the class, not the sample
BY_CLASS = ('weight', 'centroids')


def make_target(batch: int = 8, num_classes: int = 5, seed: int = 0, soft: bool = False) -> Tensor:
    """Make class indices (batch,) with repeated classes and an absent one, or probabilities (batch, num_classes).

    Args:
        batch: N.
        num_classes: K; the last class is absent if there are more than two.
        seed: for the order.
        soft: mix pairs of samples as Mixup does; every class has a little weight, rows sum to 1, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = max(2, num_classes - 1)
    target = (torch.arange(batch) % min(classes, num_classes))[torch.randperm(batch, generator=generator)]
    if not soft:
        return target
    one_hot = F.one_hot(target, num_classes).double()
    share = 0.2 + 0.6 * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    return 0.9 * (share * one_hot + (1 - share) * one_hot.flip(0)) + 0.1 / num_classes


def make_outputs(
    loss: Any,
    batch: int = 8,
    num_classes: int = 5,
    num_features: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    num_channels: int | None = None,
    own: Callable[..., dict[str, Tensor]] | None = None,
    change: Callable[[dict[str, Tensor]], None] | None = None,
) -> SimpleNamespace:
    """Draw what a loss required, as attributes; ``leaves`` holds by name the tensors that gradients arrive at.

    The tensors agree with each other: ``cosine`` is that of ``features`` and the unit rows of ``weight`` (or
    ``centroids``, which are fixed and get no gradient), ``attention`` is a sigmoid in (0, 1), ``feature_map``
    (N, C, 3, 3) is not negative, as after a ReLU. ``logits`` are drawn by themselves.

    Args:
        loss: a loss, its class, its name, or a tuple of names of tensors.
        batch: N.
        num_classes: K.
        num_features: D.
        dtype: floating point.
        seed: equal seeds give equal tensors.
        num_channels: C of the feature map, 3 K by default.
        own: called as ``own(batch, num_classes, num_features)``; returns by name leaf tensors that the loss reads
            beside (or in place of) the known ones.
        change: called with the drawn tensors by name before anything is derived from them; may write into them.
    """
    required = _reads(loss)
    generator = torch.Generator().manual_seed(seed)
    channels = num_channels or 3 * num_classes
    shapes = {
        'logits': (batch, num_classes),
        'features': (batch, num_features),
        'feature_map': (batch, channels, 3, 3),
        'attention': (batch, num_features),
        'weight': (num_classes, num_features),
        'centroids': (num_classes, num_features),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        extra = own(batch, num_classes, num_features) if own else {}
    unknown = [name for name in required if name not in _KNOWN and name not in extra]
    if unknown:
        raise AssertionError(f"nothing is known of the tensor '{unknown[0]}': give a factory that makes it.")
    drawn = {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64).to(dtype)
        for name in sorted(_sources(required) - extra.keys())
    }
    drawn.update({name: tensor.detach().to(dtype) for name, tensor in extra.items()})
    if change:
        change(drawn)
    for name, tensor in drawn.items():
        tensor.requires_grad_(name != 'centroids' and tensor.is_floating_point())
    return derive(drawn, required, extra)


def _reads(loss: Any) -> tuple[str, ...]:
    return loss if isinstance(loss, tuple) else declared(loss, 'requires') if isinstance(loss, str) else loss.requires


def _sources(required: Iterable[str]) -> set[str]:
    """Names of the tensors to draw, from which the read ones can be derived."""
    sources = {name for name in required if name in _KNOWN}
    if 'cosine' in sources:
        sources = sources - {'cosine'} | {'features', 'centroids' if 'centroids' in sources else 'weight'}
    return sources


def derive(drawn: dict[str, Tensor], required: Iterable[str], extra: Iterable[str] = ()) -> SimpleNamespace:
    """From leaves to what a loss reads; keeps the graph between them."""
    rows = {name: F.normalize(drawn[name], dim=1) for name in BY_CLASS if name in drawn and name not in extra}
    found = {**drawn, **rows}
    if 'feature_map' in drawn and 'feature_map' not in extra:
        found['feature_map'] = drawn['feature_map'].abs()
    if 'attention' in drawn and 'attention' not in extra:
        found['attention'] = drawn['attention'].sigmoid()
    if 'cosine' in required and 'cosine' not in extra:
        vectors = found['centroids'] if 'centroids' in found else found['weight']
        found['cosine'] = F.normalize(found['features'], dim=1) @ vectors.T
    leaves = {name: tensor for name, tensor in drawn.items() if tensor.requires_grad}
    return SimpleNamespace(**found, leaves=leaves, drawn=drawn, requires=tuple(required), own=tuple(extra))
