"""Convolutions of small images without the kernel taps that only see padding.

Deep stages of a network that was drawn for 224 px see one place of a 28 px image, and eight ninths of a 3 x 3 kernel
over one place are multiplied by padding's zeros. Libraries compute them all the same, and slowly.
"""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['crop_kernels']


class _CroppedConv2d(nn.Conv2d):
    """A convolution that crops its kernel to the image wherever its output is a single place; equal otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        weight, padding = self.weight, list(self.padding)
        for i, size in enumerate(x.shape[-2:]):
            pad, kernel = self.padding[i], self.kernel_size[i]
            if pad and 0 <= size + 2 * pad - kernel < self.stride[i]:  # one place, `pad` before the image's first
                weight = weight.narrow(2 + i, pad, min(kernel - pad, size))
                padding[i] = 0
        return F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)


def crop_kernels(model: nn.Module) -> int:
    """Let the model's padded convolutions leave out what only meets padding; in place.

    The results are those of before but for the order of summation. Weights, their names and hooks stay as they are.

    Args:
        model: any; plain ``nn.Conv2d`` with zero padding and no dilation are taken, subclasses are not.

    Returns:
        The number of convolutions that can be cropped; whether one is depends on the size of its input.
    """
    cropped = [m for m in model.modules() if type(m) is nn.Conv2d and _can_be_cropped(m)]
    for convolution in cropped:
        convolution.__class__ = _CroppedConv2d
    return len(cropped)


def _can_be_cropped(convolution: nn.Conv2d) -> bool:
    padding = convolution.padding
    return (
        convolution.padding_mode == 'zeros'
        and not isinstance(padding, str)
        and any(padding)
        and convolution.dilation == (1, 1)
        and all(p < k for p, k in zip(padding, convolution.kernel_size, strict=True))
    )
