"""timm's registry finds ``<timm architecture>_<head>`` by itself. Nothing else here changes what is timm's.

A variant is registered when timm is first asked for it by name, so that ``timm.create_model``, transformers and
upstream's scripts need no more than ``import ccl_timm``. ``timm.list_models()`` lists it from then on.

Read in timm 1.0.31: ``is_model``, ``model_entrypoint`` and with them ``create_model`` pass the name through
``timm.models._registry.get_arch_name``; ``get_pretrained_cfg`` looks it up in its ``_model_pretrained_cfgs``.
``register_model`` does neither, so a name can still be registered by whoever defines such a model.
"""

import contextlib

from timm.models import is_model, split_model_name_tag

from ccl_timm import registry
from ccl_timm._compat import model_registry
from ccl_timm.errors import UserError
from ccl_timm.heads import list_heads
from ccl_timm.models.builder import register_variant

__all__ = ['install', 'split_variant']


def split_variant(name: str) -> tuple[str, str] | None:
    """Backbone and head of ``<timm architecture>_<head>``; None if the name is not of this form."""
    for head in sorted(list_heads(), key=len, reverse=True):
        backbone = name.removesuffix(f'_{head}')
        if backbone != name and is_model(backbone):
            return backbone, head
    return None


def _register(name: str) -> None:
    """Register a variant that timm does not have yet.

    Other names stay unknown to timm, and so do backbones that cannot take the head and models of plugins:
    ``ccl_timm.create_model`` explains the former and loads the latter.
    """
    if name in model_registry._model_entrypoints:
        return
    variant = split_variant(name)
    if variant and all(plugin.name != name for plugin in registry.find_plugins('model')):
        with contextlib.suppress(UserError):
            register_variant(*variant)


class _PretrainedCfgs(dict):
    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and not super().__contains__(name):
            _register(split_model_name_tag(name)[0])
        return super().__contains__(name)


def _get_arch_name(model_name: str) -> str:
    name = split_model_name_tag(model_name)[0]
    _register(name)
    return name


def install() -> None:
    """Let timm's registry find variants, from now on and in this process."""
    model_registry.get_arch_name = _get_arch_name
    if not isinstance(model_registry._model_pretrained_cfgs, _PretrainedCfgs):
        model_registry._model_pretrained_cfgs = _PretrainedCfgs(model_registry._model_pretrained_cfgs)
