"""Named models: timm backbones with our heads. Importing this registers them with timm."""

import contextlib
import warnings
from typing import Any

import timm
from timm.models import is_model, list_models, model_entrypoint, parse_model_name, split_model_name_tag
from torch import nn

from ccl_timm import plugins
from ccl_timm.errors import UnknownNameError, UserError, did_you_mean
from ccl_timm.models.variants import build_variant, register_variant, variant_cfg

__all__ = [
    'MODELS',
    'build_variant',
    'create_model',
    'ensure_registered',
    'load_plugins',
    'register_variant',
    'taken',
    'variant_cfg',
]

_NAMED = (
    ('resnet18', 'cam'),
    ('resnet18', 'cosine'),
    ('resnet18', 'mc'),
    ('resnet18', 'pedcc'),
    ('vgg16', 'cam'),
    ('vgg16', 'cosine'),
    ('vgg16', 'mc'),
    ('vgg16', 'pedcc'),
    ('vit_tiny_patch16_224', 'cam'),
    ('vit_small_patch16_224', 'cam'),
    ('vit_base_patch16_224', 'cam'),
)

# name -> module:function; pyproject.toml declares the same as entry points
MODELS: dict[str, str] = {}
for _backbone, _head in _NAMED:
    globals()[f'{_backbone}_{_head}'] = register_variant(_backbone, _head)
    MODELS[f'{_backbone}_{_head}'] = f'{__name__}:{_backbone}_{_head}'


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ``create_model`` that also finds plugins' models and explains unknown names.

    Args:
        model_name: any timm name, a name of ours (``'resnet18_cam'``), a plugin's, ``'hf-hub:owner/repository'`` or
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
    ensure_registered(model_name)
    return timm.create_model(model_name, pretrained=pretrained, **kwargs)


def ensure_registered(model_name: str) -> None:
    """Make timm know a model's name, loading the plugin that has it if need be.

    Raises:
        UnknownNameError: nobody has it.
    """
    try:
        source, name = parse_model_name(model_name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if source:
        return
    name, _ = split_model_name_tag(name)
    if taken(name) or plugins.load_plugin('model', name, verify=_verify_model, guard=_no_overwriting) is not None:
        return
    if is_model(name):  # registered by hand, by neither timm nor a plugin
        return
    known = [*list_models(), *plugins.plugin_names('model')]
    raise UnknownNameError(
        f"Unknown model '{name}'{did_you_mean(name, known)} `ccl-timm plugins` lists models of plugins, "
        'timm.list_models() all others.'
    )


def load_plugins() -> None:
    """Register the models of all plugins; one that fails is warned of and left out."""
    plugins.load_all('model', verify=_verify_model, guard=_no_overwriting)


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
