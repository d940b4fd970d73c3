"""Losses of pytorch-metric-learning by name, such as ``pml:ProxyAnchorLoss``: on features, beside cross-entropy."""

import ast
import functools
import importlib
import inspect
from collections.abc import Sequence
from inspect import Parameter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ccl_timm.errors import UnknownNameError, UserError, did_you_mean
from ccl_timm.losses.base import Loss, Range, class_weight_buffer, cross_entropy, require, require_smoothing
from ccl_timm.ops import all_gather_rows, full_precision

__all__ = ['PREFIX', 'PMLLoss', 'list_pml_losses', 'pml_class', 'pml_options']

PREFIX = 'pml:'
_PACKAGE = 'pytorch_metric_learning'
# bases, and losses that take no labels
_NOT_FOR_CLASSES = {'BaseMetricLossFunction', 'GenericPairLoss', 'ManifoldLoss', 'VICRegLoss'}
# each image is compared with classes, not with other images
_BY_IMAGE = {
    'ArcFaceLoss', 'CosFaceLoss', 'LargeMarginSoftmaxLoss', 'NormalizedSoftmaxLoss', 'P2SGradLoss', 'ProxyNCALoss',
    'SoftTripleLoss', 'SphereFaceLoss', 'SubCenterArcFaceLoss',
}  # fmt: skip
# options that are given as text, 'NAME' or 'NAME(option=value)' -> module of the package
_COMPONENTS = {
    'miner': 'miners',
    'distance': 'distances',
    'reducer': 'reducers',
    'embedding_regularizer': 'regularizers',
    'weight_regularizer': 'regularizers',
}
_SIZES = {'embedding_size': 'num_features', 'descriptors_dim': 'num_features'}  # their names -> ours
_HIDDEN = {'self', 'collect_stats', 'weight_init_func', 'mat_based_loss'}  # no options that text can give


class PMLLoss(Loss):
    """Cross-entropy plus a loss of pytorch-metric-learning; each of its losses is a subclass with its own options.

    ``L = ce_weight * CE(logits, y) + weight * metric(features, y)``. Features are what the last layer of the head
    reads. The metric loss compares those of the global batch: under DDP, a batch spread over processes has the
    gradient that it has on one, unless the loss or the miner draws samples.

    Args:
        weight: of the metric loss, >= 0.
        ce_weight: of the cross-entropy, >= 0; with 0 the last layer is not trained.
        smoothing: label smoothing of the cross-entropy, in [0, 1).
        class_weight: K weights of the classes in the cross-entropy.
        miner: which pairs or triplets count: a miner's name, such as ``'MultiSimilarityMiner'`` or
            ``'MultiSimilarityMiner(epsilon=0.2)'``; None for all.
        **options: those of the metric loss by their names, but ``num_features`` for the width of the embedding, which
            ``create_task`` fills in with ``num_classes``. ``distance``, ``reducer``, ``embedding_regularizer`` and
            ``weight_regularizer`` are names as that of the miner.

    Shapes: logits (N, K), features (N, D), N the same on every process; target (N,) indices.
    Terms: ``ce``, ``metric``.
    State: what the metric loss has, such as proxies (parameters).

    Raises:
        UserError: an option out of range, or one that pytorch-metric-learning refuses.
    """

    requires = ('logits', 'features')
    uses_batch_statistics = True
    paper = 'see the documentation of pytorch-metric-learning'
    assumptions = 'features as the last layer reads them, with cross-entropy of the logits beside it'
    search_space = {'weight': Range(0.01, 10.0, log=True), 'smoothing': Range(0.0, 0.3)}
    source: type[nn.Module]

    def __init__(
        self,
        weight: float = 1.0,
        ce_weight: float = 1.0,
        smoothing: float = 0.0,
        class_weight: Sequence[float] | None = None,
        miner: str | None = None,
        **options: Any,
    ):
        super().__init__()
        require(weight >= 0, f'weight must not be negative, as {weight} is.')
        require(ce_weight >= 0, f'ce_weight must not be negative, as {ce_weight} is.')
        require_smoothing(smoothing)
        self.weight, self.ce_weight, self.smoothing = weight, ce_weight, smoothing
        self.register_buffer('class_weight', class_weight_buffer(class_weight), persistent=False)
        self.miner = _component('miner', miner)
        self.uses_batch_statistics = type(self).uses_batch_statistics or miner is not None
        for name in _COMPONENTS.keys() & options.keys():
            options[name] = _component(name, options[name])
        theirs = {_SIZES.get(name, name): name for name in _options_of(self.source)}
        self.metric = _built(self.source, {theirs.get(name, name): value for name, value in options.items()})
        _keep_state(self.metric)

    def compute_terms(self, outputs, target):
        """Return ``ce`` and ``metric``."""
        ce = cross_entropy(outputs.logits, target, self.smoothing, self.class_weight)
        metric = self._metric_of(all_gather_rows(outputs.features), all_gather_rows(target))
        return {'ce': self.ce_weight * ce, 'metric': self.weight * metric}

    @torch.compiler.disable  # it branches on values
    def _metric_of(self, features: Tensor, target: Tensor) -> Tensor:
        if features.is_meta:  # has no values to compare
            return features.sum()
        advance = self.training and torch.is_grad_enabled()
        before = dict(self.metric.named_buffers(recurse=False))
        parameters = {name: full_precision(p) for name, p in self.metric.named_parameters()}  # proxies may be bfloat16
        pairs = self.miner(features, target) if self.miner else None
        value = torch.func.functional_call(self.metric, parameters, (features, target, pairs))
        for name, state in before.items():  # DynamicSoftMarginLoss updates it in evaluation, too, with its graph
            setattr(self.metric, name, getattr(self.metric, name).detach() if advance else state)
        return value


def list_pml_losses() -> list[str]:
    """Names of the losses for labelled images, with the prefix, sorted.

    Raises:
        UserError: pytorch-metric-learning is not installed.
    """
    module = _module('losses')
    base = module.BaseMetricLossFunction
    found = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
    return sorted(PREFIX + name for name in found if name not in _NOT_FOR_CLASSES)


def pml_class(name: str) -> type[PMLLoss]:
    """The subclass of :class:`PMLLoss` for a loss of pytorch-metric-learning.

    Args:
        name: with the prefix, such as ``'pml:SupConLoss'``.

    Raises:
        UserError: pytorch-metric-learning is not installed.
        UnknownNameError: it has no such loss for labelled images, with the closest one.
    """
    known = list_pml_losses()
    if name not in known:
        raise UnknownNameError(f"Unknown loss '{name}'{did_you_mean(name, known)} `ccl-timm losses --pml` lists them.")
    return _subclass(name.removeprefix(PREFIX))


def pml_options(name: str) -> list[Parameter]:
    """The options of a loss that most others do not have, without the sizes that come from the model."""
    known = {*inspect.signature(PMLLoss).parameters, *_COMPONENTS, 'num_classes', 'num_features'}
    known |= {'embedding_reg_weight', 'weight_reg_weight'}
    return [option for key, option in inspect.signature(pml_class(name)).parameters.items() if key not in known]


def __getattr__(name: str) -> type[PMLLoss]:
    """The subclasses are attributes of this module, so that they pickle."""
    if not name.endswith('Loss') or name in _NOT_FOR_CLASSES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        return pml_class(PREFIX + name)
    except UserError as error:
        raise AttributeError(str(error)) from error


@functools.cache
def _subclass(name: str) -> type[PMLLoss]:
    source = getattr(_module('losses'), name)
    own = {_SIZES.get(key, key): parameter for key, parameter in _options_of(source).items()}
    shared = {key: p for key, p in inspect.signature(PMLLoss).parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
    options = [
        Parameter(key, Parameter.KEYWORD_ONLY, default=parameter.default)
        for key, parameter in {**own, **shared}.items()
    ]
    doc = inspect.cleandoc(PMLLoss.__doc__ or '')
    own_doc = inspect.cleandoc(vars(source).get('__doc__') or '')
    facts = {
        'source': source,
        'uses_batch_statistics': name not in _BY_IMAGE,
        'paper': f'{name} of pytorch-metric-learning',
        '__module__': __name__,
        '__doc__': f'{doc}\n\n{name} in pytorch-metric-learning:\n\n{own_doc}' if own_doc else doc,
        '__signature__': inspect.Signature(options),
    }
    return type(name, (PMLLoss,), facts)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f'{_PACKAGE}.{name}')
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] != _PACKAGE:
            raise
        raise UserError(
            f"Losses named '{PREFIX}...' are those of pytorch-metric-learning, which is not installed: "
            "`pip install 'ccl-timm[pml]'`."
        ) from error


def _options_of(cls: type) -> dict[str, Parameter]:
    """Options of a class of the package, which hands those of its bases on as ``**kwargs``."""
    found: dict[str, Parameter] = {}
    for base in cls.__mro__:
        if not base.__module__.startswith(_PACKAGE) or '__init__' not in vars(base):
            continue
        for key, parameter in inspect.signature(vars(base)['__init__']).parameters.items():
            if key not in _HIDDEN and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                found.setdefault(key, parameter)
    return found


def _component(option: str, text: Any) -> nn.Module | None:
    """The object that an option names: ``'NAME'`` or ``'NAME(option=value, ...)'``."""
    if text is None or isinstance(text, nn.Module):
        return text
    name, arguments = _parse_call(option, str(text))
    module = _module(_COMPONENTS[option])
    known = [key for key, value in vars(module).items() if isinstance(value, type) and not key.startswith('Base')]
    if name not in known:
        raise UserError(f"there is no {option} '{name}'{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")
    return _built(getattr(module, name), arguments)


def _parse_call(option: str, text: str) -> tuple[str, dict[str, Any]]:
    try:
        node = ast.parse(text, mode='eval').body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise UserError(f"{option} must be NAME or 'NAME(option=value, ...)', not '{text}'.")


def _built(cls: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    unknown = [key for key in options if key not in _options_of(cls)]
    if unknown:
        raise UserError(f"{cls.__name__} has no option '{unknown[0]}'; its options: {', '.join(_options_of(cls))}.")
    try:
        return cls(**options)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'{cls.__name__} refuses {options}: {str(error) or type(error).__name__}') from error


def _keep_state(module: nn.Module) -> None:
    """Make plain tensors of a loss buffers, so that they are saved, resumed and moved with it."""
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor):
            delattr(module, name)
            module.register_buffer(name, value)
