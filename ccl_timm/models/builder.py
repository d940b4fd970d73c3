"""Named architectures: a timm backbone, one of our heads, and a stem, registered with timm."""

import dataclasses
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import timm.models
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    load_pretrained,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn
from torch.hub import load_state_dict_from_url

from ccl_timm._compat import FeatureGetterNet, TimmModel, pretrained_cfg_for_features
from ccl_timm.errors import UserError, user_errors
from ccl_timm.heads import Head, head_class, head_options, list_heads
from ccl_timm.models.adapters import (
    build_options,
    classifier_path,
    feature_stage_path,
    find_feature_stage,
    make_small_input,
    prepare_feature_stage,
    prepare_for_head,
    registered_cfg,
)
from ccl_timm.models.checkpoints import checkpoint_options, tagged_cfgs
from ccl_timm.models.variant import attach_head, backbone_class, check_classifier
from ccl_timm.models.weights import check_classes, check_model_args, read_hub_weights, read_local_weights

__all__ = ['build_variant', 'options_in', 'register_variant', 'variant_cfg']

# what timm's families call the conversion of other names of their tensors
_FILTERS = ('checkpoint_filter_fn', '_filter_fn', '_filter_torchvision_pretrained', 'pretrained_filter_fn')

default_cfgs: dict[str, Any] = {}  # read by timm's register_model, which looks into the module of the function

_Kind = Literal['own', 'other', 'stock']
_NO_WEIGHTS: dict[str, Any] = dict(
    url=None, file=None, hf_hub_id=None, hf_hub_filename=None, state_dict=None, source=None, custom_load=False, tag=None
)


def register_variant(backbone: str, head: str) -> Callable[..., nn.Module]:
    """Register ``<backbone>_<head>`` with timm, with a default_cfg derived from the backbone's.

    Args:
        backbone: a timm architecture without tag, such as ``'resnet18'``.
        head: one of ``ccl_timm.heads.list_heads()``, such as ``'cam'``.

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
    cls = head_class(head)

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = checkpoint_options(name, kwargs.get('pretrained_cfg'))
        model: TimmModel = build_variant(name, backbone, cls, pretrained, **{**options, **kwargs})
        model._model_args = {**getattr(model, '_model_args', {}), **options}  # timm adds what it was called with
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f'{backbone} with the {cls.__name__} classifier; see build_variant.'
    default_cfgs.update(generate_default_cfgs(tagged_cfgs(name, variant_cfg(backbone, cls))))
    setattr(module, name, entry_point)
    return register_model(entry_point)


def variant_cfg(backbone: str, head_class: type[Head]) -> PretrainedCfg:
    """A default_cfg like the backbone's, without its weights, that names the tensors shaped by the classes.

    Raises:
        UserError: the backbone has a head of ours, or no single classifier.
    """
    if is_model(bare := backbone.rpartition('_')[0]) and backbone.removeprefix(f'{bare}_') in list_heads():
        raise UserError(f"'{backbone}' has a head already: put one on '{bare}'.")
    tensors = _class_tensors(backbone, classifier_path(backbone), head_class)
    cfg = dataclasses.replace(registered_cfg(backbone), **_NO_WEIGHTS, classifier=tensors)
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
            model, strictly. Where they hold another head of ours, the backbone's go into the model, and a warning says
            that the head starts anew. Else they are the backbone's, which timm loads before the head is put in, so that
            no tensor of its classifier can reach the head. Without weights of the variant's own: the backbone's.
        pretrained_cfg: see timm's ``create_model``.
        pretrained_cfg_overlay: likewise; ``dict(file=...)`` takes weights from a file.
        pretrained_model_args: how the checkpoint's model was built.
        cache_dir: of the Hub's downloads.
        num_classes: K, default that of the cfg (1000); 0 for no classifier.
        features_only: return timm's feature extractor of the backbone, with the weights of a trained checkpoint, too.
            With ``small_input`` and for the head ``mc``, whose feature maps differ from the backbone's, it is timm's
            ``FeatureGetterNet`` of the whole model.
        small_input: a stem for images of 24 to 64 px, see ``adapters.make_small_input``.
        **kwargs: the head's options; the rest goes to the backbone.

    Raises:
        UserError: the family has no small stem, or a trained checkpoint does not fit.
    """
    if not pretrained_cfg and get_pretrained_cfg(name) is None:
        pretrained_cfg = variant_cfg(backbone, head_class).to_dict() | {'architecture': name}  # not a registered name
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    num_classes = cfg.num_classes if num_classes is None else num_classes
    check_classifier(num_classes, kwargs.get('global_pool'))
    options = {k: kwargs.pop(k) for k in head_options(head_class) if k in kwargs}
    weights = _read_weights(cfg, pretrained_cfg_overlay or {}, cache_dir) if pretrained else None
    found = options_in(weights, backbone, head_class) if weights else {}
    kind = _kind_of(weights, backbone, head_class, {**found, **options})
    if kind == 'own':
        options = {**found, **options}
    if pretrained_model_args is not None or cfg.source in ('hf-hub', 'local-dir'):
        kind = _check_foreign(name, cfg, pretrained_cfg_overlay or {}, pretrained_model_args or {}, weights) or kind
    if kind != 'stock':
        kwargs.setdefault('in_chans', cfg.input_size[0])
    if features_only and not (small_input or _has_feature_stage(head_class)):
        stock = _without_head(weights, backbone) if weights and kind != 'stock' else weights
        size = {} if kind == 'stock' else {'input_size': cfg.input_size}
        return _build_backbone(backbone, stock, pretrained, cache_dir, size, {**kwargs, 'features_only': True})

    indices = kwargs.pop('out_indices', None)
    if features_only and (wrapper := kwargs.pop('feature_cls', 'getter')) != 'getter':
        raise UserError(f"feature_cls='{wrapper}' does not work with the feature maps of '{name}': leave it out.")
    own = None if kind == 'stock' else weights
    stock = None if own else weights
    model = _build_backbone(backbone, stock, pretrained and not own, cache_dir, {}, {**kwargs, 'num_classes': 0})
    if small_input:
        make_small_input(model, name)
    _attach(model, backbone, head_class, num_classes, options)
    model.pretrained_cfg = model.default_cfg = _without_weights(cfg)
    model.pretrained_model_args, model._model_args = pretrained_model_args or {}, found
    if own:
        with_head = kind == 'own' and num_classes
        _load_trained(model, name, cfg, own if with_head else _without_head(own, backbone), backbone)
    if kind == 'other' and num_classes:
        warnings.warn(
            f"The weights have another head than '{name}': its {head_class.__name__} starts anew.", stacklevel=2
        )
    return _extractor_of(model, indices) if features_only else model


def options_in(weights: Mapping[str, Any], backbone: str, head_class: type[Head]) -> dict[str, Any]:
    """Options of a head that the state_dict of a whole model shows; see ``Head.options_from``."""
    path = f'{classifier_path(backbone)}.'
    found = head_class.options_from({k.removeprefix(path): v for k, v in weights.items() if k.startswith(path)})
    return {key: value for key, value in found.items() if key in head_options(head_class)}  # a base class's may be more


def _attach(model: TimmModel, backbone: str, head_class: type[Head], num_classes: int, options: dict[str, Any]) -> None:
    """Attach a head to a backbone without classes, in place."""
    prepare_for_head(model)
    if _has_feature_stage(head_class):
        prepare_feature_stage(model, _family(backbone))
    attach_head(model, classifier_path(backbone), head_class, num_classes, options)


def _extractor_of(model: TimmModel, indices: int | tuple[int, ...] | None) -> nn.Module:
    """timm's feature extractor of a whole model, of all levels by default, with what timm's builder gives to one."""
    cfg, channels = pretrained_cfg_for_features(model.pretrained_cfg), model.in_chans
    indices = tuple(range(len(model.feature_info))) if indices is None else indices
    prune = not _has_feature_stage(model._head_class)  # a feature stage goes when the head does
    extractor: TimmModel = FeatureGetterNet(model, out_indices=indices, prune=prune)
    extractor.pretrained_cfg = extractor.default_cfg = cfg
    extractor._traits, extractor.in_chans = dict(model._traits), channels
    return extractor


def _build_backbone(
    backbone: str,
    weights: dict[str, Any] | None,
    pretrained: bool,
    cache_dir: str | None,
    overlay: dict[str, Any],
    kwargs: dict[str, Any],
) -> TimmModel:
    with_weights = {'state_dict': weights, 'num_classes': -1, **overlay} if weights else None
    needs_whole = pretrained or 'features_only' in kwargs
    options = build_options(backbone, needs_whole, kwargs.get('drop_rate', 0.0))
    model: TimmModel = timm.create_model(
        backbone,
        pretrained=pretrained,
        pretrained_cfg_overlay=with_weights,
        cache_dir=cache_dir,
        **{**options, **kwargs},
    )
    if weights and 'features_only' not in kwargs:
        _check_fit(model, backbone, weights)
    model._model_args = {}  # timm's create_model fills in the variant's
    model.pretrained_cfg.pop('state_dict', None)
    return model


def _check_fit(model: TimmModel, backbone: str, weights: dict[str, Any]) -> None:
    """Raise a UserError if weights lack most of a backbone's parameters: timm takes what fits, and logs the rest."""
    family = sys.modules[_family(backbone)]
    convert = next((getattr(family, name) for name in _FILTERS if hasattr(family, name)), None)
    given = dict(weights)
    if convert:
        try:
            given = convert(given, model)
        except TypeError:  # as timm calls the few that take no model
            given = convert(dict(weights))
    names = [name for name, _ in model.named_parameters()]
    missing = [name for name in names if name not in given]
    if len(missing) > len(names) / 2:
        raise UserError(
            f"The weights do not fit '{backbone}': of its {len(names)} parameters they lack {len(missing)}, such as "
            f"'{missing[0]}', and have '{next(iter(weights))}'. Give the state_dict of such a model."
        )


def _check_foreign(
    name: str, cfg: PretrainedCfg, overlay: dict[str, Any], model_args: dict[str, Any], weights: dict[str, Any] | None
) -> _Kind | None:
    """Check what somebody's config.json says; ``'own'`` where the weights beside it are loaded, which must fit it."""
    check_model_args(name, {key: value for key, value in model_args.items() if key != 'num_classes'})
    if weights is None or overlay.keys() & {'file', 'url'}:
        return None
    check_classes(name, weights, _without_weights(cfg))
    return 'own'


def _without_weights(cfg: PretrainedCfg) -> dict[str, Any]:
    return dataclasses.replace(cfg, state_dict=None).to_dict()


def _family(backbone: str) -> str:
    return timm.models.model_entrypoint(backbone).__module__


def _head_keys(weights: dict[str, Any], backbone: str) -> set[str]:
    """Names of the tensors in a state_dict that belong to a head or a stock classifier, and to a feature stage."""
    prefixes = (
        f'{classifier_path(backbone)}.',
        f'{find_feature_stage(_family(backbone)) or classifier_path(backbone)}.',
    )
    return {key for key in weights if key.startswith(prefixes)}


def _kind_of(weights: dict[str, Any] | None, backbone: str, head_class: type[Head], options: dict[str, Any]) -> _Kind:
    """Whether a state_dict has this head, another one of ours, or the backbone's own classifier.

    The latter is a linear layer at a path that may be within the head's, and have other layers beside it.
    """
    if weights is None:
        return 'stock'
    path, stock_path = classifier_path(backbone), registered_cfg(backbone).classifier
    keys = _head_keys(weights, backbone)
    found = {key.removeprefix(f'{path}.') for key in keys if key.startswith(f'{path}.')}
    has_stage = any(not key.startswith(f'{path}.') for key in keys)
    own = set(head_class(16, 2, device='meta', **options).state_dict())
    if path != stock_path and f'{stock_path}.weight' in weights:
        return 'own' if own <= found else 'stock'
    if found == own and has_stage == _has_feature_stage(head_class):
        return 'own'
    return 'stock' if found <= {'weight', 'bias'} else 'other'


def _without_head(weights: dict[str, Any], backbone: str) -> dict[str, Any]:
    head = _head_keys(weights, backbone)
    return {key: value for key, value in weights.items() if key not in head}


def _has_feature_stage(head_class: type[Head]) -> bool:
    return head_class.feature_stage is not Head.feature_stage


def _class_tensors(backbone: str, path: str, head_class: type[Head]) -> Any:
    paths = tuple(f'{path}.{name}' if name else path for name in head_class.classifier_layers)
    if _has_feature_stage(head_class):
        paths += (feature_stage_path(timm.models.model_entrypoint(backbone).__module__),)
    return paths[0] if len(paths) == 1 else paths


def _read_weights(cfg: PretrainedCfg, overlay: dict[str, Any], cache_dir: str | None) -> dict[str, Any] | None:
    """The state_dict that a cfg points to; None where it has none of its own.

    Of a cfg from the Hub or a folder, only what the caller has laid over it names other weights than those beside it.
    """
    if cfg.hf_hub_id and cfg.source == 'hf-hub' and not overlay.keys() & {'state_dict', 'file', 'url'}:
        return read_hub_weights(cfg.hf_hub_id, cache_dir)
    if cfg.state_dict:
        return cfg.state_dict
    if cfg.file and cfg.source == 'local-dir':
        return read_local_weights(cfg.file)
    if cfg.file:
        return timm.models.load_state_dict(cfg.file)
    if url := overlay.get('url'):
        with user_errors(f"'{url}' cannot be loaded", (OSError, RuntimeError, pickle.UnpicklingError)):
            return load_state_dict_from_url(url, cache_dir, map_location='cpu', weights_only=True)
    if cfg.hf_hub_id:
        return read_hub_weights(cfg.hf_hub_id, cache_dir)
    return None


def _load_trained(model: TimmModel, name: str, cfg: PretrainedCfg, weights: dict[str, Any], backbone: str) -> None:
    """Load a checkpoint of this variant; only a change of classes or input channels may change a tensor.

    Weights without any tensor of a head leave the model's as it is.
    """
    resize = getattr(sys.modules[backbone_class(model).__module__], 'checkpoint_filter_fn', None)
    wanted = model.state_dict().keys()
    changed = model.num_classes != cfg.num_classes
    by_class = tuple(f'{p}.' for p in ([cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier or ()))
    anew = {k for k in wanted if changed and k.startswith(by_class)}
    head = _head_keys(model.state_dict(), backbone) if not _head_keys(weights, backbone) else ()
    missing = [k for k in wanted if k not in weights and k not in head]
    unexpected = [k for k in weights if k not in wanted]
    if missing or unexpected:
        raise UserError(
            f"The checkpoint does not fit '{name}': "
            + '; '.join(
                f'{what} {keys[:3]}' for what, keys in (('missing', missing), ('unexpected', unexpected)) if keys
            )
            + '. Build the model with the options it was trained with (small_input, hidden_features, ...).'
        )
    hint = '. Build the model with the options it was trained with'
    with user_errors(f"The checkpoint does not fit '{name}'", (RuntimeError,), hint=hint):
        load_pretrained(
            model,
            pretrained_cfg={**model.pretrained_cfg, 'source': None, 'state_dict': dict(weights)},
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            filter_fn=resize,
            strict=not (anew or head),
        )
