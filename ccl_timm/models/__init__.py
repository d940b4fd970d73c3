"""Named models: timm backbones with our heads. Importing this registers them with timm."""

import contextlib
import fnmatch
import warnings
from collections.abc import Iterator
from typing import Any

import timm
from timm.models import is_model, list_models, model_entrypoint, parse_model_name, split_model_name_tag
from torch import nn

from ccl_timm import plugins
from ccl_timm.errors import PluginLoadError, UnknownNameError, UserError, did_you_mean
from ccl_timm.heads import HEADS
from ccl_timm.models import sources
from ccl_timm.models.variants import build_variant, register_variant, variant_cfg

__all__ = [
    'MODELS',
    'build_variant',
    'create_model',
    'ensure_registered',
    'known_to_timm',
    'load_plugins',
    'loading',
    'overview',
    'register_variant',
    'split_variant',
    'taken',
    'variant_cfg',
]

# the backbones of both papers, and ViTs and a VGG beside them
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

# name -> module:function; pyproject.toml declares the same as entry points
MODELS: dict[str, str] = {}
for _backbone, _head in _NAMED:
    globals()[f'{_backbone}_{_head}'] = register_variant(_backbone, _head)
    MODELS[f'{_backbone}_{_head}'] = f'{__name__}:{_backbone}_{_head}'


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
    with loading(model_name, pretrained, kwargs.get('cache_dir')):
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)


@contextlib.contextmanager
def loading(model_name: str, pretrained: bool = False, cache_dir: str | None = None) -> Iterator[None]:
    """Where timm builds a model by any name: registered before, and failures of a repository or folder in sentences.

    Args:
        model_name: as for :func:`create_model`.
        pretrained: weights will be loaded; a repository must have safetensors.
        cache_dir: of the Hub's downloads.

    Raises:
        UserError: as :func:`create_model`.
    """
    ensure_registered(model_name, cache_dir)
    source, location = parse_model_name(model_name)
    if not source:
        yield
        return
    if source == 'hf-hub' and pretrained:
        sources.fetch_weights(location, cache_dir=cache_dir)
    with sources.explained_load(location):
        yield


def ensure_registered(model_name: str, cache_dir: str | None = None) -> None:
    """Make timm know a model's name: load the plugin that has it, or register a variant of any timm backbone.

    Args:
        model_name: as for :func:`create_model`; of a folder or a repository, the architecture that its config names.
        cache_dir: of the Hub's downloads.

    Raises:
        UnknownNameError: nobody has it.
        UserError: it is no name, or names a folder without a config, or a backbone that cannot take the head.
    """
    try:
        source, location = parse_model_name(model_name)
    except ValueError as error:
        raise UserError(str(error)) from error
    config = sources.read_config(source, location, cache_dir) if source else {'architecture': location}
    name, _ = split_model_name_tag(config['architecture'])
    if taken(name) or plugins.load_plugin('model', name, verify=_verify_model, guard=_no_overwriting) is not None:
        return
    if is_model(name):
        return
    if variant := split_variant(name):
        register_variant(*variant)
        return
    if source:
        raise UnknownNameError(sources.missing_architecture(location, config))
    known = [*list_models(), *plugins.plugin_names('model')]
    raise UnknownNameError(
        f"Unknown model '{name}'{did_you_mean(name, known)} `ccl-timm plugins` lists models of plugins, "
        'timm.list_models() all others.'
    )


def split_variant(name: str) -> tuple[str, str] | None:
    """Backbone and head of ``<timm architecture>_<head>``; None if the name is not of this form."""
    for head in HEADS:
        backbone = name.removesuffix(f'_{head}')
        if backbone != name and is_model(backbone):
            return backbone, head
    return None


def known_to_timm(name: str) -> bool:
    """Whether timm's own ``create_model`` has this architecture as soon as ccl_timm is imported."""
    return name in MODELS or (is_model(name) and model_entrypoint(name).__module__.startswith('timm.'))


def load_plugins() -> None:
    """Register the models of all plugins; one that fails is warned of and left out."""
    plugins.load_all('model', verify=_verify_model, guard=_no_overwriting)


def overview(pattern: str = '*') -> list[tuple[str, int, str]]:
    """Name, number of parameters at 1000 classes, and head of our named models and plugins' that match a pattern."""
    rows = []
    for name in fnmatch.filter([*MODELS, *plugins.plugin_names('model')], pattern):
        with contextlib.suppress(PluginLoadError):
            model = create_model(name, device='meta')
            head = next((key for key, value in HEADS.items() if type(model.get_classifier()) is value), 'any')
            rows.append((name, sum(p.numel() for p in model.parameters()), head))
    return rows


def taken(name: str) -> str | None:
    """Whether timm or this package has a model of that name, in words; None if neither has."""
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
