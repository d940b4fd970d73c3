"""What a model costs: parameters, multiply-adds and activations."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['Cost', 'cost']


class Cost(NamedTuple):
    """What one image costs.

    Attributes:
        parameters: of the model.
        macs: multiply-adds of a forward pass.
        activations: values that convolutions and matrix products give, as timm's tables count them.
    """

    parameters: int
    macs: int
    activations: int


def cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count by running an image of zeros through a model in evaluation mode.

    Args:
        model: stays as it is.
        input_size: channels, height, width.
    """
    training = model.training
    example = next(model.parameters())
    image = torch.zeros(1, *input_size, device=example.device, dtype=example.dtype)
    flops, outputs = FlopCounterMode(display=False), _Outputs()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flops, outputs:  # fused attention is not counted
        model.eval()(image)
    model.train(training)
    return Cost(sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2, outputs.count)


class _Outputs(TorchDispatchMode):
    """Counts the values that products give."""

    _PRODUCTS = ('convolution', 'mm', 'addmm', 'bmm', 'baddbmm')

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in self._PRODUCTS:
            self.count += out.numel()
        return out
