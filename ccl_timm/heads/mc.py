"""The classifier of MC-Loss: a few channels of the last feature map for each class, then a linear layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from ccl_timm.heads.linear import LinearHead

__all__ = ['ChannelStage', 'MCHead']


class ChannelStage(nn.Conv2d):
    """3x3 convolution and ReLU that turn the last feature map into one with some channels for each class.

    No normalisation layer behind it: all its tensors are a weight and a bias, which timm's loader knows how to leave
    out when the number of classes changes [assumption; the official networks have the last block this wide instead].
    """

    def __init__(self, in_channels: int, out_channels: int, device=None, dtype=None):
        super().__init__(in_channels, out_channels, 3, padding=1, device=device, dtype=dtype)
        assert self.bias is not None
        nn.init.kaiming_normal_(self.weight, nonlinearity='relu')
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W), not negative."""
        return F.relu(self._conv_forward(x, self.weight, self.bias))


class MCHead(LinearHead):
    """A linear classifier behind a :class:`ChannelStage`, which the model puts at the end of its feature map.

    Inference uses this classifier alone; the channels' grouping matters to MC-Loss only.

    Args:
        in_features: width of the backbone's own feature map.
        num_classes: K.
        channels_per_class: xi. 3 in the official code for CUB-200 and in CC-Loss for Cars-196.

    Outputs: logits (N, K), features (N, K * xi), weight (K, K * xi).
    """

    def __init__(self, in_features: int, num_classes: int, channels_per_class: int = 3, device=None, dtype=None):
        super().__init__(num_classes * channels_per_class, num_classes, None, device, dtype)
        self.in_features = in_features
        self.channels_per_class = channels_per_class

    def feature_stage(self) -> ChannelStage:
        """A new :class:`ChannelStage` for this number of classes."""
        like = self.out.weight
        return ChannelStage(self.in_features, self.out.in_features, device=like.device, dtype=like.dtype)

    def reset(self, num_classes: int) -> None:
        """Replace the linear layer; the model then asks for a new stage."""
        channels, like = num_classes * self.channels_per_class, self.out.weight
        self.out = nn.Linear(channels, num_classes, device=like.device, dtype=like.dtype)
