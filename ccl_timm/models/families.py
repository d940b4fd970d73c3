"""What single timm families need so that another head fits, and their stems for small images. Nothing else does."""

from typing import Any

from timm.models import ResNet
from timm.models.vgg import VGG
from torch import nn

from ccl_timm.errors import UserError

__all__ = ['build_options', 'make_small_input', 'prepare_for_head']


def build_options(backbone: str, pretrained: bool) -> dict[str, Any]:
    """Arguments for building a backbone whose classifier goes anyway."""
    if backbone.startswith('vgg') and not pretrained:
        # the 119 M parameters before the classifier are taken out again: do not spend seconds on their initial values
        return {'mlp_ratio': 1 / 4096}
    return {}


def prepare_for_head(model: nn.Module) -> None:
    """Bring a backbone, in place, into the form that the heads expect.

    VGG: the two 4096-wide layers before the classifier go. The VGG16 of both papers is the convolutions and one
    hidden layer (14.7 M parameters), not the network of 134 M.
    """
    if isinstance(model, VGG):
        model.pre_logits = nn.Identity()
        model.head.in_features = model.head.num_features = model.head_hidden_size = model.num_features


def make_small_input(model: nn.Module, name: str) -> None:
    """Replace, in place, the stem that is made for 224 px by one that keeps the resolution of small images.

    ResNet: a 3x3 stride-1 convolution (new weights) and no max-pool, as both papers do on CIFAR. VGG: without its last
    max-pool, so that 24, 28 and 32 px run.

    Raises:
        UserError: the family has no such stem.
    """
    if isinstance(model, ResNet) and isinstance(model.conv1, nn.Conv2d):
        old = model.conv1
        model.conv1 = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            3,
            padding=1,
            bias=False,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
        model.maxpool = nn.Identity()
    elif isinstance(model, VGG):
        model.features[-1] = nn.Identity()
    else:
        raise UserError(
            f"small_input=True does not fit '{name}': it replaces the stem of ResNet and VGG; for a vision "
            'transformer give img_size=32 and patch_size=4 instead.'
        )
