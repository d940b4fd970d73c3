"""Operations that losses and heads share: float32 outside autocast, a sum over all processes, unit vectors."""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccl_timm.errors import UserError

__all__ = [
    'FullPrecisionBuffers',
    'all_gather_rows',
    'all_reduce_sum',
    'full_precision',
    'force_fp32',
    'outside_autocast',
    'rank',
    'all_reduce_sum_no_grad',
    'l2_normalize',
    'world_size',
]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)  # of class indices, besides int64


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast on the device; nothing for the meta device, which has none, and for torch.fx."""
    if isinstance(device, torch.fx.Proxy) or device.type == 'meta':
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in float32 (float64 stays float64)."""
    return x if x.dtype == torch.float64 else x.float()


class FullPrecisionBuffers(nn.Module):
    """A module whose floating-point buffers stay float32 or float64 in ``.half()`` and ``.to(torch.bfloat16)``.

    Running means would stand still in half precision, where 256 + 1 is 256; those of submodules stay, too.
    """

    def _apply(self, fn, recurse=True):
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            device = getattr(module, name).device
            if getattr(module, name).dtype.itemsize < torch.float32.itemsize <= buffer.dtype.itemsize:
                setattr(module, name, buffer.to(device))
        return self


def force_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of tensors compute outside autocast and in float32, or in float64 if its first tensor is that.

    Class indices may be of any integer type.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first = next((x for x in [*args, *kwargs.values()] if _is_real(x)), None)
        if first is None:
            raise UserError(f'{function.__name__} takes floating-point tensors, and got none.')
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        args = tuple(_widened(x, dtype) for x in args)
        kwargs = {name: _widened(x, dtype) for name, x in kwargs.items()}
        with outside_autocast(first.device):
            return function(*args, **kwargs)

    return wrapped


def _widened(x: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in this type, class indices as int64, all else as it is."""
    if _is_real(x):
        return x.to(dtype)
    return x.long() if isinstance(x, Tensor) and x.dtype in _INTEGERS else x


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def l2_normalize(x: Tensor) -> Tensor:
    """Divide vectors (..., D) by their norm; one shorter than 1e-12 stays as it is, so that its gradient is finite."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 1e-12, norm, 1.0)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum_no_grad(x.detach())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # every process's loss holds this process's share, so their gradients add up
        return _AllSum.apply(grad)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process among those that train together; 0 without a process group."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if _is_distributed() else 1


def on_all_processes(condition: bool) -> bool:
    """Whether a condition holds on every process; each of them must call this."""
    if world_size() == 1:
        return condition
    conditions: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(conditions, condition)  # of objects: NCCL reduces no tensor of the CPU
    return all(conditions)


def all_reduce_sum_no_grad(x: Tensor) -> Tensor:
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


def all_reduce_sum(x: Tensor) -> Tensor:
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


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # every process computes with all rows, so the gradients of one row add up
        return _AllSum.apply(grad)[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def all_gather_rows(x: Tensor) -> Tensor:
    """Concatenate the rows of ``x`` of all processes, with gradients.

    A loss that every process computes on all rows has, after DDP's averaging, the gradient of one process on the whole
    batch, with factor 1. Every process must call it equally often.

    Args:
        x: (N, ...), the same shape on every process.

    Returns:
        (processes x N, ...), in the order of ranks. ``x`` itself without a process group, or where gradients are off
        (evaluation).
    """
    if not torch.is_grad_enabled() or not _is_distributed():
        return x
    return _AllRows.apply(x)
