"""A timm backbone with one of ccl-timm's heads, under a name of its own."""

from timm.models import generate_default_cfgs, register_model

from ccl_timm.heads import CAMHead
from ccl_timm.models import build_variant, variant_cfg

__all__ = ['example_plugin_net']

# timm looks for this table in the module of a registered function: input size, mean, std, where the weights are
default_cfgs = generate_default_cfgs({'example_plugin_net': variant_cfg('resnet10t', CAMHead)})


@register_model
def example_plugin_net(pretrained=False, **kwargs):
    """ResNet-10-T with the CAM classifier. With ``pretrained``, the backbone has timm's ImageNet weights.

    Options: see ``ccl_timm.models.build_variant``; those of the head are ``hidden_features`` and ``reduction``.
    """
    return build_variant('example_plugin_net', 'resnet10t', CAMHead, pretrained, **kwargs)
