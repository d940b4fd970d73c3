"""What a model computes of a folder of images, as a table: paths, labels, features, logits, attention."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccl_timm.console.escape import utf8_text
from ccl_timm.errors import UserError, require_writable
from ccl_timm.training.checkpoints import Trained
from ccl_timm.training.prediction import compute_batches, find_images, head_outputs

__all__ = ['FORMATS', 'check_table', 'embed', 'write_table']

FORMATS = ('.npz', '.parquet')
_OUTPUTS = ('features', 'logits', 'attention')


def embed(
    trained: Trained, folder: str | os.PathLike, batch_size: int = 32, device: str | torch.device = 'cpu'
) -> tuple[dict[str, np.ndarray], list[tuple[Path, str]]]:
    """Compute features, logits and, where the head has it, attention of all images below a folder.

    Args:
        trained: from :func:`ccl_timm.training.checkpoints.load_trained`.
        folder: of images, or of folders of them.
        batch_size: images at a time.
        device: where to compute.

    Returns:
        Arrays by name, in the order of the paths: ``path`` (N,) below the folder; ``label`` (N,), the name of the
        folder below it that the image lies in, or empty: its class in training, except for ``torch/image_folder``,
        whose classes are the uppermost folders; ``features`` (N, D), ``logits`` (N, K) and ``attention`` (N, C),
        float32. And the files that cannot be read, with the reason.

    Raises:
        UserError: there is no such folder or no image in it, or the model computes numbers that are not finite.
    """
    if not os.path.isdir(folder):
        raise UserError(f"There is no folder '{folder}'.")
    unreadable: list[tuple[Path, str]] = []
    paths: list[str] = []
    batches: list[dict[str, Tensor]] = []

    def compute(images: Tensor) -> dict[str, Tensor]:
        outputs = head_outputs(trained.model, images)
        found = {name: getattr(outputs, name, None) for name in _OUTPUTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    images = find_images([str(folder)])
    for names, outputs in compute_batches(trained, images, batch_size, device, compute, unreadable):
        paths += [utf8_text(name.relative_to(folder).as_posix()) for name in names]
        batches.append(outputs)
    if not paths:
        raise UserError(f"Not one image in '{folder}' can be read.")
    labels = [path.split('/')[-2] if '/' in path else '' for path in paths]  # the class, as in training
    arrays = {name: torch.cat([outputs[name] for outputs in batches]).numpy() for name in batches[0]}
    return {'path': np.array(paths), 'label': np.array(labels), **arrays}, unreadable


def check_table(path: str | os.PathLike) -> None:
    """Raise a UserError unless a table can be written to a new file of this name."""
    if Path(path).suffix not in FORMATS:
        raise UserError(f"'{path}' must end in {' or '.join(FORMATS)}: those are the tables that can be written.")
    require_writable(path)
    if Path(path).suffix == '.parquet':
        _pyarrow()


def write_table(columns: dict[str, np.ndarray], path: str | os.PathLike) -> None:
    """Write what :func:`embed` returns to a new file, as NumPy's .npz or as Parquet with a list of numbers a row.

    Raises:
        UserError: see :func:`check_table`.
    """
    check_table(path)
    if Path(path).suffix == '.npz':
        np.savez(path, **columns)
        return
    pyarrow = _pyarrow()
    pyarrow.parquet.write_table(pyarrow.table({name: column.tolist() for name, column in columns.items()}), path)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('Parquet needs the package pyarrow: `pip install pyarrow`, or write .npz.') from error
    return pyarrow
