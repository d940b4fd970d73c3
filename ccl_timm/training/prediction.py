"""Classification of new images by a trained model."""

import os
from pathlib import Path
from typing import Any

import timm.data
import torch

from ccl_timm.data.files import UnreadableImage, color_mode, list_images, read_image
from ccl_timm.errors import UserError
from ccl_timm.training.checkpoints import Trained

__all__ = ['find_images', 'predict']


def predict(
    trained: Trained, paths: list[Path], topk: int = 5, batch_size: int = 32, device: str = 'cpu'
) -> tuple[list[dict[str, Any]], list[tuple[Path, str]]]:
    """Classify image files.

    Args:
        trained: from :func:`ccl_timm.training.checkpoints.load_trained`.
        paths: image files.
        topk: how many classes for each, best first.
        batch_size: images at a time.
        device: where to compute.

    Returns:
        For each image that can be read ``{'image', 'predictions': [{'class', 'index', 'probability'}]}``, in order;
        and those that cannot, with the reason. None is replaced by another.

    Raises:
        UserError: the model computes numbers that are not finite.
    """
    config = trained.data_config
    transform = timm.data.create_transform(**config, is_training=False)
    mode = trained.settings.get('input_img_mode') or color_mode(config['input_size'][0])
    model = trained.model.to(device).eval()
    results, unreadable, images, names = [], [], [], []

    def flush() -> None:
        if images:
            with torch.inference_mode():
                probabilities = model(torch.stack(images).to(device)).float().softmax(-1).cpu()
            finite = probabilities.isfinite().all(-1).tolist()
            if not all(finite):
                raise UserError(f"The model computes no finite numbers for '{names[finite.index(False)]}'.")
            results.extend(_ranked(trained, name, row, topk) for name, row in zip(names, probabilities, strict=True))
            images.clear()
            names.clear()

    for path in paths:
        try:
            images.append(transform(read_image(path, mode)))
            names.append(path)
        except UnreadableImage as error:
            unreadable.append((path, str(error)))
        if len(images) == batch_size:
            flush()
    flush()
    return results, unreadable


def _ranked(trained: Trained, path: Path, probabilities: torch.Tensor, topk: int) -> dict[str, Any]:
    best = probabilities.topk(min(topk, len(probabilities)))
    predictions = [
        {'class': trained.labels[index], 'index': index, 'probability': round(value, 6)}
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return {'image': str(path), 'predictions': predictions}


def find_images(names: list[str]) -> list[Path]:
    """The files named, and all images below the folders named, in order.

    Raises:
        UserError: a name does not exist, or a folder has no image.
    """
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = list_images(path)
            if not below:
                raise UserError(f"Folder '{path}' holds no image.")
            paths += map(Path, below)
        elif os.path.lexists(path):
            paths.append(path)
        else:
            raise UserError(f"'{path}' does not exist.")
    return paths
