"""Losses by name: ours, plugins', timm's own, and those of pytorch-metric-learning."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from timm.loss import LOSS_TYPES, MULTI_LABEL_LOSS_TYPES, create_classification_loss
from torch import Tensor

from ccl_timm import registry
from ccl_timm.errors import UnknownNameError, UserError, did_you_mean, require_finite
from ccl_timm.losses.base import Loss, Range, class_weight_buffer, cross_entropy, require_smoothing
from ccl_timm.losses.cc import CCLoss, channel_correlation
from ccl_timm.losses.center import CenterLoss
from ccl_timm.losses.cot import COTLoss, complement_entropy
from ccl_timm.losses.focal import FocalLoss, focal_loss
from ccl_timm.losses.ical import FICALLoss, ICALLoss, mean_class_cosine
from ccl_timm.losses.margin import (
    AMSoftmaxLoss,
    ArcFaceLoss,
    ASoftmaxLoss,
    CombinedMarginLoss,
    additive_margin,
    angular_margin,
    combined_margin,
)
from ccl_timm.losses.mc import MCLoss, channel_discriminality, channel_diversity
from ccl_timm.losses.pedcc import PEDCCLoss
from ccl_timm.losses.pml import PREFIX, list_pml_losses, pml_class, pml_options
from ccl_timm.losses.pod import CosineLoss, NaCLoss, PODLoss, cosine_loss, norm_adaptive_cosine, self_correlation
from ccl_timm.ops import force_fp32, full_precision

__all__ = [
    'AMSoftmaxLoss',
    'ASoftmaxLoss',
    'ArcFaceLoss',
    'CCLoss',
    'COTLoss',
    'CenterLoss',
    'CombinedMarginLoss',
    'CosineLoss',
    'FICALLoss',
    'FocalLoss',
    'ICALLoss',
    'LogitsLoss',
    'Loss',
    'MCLoss',
    'NaCLoss',
    'PEDCCLoss',
    'PODLoss',
    'PREFIX',
    'additive_margin',
    'angular_margin',
    'channel_correlation',
    'class_weight_option',
    'channel_discriminality',
    'channel_diversity',
    'combined_margin',
    'complement_entropy',
    'cosine_loss',
    'Range',
    'create_loss',
    'cross_entropy',
    'declared',
    'explain',
    'focal_loss',
    'full_precision',
    'force_fp32',
    'is_timm_loss',
    'list_losses',
    'list_pml_losses',
    'loss_class',
    'loss_options',
    'losses_for',
    'mean_class_cosine',
    'norm_adaptive_cosine',
    'overview',
    'self_correlation',
    'name_owner',
    'pml_overview',
    'takes_soft_targets',
]


class LogitsLoss(Loss):
    """Any criterion of logits and target, such as timm's own, in the form of our losses.

    Args:
        criterion: called with logits (N, K) and the target.
        name: of its one term.
        soft_targets: whether it takes class probabilities (N, K), too.
    """

    def __init__(
        self, criterion: Callable[[Tensor, Tensor], Tensor], name: str = 'criterion', soft_targets: bool = True
    ):
        super().__init__()
        self.criterion = criterion
        self.name = name
        self.soft_targets = soft_targets

    def compute_terms(self, outputs, target):
        """Return the criterion's value under its name."""
        return {self.name: self.criterion(outputs.logits, target)}

    def _check_indices(self, target, read):
        """The criterion's own matter: it may ignore some index."""


def list_losses(timm: bool = False) -> list[str]:
    """Names that :func:`create_loss` knows: ours and those of available plugins, with ``timm`` timm's too."""
    names = {*registry.names('loss')}
    return sorted(names | {t for t in LOSS_TYPES if is_timm_loss(t)} if timm else names)


def is_timm_loss(name: str) -> bool:
    """Whether the name is one of timm's single-label losses (``ce``, ``bce``, ``asl``, ``poly``)."""
    return name in LOSS_TYPES and name not in {'jsd', *set(MULTI_LABEL_LOSS_TYPES) - {'bce', 'asl', 'poly'}}


def loss_class(name: str) -> type[Loss]:
    """The class of one of our losses, of a plugin's, or of one of pytorch-metric-learning (``pml:NAME``).

    Raises:
        UnknownNameError: there is none of that name, with the closest one.
        UserError: it is of pytorch-metric-learning, which is not installed.
    """
    if name.startswith(PREFIX):
        return pml_class(name)
    found = registry.load('loss', name, verify=_verify_loss)
    if found is None:
        raise UnknownNameError(
            f"Unknown loss '{name}'{did_you_mean(name, list_losses(timm=True))} "
            f'Losses: {", ".join(list_losses())}; of timm: {", ".join(filter(is_timm_loss, LOSS_TYPES))}; '
            'of pytorch-metric-learning: pml:NAME, see `ccl-timm losses --pml`.'
        )
    return found


def declared(name: str, attribute: str) -> Any:
    """An attribute of a loss by name, such as ``requires``; :class:`Loss`'s own for a plug-in's function without it."""
    return getattr(loss_class(name), attribute, getattr(Loss, attribute))


def takes_soft_targets(name: str) -> bool:
    """Whether the loss of that name takes class probabilities (N, K), as Mixup and CutMix make them."""
    return name != 'asl' if is_timm_loss(name) else declared(name, 'soft_targets')


def class_weight_option(name: str) -> str | None:
    """The option of a loss that weighs classes; None if it has none."""
    if is_timm_loss(name):
        return 'class_weight' if name in ('ce', 'bce') else None
    return 'alpha' if name == 'focal' else 'class_weight' if 'class_weight' in loss_options(name) else None


def loss_options(name: str) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a loss by name, with their defaults."""
    target = create_classification_loss if is_timm_loss(name) else loss_class(name)
    return dict(inspect.signature(target).parameters)


def create_loss(name: str, **kwargs: Any) -> Loss:
    """Build a loss by name.

    Args:
        name: one of :func:`list_losses`, of timm's (``ce``, ``bce``, ``asl``, ``poly``), or of
            pytorch-metric-learning's, such as ``pml:SupConLoss``.
        **kwargs: the loss's options; see its docstring, or timm's ``create_classification_loss``.

    Returns:
        A module called as ``loss(outputs, target)``, where outputs has what the loss ``requires`` as attributes.

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
        require_finite('', kwargs)
        if name == 'ce':
            return LogitsLoss(_cross_entropy(**kwargs), name)
        if is_timm_loss(name):
            return LogitsLoss(create_classification_loss(name, **kwargs), name, takes_soft_targets(name))
        return _built(name, loss_class(name)(**kwargs))
    except UserError as error:
        raise UserError(f"Loss '{name}': {error}") from error
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"Loss '{name}' cannot be built with {kwargs}: {str(error) or 'it refuses a value'}") from error


def _cross_entropy(
    smoothing: float = 0.0, class_weight: Sequence[float] | None = None, **others: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """timm's ``ce`` for class weights and for class probabilities, too, of which it makes losses of their own."""
    require_smoothing(smoothing)
    create_classification_loss('ce', **others)  # refuses options of other losses
    return partial(cross_entropy, smoothing=smoothing, class_weight=class_weight_buffer(class_weight))


def _built(name: str, loss: Any) -> Loss:
    """The loss that a plug-in's class or function returned, if it is one."""
    if not isinstance(loss, Loss):
        raise UserError(f'its function returned a {type(loss).__name__}, not a ccl_timm.Loss.')
    return loss


def name_owner(name: str) -> str | None:
    """A sentence if timm has a loss of that name, else None."""
    return 'timm has a loss of this name' if name in LOSS_TYPES else None


def overview() -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows and header of the table of losses; those of plug-ins are named and not imported."""
    rows = [_row(name) for name in registry.our_names('loss')]
    for plugin in registry.find_plugins('loss'):
        if plugin.name in registry.plugin_names('loss'):
            by = f'plug-in {plugin.distribution} {plugin.version}'
            rows.append((plugin.name, '-', '-', '-', by, f'see `ccl-timm losses {plugin.name}`'))
    return sorted(rows), _HEADER


def pml_overview() -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows and header of the table of pytorch-metric-learning's losses.

    Raises:
        UserError: it is not installed.
    """
    rows: list[tuple[str, ...]] = [(name, ', '.join(map(str, pml_options(name))) or '-') for name in list_pml_losses()]
    return rows, ('name', 'options')


_HEADER = ('name', 'head', 'requires', 'soft targets', 'paper', 'assumptions')


def _row(name: str) -> tuple[str, ...]:
    facts = (declared(name, 'head') or 'any', ', '.join(declared(name, 'requires')))
    soft = 'yes' if declared(name, 'soft_targets') else 'no'
    return (name, *facts, soft, declared(name, 'paper'), declared(name, 'assumptions') or '-')


def losses_for(head: str, outputs: Iterable[str]) -> list[str]:
    """Names of our losses that suit a head: those made for it, and those for any head that require only its outputs.

    Args:
        head: its name.
        outputs: names of the tensors that it computes.
    """
    available = {*outputs, 'feature_map'}
    suits = []
    for name in registry.our_names('loss'):
        cls = loss_class(name)
        if cls.head == head or (cls.head is None and available.issuperset(cls.requires)):
            suits.append(name)
    return suits


def explain(name: str) -> str:
    """What a loss computes, its options, cautions, and what in it no source states."""
    if is_timm_loss(name):
        return f"{name}: timm's own loss; its options are those of timm.loss.create_classification_loss."
    cls = loss_class(name)
    facts = dict(zip(_HEADER, _row(name), strict=True))
    options = ', '.join(str(option) for option in loss_options(name).values())
    lines = [f'{name}({options})', '', inspect.getdoc(cls) or '', '']
    return '\n'.join([*lines, *(f'{key}: {value}' for key, value in facts.items() if key != 'name')])


def _verify_loss(name: str, obj: Any) -> None:
    if not callable(obj):
        raise TypeError('the object must be a class or function that returns a loss')
    if name_owner(name):
        raise TypeError(name_owner(name))
    if isinstance(obj, type):
        if not issubclass(obj, Loss):
            raise TypeError('the class must derive from ccl_timm.Loss')
        if obj.compute_terms is Loss.compute_terms:
            raise TypeError('the class has no method compute_terms(outputs, target)')
    kinds = {p.kind for p in inspect.signature(obj).parameters.values()}
    if kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}:
        raise TypeError('its options must be explicit: no *args or **kwargs')
