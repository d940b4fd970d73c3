"""A timm model whose classifier is one of our heads, and stays one when the number of classes changes."""

import contextlib
import functools
from typing import Any

from torch import nn

from ccl_timm._compat import TimmModel
from ccl_timm.errors import UserError
from ccl_timm.heads import Head
from ccl_timm.models.adapters import flatten_pooled, insert_feature_stage, remove_feature_stage

__all__ = ['VariantMixin', 'attach_head', 'backbone_class', 'check_classifier']


_Backbone: Any = object  # for a type checker, a class with everything that timm's models have


class VariantMixin(_Backbone):
    """Mixin over a timm model's class: :meth:`reset_classifier` keeps the head."""

    def get_classifier(self) -> Any:
        """The head, or an Identity if there are 0 classes; not every family's own method gives it."""
        return self.get_submodule(self._head_path)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs: Any) -> None:
        """Change the number of classes; what the head has beside its last layer stays.

        Args:
            num_classes: new number of classes; 0 removes the head (features come out, as with any timm model).
            global_pool: new pooling, unchanged if None; a pooling of another width makes a new head.
            **kwargs: what the family's own method takes besides, such as ``reset_other``.

        Raises:
            UserError: there cannot be as many classes, or not without pooling.
        """
        check_classifier(num_classes, global_pool)
        head = self.get_classifier()
        training = head.training
        remove_feature_stage(self, backbone_class(self).__module__)
        super().reset_classifier(0, global_pool, **kwargs)
        flatten_pooled(self)
        self.num_classes = num_classes
        if num_classes == 0:
            return
        pooling = getattr(self, 'global_pool', None)
        check_classifier(num_classes, getattr(pooling, 'pool_type', pooling))  # it may be off from before
        if isinstance(head, nn.Identity) or head.in_features != self.head_hidden_size:
            head = _new_head(self, self._head_class, num_classes, self._head_options)
        else:
            head.reset(num_classes)
        _place(self, head.train(training))

    def __reduce_ex__(self, protocol):
        # the class is made at run time: pickle the recipe for it instead of its name
        return _empty_instance, (backbone_class(self),), self.__getstate__()


def check_classifier(num_classes: int, global_pool: str | None) -> None:
    """Raise a UserError for a negative number of classes, and for a head on features that are not pooled."""
    if num_classes < 0:
        raise UserError(f'num_classes={num_classes} must not be negative.')
    if num_classes and global_pool == '':
        raise UserError("A head reads pooled features: global_pool='' works with num_classes=0 only.")


def attach_head(model: TimmModel, path: str, head_class: type[Head], num_classes: int, options: dict) -> nn.Module:
    """Put a head in the place of a timm model's classifier, in place, and return the model.

    Args:
        model: a timm model built with 0 classes.
        path: of the classifier's module, an Identity as yet.
        head_class: built as ``head_class(in_features, num_classes, **options)``.
        num_classes: K; 0 for none yet.
        options: the head's own keyword arguments.

    Raises:
        UserError: the model does not follow timm's conventions for a classifier.
    """
    _check_place(model, path)
    flatten_pooled(model)
    model.__class__ = variant_class(type(model))
    model._head_class, model._head_options, model._head_path = head_class, dict(options), path
    model.num_classes = num_classes
    if num_classes > 0:
        _place(model, _new_head(model, head_class, num_classes, options))
    return model


def _check_place(model: TimmModel, path: str) -> None:
    """Refuse a model where a head at this path would not be the only layer that reads the pooled features."""
    name = model.pretrained_cfg['architecture']
    for attribute in ('forward_features', 'forward_head', 'get_classifier', 'reset_classifier', 'head_hidden_size'):
        if not hasattr(model, attribute):
            raise UserError(
                f"'{name}' cannot take a head: it has no '{attribute}' of timm's; use another architecture."
            )
    with contextlib.suppress(AttributeError):  # EfficientViT-M looks for the Linear within the Identity
        if not isinstance(model.get_classifier(), nn.Module):  # though its cfg names one: LeViT-384-s8
            raise UserError(
                f"'{name}' has several classifiers, and a head replaces a single one: use another architecture."
            )
    if not isinstance(dict(model.named_modules(remove_duplicate=False)).get(path), nn.Identity):
        raise UserError(
            f"'{name}' cannot take a head: built without classes, it has no free place at '{path}', where its last "
            'layer belongs; use another architecture.'
        )


def _variant_class(backbone: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a timm model's class that keeps its head; one for each backbone class."""
    return type(f'{backbone.__name__}VariantMixin', (VariantMixin, backbone), {'__module__': __name__})


# Any: a type checker takes classes of modules for not hashable
variant_class: Any = functools.cache(_variant_class)


def backbone_class(model: TimmModel) -> type[nn.Module]:
    """The timm class of a model that has one of our heads."""
    return type(model).__bases__[1]


def _empty_instance(backbone: type[nn.Module]) -> nn.Module:
    cls = variant_class(backbone)
    return cls.__new__(cls)


def _place(model: TimmModel, head: Head) -> None:
    model.set_submodule(model._head_path, head)
    stage = head.feature_stage()
    if stage is not None:
        insert_feature_stage(model, backbone_class(model).__module__, stage)


def _new_head(model: TimmModel, head_class: type[Head], num_classes: int, options: dict) -> Head:
    example = next(model.parameters())
    return head_class(model.head_hidden_size, num_classes, device=example.device, dtype=example.dtype, **options)
