"""Our models in torchvision's ``get_model`` and ``list_models``, for those who build models there."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ccl_timm.errors import UserError
from ccl_timm.models import MODELS, create_model, split_variant

__all__ = ['register_torchvision']


class _Builders(dict):
    """torchvision's builders by name, which finds ``<timm architecture>_<head>``, too."""

    def __missing__(self, name: str) -> Callable[..., nn.Module]:
        if split_variant(name) is None:
            raise KeyError(name)
        return _builder(name)


def register_torchvision() -> list[str]:
    """Register our models with torchvision: ``torchvision.models.get_model('resnet18_cam', num_classes=196)``.

    ``get_model`` finds any ``<timm architecture>_<head>``; ``list_models`` lists our named ones.

    torchvision's registry is private and may change; nothing else here needs it. Weights come with ``pretrained=True``,
    as for ``ccl_timm.create_model``, not by torchvision's ``weights``. Calling it twice does no harm.

    Returns:
        The names that are listed.

    Raises:
        UserError: this torchvision has no such registry.
    """
    try:
        from torchvision.models import _api
        from torchvision.models._api import BUILTIN_MODELS, register_model
    except ImportError as error:
        raise UserError(f'This torchvision does not let other packages register models: {error}.') from error
    for name in MODELS:
        if name not in BUILTIN_MODELS:
            register_model(name)(_builder(name))
    _api.BUILTIN_MODELS = _Builders(BUILTIN_MODELS)
    return list(MODELS)


def _builder(name: str) -> Callable[..., nn.Module]:
    def build(*, weights: None = None, progress: bool = True, **kwargs: Any) -> nn.Module:
        if weights is not None:
            raise UserError(
                f"'{name}' has no weights of torchvision: give pretrained=True for timm's ImageNet weights."
            )
        return create_model(name, **kwargs)

    build.__name__ = name
    return build
