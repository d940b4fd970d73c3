"""A small network of wide 3x3 convolutions that learns images of 24 to 64 px in minutes, without a GPU, too.

Plain blocks of two convolutions and a stem that whitens patches of 2x2 pixels are what published speed runs on CIFAR-10
have in common. This is our own network of that kind.
"""

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['FastConvNet', 'WhiteningStem', 'fast_convnet', 'patch_basis']

default_cfgs = generate_default_cfgs(
    {
        'fast_convnet': {
            'input_size': (3, 32, 32),
            'fixed_input_size': False,
            'pool_size': (3, 3),
            'crop_pct': 1.0,
            'interpolation': 'bilinear',
            'mean': (0.4914, 0.4822, 0.4465),
            'std': (0.2023, 0.1994, 0.2010),
            'num_classes': 1000,
            'first_conv': None,  # the stem's filters are fixed, and follow from the number of channels
            'classifier': 'head',
        }
    }
)


@register_model
def fast_convnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """1.2 M parameters, 0.065 G multiply-adds at 32 px; see :class:`FastConvNet`."""
    features = {'out_indices': (0, 1, 2), 'flatten_sequential': True}
    return build_model_with_cfg(FastConvNet, 'fast_convnet', pretrained, feature_cfg=features, **kwargs)


class FastConvNet(nn.Module):
    """A whitening stem, three blocks of two 3x3 convolutions, max-pooling, and a linear classifier.

    The classifier reads an eighth of the pooled features: with small first logits, the network takes a learning rate
    ten times as high, and learns faster. The convolutions start with torch's own weights, not with He's: those are
    larger, and since a norm follows each, they would only change more slowly.

    Args:
        num_classes: K; 0 for the pooled features (N, widths[2]).
        in_chans: channels of the images.
        global_pool: pooling of the last feature map, a name of timm's.
        drop_rate: dropout before the classifier.
        widths: channels of the three blocks.
        device: of the parameters.
        dtype: likewise.

    Raises:
        ValueError: not three widths.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'max',
        drop_rate: float = 0.0,
        widths: tuple[int, int, int] = (64, 128, 256),
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if len(widths) != 3:
            raise ValueError(f'widths={tuple(widths)}: give three, one for each block, such as (64, 128, 256)')
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = widths[-1]
        self.grad_checkpointing = False
        factory = {'device': device, 'dtype': dtype}
        self.stem = WhiteningStem(in_chans, **factory)
        inputs = (self.stem.out_channels, *widths)
        self.stages = nn.Sequential(*(_block(*pair, **factory) for pair in zip(inputs, widths, strict=False)))
        self.feature_info = [
            {'num_chs': width, 'reduction': 2 ** (n + 1), 'module': f'stages.{n}'} for n, width in enumerate(widths)
        ]
        self._set_pool(global_pool)
        self.head = _linear(self.head_hidden_size, num_classes, **factory)

    def _set_pool(self, global_pool: str) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to the last feature map (N, widths[2], (H-1)//8, (W-1)//8)."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A feature map to logits (N, K), or with ``pre_logits`` to what the classifier reads."""
        x = F.dropout(self.global_pool(x) / 8, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm gives learning rates to depths: the stem, then a block each."""
        return {'stem': r'^stem', 'blocks': r'^stages\.(\d+)'}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations of a block until the backward pass, which computes them again."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, and another pooling if one is named."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        like = next(self.parameters())
        self.head = _linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)


class WhiteningStem(nn.Module):
    """Whitens patches of 2x2 pixels: a fixed orthonormal basis, each coordinate brought to mean 0 and variance 1.

    The basis has averages and differences of neighbours, in the mean and the contrasts of the channels. In photographs
    these are nearly uncorrelated: on CIFAR-10 the mean absolute correlation is 0.01, that of the pixels 0.83. So no
    basis has to be computed from the data.

    The coordinates come out with both signs, through a GELU: (N, C, H, W) to (N, 8 C, H-1, W-1).
    """

    basis: Tensor

    def __init__(self, in_chans: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.register_buffer('basis', patch_basis(in_chans).to(device, dtype))
        self.norm = nn.BatchNorm2d(len(self.basis), affine=False, device=device, dtype=dtype)
        self.out_channels = 2 * len(self.basis)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.conv2d(x, self.basis))
        return F.gelu(torch.cat([x, -x], 1))


def patch_basis(channels: int) -> Tensor:
    """An orthonormal basis of patches (channels, 2, 2): the cosine transform over channels, times Haar's over pixels.

    Returns:
        (4 channels, channels, 2, 2) float32.
    """
    frequency = torch.arange(channels)
    cosines = torch.cos(torch.pi * (frequency + 0.5) * frequency[:, None] / channels)
    cosines /= cosines.norm(dim=1, keepdim=True)
    haar = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    return torch.einsum('kc,ai,bj->kabcij', cosines, haar, haar).reshape(4 * channels, channels, 2, 2)


def _block(inputs: int, outputs: int, **factory: Any) -> nn.Sequential:
    """(N, inputs, H, W) to (N, outputs, H/2, W/2)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **factory),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outputs, **factory),
        nn.GELU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False, **factory),
        nn.BatchNorm2d(outputs, **factory),
        nn.GELU(),
    )


def _linear(inputs: int, num_classes: int, **factory: Any) -> nn.Module:
    return nn.Linear(inputs, num_classes, **factory) if num_classes > 0 else nn.Identity()
