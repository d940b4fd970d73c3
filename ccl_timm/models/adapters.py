"""What single timm families need so that another head fits, and their stems for small images. Nothing else does."""

import difflib
from typing import Any

from timm.layers import SelectAdaptivePool2d
from timm.models import (
    DLA,
    DPN,
    DenseNet,
    EfficientNet,
    PretrainedCfg,
    ResNet,
    ResNetV2,
    get_pretrained_cfg,
    list_models,
    model_entrypoint,
)
from timm.models.vgg import VGG
from torch import Tensor, nn

from ccl_timm._compat import TimmModel
from ccl_timm.errors import UserError

__all__ = [
    'build_options',
    'classifier_path',
    'feature_stage_path',
    'find_feature_stage',
    'flatten_pooled',
    'make_small_input',
    'prepare_feature_stage',
    'prepare_for_head',
    'registered_cfg',
    'insert_feature_stage',
    'late_dropout',
    'remove_feature_stage',
]

# timm module of a family -> what a head replaces, where that is more than the Linear that the cfg names: with the
# BatchNorm or the hidden layer before it, since forward_head(pre_logits=True) gives what these read
_CLASSIFIERS = {
    'timm.models.cpubone': 'head.classifier',
    'timm.models.efficientvit_msra': 'head',
    'timm.models.iformer': 'head.head',
    'timm.models.levit': 'head',
    'timm.models.metaformer': 'head.fc',
    'timm.models.shvit': 'head',
}

# where the classifier's own dropout goes with it
_DROPOUT_IN_CLASSIFIER = ('timm.models.cpubone', 'timm.models.efficientvit_msra', 'timm.models.levit')

# where it comes after what forward_head gives with pre_logits=True
_DROPOUT_AFTER_HEAD = ('timm.models.lcnetv2', 'timm.models.mvitv2')

# timm module of a family -> path of a stage at the end of the feature map, among what forward_features runs
_FEATURE_STAGES = {'timm.models.resnet': 'layer4.channels', 'timm.models.vgg': 'features.channels'}


def registered_cfg(name: str) -> PretrainedCfg:
    """The default_cfg of a name that timm has registered with one.

    Raises:
        LookupError: it has not.
    """
    cfg = get_pretrained_cfg(name)
    if cfg is None:
        raise LookupError(f"timm has no default_cfg of '{name}'")
    return cfg


def classifier_path(backbone: str) -> str:
    """Path, in a timm model, of the module in whose place a head stands.

    Args:
        backbone: a timm architecture without tag.

    Raises:
        UserError: it has no classifier, or several.
    """
    cfg = get_pretrained_cfg(backbone)
    path = cfg.classifier if cfg else None
    if not path:
        raise UserError(f"'{backbone}' has no classifier to put a head in the place of: use another architecture.")
    if not isinstance(path, str):
        raise UserError(
            f"'{backbone}' has {len(path)} classifiers ({', '.join(path[:2])}{', ...' if len(path) > 2 else ''}), "
            f'and a head replaces a single one: use {_similar(backbone)}.'
        )
    return _CLASSIFIERS.get(model_entrypoint(backbone).__module__, path)


def _similar(backbone: str) -> str:
    """The architecture of the same family with the closest name that has a single classifier, quoted."""
    family = list_models(module=model_entrypoint(backbone).__module__.rpartition('.')[2])
    single = [name for name in family if isinstance(registered_cfg(name).classifier, str)]
    close = difflib.get_close_matches(backbone.replace('_distilled', ''), single, n=1)
    return f"'{close[0]}'" if close else 'another architecture'


def build_options(backbone: str, pretrained: bool, drop_rate: float = 0.0) -> dict[str, Any]:
    """Arguments for building a backbone whose classifier goes anyway.

    Raises:
        UserError: its dropout would go too.
    """
    if drop_rate and model_entrypoint(backbone).__module__ in _DROPOUT_IN_CLASSIFIER:
        raise UserError(
            f"drop_rate={drop_rate} of '{backbone}' is inside the classifier that a head replaces: leave it 0."
        )
    if backbone.startswith('vgg') and not pretrained:
        # the 119 M parameters before the classifier are taken out again: do not spend seconds on their initial values
        return {'mlp_ratio': 1 / 4096}
    return {}


def prepare_for_head(model: TimmModel) -> None:
    """Bring a backbone, in place, into the form that the heads expect.

    VGG: the two 4096-wide layers before the classifier go. CC-Loss does not state the size of its VGG16; that it is the
    convolutions and its own classifier (15 M parameters), not the network of 134 M, is our assumption.
    """
    if isinstance(model, VGG):
        model.pre_logits = nn.Identity()  # type: ignore[assignment]  # the two layers in it go
        width = model.num_features * model.head.global_pool.feat_mult()
        model.head.in_features = model.head.num_features = model.head_hidden_size = width


def flatten_pooled(model: TimmModel) -> None:
    """Let pooled features be (N, C), in place, where the family's classifier is a convolution on (N, C, 1, 1).

    Each ``reset_classifier`` of such a family makes a new pooling, so it is needed again after that.
    """
    if isinstance(model, (DLA, DPN, ResNetV2)):
        for module in model.modules():
            if isinstance(module, SelectAdaptivePool2d) and module.pool_type:
                module.flatten = nn.Flatten(1)


def late_dropout(model: TimmModel, pooled: Tensor) -> Tensor:
    """The dropout before the classifier, for families in which ``forward_head(pre_logits=True)`` leaves it out."""
    if model.training and any(cls.__module__ in _DROPOUT_AFTER_HEAD for cls in type(model).__mro__):
        return nn.functional.dropout(pooled, model.drop_rate)
    return pooled


def find_feature_stage(family: str) -> str | None:
    """As :func:`feature_stage_path`; None if the family has no place for it."""
    return _FEATURE_STAGES.get(family)


def feature_stage_path(family: str) -> str:
    """Path, in a model, of the stage that the head ``mc`` has at the end of the feature map.

    Args:
        family: name of the timm module that defines the model, such as ``'timm.models.resnet'``.

    Raises:
        UserError: the family has no place for it.
    """
    if family not in _FEATURE_STAGES:
        raise UserError(
            f"The head 'mc' fits the models of {' and '.join(_FEATURE_STAGES)} only, not those of {family}: give the "
            "loss 'mc' the stock model, whose channels it divides among the classes."
        )
    return _FEATURE_STAGES[family]


def prepare_feature_stage(model: TimmModel, family: str) -> None:
    """Make room, in place, for a stage at the end of the feature map, which has twice the resolution from then on.

    ResNet: the last stage has stride 1. VGG: the stage replaces the last max-pool. Both as in the official code of
    MC-Loss, which compares places: 14x14 of them at 224 px.
    """
    path = feature_stage_path(family)
    parent_path, _, name = path.rpartition('.')
    parent = model.get_submodule(parent_path)
    last = model.feature_info[-1]
    if isinstance(model, VGG):
        stride = 2 if isinstance(parent.pop(-1), nn.MaxPool2d) else 1  # small_input has taken it out before
        last['module'] = path
    else:
        stride = _remove_strides(parent[0])
    last['reduction'] //= stride
    parent.add_module(name, nn.Identity())


def _remove_strides(block: Any) -> int:
    """Give every layer of a block stride 1, in place, and return the block's stride of before."""
    stride = 1
    for module in block.modules():
        if isinstance(module, nn.AvgPool2d):
            module.kernel_size = _ones_like(module.kernel_size)
        if hasattr(module, 'stride'):
            stride = max(stride, *(module.stride if isinstance(module.stride, tuple) else (module.stride,)))
            module.stride = _ones_like(module.stride)
    return stride


def _ones_like(size: Any) -> Any:
    return (1,) * len(size) if isinstance(size, tuple) else 1


def insert_feature_stage(model: TimmModel, family: str, stage: Any) -> None:
    """Put a stage at the end of a feature map, in place; the model's width becomes that of the stage.

    Args:
        model: see :func:`prepare_feature_stage`; without a stage.
        family: see :func:`feature_stage_path`.
        stage: has ``in_channels`` and ``out_channels``.

    Raises:
        UserError: the model's pooling changes the width.
    """
    if model.num_features != stage.in_channels:
        raise UserError("The head 'mc' needs a pooling that keeps the number of channels: use global_pool='avg'.")
    model.set_submodule(feature_stage_path(family), stage)
    _set_width(model, stage.out_channels)


def remove_feature_stage(model: TimmModel, family: str) -> None:
    """Undo :func:`insert_feature_stage`, in place; nothing if there is no stage."""
    parent, _, name = _FEATURE_STAGES.get(family, '').rpartition('.')
    stage = model.get_submodule(parent)._modules.get(name)
    if hasattr(stage, 'in_channels'):
        _set_width(model, stage.in_channels)
        model.set_submodule(f'{parent}.{name}', nn.Identity())


def _set_width(model: TimmModel, channels: int) -> None:
    model.num_features = model.head_hidden_size = channels
    model.feature_info[-1]['num_chs'] = channels


def make_small_input(model: TimmModel, name: str) -> None:
    """Replace, in place, the stem that is made for 224 px by one that keeps the resolution of small images.

    - ResNet, DenseNet: a 3x3 stride-1 convolution (new weights) in the place of the 7x7 stride-2 one, and no max-pool:
      what POD-Loss does with ResNet on CIFAR and Tiny ImageNet [assumption for CC-Loss and for DenseNet].
    - VGG: without its last max-pool, so that 24, 28 and 32 px run [assumption: CC-Loss states no change].
    - MobileNetV2 and the EfficientNets: the stem's 3x3 convolution with stride 1 (its weights stay) [assumption].

    Raises:
        UserError: the family has no such stem.
    """
    for family, change, divisor in _SMALL_STEMS:
        if isinstance(model, family):
            change(model)
            info: Any = model.feature_info if family is not VGG else model.feature_info[-1:]
            for stage in info:
                stage['reduction'] = max(1, stage['reduction'] // divisor)
            return
    raise UserError(
        f"small_input=True does not fit '{name}': it changes the stem of ResNet, DenseNet, VGG and MobileNetV2; for a "
        'vision transformer give img_size=32 patch_size=4 instead, for Swin window_size=4 too.'
    )


def _small_resnet(model: TimmModel) -> None:
    model.conv1 = _fine_convolution(model.conv1)
    model.maxpool = nn.Identity()


def _small_densenet(model: TimmModel) -> None:
    model.features.conv0 = _fine_convolution(model.features.conv0)
    model.features.pool0 = nn.Identity()


def _small_vgg(model: TimmModel) -> None:
    model.features[-1] = nn.Identity()


def _small_efficientnet(model: TimmModel) -> None:
    model.conv_stem.stride = (1, 1)


# family, change of its stem, and by what that divides the reduction of its feature maps (VGG: of the last one)
_SMALL_STEMS = (
    (ResNet, _small_resnet, 4),
    (DenseNet, _small_densenet, 4),
    (VGG, _small_vgg, 2),
    (EfficientNet, _small_efficientnet, 2),
)


def _fine_convolution(old: nn.Module) -> nn.Conv2d:
    """A 3x3 stride-1 convolution with the channels of an old one, He-initialised."""
    if not isinstance(old, nn.Conv2d):
        raise UserError(
            'small_input=True does not fit a stem of several convolutions: choose a variant with a single one.'
        )
    device, dtype = old.weight.device, old.weight.dtype
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False, device=device, dtype=dtype)
    nn.init.kaiming_normal_(new.weight, mode='fan_out', nonlinearity='relu')
    return new
