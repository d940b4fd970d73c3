"""Where precision matters: float32 at least, and no autocast."""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ['full_precision', 'in_full_precision', 'outside_autocast']


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast on the device; nothing for the meta device, which has none, and for torch.fx."""
    if isinstance(device, torch.fx.Proxy) or device.type == 'meta':
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in float32 (float64 stays float64)."""
    return x if x.dtype == torch.float64 else x.float()


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of tensors compute outside autocast and in float32, or in float64 if its first tensor is that."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first = next(x for x in [*args, *kwargs.values()] if _is_real(x))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        args = [x.to(dtype) if _is_real(x) else x for x in args]
        kwargs = {name: x.to(dtype) if _is_real(x) else x for name, x in kwargs.items()}
        with outside_autocast(first.device):
            return function(*args, **kwargs)

    return wrapped


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
