"""PEDCC: class centroids that are spread evenly over the unit sphere and never learnt."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccl_timm.errors import UserError
from ccl_timm.ops import l2_normalize, outside_autocast

__all__ = ['max_cosine', 'pedcc_centroids']

# the energy is the soft maximum of all cosines; each temperature starts where the one before has ended
_SHARPNESS = (16, 64, 256, 1024, 4096)
_LBFGS: dict[str, Any] = dict(max_iter=60, history_size=10, tolerance_grad=1e-7, tolerance_change=1e-9)


def pedcc_centroids(num_classes: int, dim: int, seed: int = 0) -> Tensor:
    """Predefined evenly-distributed class centroids: K unit vectors in D dimensions, as far apart as they can be.

    - K <= D + 1: the regular simplex, every pair at cosine -1 / (K - 1), exact in closed form (arXiv 2105.00401 has
      the theorem and another construction; this one, a Helmert basis times a random rotation, is [assumption]).
    - D + 2 <= K <= 2 D: K - D regular simplices of about equal size in mutually orthogonal subspaces, again exact.
      Classes of one simplex are neighbours in number, at a negative cosine; all other pairs are at 0. No arrangement
      has a smaller largest cosine than 0 here (Rankin's bound), so that no energy minimisation could do better
      [assumption; the papers do not say what they take for K > D + 1].
    - D = 2, K > 4: the regular polygon, exact. Classes that follow each other in number are neighbours [assumption].
    - 24 in 4 and 240 in 8 dimensions: the roots of D4 and E8, neighbours at cosine 0.5. For E8 this is the optimum, for
      D4 the best arrangement known [assumption].
    - Else, K > 2 D: minimum of the soft maximum of all cosines, found by annealed L-BFGS from random points; a local
      one. Its largest cosine is within 2e-3 of the best known for 7 to 12, 20 and 24 points in 3 dimensions, 0.01 above
      it for 13. Needs K x K memory and some seconds for K = 1000 [assumption].

    Args:
        num_classes: K >= 2.
        dim: D >= 1, and >= 2 for K > 2.
        seed: of the rotation, or of the random start; torch's global generator is not touched. Other machines give
            the same vectors up to rounding, or for K > 2 D another minimum: keep what you train with.

    Returns:
        (K, D) float64 on the CPU; rows have norm 1. Where they are exact they sum to 0.

    Raises:
        UserError: K < 2, D < 1, or K > 2 points on a line.
    """
    if num_classes < 2 or dim < 1 or (dim == 1 and num_classes > 2):
        raise UserError(
            f'There are no {num_classes} separate centroids in {dim} dimensions: take at least 2 classes and 1 '
            'dimension, 2 dimensions for more than 2 classes.'
        )
    generator = torch.Generator('cpu').manual_seed(seed)
    points = _exact(num_classes, dim)
    if points is None:
        return _minimise_energy(_gaussian(num_classes, dim, generator))
    return points @ _random_columns(dim, points.shape[1], generator).T


def max_cosine(centroids: Tensor) -> float:
    """Largest cosine between two rows of (K, D): how near to each other the closest two classes are."""
    rows = l2_normalize(centroids)
    return (rows @ rows.T).fill_diagonal_(-math.inf).max().item()


def _exact(num_classes: int, dim: int) -> Tensor | None:
    """The arrangement in closed form (K, at most D); None if there is none."""
    if num_classes <= 2 * dim:
        groups = max(1, num_classes - dim)
        sizes = [num_classes // groups + (g < num_classes % groups) for g in range(groups)]
        return torch.block_diag(*[_simplex(size) for size in sizes])  # (K, K - groups), K - groups <= D
    if dim == 2:
        angles = torch.arange(num_classes, dtype=torch.float64, device='cpu') * (2 * math.pi / num_classes)
        return torch.stack([angles.cos(), angles.sin()], dim=1)
    return _roots(dim) if (num_classes, dim) in ((24, 4), (240, 8)) else None


def _roots(dim: int) -> Tensor:
    """Roots of D4 (24, 4) or E8 (240, 8), divided by their norm."""
    grid = list(itertools.product((-1, 0, 1), repeat=dim))
    roots: list[Sequence[float]] = [row for row in grid if sum(map(abs, row)) == 2]
    if dim == 8:
        roots += [[x / 2 for x in row] for row in grid if math.prod(row) == 1]  # an even number of minus signs
    return torch.tensor(roots, dtype=torch.float64, device='cpu') / math.sqrt(2)


def _gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    # on the CPU even where a default device is set, since the generator is
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device='cpu')


def _simplex(size: int) -> Tensor:
    """Regular simplex (size, size - 1): the Helmert basis, orthonormal columns that sum to 0, times a factor."""
    column = torch.arange(1, size, dtype=torch.float64, device='cpu')
    basis = torch.ones(size, size - 1, dtype=torch.float64, device='cpu').triu()  # column j: j + 1 ones ...
    basis.diagonal(-1).copy_(-column)  # ... and then their sum, negative
    return basis / (column * (column + 1)).sqrt() * math.sqrt(size / (size - 1))


def _random_columns(dim: int, number: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns (dim, number), the same whatever signs the QR routine prefers."""
    q, r = torch.linalg.qr(_gaussian(dim, number, generator))
    return q * r.diagonal().sign()


def _minimise_energy(start: Tensor) -> Tensor:
    # the caller may be in inference mode, or in autocast, whose half precision would end elsewhere
    with torch.inference_mode(False), torch.enable_grad(), outside_autocast(start.device):
        points = l2_normalize(start).float().requires_grad_()  # half the time of float64, and the minimum is as good
        for sharpness in _SHARPNESS:
            optimizer = torch.optim.LBFGS([points], line_search_fn='strong_wolfe', **_LBFGS)
            optimizer.step(functools.partial(_backward_energy, points, sharpness))
        return l2_normalize(points.detach().double())


def _backward_energy(points: Tensor, sharpness: float) -> Tensor:
    """The soft maximum of all cosines, with its gradient in ``points.grad``."""
    points.grad = None
    rows = l2_normalize(points)
    cosines = (sharpness * rows @ rows.T).fill_diagonal_(-math.inf)
    value = cosines.flatten().logsumexp(0) / sharpness
    value.backward()
    return value
