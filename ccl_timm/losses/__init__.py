"""Losses by name: ours, plugins', and timm's own."""

import importlib
import inspect
from typing import Any

from timm.loss import LOSS_TYPES, MULTI_LABEL_LOSS_TYPES, create_classification_loss

from ccl_timm import plugins
from ccl_timm.errors import UnknownNameError, UserError, did_you_mean
from ccl_timm.losses.base import Loss, cross_entropy, full_precision
from ccl_timm.losses.cc import CCLoss, channel_correlation

__all__ = [
    'LOSSES',
    'CCLoss',
    'Loss',
    'LogitsLoss',
    'channel_correlation',
    'create_loss',
    'cross_entropy',
    'full_precision',
    'is_timm_loss',
    'list_losses',
    'loss_class',
    'loss_options',
    'takes_soft_targets',
]

# name -> module:class; pyproject.toml declares the same as entry points
LOSSES: dict[str, str] = {
    'cc': 'ccl_timm.losses:CCLoss',
}


class LogitsLoss(Loss):
    """Any criterion of logits and target, such as timm's own, in the form of our losses. Term: ``loss``."""

    soft_targets = True

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def terms(self, outputs, target):
        """Return the criterion's value under the name ``loss``."""
        return {'loss': self.criterion(outputs.logits, target)}


def list_losses(timm: bool = False) -> list[str]:
    """Names that :func:`create_loss` knows: ours and those of available plugins, with ``timm`` timm's too."""
    names = {*LOSSES, *plugins.plugin_names('loss')}
    return sorted(names | {t for t in LOSS_TYPES if is_timm_loss(t)} if timm else names)


def is_timm_loss(name: str) -> bool:
    """Whether the name is one of timm's single-label losses (``ce``, ``bce``, ``asl``, ``poly``)."""
    return name in LOSS_TYPES and name not in {'jsd', *set(MULTI_LABEL_LOSS_TYPES) - {'bce', 'asl', 'poly'}}


def loss_class(name: str) -> type[Loss]:
    """The class of one of our losses or of a plugin's.

    Raises:
        UnknownNameError: there is none of that name, with the closest one.
    """
    if name in LOSSES:
        module, _, attribute = LOSSES[name].partition(':')
        return getattr(importlib.import_module(module), attribute)
    found = plugins.load_plugin('loss', name, verify=_verify_loss)
    if found is None:
        raise UnknownNameError(
            f"Unknown loss '{name}'{did_you_mean(name, list_losses(timm=True))} "
            f'Losses: {", ".join(list_losses())}; of timm: {", ".join(sorted(set(list_losses(True)) - set(list_losses())))}.'
        )
    return found


def takes_soft_targets(name: str) -> bool:
    """Whether the loss of that name takes class probabilities (N, K), as Mixup and CutMix make them."""
    return is_timm_loss(name) or getattr(loss_class(name), 'soft_targets', False)


def loss_options(name: str) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a loss by name, with their defaults."""
    target = create_classification_loss if is_timm_loss(name) else loss_class(name)
    return dict(inspect.signature(target).parameters)


def create_loss(name: str, **kwargs: Any) -> Loss:
    """Build a loss by name.

    Args:
        name: one of :func:`list_losses`, or of timm's (``ce``, ``bce``, ``asl``, ``poly``).
        **kwargs: the loss's options; see its docstring, or timm's ``create_classification_loss``.

    Returns:
        A module called as ``loss(outputs, target)``, where outputs has what the loss ``reads`` as attributes.

    Raises:
        UnknownNameError: no such loss.
        UserError: an unknown option, or a value out of range.
    """
    options = loss_options(name)
    unknown = [key for key in kwargs if key not in options]
    if unknown:
        raise UserError(
            f"Loss '{name}' has no option '{unknown[0]}'{did_you_mean(unknown[0], options)} "
            f'Its options: {", ".join(options) or "none"}.'
        )
    try:
        if is_timm_loss(name):
            return LogitsLoss(create_classification_loss(name, **kwargs))
        return loss_class(name)(**kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"Loss '{name}' cannot be built with {kwargs}: {error}") from error


def _verify_loss(name: str, obj: Any) -> None:
    if not callable(obj):
        raise TypeError('the object must be a class or function that returns a loss')
    if name in LOSSES or name in LOSS_TYPES:
        raise TypeError(f"'{name}' is taken")
    kinds = {p.kind for p in inspect.signature(obj).parameters.values()}
    if kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
        raise TypeError('its options must be explicit: no *args or **kwargs')
