"""Named models: timm backbones with our heads. Importing this registers them with timm."""

import contextlib
import fnmatch
import warnings
from collections.abc import Mapping
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import (
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    parse_model_name,
    resolve_model_input_args,
    split_model_name_tag,
)
from torch import nn

from ccl_timm import registry
from ccl_timm._compat import TimmModel
from ccl_timm.errors import LIBRARY_ERRORS, UnknownNameError, UserError, did_you_mean, user_errors
from ccl_timm.heads import head_class, head_name, output_names
from ccl_timm.models import on_demand, weights
from ccl_timm.models.builder import build_variant, options_in, register_variant, variant_cfg
from ccl_timm.models.fast_convnet import FastConvNet
from ccl_timm.models.hub_errors import load_errors
from ccl_timm.models.on_demand import split_variant

__all__ = [
    'FastConvNet',
    'MODELS',
    'build_variant',
    'create_for_input',
    'create_model',
    'ensure_registered',
    'known_to_timm',
    'list_models',
    'load_plugins',
    'overview',
    'register_variant',
    'split_variant',
    'name_owner',
    'options_in_weights',
    'variant_cfg',
]

# CC-Loss has vgg16 and resnet18; POD-Loss has resnet50, densenet121, mobilenetv2_100, vit_base and swin_base
_BACKBONES = (
    'vgg16',
    'vgg16_bn',
    'resnet18',
    'resnet50',
    'densenet121',
    'mobilenetv2_100',
    'vit_tiny_patch16_224',
    'vit_small_patch16_224',
    'vit_base_patch16_224',
    'swin_base_patch4_window7_224',
)
_NAMED = [(backbone, head) for backbone in _BACKBONES for head in ('cam', 'cosine', 'pedcc')]
_NAMED += [('resnet18', 'mc'), ('vgg16', 'mc'), ('resnet18', 'linear'), ('resnet50', 'linear'), ('vgg16', 'linear')]
_NAMED += [('resnet18', 'mlp'), ('vgg16', 'mlp'), ('vgg16_bn', 'mlp')]
_NAMED += [('fast_convnet', head) for head in ('cam', 'cosine', 'pedcc', 'linear', 'mlp')]

MODELS = tuple(register_variant(backbone, head).__name__ for backbone, head in _NAMED)
on_demand.install()


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ``create_model`` that also finds plugins' models and explains unknown names.

    Args:
        model_name: any timm name, a name of ours (``'resnet18_cam'``, or any
            ``<timm architecture>_<head>``), a plugin's, ``'hf-hub:owner/repository'`` or
            ``'local-dir:folder'``.
        pretrained: load weights; for ours without a checkpoint of their own, the backbone's ImageNet weights.
        **kwargs: as timm's: ``num_classes``, ``in_chans``, ``drop_rate``, ``checkpoint_path`` ...; for ours also
            ``small_input`` and the head's options (``hidden_features``, ``reduction``).

    Returns:
        The model. ``model(images)`` is logits (N, num_classes), in training and in evaluation.

    Raises:
        UnknownNameError: no such model, with the closest name.
        UserError: an option or a checkpoint does not fit the model.
    """
    with user_errors(f"Model '{model_name}' cannot be built", (*LIBRARY_ERRORS, AttributeError, SafetensorError)):
        return create_for_input(model_name, None, pretrained=pretrained, **kwargs)


def create_for_input(
    model_name: str, settings: dict[str, Any] | None, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """:func:`create_model` for images of the size and channels that a script's settings ask for.

    Args:
        model_name: as for :func:`create_model`.
        settings: ``input_size``, ``img_size``, ``in_chans`` as of timm's scripts; others are not read.
        pretrained: as for :func:`create_model`.
        **kwargs: likewise.

    Raises:
        UserError: as :func:`create_model`.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    cache_dir = kwargs.get('cache_dir')
    source, location = _parse(model_name)
    if not source:
        ensure_registered(model_name, cache_dir)
        return _create(model_name, settings, kwargs, pretrained=pretrained)
    found = weights.read_model(source, location, cache_dir)
    _register(found.architecture, location, found.config)
    if 'pretrained_cfg' in kwargs:
        raise UserError(f"'{location}' has a pretrained_cfg of its own: give pretrained_cfg_overlay instead.")
    with load_errors(location):
        overlay = kwargs.pop('pretrained_cfg_overlay', {})
        if pretrained and not overlay.keys() & {'file', 'hf_hub_id', 'state_dict', 'url'}:
            hub = source == 'hf-hub'
            state_dict = weights.read_hub_weights(location, cache_dir) if hub else weights.read_local_weights(location)
            weights.check_classes(location, state_dict, _with_classifier(found))
            overlay = {**overlay, 'state_dict': state_dict}
        options = {'pretrained_model_args': found.model_args, **found.model_args, **kwargs}
        cfg = {**found.pretrained_cfg, 'architecture': split_model_name_tag(found.architecture)[0]}
        model: TimmModel = _create(
            found.architecture,
            settings,
            options,
            pretrained=pretrained,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay=overlay,
        )
    model.pretrained_cfg.pop('state_dict', None)
    return model


def _create(model_name: str, settings: dict[str, Any] | None, kwargs: dict[str, Any], **arguments: Any) -> nn.Module:
    if settings is None:
        return timm.create_model(model_name, **{**arguments, **kwargs})
    overlay = arguments.pop('pretrained_cfg_overlay', None)  # may hold weights, which this would copy
    found = resolve_model_input_args(model_name, settings, **{**arguments, **kwargs})
    return timm.create_model(pretrained_cfg_overlay=overlay, **found)


def _with_classifier(found: weights.ForeignModel) -> dict[str, Any]:
    """The cfg of a model, with the name of its classifier from the registry where it has none, and 1000 classes."""
    registered = get_pretrained_cfg(split_model_name_tag(found.architecture)[0])
    usual = {'classifier': registered.classifier, 'num_classes': registered.num_classes} if registered else {}
    return {**usual, **found.pretrained_cfg}


def _parse(model_name: str) -> tuple[str | None, str]:
    try:
        return parse_model_name(model_name)
    except ValueError as error:
        raise UserError(str(error)) from error


def options_in_weights(name: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a state_dict of a model shows of its head, such as the width of features that classes decided."""
    variant = split_variant(name)
    return options_in(weights, variant[0], head_class(variant[1])) if variant else {}


def ensure_registered(model_name: str, cache_dir: str | None = None) -> None:
    """Make timm know a model's name: load the plugin that has it, or register a variant of any timm backbone.

    Args:
        model_name: as for :func:`create_model`; of a folder or a repository, the architecture that its config names.
        cache_dir: of the Hub's downloads.

    Raises:
        UnknownNameError: nobody has it.
        UserError: it is no name, or names a folder without a config, or a backbone that cannot take the head.
    """
    source, location = _parse(model_name)
    if source:
        config = weights.read_config(source, location, cache_dir)
        _register(config['architecture'], location, config)
    else:
        _register(location)


def _register(architecture: str, location: str = '', config: dict[str, Any] | None = None) -> None:
    name, _ = split_model_name_tag(architecture)
    if name_owner(name) or registry.load('model', name, verify=_verify_model, guard=_no_overwriting) is not None:
        return
    if is_model(name):
        return
    if variant := split_variant(name):
        register_variant(*variant)
        return
    if config is not None:
        raise UnknownNameError(weights.missing_architecture(location, config))
    known = [*timm.list_models(), *registry.plugin_names('model')]
    raise UnknownNameError(
        f"Unknown model '{name}'{did_you_mean(name, known)} `ccl-timm plugins` lists models of plugins, "
        'timm.list_models() all others.'
    )


def known_to_timm(name: str) -> bool:
    """Whether timm's own ``create_model`` has this architecture as soon as ccl_timm is imported."""
    if not is_model(name):
        return False
    module = model_entrypoint(name).__module__
    if module == register_variant.__module__:
        backbone, _ = split_variant(name) or (name, '')
        module = model_entrypoint(backbone).__module__  # a plugin's backbone has to be loaded first
    return module.startswith(('timm.', 'ccl_timm.'))


def load_plugins() -> None:
    """Register the models of all plugins; one that fails is warned of and left out."""
    registry.load_all('model', verify=_verify_model, guard=_no_overwriting)


def list_models(pattern: str = '*') -> list[str]:
    """Names of our named models and plug-ins' that match a pattern such as ``'*_cam'``; imports no plug-in.

    Any other ``<timm architecture>_<head>`` is a name, too; ``timm.list_models()`` has timm's own.
    """
    return fnmatch.filter([*MODELS, *registry.plugin_names('model')], pattern)


def overview(pattern: str = '*') -> list[tuple[str, int, str, list[str]]]:
    """Name, parameters at 1000 classes, head and its outputs, of our named models and plug-ins' that match a pattern.

    A plug-in's model that cannot be built is left out with a warning.
    """
    rows = []
    for name in list_models(pattern):
        try:
            model: TimmModel = create_model(name, device='meta')
            head = model.get_classifier()
            outputs = output_names(head)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too, whatever a plug-in's function raises
            warnings.warn(f"Left out: '{name}' ({type(error).__name__}: {error})", stacklevel=2)
            continue
        rows.append((name, sum(p.numel() for p in model.parameters()), head_name(head) or 'any', outputs))
    return rows


def name_owner(name: str) -> str | None:
    """A clause on who has a model of that name, timm or this package; None if neither has."""
    if not is_model(name):
        return None
    owner = model_entrypoint(name).__module__.partition('.')[0]
    return f'{owner} has a model of this name' if owner in ('timm', 'ccl_timm') else None


@contextlib.contextmanager
def _no_overwriting():
    # timm only warns when a name is taken, and drops the first model's pretrained tags: for a plugin that is an error
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Overwriting .* in registry')
        yield


def _verify_model(name: str, obj: Any) -> None:
    if not callable(obj) or getattr(obj, '__name__', None) != name:
        raise TypeError(f"the object must be a function named '{name}'")
    if not is_model(name):
        raise TypeError('the function must be decorated with timm.models.register_model')
