"""One collective: a sum over all processes, which gradients pass through or not."""

import torch
import torch.distributed as dist

__all__ = ['all_sum', 'sum_over_processes', 'world_size']


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(x.detach())

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        # every process's loss holds this process's share, so their gradients add up
        return sum_over_processes(grad)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if _is_distributed() else 1


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Sum ``x`` over all processes, without autograd: for functions that write out their own gradient.

    Args:
        x: any shape, the same on every process. Every process must call it equally often.

    Returns:
        The sum, same shape; ``x`` itself without a process group.
    """
    if not _is_distributed():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum ``x`` over all processes, in the forward and in the backward pass.

    A loss that builds its batch statistics with it sees the global batch: after DDP's averaging, the gradient is
    that of one process on the whole batch, with factor 1. Every process must call it equally often.

    Args:
        x: any shape, floating point, the same shape on every process.

    Returns:
        The sum, same shape. ``x`` itself without a process group, or where gradients are off (evaluation).
    """
    if not torch.is_grad_enabled() or not _is_distributed():
        return x
    return _AllSum.apply(x)
