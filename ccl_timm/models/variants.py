"""Named architectures: a timm backbone, one of our heads, and a stem, registered with timm."""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import timm.models
from timm.models import generate_default_cfgs, get_pretrained_cfg, is_model, load_pretrained, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import load_state_dict_from_path
from timm.models._pretrained import PretrainedCfg
from torch import nn

from ccl_timm.errors import UserError
from ccl_timm.heads import HEADS, Head
from ccl_timm.models.checkpoints import checkpoint_options, tagged_cfgs
from ccl_timm.models.families import (
    build_options,
    classifier_path,
    feature_stage_path,
    make_small_input,
    prepare_feature_stage,
    prepare_for_head,
)
from ccl_timm.models.headed import backbone_class, put_head
from ccl_timm.models.sources import read_hub_weights

__all__ = ['build_variant', 'register_variant', 'variant_cfg']

default_cfgs: dict[str, Any] = {}  # read by timm's register_model, which looks into the module of the function

_NO_WEIGHTS = dict(
    url=None, file=None, hf_hub_id=None, hf_hub_filename=None, state_dict=None, source=None, custom_load=False, tag=None
)


def register_variant(backbone: str, head: str) -> Callable[..., nn.Module]:
    """Register ``<backbone>_<head>`` with timm, with a default_cfg derived from the backbone's.

    Args:
        backbone: a timm architecture without tag, such as ``'resnet18'``.
        head: a name in ``ccl_timm.heads.HEADS``, such as ``'cam'``.

    Returns:
        The entry point, as timm's ``create_model`` calls it. Registering twice returns the first.

    Raises:
        UserError: timm has no such backbone, or there is no such head.
    """
    name = f'{backbone}_{head}'
    module = sys.modules[__name__]
    if hasattr(module, name):
        return getattr(module, name)
    if not timm.models.is_model(backbone):
        raise UserError(f"'{backbone}' is not a timm architecture, so there is no '{name}'; see timm.list_models().")
    if head not in HEADS:
        raise UserError(f"There is no head '{head}'; heads: {', '.join(HEADS)}.")

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = checkpoint_options(name, kwargs.get('pretrained_cfg'))
        model = build_variant(name, backbone, HEADS[head], pretrained, **{**options, **kwargs})
        model._model_args = {**getattr(model, '_model_args', {}), **options}  # timm adds what it was called with
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f'{backbone} with the {HEADS[head].__name__} classifier; see build_variant.'
    default_cfgs.update(generate_default_cfgs(tagged_cfgs(name, variant_cfg(backbone, HEADS[head]))))
    setattr(module, name, entry_point)
    return register_model(entry_point)


def variant_cfg(backbone: str, head_class: type[Head]) -> PretrainedCfg:
    """A default_cfg like the backbone's, without its weights, that names the tensors shaped by the classes.

    Raises:
        UserError: the backbone has a head of ours, or no single classifier.
    """
    if is_model(bare := backbone.rpartition('_')[0]) and backbone.removeprefix(f'{bare}_') in HEADS:
        raise UserError(f"'{backbone}' has a head already: put one on '{bare}'.")
    tensors = _class_tensors(backbone, classifier_path(backbone), head_class)
    cfg = dataclasses.replace(get_pretrained_cfg(backbone), **_NO_WEIGHTS, classifier=tensors)
    if _has_feature_stage(head_class) and cfg.pool_size:
        cfg = dataclasses.replace(cfg, pool_size=tuple(2 * size for size in cfg.pool_size))
    return cfg


def build_variant(
    name: str,
    backbone: str,
    head_class: type[Head],
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    small_input: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm backbone with another classifier; the body of every variant's entry point.

    Args:
        name: the variant's registered name.
        backbone: timm architecture.
        head_class: its options (such as ``hidden_features``) are picked out of ``kwargs`` by its signature.
        pretrained: load weights. Where the weights hold this head they are a trained checkpoint and go into the whole
            model, strictly; else they are the backbone's, which timm loads before the head is put in, so that no
            tensor of its classifier can reach the head. Without weights of the variant's own: the backbone's default.
        pretrained_cfg: see timm's ``create_model``.
        pretrained_cfg_overlay: likewise; ``dict(file=...)`` takes weights from a file.
        pretrained_model_args: how the checkpoint's model was built.
        cache_dir: of the Hub's downloads.
        num_classes: K, default that of the cfg (1000); 0 for no classifier.
        features_only: return timm's feature extractor of the backbone, which has no head.
        small_input: a stem for images of 24 to 64 px, see ``families.make_small_input``.
        **kwargs: the head's options; the rest goes to the backbone.

    Raises:
        UserError: the family has no small stem, or a trained checkpoint does not fit.
    """
    if not pretrained_cfg and get_pretrained_cfg(name) is None:
        pretrained_cfg = variant_cfg(backbone, head_class).to_dict() | {'architecture': name}  # not a registered name
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    options = {k: kwargs.pop(k) for k in _options_of(head_class) if k in kwargs}
    path = classifier_path(backbone)
    weights = _read_weights(cfg, cache_dir) if pretrained else None
    stock_path = get_pretrained_cfg(backbone).classifier
    trained = weights is not None and _holds_head(weights, path, stock_path, head_class, options)
    if trained:
        kwargs.setdefault('in_chans', cfg.input_size[0])
    from_backbone = pretrained and not trained

    model = timm.create_model(
        backbone,
        pretrained=from_backbone,
        pretrained_cfg_overlay={'state_dict': weights, 'num_classes': -1} if weights and from_backbone else None,
        cache_dir=cache_dir,
        features_only=features_only or None,
        num_classes=None if features_only else 0,
        **build_options(backbone, from_backbone or features_only, kwargs.get('drop_rate', 0.0)),
        **kwargs,
    )
    if features_only:
        if small_input:
            raise UserError(f"'{name}' has small_input=True or features_only=True, not both: choose one.")
        return model
    model._model_args = {}  # timm's create_model fills in the variant's
    prepare_for_head(model)
    if small_input:
        make_small_input(model, name)
    if _has_feature_stage(head_class):
        prepare_feature_stage(model, timm.models.model_entrypoint(backbone).__module__)
    put_head(model, path, head_class, cfg.num_classes if num_classes is None else num_classes, options)
    model.pretrained_cfg = model.default_cfg = dataclasses.replace(cfg, state_dict=None).to_dict()
    model.pretrained_model_args = pretrained_model_args or {}
    if trained:
        _load_trained(model, name, cfg, weights)
    return model


def _options_of(head_class: type[Head]) -> list[str]:
    names = list(inspect.signature(head_class).parameters)[2:]  # after in_features and num_classes
    return [name for name in names if name not in ('device', 'dtype')]


def _holds_head(
    weights: dict[str, Any], path: str, stock_path: str, head_class: type[Head], options: dict[str, Any]
) -> bool:
    """Whether a state_dict has this kind of head at ``path``, rather than a backbone's classifier.

    The latter is a linear layer at ``stock_path``, which may be within ``path`` and have other layers beside it.
    """
    found = {key.removeprefix(f'{path}.') for key in weights if key.startswith(f'{path}.')}
    own = head_class(16, 2, device='meta', **options).state_dict().keys()
    if path != stock_path and f'{stock_path}.weight' in weights:
        return own <= found
    return bool(found - {'weight', 'bias'}) or found == set(own)


def _has_feature_stage(head_class: type[Head]) -> bool:
    return head_class.feature_stage is not Head.feature_stage


def _class_tensors(backbone: str, path: str, head_class: type[Head]) -> Any:
    paths = tuple(f'{path}.{name}' if name else path for name in head_class.class_tensors)
    if _has_feature_stage(head_class):
        paths += (feature_stage_path(timm.models.model_entrypoint(backbone).__module__),)
    return paths[0] if len(paths) == 1 else paths


def _read_weights(cfg: PretrainedCfg, cache_dir: str | None) -> dict[str, Any] | None:
    """The state_dict that a cfg points to; None where it has none of its own."""
    if cfg.state_dict:
        return cfg.state_dict
    if cfg.source == 'local-dir':
        return load_state_dict_from_path(cfg.file)
    if cfg.file:
        return timm.models.load_state_dict(cfg.file)
    if cfg.hf_hub_id:
        return read_hub_weights(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir)
    return None


def _load_trained(model: nn.Module, name: str, cfg: PretrainedCfg, weights: dict[str, Any]) -> None:
    """Load a checkpoint of this variant; only a change of classes or input channels may change a tensor."""
    resize = getattr(sys.modules[backbone_class(model).__module__], 'checkpoint_filter_fn', None)
    wanted = model.state_dict().keys()
    changed = model.num_classes != cfg.num_classes
    by_class = tuple(f'{p}.' for p in ([cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier))
    missing = [k for k in wanted if k not in weights and not (changed and k.startswith(by_class))]
    unexpected = [k for k in weights if k not in wanted]
    if missing or unexpected:
        raise UserError(
            f"The checkpoint does not fit '{name}': "
            + '; '.join(
                f'{what} {keys[:3]}' for what, keys in (('missing', missing), ('unexpected', unexpected)) if keys
            )
            + '. Build the model with the options it was trained with (small_input, hidden_features, ...).'
        )
    try:
        load_pretrained(
            model,
            pretrained_cfg={**model.pretrained_cfg, 'source': None, 'state_dict': dict(weights)},
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            filter_fn=resize,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"The checkpoint does not fit '{name}': {reason} Build the model with the options it was trained with."
        ) from error
