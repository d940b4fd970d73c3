"""Classification of new images by a trained model."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor

from ccl_timm.data.files import UnreadableImage, color_mode, list_images, read_image
from ccl_timm.errors import UserError
from ccl_timm.training.checkpoints import Trained

__all__ = ['find_images', 'predict', 'preprocessing', 'rank']


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
    prepare, model = preprocessing(trained), trained.model.to(device).eval()
    results, unreadable, images, names = [], [], [], []

    def flush() -> None:
        if images:
            with torch.inference_mode():
                probabilities = model(torch.stack(images).to(device)).float().softmax(-1).cpu()
            finite = probabilities.isfinite().all(-1).tolist()
            if not all(finite):
                raise UserError(f"The model computes no finite numbers for '{names[finite.index(False)]}'.")
            ranked = zip(names, rank(trained, probabilities, topk), strict=True)
            results.extend({'image': str(name), 'predictions': predictions} for name, predictions in ranked)
            images.clear()
            names.clear()

    for path in paths:
        try:
            images.append(prepare(path))
            names.append(path)
        except UnreadableImage as error:
            unreadable.append((path, str(error)))
        if len(images) == batch_size:
            flush()
    flush()
    return results, unreadable


def preprocessing(trained: Trained) -> Callable[[Image.Image | str | os.PathLike], Tensor]:
    """A function from a PIL image or an image file to the model's input (C, H, W), as in validation.

    It raises UnreadableImage for a file that cannot be read.
    """
    transform = timm.data.create_transform(**trained.data_config, is_training=False)
    mode = trained.settings.get('input_img_mode') or color_mode(trained.data_config['input_size'][0])

    def prepare(image: Image.Image | str | os.PathLike) -> Tensor:
        return transform(image.convert(mode) if isinstance(image, Image.Image) else read_image(image, mode))

    return prepare


def rank(trained: Trained, probabilities: Tensor, topk: int) -> list[list[dict[str, Any]]]:
    """For each row of probabilities (N, K) its best classes: ``{'class', 'index', 'probability'}``, best first."""
    best = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
    return [
        [
            {'class': trained.labels[k], 'index': k, 'probability': round(p, 6)}
            for p, k in zip(row, indices, strict=True)
        ]
        for row, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


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
