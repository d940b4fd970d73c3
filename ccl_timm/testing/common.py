"""What the checks of losses and of models share: running them, and comparing tensors with the values in the message."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['SEED', 'assert_close', 'assert_finite', 'different_state', 'run_checks', 'state_of']

SEED = 1234


def state_of(loss: nn.Module) -> dict[str, Tensor]:
    """A copy of a loss's saved tensors."""
    return {name: tensor.detach().clone() for name, tensor in loss.state_dict().items()}


def different_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    """None, or the name of the first tensor that differs."""
    if a.keys() != b.keys():
        return sorted(a.keys() ^ b.keys())[0]
    return next((name for name in a if not torch.equal(a[name], b[name])), None)


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float, what: str) -> None:
    """Fail with both values at the worst entry unless two tensors are close."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f'{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}.'
    if torch.allclose(actual, expected, rtol=rtol, atol=atol):
        return
    error = (actual - expected).abs()
    worst = error.nan_to_num(nan=float('inf')).argmax()
    got, want = actual.flatten()[worst].item(), expected.flatten()[worst].item()
    raise AssertionError(f'{what}: {got:.12g} instead of {want:.12g} (difference {abs(got - want):.3g}).')


def assert_finite(value: Tensor, gradients: dict[str, Tensor], where: str) -> None:
    """Fail with the place unless value and gradients are finite."""
    assert value.isfinite(), f'{where}: the value is {value.item()}.'
    for name, gradient in gradients.items():
        bad = int((~gradient.isfinite()).sum())
        assert not bad, f'{where}: the gradient on {name} has {bad} of {gradient.numel()} entries that are not finite.'


def run_checks(what: str, case: Any, checks: Iterable[Callable]) -> None:
    """Run checks one after another; a failure names what failed, the check, and the cause."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small, sharing the work takes longer than the work
    try:
        for check in checks:
            with torch.random.fork_rng():
                _run_one(what, case, check)
    finally:
        torch.set_num_threads(threads)


def _run_one(what: str, case: Any, check: Callable) -> None:
    try:
        check(case)
    except Exception as error:
        cause = str(error) if isinstance(error, AssertionError) else f'{type(error).__name__}: {error}'
        raise AssertionError(f'{what}, {check.__name__}: {cause}') from error
